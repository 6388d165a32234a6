"""The demo with its real data and, on any machine, its shortest pretraining: three CPU-minutes."""

import json
from pathlib import Path

import pytest
from PIL import Image

from fcmae.data.sources import FashionMNIST
from tests.conftest import run_python


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.skipif(not Path(FashionMNIST.DEBIAN).is_dir(), reason="needs Debian's package dataset-fashion-mnist")
def test_pretraining_makes_better_features(tmp_path):
    run_python(tmp_path, "-m", "fcmae.cli", "demo", "--minutes", "0.1", timeout=3000)
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
    assert summary["knn_after"] >= summary["knn_before"] + 5
    assert summary["pretrain_epochs"] == 0.5
    assert summary["finetune_pretrained"] > 50
    assert summary["finetune_scratch"] > 50
    for name in ("reconstruction.png", "loss.png"):
        with Image.open(tmp_path / "demo" / name) as picture:
            assert picture.width > 300
