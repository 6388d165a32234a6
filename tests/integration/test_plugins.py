"""The examples of docs/plugins.md, as they stand there, in one pretraining and one fine-tuning run."""

import json
import re

import numpy as np
import pytest
import torch

import fcmae as package
from tests.conftest import TESTS, TINY_FINETUNE, TINY_PRETRAIN
from tests.results import assert_same, metrics_of, weights

PAGE = TESTS.parent / "docs" / "plugins.md"
SOURCE = 'data.source={_target_: "cells.py:Cells", images: images.npy, numbers: numbers.npy}'
V2 = "torchvision.transforms.v2"
BOTH = (
    *(SOURCE, SOURCE.replace("data.", "data.val_")),
    "data.name=imagefolder",
    f'data.transforms=[{{_target_: "turn.py:QuarterTurns", p: 0.9}}, {{_target_: {V2}.RandomVerticalFlip}}]',
    "logger.sinks.curve._target_=curve.py:Curve",
)
TARGET = ("target.edges._target_=edges.py:Edges", "target.edges.weight=0.5")
PRETRAIN = (*TINY_PRETRAIN, *BOTH, "data.image_size=64", "mask._target_=columns.py:Columns", *TARGET)
FINETUNE = (*TINY_FINETUNE, *BOTH, "objective._target_=number.py:Number", "objective.power=1")


def examples():
    """The files that the page shows, by name."""
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    return {re.match(r"# (\w+\.py)\n", block)[1]: block for block in blocks}


@pytest.fixture
def here(tmp_path, monkeypatch):
    for name, text in examples().items():
        (tmp_path / name).write_text(text)
    rng = np.random.default_rng(0)
    np.save(tmp_path / "images.npy", rng.integers(0, 256, (24, 3, 64, 64), dtype=np.uint8))
    np.save(tmp_path / "numbers.npy", rng.normal(5, 2, 24).astype(np.float32))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_the_examples_train_resume_evaluate_and_export(fcmae_here, here):
    for command, name in ((PRETRAIN, "pre"), ((*FINETUNE, "init_from=pre"), "fine")):
        fcmae_here(*command, f"hydra.run.dir={name}")
        fcmae_here(*command, f"hydra.run.dir={name}_cut", "trainer.max_steps=2", "loader.workers=1", check=75)
        fcmae_here(*command, f"hydra.run.dir={name}_cut")
        assert_same(weights(name), weights(f"{name}_cut"))
        steps = [line.split(",")[0] for line in (here / f"{name}_cut" / "loss.csv").read_text().splitlines()]
        assert steps == [str(step) for step in range(1, len(steps) + 1)]
        assert len(steps) > 4
        fcmae_here("export", name, "--to", "timm", "--out", f"{name}_timm")
    assert "number.py:Number, whose head is not exported" in (here / "fine_timm" / "README.md").read_text()
    assert "names the class" in fcmae_here("evaluate", "checkpoint=fine", check=2).stderr
    allowed = "allow=[number.py:Number, cells.py:Cells]"
    fcmae_here("evaluate", "checkpoint=fine", allowed, "out=result.json")
    metrics = metrics_of(here / "fine")
    measured = [line["error"] for line in metrics if "error" in line]
    assert json.loads((here / "result.json").read_text())["error"] == pytest.approx(min(measured), rel=1e-4)
    network = package.load("fine", allow=["number.py:Number"])
    assert network(torch.zeros(1, 3, 64, 64)).shape == (1, 1)


WRONG = {
    "sink": (
        "logger.sinks.curve._target_=turn.py:QuarterTurns",
        "with the methods log, picture, close; it is a class without log",
    ),
    "sink arguments": (
        "logger.sinks.curve.title=x",
        "logger.sinks.curve: curve.py:Curve does not take these arguments",
    ),
    "transform": (
        'data.transforms=[{_target_: "curve.py:Curve"}]',
        r"data.transforms\[0\]._target_ is .* without __call__",
    ),
    "type": (
        "data.transforms=[{_target_: torchvision.transforms.v2.RandomCrop, size: 9}]",
        r"must return torch.uint8 \[3, 64, 64\]; got torch.uint8 \[3, 9, 9\]",
    ),
    "GPU": ("data.decode_on=gpu", "data.decode_on must be cpu unless.*; got 'gpu'"),
    "kind": ("data.transforms=[flip]", r"data.transforms must be a list of _target_.*; got \['flip'\]"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_plugin_is_one_line(fcmae_here, here, name):
    override, message = WRONG[name]
    said = fcmae_here(*PRETRAIN, override, "hydra.run.dir=run", check=2).stderr
    assert re.search(message, said), said
    assert "Traceback" not in said


BROKEN = """
import torch
from fcmae.masks import RandomMask
from fcmae.targets import Pixels

class Short(RandomMask):
    def scores(self, rng, rows, cols, crop):
        return super().scores(rng, rows, cols, crop)[1:]

class Wide(Pixels):
    def loss(self, pred, target, mask, valid):
        return (pred - target).square()

class Missing(Pixels):
    def loss(self, pred, target, mask, valid):
        return {}["error"]

def fails(image):
    raise RuntimeError("no")

class Failing:
    def __call__(self, image):
        return fails(image)
"""


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("mask._target_=broken.py:Short", r"scores must return a float tensor \[\d+\]; got"),
        ("target.wide._target_=broken.py:Wide", r"the loss of broken.py:Wide must be \["),
        ("target.gone._target_=broken.py:Missing", r"KeyError: 'error' \(.*broken.py, line 16\)$"),
        ('data.transforms=[{_target_: "broken.py:Failing"}]', r"RuntimeError: no \(.*broken.py, line 19\)$"),
    ],
)
def test_what_fails_on_the_first_sample_is_told_before_the_run_begins(fcmae_here, here, override, message):
    (here / "broken.py").write_text(BROKEN)
    said = fcmae_here(*TINY_PRETRAIN, SOURCE, "data.image_size=64", override, "hydra.run.dir=run", check=2).stderr
    assert re.search(message, said, re.MULTILINE), said
    assert "Traceback" not in said
    assert not (here / "run" / "config.yaml").exists()
