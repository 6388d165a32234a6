"""The demo at a small scale: a tenth of its images, and its shortest pretraining on them."""

import gzip
import json
from pathlib import Path

import pytest
from PIL import Image

from fcmae import demo
from fcmae.config import compose
from fcmae.data.sources import FashionMNIST

IMAGES = {"train": 6000, "t10k": 500}
NARROW = ("model.dims=[12,24,48,96]",)
"""Half of the widths of model=demo."""


@pytest.fixture
def small(tmp_path, monkeypatch):
    """The first images of Fashion-MNIST, and a demo that suits their number."""
    for split, images in IMAGES.items():
        for kind, header, size in (("images-idx3", 16, 28 * 28), ("labels-idx1", 8, 1)):
            name = f"{split}-{kind}-ubyte.gz"
            with gzip.open(FashionMNIST.DEBIAN / name) as whole, gzip.open(tmp_path / name, "wb", 1) as part:
                part.write(whole.read(header + images * size))
    monkeypatch.setattr(demo, "GALLERY", 500)
    monkeypatch.setattr(demo, "QUERIES", 500)
    monkeypatch.setattr(demo, "STEPS", 20)
    monkeypatch.setattr(demo.Plan, "RECIPE", (8.0, 12.0))
    monkeypatch.setattr(demo.Plan, "ENOUGH", demo.Plan.LEAST)
    monkeypatch.setattr(demo, "compose", lambda command, overrides: compose(command, [*overrides, *NARROW]))


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.skipif(not Path(FashionMNIST.DEBIAN).is_dir(), reason="needs Debian's package dataset-fashion-mnist")
def test_pretraining_makes_better_features(tmp_path, small, fcmae_here):
    said = fcmae_here("demo", "--minutes", "0.1", "--data", str(tmp_path)).stdout
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
    print(summary)
    assert summary["knn_after"] >= summary["knn_before"] + 5
    assert summary["pretrain_epochs"] == 2
    assert summary["finetune_pretrained"] > 40
    assert summary["finetune_scratch"] > 20
    for number in ("knn_before", "knn_after", "finetune_pretrained", "finetune_scratch"):
        assert f"{summary[number]:.1f}%" in said
    for name in ("reconstruction.png", "loss.png"):
        with Image.open(tmp_path / "demo" / name) as picture:
            assert picture.width > 300
