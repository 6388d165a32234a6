"""On a GPU: padding in CUDA graphs, and draws that belong to the sample in compiled fine-tuning."""

import pytest
import torch

from fcmae.checkpoints import checkpoint
from fcmae.cli import main
from fcmae.randomness import sample_keys, uniform
from tests.results import metrics_of

pytestmark = pytest.mark.gpu

SHARED = (
    "data=synthetic",
    "data.length=256",
    "data.image_size=64",
    "loader.workers=2",
    "optim.global_batch_size=64",
    "trainer.max_steps=8",
    "trainer.log_every=1",
    "trainer.eval_every_epochs=null",
    "optim.lr=1e-4",
    "schedule.epochs=4",
    "schedule.warmup_epochs=0",
    "logger=quiet",
)
PRETRAIN = ("pretrain", "model=convnextv2_atto", "precision=bf16", *SHARED)
MIXING = ("augment=none", "augment.mixup=0.8", "augment.cutmix=1.0", "model.drop_path_rate=0.3")
FINETUNE = ("finetune", "model=convnextv2_atto", "precision=float32", *MIXING, *SHARED)


def losses(run):
    return [line["loss"] for line in metrics_of(run) if "loss" in line]


def test_draws_are_those_of_the_cpu():
    keys = sample_keys(0, 5, range(4096))
    compiled = torch.compile(uniform, dynamic=False, fullgraph=True)
    for layer in (0, 35):
        expected = uniform(keys, layer)
        assert torch.equal(uniform(keys.cuda(), layer).cpu(), expected)
        assert torch.equal(compiled(keys.cuda(), layer).cpu(), expected)


def test_padding_in_a_cuda_graph_changes_no_bit(tmp_path):
    """64 samples as five micro-batches of 13, one of which holds a sample of padding."""
    for graph in ("true", "false"):
        args = (*PRETRAIN, "trainer.micro_batch_size=13", f"trainer.cuda_graph={graph}")
        assert main([*args, f"hydra.run.dir={tmp_path}/{graph}"]) == 75
    ours, expected = (checkpoint.read(checkpoint.resolve(tmp_path / graph))["model"] for graph in ("true", "false"))
    assert all(torch.equal(value, expected[name]) for name, value in ours.items())
    assert losses(tmp_path / "true") == losses(tmp_path / "false")


@pytest.mark.parametrize("args", [(*PRETRAIN, "precision=float32"), FINETUNE], ids=["pretrain", "finetune"])
def test_the_micro_batch_does_not_change_the_curve(tmp_path, args):
    """Compiled, in float32; the padding of micro-batches of 13 included."""
    for micro in (64, 32, 13):
        assert main([*args, f"trainer.micro_batch_size={micro}", f"hydra.run.dir={tmp_path}/{micro}"]) == 75
    whole = losses(tmp_path / "64")
    assert len(whole) == 8
    for micro in ("32", "13"):
        assert losses(tmp_path / micro) == pytest.approx(whole, rel=1e-4)
        assert losses(tmp_path / micro)[0] == pytest.approx(whole[0], rel=1e-6)
