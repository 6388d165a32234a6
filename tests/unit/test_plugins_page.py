"""docs/plugins.md: the mask and the target of the page run as they stand there."""

import re
import shlex

import pytest

import fcmae
from tests.conftest import TESTS, TINY_PRETRAIN
from tests.results import metrics_of, newest

PAGE = (TESTS.parent / "docs" / "plugins.md").read_text()
FILES = dict(re.findall(r"```python\n# (\w+\.py)\n(.*?)```", PAGE, re.DOTALL))
MASK, WITH_PIXELS, ALONE = re.findall(r"^fcmae (pretrain .*(?:mask|target)\..*)$", PAGE, re.MULTILINE)


@pytest.fixture
def files(tmp_path):
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def overrides(command):
    return [word for word in shlex.split(command)[1:] if not word.startswith("data.path=")]


@pytest.mark.slow
def test_parts_are_logged_and_classes_of_a_checkpoint_need_to_be_allowed(files, fcmae_here):
    args = (*TINY_PRETRAIN, "schedule.epochs=1", "schedule.warmup_epochs=0", *overrides(MASK), *overrides(WITH_PIXELS))
    fcmae_here(*args, "hydra.run.dir=run")
    logged = metrics_of(files / "run")
    losses = [line for line in logged if "loss" in line]
    assert len(losses) == 3
    for line in losses:
        assert line["loss"] == pytest.approx(line["loss_pixels"] + 0.5 * line["loss_edges"], rel=1e-4)
    changed = fcmae_here(*args, "target.edges.weight=1", "hydra.run.dir=run", check=2)
    assert "the recipe differs" in changed.stderr
    assert "\n  target.edges.weight: 0.5 -> 1\n" in changed.stderr
    refused = fcmae_here("reconstruct", "run", "data.name=synthetic", check=2).stderr.splitlines()[-1]
    assert re.search(r"names the class edges.py:Edges as its target.edges; .*--allow edges.py:Edges", refused)
    allow = ("--allow", "edges.py:Edges", "--allow", "columns.py:Columns")
    fcmae_here("reconstruct", "run", "data.name=synthetic", *allow)
    assert (files / "reconstruction.png").is_file()
    fcmae_here("export", "run", "--to", "timm", "--out", "timm")
    assert "edges (edges.py:Edges)" in (files / "timm" / "README.md").read_text()


def test_a_target_alone_has_no_pictures(files, fcmae_here, monkeypatch):
    args = (*TINY_PRETRAIN, "schedule.epochs=1", "schedule.warmup_epochs=0", *overrides(ALONE))
    fcmae_here(*args, "hydra.run.dir=run")
    assert not list((files / "run").rglob("*.png"))
    state = newest(files / "run")
    assert list(state["config"]["target"]) == ["edges"]
    assert "decoder.pred.weight" not in state["model"]
    monkeypatch.chdir(files)
    assert list(fcmae.load("run", allow=["edges.py:Edges"]).targets) == ["edges"]
    picture = fcmae_here("reconstruct", "run", "data.name=synthetic", "--allow", "edges.py:Edges", check=2)
    assert "can be drawn: to_pixels returns None for edges" in picture.stderr
    fcmae_here("knn", "checkpoint=run", "k=1", "cache=null")


WRONG = """
import torch


class NoLoss:
    def __init__(self, patch_size, in_chans):
        self.dim = 1

    def __call__(self, seen):
        return None

    def to_pixels(self, pred, imgs):
        return None


class NotCallable(NoLoss):
    __call__ = None
    loss = None


class NoDim(NoLoss):
    def __init__(self, patch_size, in_chans):
        pass

    def loss(self, pred, target, mask, valid):
        return pred.mean(dim=-1)


class ZeroDim(NoDim):
    dim = 0


class Alone(NoDim):
    dim = 1

    def __call__(self, seen):
        return torch.zeros(len(seen.imgs), 16, 1)


class Whole(Alone):
    def __call__(self, seen):
        return torch.zeros(len(seen.imgs), 16, 1), None

    def loss(self, pred, target, mask, valid):
        return pred.mean()


class Greedy(Whole):
    needs = ("depth",)


class NoPatchSize(Whole):
    def __init__(self, in_chans):
        pass


class OtherLoss(Whole):
    def loss(self, pred, target):
        return pred
"""


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("NoLoss", "target.own._target_ is 'wrong.py:NoLoss', which must be a class with the methods .*without loss"),
        ("NotCallable", "without __call__, loss"),
        ("NoDim", "target.own: wrong.py:NoDim must have the attribute dim"),
        ("ZeroDim", "target.own: wrong.py:ZeroDim.dim must be a positive integer; got 0"),
        ("Greedy", r"target.own: wrong.py:Greedy.needs must be some of channels, label; got 'depth'"),
        ("NoPatchSize", "target.own: wrong.py:NoPatchSize does not take these arguments: .*patch_size"),
        ("OtherLoss", r"whose loss must take \(pred, target, mask, valid\); it takes \(self, pred, target\)"),
        ("Missing", "target.own._target_ is 'wrong.py:Missing'; expected a class that Python finds"),
        ("Whole target.own.weight=0", "target.own.weight must be a positive number or learned; got 0"),
        ("Whole target.own.more=1", "target.own: wrong.py:Whole does not take these arguments: .*'more'"),
        ("Whole target=null", "target must be one or several of NAME: .*; got {"),
        ("Alone", r"target: wrong.py:Alone must return \(target, valid\); got Tensor"),
        ("Whole", r"target: the loss of wrong.py:Whole must be \[1, 16\]; got \[\]"),
    ],
)
def test_a_wrong_target_is_refused_in_one_line(given, message, tmp_path, fcmae_here):
    (tmp_path / "wrong.py").write_text(WRONG)
    name, *more = given.split()
    if more == ["target=null"]:
        more = ["target.own=null", "target.pixels=null"]
    args = (*TINY_PRETRAIN, f"target.own._target_=wrong.py:{name}", *more, "hydra.run.dir=run")
    refused = fcmae_here(*args, check=2).stderr.splitlines()
    errors = [line for line in refused if line.startswith("fcmae pretrain: ")]
    assert len(errors) == 1
    assert "Traceback" not in refused
    assert re.search(message, errors[0])
