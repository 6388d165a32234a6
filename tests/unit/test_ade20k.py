"""The ADE20K recipe on made-up files of its format, with a tiny network."""

import numpy as np
import pytest
from PIL import Image

from tests.results import metrics_of


@pytest.fixture
def ade(tmp_path):
    """ADEChallengeData2016: JPEGs, and PNGs of 0 (not labelled) to 150."""
    rng = np.random.default_rng(0)
    for split, count in (("training", 6), ("validation", 2)):
        for kind in ("images", "annotations"):
            (tmp_path / "ADE" / kind / split).mkdir(parents=True)
        for number in range(count):
            mask = np.kron(rng.integers(0, 151, (5, 7)), np.ones((10, 10))).astype(np.uint8)
            name = f"ADE_{split[:-3]}_{number:08}"
            Image.fromarray(mask).save(tmp_path / "ADE" / "annotations" / split / f"{name}.png")
            colours = np.stack([mask, 255 - mask, mask // 2], axis=-1)
            Image.fromarray(colours).save(tmp_path / "ADE" / "images" / split / f"{name}.jpg")
    return tmp_path


def test_a_few_steps_of_the_recipe(fcmae_here, ade):
    """Windows of 64 px with scale jitter over images of 70 x 50, padded where they are smaller."""
    paths = [f"data.{key}=ADE/{folder}/{split}" for key, folder, split in (
        ("path", "images", "training"), ("target_path", "annotations", "training"),
        ("val_path", "images", "validation"), ("val_target_path", "annotations", "validation"))]  # fmt: skip
    tiny = ("model.backbone=convnextv2_atto", "model.depths=[1,1,2,1]", "model.dims=[8,8,16,16]", "objective.width=16")
    how = ("data.image_size=64", "optim.global_batch_size=4", "schedule.epochs=2", "trainer.micro_batch_size=2",
           "trainer.eval_every_epochs=2", "loader.workers=0", "logger=quiet", "trainer.log_every=1",
           "schedule.warmup_epochs=1", "precision=float32", "hydra.run.dir=run")  # fmt: skip
    fcmae_here("finetune", "experiment=ade20k/upernet_base", *paths, *tiny, *how)
    lines = metrics_of(ade / "run")
    losses = [line["loss_ce"] for line in lines if "loss_ce" in line]
    assert len(losses) == 2
    assert losses[0] == pytest.approx(np.log(150), rel=0.05)
    assert 0 <= lines[-1]["miou"] <= 100
    assert any(name.startswith("iou_") for name in lines[-1])
    fcmae_here("predict", "run", "ADE/images/validation", "--out", "masks", "loader.workers=0")
    files = sorted((ade / "masks").rglob("*.png"))
    assert len(files) == 2
    with Image.open(files[0]) as image:
        assert image.size == (70, 50)
        assert np.array(image).min() >= 1  # the numbers of the files
