"""A GPU that runs out of memory: what is said, and what trainer.micro_batch_size=auto finds."""

import gc

import pytest
import torch

from fcmae.checkpoints import checkpoint
from fcmae.cli import main
from fcmae.training import fit_micro_batch as micro_batch

pytestmark = pytest.mark.gpu

LIMIT = 3 * 2**30
"""Bytes that this process may take: too few for 512 images."""
ARGS = (
    "pretrain",
    "model=convnextv2_atto",
    "data=synthetic",
    "data.length=512",
    "loader.workers=4",
    "optim.global_batch_size=512",
    "trainer.max_steps=1",
    "trainer.eval_every_epochs=null",
    "logger=quiet",
)


@pytest.fixture(autouse=True)
def _small_gpu(monkeypatch):
    gc.collect()  # the test before may have left a graph and its memory
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    monkeypatch.setattr(micro_batch, "MARGIN", 0.1 * LIMIT / total)
    torch.cuda.set_per_process_memory_fraction(LIMIT / total)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


def test_running_out_is_one_line(tmp_path, capsys):
    assert main([*ARGS, f"hydra.run.dir={tmp_path}/run"]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("fcmae pretrain: out of memory on ")
    assert "trainer.micro_batch_size is 512; set a smaller one, or trainer.micro_batch_size=auto" in line


@pytest.mark.parametrize("mode", [["trainer.compile=false", "trainer.cuda_graph=false"], []], ids=["eager", "compiled"])
def test_auto_finds_what_fits_and_changes_no_bit(mode, tmp_path, capsys):
    auto, given = f"{tmp_path}/auto", f"{tmp_path}/given"
    assert main([*ARGS, *mode, "trainer.micro_batch_size=auto", f"hydra.run.dir={auto}"]) == 75
    state = checkpoint.read(checkpoint.resolve(auto))
    size = state["config"]["trainer"]["micro_batch_size"]
    assert f"trainer.micro_batch_size=auto takes {size}\n" in capsys.readouterr().err
    assert 8 <= size < 512
    assert main([*ARGS, *mode, f"trainer.micro_batch_size={size}", f"hydra.run.dir={given}"]) == 75
    weights = checkpoint.read(checkpoint.resolve(given))["model"]
    assert all(torch.equal(value, weights[name]) for name, value in state["model"].items())
