"""Warnings of pretraining: few patches, loss of the mean patch, collapse, a loss that rises or stalls."""

import pytest
import torch

from fcmae.config import compose
from fcmae.distributed import World
from fcmae.loggers.logger import RunLogger
from fcmae.loggers.progress import create_progress
from fcmae.masks.patches import grid_size
from fcmae.tasks import guards
from fcmae.tasks.guards import LossWatch, losses, mask_warnings
from fcmae.tasks.pretraining import Pretraining
from tests.conftest import TINY_PRETRAIN

CPU = torch.device("cpu")
CPU_WORLD = World(0, 1, 0, 1, CPU)


def config(*overrides):
    cfg = compose("pretrain", [*TINY_PRETRAIN[1:], *overrides])
    cfg.precision = "float32"
    return cfg


@pytest.mark.parametrize(
    ("overrides", "keep", "said"),
    [
        ((), 6, []),
        (("data.image_size=24",), 3, ["have 9 patches of 8 px, fewer than 16", "leaves 3 of 9 patches visible"]),
        (("model.mask_ratio=0.9",), 1, ["model.mask_ratio=0.9 leaves 1 of 16 patches visible, fewer than 4"]),
    ],
)
def test_few_patches(overrides, keep, said):
    cfg = config(*overrides)
    lines = mask_warnings(cfg, grid_size(*cfg.data.size, 8), keep)
    assert len(lines) == len(said)
    assert all(text in line for text, line in zip(said, lines, strict=True))


def watch(values, *overrides):
    """The warnings over 10 epochs of 100 steps, one of them warm-up, a line per 20 steps."""
    cfg = config("schedule.epochs=10", "schedule.warmup_epochs=1", "trainer.log_every=20", *overrides)
    seen = LossWatch(cfg)
    steps = range(20, 20 * len(values) + 1, 20)
    lines = [
        seen(step, {"loss": loss, "lr": 1e-3, "epoch": step / 100}) for step, loss in zip(steps, values, strict=True)
    ]
    return [line for line in lines if line is not None]


def test_a_loss_that_falls_is_quiet():
    assert watch([0.3 + 0.7 * 0.97**n * (1 + 0.05 * (-1) ** n) for n in range(50)]) == []


def test_a_loss_that_rises_or_stalls_is_told_once():
    (line,) = watch([1.0 - 0.02 * n for n in range(20)] + [0.6 + 0.05 * n for n in range(30)])
    assert line.startswith("warning: the loss rose from 0.634 to 0.8 by step 540 (lr 0.001); a lower optim.lr")
    (line,) = watch([1.0] * 50)
    assert line.startswith("warning: the loss stalls: 1 at step 200, 1 at step 500 (lr 0.001)")
    assert watch([-1.0] * 50) == []  # learned weights make it negative
    assert watch([1.0, float("nan")] * 2) == []
    (line,) = watch([0.0] * 50)  # small images on a large canvas: what has a value is visible
    assert line.startswith("warning: the loss is 0 up to step 100: no hidden patch has a pixel with a value")


@pytest.fixture(scope="module")
def task():
    return Pretraining(config("data.length=20"))


def test_the_loss_is_compared_with_that_of_the_mean_patch(task, capsys):
    imgs, mask, _ = task._fixed(8, CPU)
    seen = guards.Seen(imgs)
    target = task.model.targets["pixels"]
    wanted, _ = target(seen)
    exact, constant = losses(task.model, "pixels", seen, mask, wanted)
    assert exact == 0
    assert 0.3 < constant < 1
    mean = wanted[mask].mean(0).expand_as(wanted)
    assert losses(task.model, "pixels", seen, mask, mean)[0] == pytest.approx(constant)
    task.mean_patch.warmup_steps = 3
    logger = RunLogger([], create_progress("a", 0, 1, enabled=False))
    task.mean_patch(None, guards.LEAST_STEPS, logger, CPU_WORLD, None)
    task.mean_patch.warmup_steps = 30
    task.mean_patch(None, 30, logger, CPU_WORLD, None)
    assert capsys.readouterr().err == ""
    for _ in range(2):
        task.mean_patch(None, 31, logger, CPU_WORLD, None)
    said = capsys.readouterr().err
    assert said.count("warning: at step 31 the loss of target.pixels is ") == 1
    assert "of the mean patch" in said
    assert "on 20 training images" in said


def test_collapse_is_seen_without_validation_images(task, monkeypatch):
    monkeypatch.setattr(task.model.backbone, "forward_features", lambda imgs: imgs.new_ones(len(imgs), 24, 4, 4))
    assert "the features collapse at step 7: effective_rank is 1 (below 2)" in task.mean_patch.look(7, CPU)[0]
    monkeypatch.setattr(
        task.model.backbone, "forward_features", lambda imgs: imgs.new_full((len(imgs), 24, 4, 4), torch.nan)
    )
    assert not [line for line in task.mean_patch.look(7, CPU) if "collapse" in line]  # another message tells it
