"""The loss on held-out images: the same at every look, exact over ranks, no trace in training; its best; the end."""

import itertools
import math
from pathlib import Path

import pytest
import torch

from fcmae.checkpoints import checkpoint
from fcmae.config import DataConfig, PretrainConfig, compose
from fcmae.data.pixels.transforms import CentreCrop, eval_transform
from fcmae.distributed import World
from fcmae.errors import ConfigError, UsageError
from fcmae.tasks.held_out import HeldOut, HeldOutLoss
from fcmae.tasks.pretraining import Pretraining
from fcmae.training.state import TrainState
from tests.conftest import TINY_PRETRAIN, Command
from tests.results import metrics_of

CPU = World(0, 1, 0, 1, torch.device("cpu"))
WATCHED = (*TINY_PRETRAIN, "monitor.val_loss=true", "trainer.eval_every_epochs=1")
TWO_TARGETS = ("+target.raw={_target_: fcmae.targets.Pixels, norm: none, weight: 0.5}",)


class OneOf(World):
    """A rank that does not meet the others, of whom one has read images."""

    def max(self, value):
        return torch.maximum(value, torch.tensor([0, 1]))


def held_out(*overrides: str) -> HeldOutLoss:
    cfg = compose("pretrain", [*WATCHED[1:], "data.length=13", *overrides])
    task = Pretraining(cfg)
    return HeldOutLoss(task.model, cfg, task._held_out(), task.loss)


def never() -> bool:
    return False


def test_crop_and_mask_belong_to_the_image():
    samples = held_out().images.samples
    few, many = HeldOut(samples, 5), HeldOut(samples, None)
    assert len(set(few.indices)) == 5
    assert many.indices == list(range(13))
    for place, index in enumerate(few.indices):
        for _ in range(2):
            for part, same in zip(few[place], many[index], strict=True):
                assert torch.equal(part, same)
    noise = [samples[epoch, 3][1] for epoch in (-1, 0, 1)]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(noise, 2))
    assert not torch.equal(held_out("seed=1").images[3][1], many[3][1])


@pytest.mark.parametrize("overrides", [(), TWO_TARGETS, ("model.grn_scope=batch",)])
def test_the_loss_is_the_mean_over_images_for_any_batches_and_ranks(overrides):
    look = held_out(*overrides)
    names = set(look.measure(look.model, CPU, never))
    assert names == ({"val_loss", "val_loss_pixels", "val_loss_raw"} if overrides == TWO_TARGETS else {"val_loss"})
    alone = []
    for place in range(13):
        image, noise = look.images[place]
        look.model.grn_scope = "image"
        with torch.no_grad():
            loss, _ = look.loss(look.model.eval(), [image[None], noise[None]])
        alone.append(loss.double())
    expected = torch.stack(alone).mean().item()
    for ranks, batch in ((1, 1), (1, 5), (2, 4), (3, 7), (17, 2)):
        look.cfg.trainer.micro_batch_size = batch
        worlds = [OneOf(rank, ranks, 0, 1, CPU.device) for rank in range(ranks)]
        with torch.no_grad():
            sums = torch.stack([look._sums(look.model, world, never) for world in worlds]).sum(0)
        assert sums[-1] == 13
        assert sums[0] / 13 == pytest.approx(expected, rel=1e-6)


def test_the_averaged_weights_are_measured():
    look, other = held_out(), held_out("seed=1")
    logged = {}
    logger = type("Logger", (), {"log": lambda self, step, metrics: logged.update(metrics)})()
    assert look(other.model, 1, logger, CPU, never) == -logged["val_loss"]  # type: ignore[arg-type]
    assert logged == look.measure(other.model, CPU, never)
    assert logged != look.measure(look.model, CPU, never)
    assert look.model.training
    assert look.model.grn_scope == "image"


def test_looking_changes_no_bit_and_the_best_is_kept(fcmae_here: Command, tmp_path: Path):
    """With an average, and a stop between the looks."""
    common = ("optim.ema_decay=0.5", "trainer.keep_checkpoints=1")
    fcmae_here(*TINY_PRETRAIN, *common, "hydra.run.dir=alone")
    fcmae_here(*WATCHED, *common, "hydra.run.dir=watched", "trainer.max_steps=4", check=75)
    fcmae_here(*WATCHED, *common, "hydra.run.dir=watched")
    states = {
        name: checkpoint.read(tmp_path / name / "checkpoints" / "step_00000009.pt") for name in ("alone", "watched")
    }
    for kind in ("model", "ema"):
        for key, value in states["alone"][kind].items():
            assert torch.equal(value, states["watched"][kind][key]), key
    measured = {line["step"]: line["val_loss"] for line in metrics_of(tmp_path / "watched") if "val_loss" in line}
    assert list(measured) == [3, 4, 6, 9]  # 4: where it was stopped
    assert not any("val_loss" in line for line in metrics_of(tmp_path / "alone"))
    best = min((3, 6, 9), key=measured.__getitem__)
    assert states["watched"]["best"] == {"step": best, "score": -measured[best]}
    assert checkpoint.resolve(f"{tmp_path}/watched@best").name == f"step_{best:08d}.pt"
    assert states["alone"]["best"] is None


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The losses that the next looks find."""
    losses: list[float] = []
    monkeypatch.setattr(HeldOutLoss, "measure", lambda *_: {"val_loss": losses.pop(0)})
    return losses


def test_a_run_ends_after_evaluations_without_a_better_loss(fcmae_here: Command, tmp_path: Path, scripted: list[float]):
    """Also where it was stopped between them, whose loss does not count; a resume says so and continues if it may."""
    run = (*WATCHED, "data.length=16", "schedule.epochs=8", "hydra.run.dir=run", "trainer.checkpoint_every_epochs=8")
    scripted += [0.5, 0.4, 0.45, 0.3, math.nan, 0.42]
    assert "ended at" not in fcmae_here(*run, "monitor.patience=3", "trainer.max_steps=7", check=75).stderr
    assert len(scripted) == 2
    ended = fcmae_here(*run, "monitor.patience=3").stderr
    line = (
        "ended at step 10 of 16: 3 evaluation(s) in a row not better than at step 4 (monitor.patience); "
        "monitor.patience=null continues"
    )
    assert line in ended.splitlines()
    assert not scripted
    assert (tmp_path / "run" / "encoder.safetensors").is_file()
    assert checkpoint.resolve(f"{tmp_path}/run@last").name == "step_00000010.pt"
    assert checkpoint.resolve(f"{tmp_path}/run").name == "step_00000004.pt"
    again = fcmae_here(*run, "monitor.patience=3").stderr
    assert line in again.splitlines()
    scripted += [0.3, 0.31, 0.32]
    assert "ended at" not in fcmae_here(*run, "monitor.patience=null").stderr
    assert checkpoint.resolve(f"{tmp_path}/run@best").name == "step_00000012.pt"


def test_nan_is_never_the_best():
    state = TrainState(0, torch.nn.Identity(), None, None, None)  # type: ignore[arg-type]
    found = []
    for step, score in enumerate((math.nan, -2.0, -math.inf, math.nan, -2.0, -1.0)):
        state.step = step
        found.append(state.improves(score))
    assert found == [False, True, False, False, False, True]
    assert (state.best, state.since_best) == ({"step": 5, "score": -1.0}, 0)


def config(*overrides: str) -> PretrainConfig:
    return compose("pretrain", [*TINY_PRETRAIN[1:], *overrides])


def test_it_is_measured_where_validation_images_are_given(tmp_path: Path):
    assert not config().measures_val_loss  # the synthetic source has some, but none are given
    folder = (f"data.path={tmp_path}", f"data.val_path={tmp_path}", "data=imagefolder")
    assert config(*folder).measures_val_loss
    assert not config(*folder, "monitor.val_loss=false").measures_val_loss
    assert not config(*folder, "trainer.eval_every_epochs=null").measures_val_loss
    with pytest.raises(ConfigError, match=r"monitor.patience must be null without val_loss \(data.val_path, .*; got 3"):
        config("monitor.patience=3")
    without = config("data=imagefolder", f"data.path={tmp_path}", "monitor.val_loss=true", "monitor.patience=2")
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(UsageError, match=r"data.val_path is not set; give the folder of validation images"):
        Pretraining(without)


@pytest.mark.parametrize("size", [(40, 64), (64, 40), (20, 20), (33, 90)])
@pytest.mark.parametrize("side", [32, [24, 48]])
def test_the_crop_shows_what_evaluation_shows(size, side):
    """By another order of resizing and cropping: compared on a smooth image, whose pixels these change little."""
    cfg = DataConfig(image_size=side, in_chans=1, mean=[0.5], std=[0.5])
    ramp = torch.linspace(0, 255, size[0])[:, None] / 2 + torch.linspace(0, 255, size[1])[None] / 2
    image = ramp.to(torch.uint8)[None]
    crop, shown = CentreCrop(cfg)(image).float(), eval_transform(cfg)(image).float()
    assert crop.shape == shown.shape
    assert (crop - shown)[:, 2:-2, 2:-2].abs().max() < 8


def test_the_crop_of_large_images_is_the_whole_image():
    cfg = DataConfig(image_size=384)
    image = torch.randint(0, 256, (3, 100, 50), dtype=torch.uint8)
    assert torch.equal(CentreCrop(cfg)(image), eval_transform(cfg)(image))


def test_two_processes_measure_what_one_does(fcmae: Command, fcmae_here: Command, tmp_path: Path):
    """The images do not divide among them, and one has none of the last batch."""
    looks = ("trainer.micro_batch_size=2", "monitor.val_images=13", "schedule.epochs=1", "schedule.warmup_epochs=0")
    fcmae_here(*WATCHED, *looks, "hydra.run.dir=one")
    fcmae(*WATCHED, *looks, "hydra.run.dir=two", ranks=2)
    one, two = ([line for line in metrics_of(tmp_path / name) if "loss" not in line] for name in ("one", "two"))
    assert [set(line) for line in one] == [
        {"step", "effective_rank", "feature_cosine", "dead_channels"},
        {"step", "val_loss"},
    ]
    for ours, theirs in zip(one, two, strict=True):
        assert theirs == pytest.approx(ours, rel=1e-4)
