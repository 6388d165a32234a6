"""The experiments of conf/experiment/examples run to their end, on small made-up data and a small network."""

import math

import numpy as np
import pytest
from safetensors.torch import load_file

from tests.conftest import TINY_PRETRAIN
from tests.results import metrics_of

SMALL = (
    *(word for word in TINY_PRETRAIN[1:] if word.startswith(("model.d", "loader.", "precision", "trainer.", "logger"))),
    "optim.global_batch_size=4",
    "optim.lr=1e-3",
    "schedule.epochs=2",
    "schedule.warmup_epochs=0",
    "hydra.run.dir=run",
)


@pytest.fixture
def tiles(tmp_path):
    """Tiles of 12 bands with holes, an elevation and a map of land cover, and a table with their biomes."""
    rng = np.random.default_rng(0)
    rows = ["image,biome"]
    for index in range(12):
        tile = np.empty((14, 64, 70), np.float32)
        tile[:12] = rng.normal(1500, 400, (12, 64, 70)).clip(1)
        tile[:12, :, :3] = 0  # the edge of a swath
        tile[12] = rng.normal(600, 300, (64, 70))
        tile[12, 40:44] = -9999
        tile[13] = rng.integers(0, 12, (64, 70))  # of which 11 is no class
        np.save(tmp_path / f"{index}.npy", tile)
        rows.append(f"{index}.npy,{('forest', 'desert', 'tundra')[index % 3]}")
    (tmp_path / "tiles.csv").write_text("\n".join(rows) + "\n")
    return tmp_path


def test_multimodal(tiles, fcmae_here):
    fcmae_here("pretrain", "experiment=examples/multimodal", "data.path=tiles.csv", *SMALL)
    steps = [line for line in metrics_of(tiles / "run") if "loss_map" in line]
    assert len(steps) == 6
    for line in steps:
        for name in ("pixels", "elevation", "map", "labels"):
            assert math.isfinite(line[f"loss_{name}"])
            assert line[f"weight_{name}"] > 0
    assert steps[0]["loss_labels"] == pytest.approx(math.log(3), abs=0.5)
    assert load_file(tiles / "run" / "encoder.safetensors")["stem.0.weight"].shape[1] == 12


def test_microscopy(tmp_path, fcmae_here):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "stack.npy", rng.normal(0, 1, (6, 1, 5, 80, 72)).astype(np.float32))  # N, C, Z, Y, X
    small = (*SMALL, "data.image_size=64", "trainer.eval_every_epochs=null")
    fcmae_here("pretrain", "experiment=examples/microscopy", "data.path=stack.npy", *small)
    steps = [line for line in metrics_of(tmp_path / "run") if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2]
    assert all(0.5 < line["loss"] < 2 for line in steps)
    weights = load_file(tmp_path / "run" / "encoder.safetensors")
    assert weights["stem.0.weight"].shape[1] == 5
    assert "stages.0.blocks.0.conv_dw.bias" not in weights
