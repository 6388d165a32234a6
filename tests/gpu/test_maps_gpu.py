"""Fine-tuning with target maps on a GPU: CUDA graphs, bf16, the same bits after a stop, and the CPU's evaluation."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.dense_files import write_squares
from tests.results import metrics_of, newest

pytestmark = pytest.mark.gpu

MODEL = ("finetune", "model=convnextv2_atto", "data.image_size=64", "data.name=imagefolder", "loader.workers=2")
HOW = ("schedule.epochs=3", "optim.global_batch_size=4", "optim.lr=1e-3", "logger=quiet", "trainer.log_every=1",
       "optim.ema_decay=0.5", "model.drop_path_rate=0.1", "trainer.cuda_graph=true", "precision=bf16")  # fmt: skip


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    folder = write_squares(tmp_path_factory.mktemp("squares"), 12, 90, 110)
    (folder / "targets" / "s").mkdir(parents=True)
    for number in range(12):
        pixels = np.array(Image.open(folder / "images" / "s" / f"{number}.png").convert("L"), np.float32)
        np.save(folder / "targets" / "s" / f"{number}.npy", pixels / 3)
    return folder


def arguments(folder, maps, *objective):
    data = (f"data.path={folder}/images", f"data.target_path={folder}/{maps}", f"data.val_path={folder}/images")
    return (*MODEL, *data, *HOW, *objective)


SEGMENT = (
    "masks",
    "objective=segment",
    "objective.classes=3",
    "objective.loss=ce+dice",
    "objective.class_weights=auto",
)
EAGER = "trainer.compile=false"
"""Compiling takes most of a test, and is left to the first."""
UPERNET = (*SEGMENT, "objective.head=upernet", "objective.width=64", EAGER)
TRANSLATE = ("targets", "objective=translate", "objective.channels=1", EAGER, "objective.loss=l1+mse")


@pytest.mark.parametrize("objective", [SEGMENT, UPERNET, TRANSLATE], ids=["segment", "upernet", "translate"])
def test_a_stopped_run_ends_with_the_same_bits(fcmae, tmp_path, squares, objective):
    args = arguments(squares, *objective)
    fcmae(*args, "hydra.run.dir=whole")
    fcmae(*args, "hydra.run.dir=cut", "trainer.max_steps=4", check=75)
    fcmae(*args, "hydra.run.dir=cut")
    states = [newest(tmp_path / run) for run in ("whole", "cut")]
    for kind in ("model", "ema"):
        for name, value in states[0][kind].items():
            assert value.equal(states[1][kind][name]), name
    best = "ssim" if objective is TRANSLATE else "miou"
    results = []
    for device, batch_size in (("cuda", 7), ("cpu", 3)):
        out = f"{device}.json"
        how = ("precision=float32", f"device={device}", f"batch_size={batch_size}", f"out={out}")
        fcmae("evaluate", "checkpoint=whole@last", *how)
        results.append(json.loads((tmp_path / out).read_text())[best])
    assert results[0] == pytest.approx(results[1], rel=1e-3)


def test_ms_ssim_is_recorded_in_a_graph(fcmae, tmp_path, squares):
    """Its gradient is equal up to rounding only, so the curve with a graph is close to the one without."""
    args = arguments(squares, *TRANSLATE[:-1], "objective.loss=l1+ms_ssim", "freeze=stages:2")
    curves = []
    for graph in ("true", "false"):
        fcmae(*args, "precision=float32", f"trainer.cuda_graph={graph}", f"hydra.run.dir=graph_{graph}")
        lines = metrics_of(tmp_path / f"graph_{graph}")
        curves.append([line["loss_ms_ssim"] for line in lines if "loss_ms_ssim" in line])
    assert len(set(curves[0])) > 3
    assert curves[0] == pytest.approx(curves[1], rel=1e-3)
