"""Objectives of fine-tuning from a file outside the package."""

import contextlib
import json
import math

import pytest
import torch
from timm.models.convnext import ConvNeXt

import fcmae as package
from fcmae.checkpoints import checkpoint
from fcmae.config import compose
from fcmae.errors import ConfigError
from fcmae.evaluation import class_metrics
from fcmae.models.build import encoder_of, model_of, objective_of
from fcmae.models.headed import Headed
from fcmae.models.objective import score, sign_and_name
from fcmae.tasks.finetuning import Finetuning
from tests.conftest import TINY_FINETUNE
from tests.results import assert_same, metrics_of

OBJECTIVES = '''
import torch
from torch import nn
from fcmae.models.objective import Objective


class Brightness(Objective):
    """Regresses an image's label, scaled by what the training labels say; timm's head."""

    best, outputs, num_classes = "-mae", 1, None

    def __init__(self, weight=1.0):
        self.weight = weight

    def fit(self, source, cfg):
        self.most = float(max(source.label(i) for i in range(len(source))))

    def state_dict(self):
        return {"most": self.most}

    def load_state_dict(self, state):
        self.most = state["most"]

    def target(self, sample, source, index):
        return sample.label / self.most

    def loss(self, output, target):
        assert output.dtype == target.dtype == torch.float32
        error = (output[:, 0] - target).abs()
        return self.weight * error + error**2, {"l1": self.weight * error, "l2": error**2}

    def metrics(self, share, world):
        total = torch.zeros(2)
        for outputs, targets, _ in share:
            total += torch.stack([(outputs[:, 0] - targets).abs().sum() * self.most, torch.tensor(len(targets))])
        error, images = world.sum(total).tolist()
        return {"mae": error / images, "images": images}


class Maps(Brightness):
    """The same from the maps of all stages."""

    outputs = None

    def head(self, widths):
        return Pooled(widths)


class Pooled(nn.Module):
    def __init__(self, widths):
        super().__init__()
        self.last = nn.Linear(sum(widths), 1)

    def forward(self, maps):
        return self.last(torch.cat([x.mean((2, 3)) for x in maps], 1))


class Total(Brightness):
    def loss(self, output, target):
        return super().loss(output, target)[0].mean(), {}


class Headless(Maps):
    def head(self, widths):
        return len(widths)


class Lossless:
    best, outputs, num_classes = "mae", 1, None
'''


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(OBJECTIVES)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def finetune(name):
    return (*TINY_FINETUNE, f"objective._target_=mine.py:{name}", "optim.layer_decay=0.8", "optim.ema_decay=0.5")


def test_an_objective_may_take_the_head_of_timm(fcmae_here, here):
    fcmae_here(*finetune("Brightness"), "schedule.epochs=1", "hydra.run.dir=run")
    model = package.load("run@last", allow=["mine.py:Brightness"])
    assert isinstance(model, ConvNeXt)
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 1)


@pytest.mark.slow
def test_an_objective_from_a_file_trains_resumes_evaluates_and_exports(fcmae_here, here):
    args, target = finetune("Maps"), "mine.py:Maps"
    fcmae_here(*args, "hydra.run.dir=whole")
    fcmae_here(*args, "hydra.run.dir=cut", "trainer.max_steps=1", check=75)
    fcmae_here(*args, "hydra.run.dir=cut")
    file, other = (checkpoint.resolve(f"{run}@last") for run in ("whole", "cut"))
    state, resumed = checkpoint.read(file), checkpoint.read(other)
    assert_same(state["model"], resumed["model"])
    lines = metrics_of(here / "whole")
    assert lines[0]["loss"] == pytest.approx(lines[0]["loss_l1"] + lines[0]["loss_l2"])
    measured = [line for line in lines if "mae" in line]
    assert state["best"]["score"] == -min(line["ema_mae"] for line in measured)
    assert state["objective"] == {"most": 9.0}

    refused = fcmae_here("evaluate", "checkpoint=cut@last", check=2).stderr
    assert f"names the class {target} as its objective" in refused
    fcmae_here("evaluate", "checkpoint=cut@last", f"allow=[{target}]", "out=result.json")
    result = json.loads((here / "result.json").read_text())
    assert result["ema_mae"] == pytest.approx(measured[-1]["ema_mae"], rel=1e-5)
    model = package.load("cut@last", allow=[target])
    assert isinstance(model, Headed)
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 1)

    fcmae_here("export", "cut@last", "--to", "timm", "--out", "timm")  # the backbone alone
    backbone = encoder_of(resumed, other)
    assert backbone.num_classes == 0
    fcmae_here("knn", "checkpoint=cut@last", "data.name=synthetic", "k=[1]")
    again = (*TINY_FINETUNE, "init_from=cut@last", "trainer.max_steps=1", "trainer.eval_every_epochs=null")
    fcmae_here(*again, "hydra.run.dir=again", check=75)


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("Lossless", [], r"objective._target_ is 'mine.py:Lossless', which must be a class with .*without fit"),
        ("Headless", [], r"objective: mine.py:Headless.head must return a torch.nn.Module; got int"),
        ("Total", [], r"objective: mine.py:Total: loss must give one value per sample \[2\]; got \[\]"),
        ("Brightness", ["augment.mixup=0.8"], r"augment.mixup must be 0 with objective: mine.py:Brightness"),
        ("Brightness", ["+objective.scale=2"], r"objective: mine.py:Brightness does not take these arguments"),
        ("Missing", [], r"objective._target_ is 'mine.py:Missing'; expected a class that Python finds"),
    ],
)
def test_a_wrong_objective_is_one_line(here, name, overrides, message):
    def train():
        task = Finetuning(compose("finetune", [*finetune(name)[1:], *overrides]))
        task.loss(task.model, [torch.randn(2, 3, 32, 32), torch.zeros(2), *task.draw(0, range(2))])

    with pytest.raises(ConfigError, match=message) as error:
        train()
    assert len(str(error.value).splitlines()) == 1


def test_the_best_metric_is_one_that_is_measured():
    task = Finetuning(compose("finetune", [*TINY_FINETUNE[1:], "+objective.best=top5"]))
    with pytest.raises(ConfigError, match="best must be one of top1; got 'top5'$"):
        task._score({"top1": 1.0, "ema_top1": 2.0})


def test_the_sign_of_a_metric_is_part_of_its_name():
    assert sign_and_name("-mae") == (-1, "mae")
    assert sign_and_name("top1") == (1, "top1")
    assert score("-mae", {"mae": 2.0, "top1": 3.0}) == -2
    assert math.isnan(score("-mae", {"mae": None}))  # as a file of results has what is not defined


def test_areas_of_too_many_scores_are_refused_before_training(monkeypatch):
    monkeypatch.setattr(class_metrics, "MOST_SCORES", 239)  # 24 images of 10 classes have 240
    for best, refused in (("auroc", True), ("average_precision", True), ("balanced_accuracy", False)):
        expected = pytest.raises(ConfigError, match=f"best={best} is computed for at most 239 scores; .* has 24 images")
        with expected if refused else contextlib.nullcontext():
            Finetuning(compose("finetune", [*TINY_FINETUNE[1:], f"objective.best={best}"]))


def test_a_checkpoint_calls_no_other_class_of_the_package(fcmae_here, tmp_path):
    state = {"task": "finetune", "config": {"objective": {"_target_": "fcmae.files.replacing"}}, "model": {}}
    with pytest.raises(ConfigError, match="code that a file names is not run"):
        model_of(state, tmp_path / "x.pt")


def test_a_checkpoint_with_a_best_metric_that_is_refused_now_is_loaded():
    """Earlier versions trained with it."""
    cfg = compose("finetune", [*TINY_FINETUNE[1:], "objective.best=-top1"])
    assert objective_of({"classes": ["a", "b"]}, cfg).classes == ["a", "b"]
    cfg.objective["layer"] = "none"
    with pytest.raises(ConfigError, match="objective.layer must be one of"):
        objective_of({}, cfg)
