"""trainer.micro_batch_size=auto: what is found, the same on all ranks, and that looking for it leaves no trace."""

import random

import numpy as np
import pytest
import torch
import yaml

from fcmae.cli import main
from fcmae.config import compose
from fcmae.data.plan import BatchPlan
from fcmae.distributed import World
from fcmae.errors import ConfigError, OutOfMemory
from fcmae.tasks.finetuning import Finetuning
from fcmae.tasks.pretraining import Pretraining
from fcmae.training import fit_micro_batch as micro_batch
from fcmae.training.fit_micro_batch import candidates, find, largest
from fcmae.training.setup import create_plan
from fcmae.training.state import TrainState
from tests.conftest import TINY_FINETUNE, TINY_PRETRAIN
from tests.results import assert_same, newest

CPU = World(0, 1, 0, 1, torch.device("cpu"))
AUTO = "trainer.micro_batch_size=auto"
MIXED = ("augment.mixup=0.8", "augment.cutmix=1.0", "model.drop_path_rate=0.5")


@pytest.fixture
def limit(monkeypatch):
    """A CPU whose memory holds so many samples of a micro-batch at once; and the sizes that were tried."""
    tried: list[int] = []

    def set_limit(most: int) -> list[int]:
        monkeypatch.setattr(micro_batch, "LIMITED", ("cpu",))
        for task in (Pretraining, Finetuning):
            monkeypatch.setattr(task, "loss", limited(task.loss, most))
        return tried

    def limited(loss, most):
        def run(self, model, batch, weight=None):
            tried.append(len(batch[0]))
            value = loss(self, model, batch, weight)
            if len(batch[0]) > most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return value

        return run

    return set_limit


@pytest.mark.parametrize("sizes", [[1], [2, 3, 5, 8, 12, 13, 40], [2**i for i in range(12)]])
def test_the_largest_is_found_with_few_trials(sizes):
    for most in range(sizes[-1] + 2):
        tried = []
        found = largest(sizes, lambda size, most=most, tried=tried: tried.append(size) or size <= most)
        assert found == max((size for size in sizes if size <= most), default=None)
        assert len(tried) == len(set(tried)) <= 2 * len(sizes).bit_length() + 4


def plans(share: int, crops: int = 1):
    return lambda size: BatchPlan.create(1000, share, size, 1, 0, crops)


def test_candidates_divide_a_share_well():
    for share, crops in ((96, 1), (96, 4), (7, 1)):
        sizes = candidates(plans(share, crops))
        assert sizes == sorted(set(sizes))
        assert sizes[0] == crops
        assert sizes[-1] == share
        for size in sizes:
            assert plans(share, crops)(size).micro_batch_size == size


@pytest.fixture
def task():
    cfg = compose("pretrain", [*TINY_PRETRAIN[1:], AUTO])
    cfg.precision = "float32"
    return Pretraining(cfg)


def look(task, world=CPU):
    return find(
        task, lambda size: create_plan(task, world, size), TrainState.create(task.model, task.cfg, world), world
    )


def test_a_search_leaves_no_trace(task, limit):
    tried = limit(5)
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    task.model.eval()
    generators = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    assert look(task).micro_batch_size == 4
    assert tried == [1, 2, 4, 8]
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    assert after[:2] == generators[:2]
    assert torch.equal(after[2], generators[2])
    assert all(torch.equal(value, before[name]) for name, value in task.model.state_dict().items())
    assert all(param.grad is None for param in task.model.parameters())
    assert not any(module.training for module in task.model.modules())


def test_the_smallest_of_the_ranks_counts(task, limit, monkeypatch):
    limit(8)
    monkeypatch.setattr(World, "smallest", lambda self, value: min(value, 2))
    assert look(task).micro_batch_size == 2
    monkeypatch.setattr(World, "smallest", lambda self, value: 0)
    with pytest.raises(OutOfMemory, match="micro_batch_size=1 does not fit on the CPU"):
        look(task)


def test_an_error_that_is_not_of_memory_is_raised(task, limit, monkeypatch):
    limit(8)

    def broken(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(Pretraining, "loss", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        look(task)


def test_on_a_cpu_it_is_the_whole_share(task, monkeypatch):
    monkeypatch.setattr(Pretraining, "loss", lambda *_: pytest.fail("tried"))
    assert look(task).micro_batch_size == 8


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(TINY_PRETRAIN, id="pretrain", marks=pytest.mark.slow),
        pytest.param((*TINY_FINETUNE, *MIXED), id="finetune"),
    ],
)
def test_a_run_is_the_same_as_with_the_size_given(command, tmp_path, limit, capsys):
    """To the bit; and it says and records what it found. On resuming it looks again."""
    limit(5)
    args = [*command, "optim.ema_decay=0.5", "trainer.max_steps=2"]
    assert main([*args, AUTO, f"hydra.run.dir={tmp_path}/auto"]) == 75
    assert "trainer.micro_batch_size=auto takes 4\n" in capsys.readouterr().err
    assert main([*args, "trainer.micro_batch_size=4", f"hydra.run.dir={tmp_path}/given"]) == 75
    found, given = (newest(tmp_path / run) for run in ("auto", "given"))
    assert found["config"] == given["config"]
    assert yaml.safe_load((tmp_path / "auto" / "config.yaml").read_text())["trainer"]["micro_batch_size"] == 4
    for name in ("model", "ema"):
        assert_same(found[name], given[name])
    if command is not TINY_PRETRAIN:
        return
    limit(2)
    assert main([*args[:-1], "trainer.max_steps=3", AUTO, f"hydra.run.dir={tmp_path}/auto"]) == 75
    assert "trainer.micro_batch_size=auto takes 2\n" in capsys.readouterr().err


def test_it_is_refused_where_the_micro_batch_is_part_of_the_recipe():
    with pytest.raises(
        ConfigError, match=r"model.grn_scope must be image with trainer.micro_batch_size.*; got 'batch'"
    ):
        compose("pretrain", [AUTO, "model.grn_scope=batch"])
    with pytest.raises(
        ConfigError, match="trainer.micro_batch_size must be a positive integer, auto or nu.*; got 'many'"
    ):
        compose("pretrain", ["trainer.micro_batch_size=many"])
