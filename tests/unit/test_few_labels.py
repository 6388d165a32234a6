"""``finetune recipe=auto``: the head is the probe's, nothing but training labels chooses, a stop changes nothing."""

import gc
import json
import math
import re
import shutil
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from fcmae import interrupt
from fcmae.config import compose, to_dict
from fcmae.config.recipe import check_recipe
from fcmae.data.pixels.transforms import eval_transform, normalize
from fcmae.distributed import World
from fcmae.errors import ConfigError, Interrupted, UsageError
from fcmae.evaluation import logistic
from fcmae.evaluation.features import Features
from fcmae.evaluation.fold_scores import clearly_better, mean_of
from fcmae.evaluation.logistic import fit, stratified_folds
from fcmae.files import as_read
from fcmae.loggers import search_progress
from fcmae.loggers.search_progress import SearchProgress, Size
from fcmae.models import FCMAE
from fcmae.status import describe, read_status
from fcmae.tasks.few_labels import FromHead, class_lines, frozen_features
from fcmae.tasks.finetuning import Finetuning
from fcmae.tasks.initial import Start
from fcmae.tasks.objectives import Classify
from fcmae.training import few_labels
from fcmae.training.agree_to_stop import StopAgreement
from tests.conftest import TINY, TINY_PRETRAIN, run_python
from tests.results import assert_same, weights

CPU = World(0, 1, 0, 1, torch.device("cpu"))
AUTO = (
    "finetune",
    "recipe=auto",
    *(override for override in TINY if not override.startswith(("optim.lr", "trainer.eval", "data.length", "model"))),
    "init_from=pre",
    "data.length=60",
    "data.labels_per_class=3",
    "schedule.epochs=1",
    "schedule.warmup_epochs=0",
    "auto.folds=3",
    "auto.held_out=11",
    "auto.lrs=[1e-3]",
    "auto.layer_decays=[0.8]",
    "auto.l2=[0.1,1]",
)
"""30 images, 10 held out in each of three folds, of which two are measured."""


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    from fcmae.cli import main

    folder = tmp_path_factory.mktemp("few")
    short = ("schedule.epochs=1", "schedule.warmup_epochs=0", "trainer.eval_every_epochs=null")
    gc.collect()
    gc.disable()
    try:
        assert main([*TINY_PRETRAIN, *short, f"hydra.run.dir={folder}/pre"]) == 0
        left = [each for each in gc.get_objects() if isinstance(each, FCMAE)]
    finally:
        gc.enable()
    assert not left, "a run leaves its network behind, on a GPU with its memory"
    return folder / "pre"


@pytest.fixture
def here(pretrained, tmp_path, monkeypatch):
    shutil.copytree(pretrained, tmp_path / "pre")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def result(run):
    return json.loads((run / "auto" / "chosen.json").read_text())


@pytest.mark.parametrize("layer", ["pooled", "stages", "stages_std"])
def test_the_network_begins_as_the_probe(layer):
    """Standardisation is folded into the linear layer: the logits are equal up to float32's rounding.

    The weights are random, and those of the search, whose network has the classifier of the config.
    """
    given = [*AUTO[1:], "init_from=null", "model=demo", "precision=float32"]
    search = Finetuning(compose("finetune", given).settled({}), Start())
    features = frozen_features(search, layer, 16, CPU, lambda: False)
    linear = fit(features.values, features.labels, 10, [0.1])[0.1]
    cfg = compose("finetune", [*given, f"objective.layer={layer}"]).settled({})
    task = FromHead(cfg, Start(), lambda: linear, search.model, range(5, 25))
    task.initialise()
    assert len(task.source) == 20
    transform = eval_transform(cfg.data)
    imgs = torch.stack([transform(task.source[i].image) for i in range(20)])
    with torch.inference_mode():
        logits = task.model.eval()(normalize(imgs, cfg.data.mean, cfg.data.std))
    expected = linear(features.values[5:25])
    assert expected.std() > 0.1
    torch.testing.assert_close(logits.double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("kept", ["probe", "finetuned"])
def test_a_stop_changes_nothing(fcmae_here, here, monkeypatch, kept):
    """Stopped in the first fold and in the last training. A fold that is done is not trained again."""
    probe_is_best = kept == "probe"
    of_probe = few_labels.metrics_of
    monkeypatch.setattr(few_labels, "metrics_of", lambda *a: {**of_probe(*a), "top1": 100.0 if probe_is_best else -1.0})
    monkeypatch.setattr("fcmae.tasks.dense.val_source", None)  # no validation image is looked at
    folders, train = [], few_labels.train
    monkeypatch.setattr(
        few_labels, "train", lambda task, run, *rest: folders.append(run.name) or train(task, run, *rest)
    )
    whole = fcmae_here(*AUTO, "hydra.run.dir=whole")
    assert whole.stderr.count("init_from: checkpoint pre/") == 1
    trained = ["fold1_lr0.001_decay0.8", "fold2_lr0.001_decay0.8", *([] if probe_is_best else ["whole"])]
    assert folders == trained
    found = result(here / "whole")
    assert (found["kept"], found["metric"], len(found["probe"]["folds"])) == (kept, "top1", 2)
    line = f"recipe=auto keeps {'the probe (layer=' if probe_is_best else 'fine-tuning (lr=0.001, layer_decay=0.8) '}"
    assert whole.stderr.count(line) == 1
    folders.clear()
    stopped = fcmae_here(*AUTO, "hydra.run.dir=cut", "trainer.max_steps=1", check=75)  # of the two of a fold
    assert f"hydra.run.dir={here}/cut and more steps" in stopped.stderr
    fcmae_here(*AUTO, "hydra.run.dir=cut", "trainer.max_steps=2", check=0 if probe_is_best else 75)  # of three in all
    fcmae_here(*AUTO, "hydra.run.dir=cut")
    assert folders == [trained[0], *(name.replace("whole", "cut") for name in (*trained, *trained[2:]))]
    assert result(here / "cut") == found
    assert_same(weights(here / "cut"), weights(here / "whole"))
    assert not list((here / "cut" / "auto").glob("*/checkpoints"))
    folders.clear()
    assert fcmae_here(*AUTO, "hydra.run.dir=whole").stdout.startswith(f"{here}/whole/checkpoints/step_")
    assert set(folders) <= {"whole"}
    monkeypatch.undo()
    measured = json.loads(fcmae_here("evaluate", f"checkpoint={here}/whole").stdout)
    assert measured["images"] == 60
    if probe_is_best:
        probe = ("solver=lbfgs", f"l2={found['l2']:g}", f"layer={found['layer']}", "data.length=60", "cache=null")
        probe = fcmae_here("probe", f"checkpoint={here}/pre", *probe, "data.labels_per_class=3").stdout
        assert json.loads(probe)["top1"] == measured["top1"]


def test_a_signal_stops_the_probe_in_a_fold(tmp_path, monkeypatch, capsys):
    """Folds that are done are not fitted again, and the result is the same by the bit."""
    labels = torch.arange(30) % 3
    values = torch.randn(30, 4, generator=torch.Generator().manual_seed(0)) + labels[:, None]
    fits, signal_at, minimum = [], [], logistic._minimum

    def minimum_with_a_signal(*args):
        fits.append(1)
        if len(fits) in signal_at:
            interrupt._received.append("SIGTERM")
        return minimum(*args)

    monkeypatch.setattr(logistic, "_minimum", minimum_with_a_signal)
    monkeypatch.setattr(interrupt, "_received", [])

    def probe(run):
        search = few_labels._Search.__new__(few_labels._Search)
        search.world, search.watchdog, search.stop = CPU, Mock(), StopAgreement(CPU)
        search.run_dir, search.folder = tmp_path / run, tmp_path / run / "auto"
        search.labels, search.folds, search.measured = labels, stratified_folds(labels, 3, 0), [0]
        search.auto = SimpleNamespace(layers=["pooled", "stages"], l2=[0.1, 1.0])
        search.objective = SimpleNamespace(weights=None, classes=["a", "b", "c"])
        search.features = {"pooled": Features(values, labels), "stages": Features(values**2, labels)}
        return search._probe()

    whole = probe("whole")
    assert len(fits) == 12
    stage = "a probe on the features of 30 images, cross-validated in 3 folds with 2 choices of layers and 2 of l2"
    assert capsys.readouterr().err == f"recipe=auto: {stage}\n"
    fits.clear()
    signal_at.append(4)  # the second l2 of the second fold
    with pytest.raises(Interrupted, match="stopped before the first step .SIGTERM.; the same command with hydra.run"):
        probe("cut")
    assert len(fits) == 4
    assert [*(tmp_path / "cut").rglob("*.*")] == [tmp_path / "cut" / "auto" / "probe" / "pooled" / "fold1.json"]
    fits.clear()
    signal_at.clear()
    interrupt._received.clear()
    assert probe("cut") == whole
    assert len(fits) == 10
    assert [path.name for path in (tmp_path / "cut" / "auto").iterdir()] == ["probe.json"]


def test_another_recipe_or_other_weights_are_refused(fcmae_here, here):
    auto = (*AUTO, "auto.layers=[pooled]")
    fcmae_here(*auto, "hydra.run.dir=run", "trainer.max_steps=1", check=75)
    said = describe(read_status("run")).splitlines()[1:3]
    assert said == [
        "  recipe=auto: 0 of 3 trainings done",
        "  step 1/2 of fold1_lr0.001_decay0.8, epoch 0.5",
    ]
    changed = fcmae_here(*auto, "hydra.run.dir=run", "auto.lrs=[1e-2]", check=2).stderr
    assert "the recipe differs" in changed
    assert "auto.lrs" in changed
    fcmae_here(*TINY_PRETRAIN, "seed=1", "trainer.max_steps=1", "hydra.run.dir=other", check=75)
    other = fcmae_here(*auto, "hydra.run.dir=run", "init_from=other", check=2).stderr
    assert "which holds other weights" in other
    (here / "run" / "auto" / "chosen.json").write_text('{"kept": "probe"}')
    damaged = fcmae_here(*auto, "hydra.run.dir=run", check=2).stderr
    assert "without layer, l2, lr, layer_decay" in damaged


def test_a_search_with_the_former_default_grid_continues_with_its_values():
    given = ["recipe=auto", "data=synthetic", "model=demo"]
    grid = ["auto.lrs=[1e-4,3e-4,1e-3]", "auto.layer_decays=[0.7,0.9]"]
    former, now = (as_read(to_dict(compose("finetune", overrides))) for overrides in ([*given, *grid], given))
    with pytest.raises(
        UsageError, match=r"give its values again(.|\n)*auto.lrs: \(0.0001, 0.0003, 0.001\) -> "
    ) as error:
        check_recipe(former, now)
    assert "auto.layer_decays: (0.7, 0.9) -> (0.7,)" in str(error.value)
    check_recipe(former, as_read(to_dict(compose("finetune", [*given, *grid]))))


def test_without_pretraining_it_begins_with_random_weights(fcmae_here, here):
    """The same care for all: scratch gets the same search."""
    said = fcmae_here(
        *AUTO, "init_from=null", "model=demo", "auto.layers=[stages]", "hydra.run.dir=run", "objective.best=auroc"
    ).stderr
    assert said.count("recipe=auto: 3 trainings of 2 to 3 steps, one fewer if the probe is better\n") == 1
    assert re.search(r"fold 1, lr=0.001, layer_decay=0.8: auroc [0-9.]+ \([0-9]+ s\); 2 trainings left, about ", said)
    assert read_status("run").search is None
    assert result(here / "run")["metric"] == "auroc"
    assert result(here / "run")["layer"] == "stages"


def test_what_is_left_is_said_by_the_trainings_that_this_process_did_whole(tmp_path, monkeypatch, capsys):
    sizes = {"one": Size(100, 30), "two": Size(100, 30), "three": Size(100, 30)}
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(search_progress.time, "perf_counter", lambda: clock.now)

    def ended(seconds, whole):
        clock.now += seconds
        said = progress.end(whole)
        return said, json.loads((tmp_path / "p").read_text())

    progress = SearchProgress(tmp_path / "p", sizes, Size(120, 40), [], CPU)
    assert capsys.readouterr().err == "recipe=auto: 4 trainings of 100 to 120 steps, one fewer if the probe is better\n"
    progress = SearchProgress(tmp_path / "p", sizes, Size(100, 40), ["two"], CPU)
    left = "recipe=auto: 3 of 4 trainings of 100 steps are left, one fewer if the probe is better\n"
    assert capsys.readouterr().err == left
    progress.start("one")
    state = {"training": "one", "done": 1, "total": 4, "samples_after": 7000}
    assert ended(10, whole=False) == ("(10 s); 2 trainings left", state)
    progress.start("three")
    state = {"training": "three", "done": 2, "total": 4, "samples_after": 4000}
    assert ended(3600, whole=True) == ("(3600 s); 1 training left, about 1 h 20 min", state)


def test_the_search_keeps_the_least_error():
    search = object.__new__(few_labels._Search)
    search.objective = Classify(best="-ece")
    search._check_metric({"ece": 5.0})
    assert search._score({"ece": 5.0}) == -5
    assert mean_of([math.nan]) < search._score({"ece": 100.0})
    search.objective = Classify(best="auroc")
    assert search._score({"auroc": 5.0}) == 5


@pytest.mark.parametrize(
    ("probe", "finetuned", "kept"),
    [
        ([80, 80, 80], [80, 80, 80], "finetuned"),  # no doubt about the probe
        ([80, 82, 84], [79, 80, 84], "probe"),  # 1 better, 0.58 standard error
        ([80, 88, 72], [79, 80, 80], "finetuned"),  # 0.33 better, 4.6
        ([81], [80], "probe"),  # one fold has no standard error
        ([math.nan, 81], [90, 80], "probe"),
        ([math.nan], [90], "finetuned"),
    ],
)
def test_the_probe_must_be_better_by_a_standard_error(probe, finetuned, kept):
    assert clearly_better(probe, finetuned) == (kept == "probe")


@pytest.mark.parametrize(("held_out", "folds"), [(1, [0]), (10, [0]), (11, [0, 1]), (1000, [0, 1, 2])])
def test_fine_tuning_is_measured_on_as_many_folds_as_it_takes(held_out, folds):
    search = few_labels._Search.__new__(few_labels._Search)
    search.folds = torch.arange(30) % 3
    search.auto = SimpleNamespace(held_out=held_out, folds=3)
    assert search._measured_folds() == folds


@pytest.mark.parametrize(("count", "held"), [(1, "has 1 image and is held out never"), (2, "in 2 of them"), (3, None)])
def test_a_class_with_fewer_images_than_folds_is_named(count, held):
    lines = class_lines(torch.tensor([0] * 9 + [2] * count), ["cat", "cow", "dog"], 3, "auroc")
    assert len(lines) == (held is not None)
    assert held is None or (lines[0].startswith("auto.folds is 3; class dog has ") and lines[0].endswith(held))


def test_top1_of_unbalanced_classes_is_said_to_overlook_the_small_ones():
    counted = [[0] * 300 + [1] * 90, [0] * 270 + [1] * 90, [0] * 147 + [1] * 30 + [2] * 3]
    two, balanced, three = (class_lines(torch.tensor(labels), ["a", "b", "c"], 3, "top1") for labels in counted)
    assert two == [
        "recipe=auto chooses by top1, and class a has 3.33 times the images of class b: a as the answer for every "
        "image is 77 % right; objective.best=auroc counts all classes alike"
    ]
    assert balanced == []
    assert three[0].endswith("is 82 % right; objective.best=balanced_accuracy counts all classes alike")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.eval_every_epochs=1", "trainer.eval_every_epochs must be null with recipe=auto"),
        ("optim.ema_decay=0.9", "optim.ema_decay must be null with recipe=auto"),
        ("auto.folds=1", "auto.folds must be 2 or more"),
        ("auto.layers=[last]", "auto.layers must be a list of pooled, mean, stages, stages_std"),
        ("auto.layer_decays=[1.5]", r"auto.layer_decays must be numbers in \(0, 1\]"),
        ("auto.lrs=[]", "auto.lrs must be a positive number, or a list of them"),
        ("objective=regress", "objective._target_ must be fcmae.tasks.objectives.Classify with recipe=auto"),
    ],
)
def test_what_does_not_fit_the_recipe(override, message):
    with pytest.raises(ConfigError, match=message):
        compose("finetune", ["recipe=auto", "data=synthetic", override])


@pytest.mark.slow
def test_two_ranks_find_the_same(fcmae_here, here):
    fcmae_here(*AUTO, "auto.layers=[pooled]", "auto.held_out=1", "hydra.run.dir=one")
    both = (*AUTO, "auto.layers=[pooled]", "auto.held_out=1", "hydra.run.dir=two")
    said = run_python(here, "-m", "fcmae.cli", *both, ranks=2).stderr
    assert (said.count("recipe=auto: 2 trainings of"), said.count("; 1 training left, about")) == (1, 1)
    one, two = result(here / "one"), result(here / "two")
    assert (one["kept"], one["layer"], one["l2"]) == (two["kept"], two["layer"], two["l2"])
    assert one["probe"]["folds"] == pytest.approx(two["probe"]["folds"])
