"""Detection on a GPU: bf16 and fp16, the CPU's loss and evaluation, and the same bits after a stop if asked for."""

import json

import pytest
import torch

from fcmae.config import compose
from fcmae.tasks.finetuning import Finetuning
from tests.coco_files import write_coco
from tests.results import assert_same, metrics_of, newest

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    folder = tmp_path_factory.mktemp("squares")
    write_coco(folder, 12, (90, 110))
    return folder


def detecting(folder, *overrides):
    files = (f"data.path={folder}/images", *(f"data.{part}annotations={folder}/objects.json" for part in ("", "val_")))
    how = ("schedule.epochs=3", "optim.global_batch_size=4", "optim.lr=1e-3", "logger=quiet", "trainer.log_every=1",
           "optim.ema_decay=0.5", "model.drop_path_rate=0.1", "data.image_size=128", "loader.workers=2")  # fmt: skip
    return ("finetune", "model=convnextv2_atto", "objective=detect", "objective.width=64", *files, *how, *overrides)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_trains_and_evaluates(fcmae_here, tmp_path, squares, precision):
    fcmae_here(*detecting(squares, f"precision={precision}"), "hydra.run.dir=run")
    lines = metrics_of(tmp_path / "run")
    assert all(line["loss"] == line["loss"] for line in lines if "loss" in line)
    assert any("ema_mask_map" in line for line in lines)
    fcmae_here("evaluate", "checkpoint=run@last", "out=gpu.json", "precision=float32")
    fcmae_here("evaluate", "checkpoint=run@last", "out=cpu.json", "device=cpu")
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("gpu.json", "cpu.json"))
    assert one["map"] == pytest.approx(two["map"], abs=0.5)
    assert one["mask_map"] == pytest.approx(two["mask_map"], abs=0.5)


def test_a_stopped_run_has_the_same_bits_if_asked_for(fcmae_here, tmp_path, squares):
    args = detecting(squares, "precision=bf16", "trainer.deterministic=true", "trainer.compile=false")
    fcmae_here(*args, "hydra.run.dir=whole")
    fcmae_here(*args, "hydra.run.dir=cut", "trainer.max_steps=4", check=75)
    fcmae_here(*args, "hydra.run.dir=cut")
    whole, cut = (newest(tmp_path / run) for run in ("whole", "cut"))
    assert_same(whole["model"], cut["model"])


def test_the_loss_and_its_draws_are_the_cpus(squares):
    losses = []
    for device in ("cpu", "cuda"):
        task = Finetuning(compose("finetune", list(detecting(squares)[1:])).settled({}))
        task.model.to(device)
        samples = [task.dataset()[0, index] for index in range(4)]
        batch = [torch.stack(column) for column in zip(*samples, strict=True)]
        parts = [part.to(device) for part in (*batch, *task.draw(0, range(4)))]
        loss, each = task.loss(task.model, parts)
        losses.append({"loss": loss.item(), **{name: part.item() for name, part in each.items()}})
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
