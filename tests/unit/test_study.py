"""``fcmae study``: each cell is measured once, on nested images, with equal steps, and compared by plain arithmetic."""

import errno
import json
import math
import multiprocessing
import os
import re
import shutil

import pytest
from PIL import Image

import fcmae
from fcmae.config import compose
from fcmae.errors import ConfigError, Interrupted, UsageError
from fcmae.status import read_any
from fcmae.studies import cells, compare, processes
from fcmae.studies.arms import choose_arms, choose_budgets, choose_metric, make_plan, steps_of, training
from fcmae.studies.compare import Budget, Difference, Worth, paired, verdict, worth
from fcmae.tasks.objectives import Classify
from tests.conftest import TINY_PRETRAIN
from tests.dense_files import write_squares
from tests.in_process import unchanged
from tests.unit.holder import held

STUDY = (
    "study",
    "init_from=pre",
    "data=synthetic",
    "data.length=40",
    "loader.workers=0",
    "precision=float32",
    "labels=[all,2,99]",
    "steps=2",
    "auto.folds=2",
    "auto.held_out=10",
    "auto.lrs=[1e-3]",
    "auto.layer_decays=[0.8]",
    "auto.l2=[0.1]",
    "auto.layers=[pooled]",
    "hydra.run.dir=study",
)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    from fcmae.cli import main

    folder = tmp_path_factory.mktemp("study")
    short = ("schedule.epochs=1", "schedule.warmup_epochs=0", "trainer.eval_every_epochs=null")
    assert main([*TINY_PRETRAIN, *short, f"hydra.run.dir={folder}/pre"]) == 0
    return folder / "pre"


@pytest.fixture
def here(pretrained, tmp_path, monkeypatch):
    shutil.copytree(pretrained, tmp_path / "pre")
    monkeypatch.chdir(tmp_path)
    return tmp_path


ARMS = ("random_probe", "pretrained_probe", "scratch", "finetuned", "auto")


def test_a_study_of_classes(fcmae_here, here):
    arms = ["random_probe", "finetuned", "auto"]
    done = fcmae_here(*STUDY, "labels=[2,99]", "seeds=1", f"arms=[{','.join(arms)}]")
    assert "labels=99 left out: class 0 has 4" in done.stderr
    assert "3 of 3: auto, 2 per class, seed 0: top1 " in done.stderr
    found = json.loads((here / "study" / "study.json").read_text())
    assert found["sentence"] in done.stdout
    assert "| finetuned | " in done.stdout
    assert [(each["label"], each["images"], each["steps"]) for each in found["budgets"]] == [(2, 20, 2)]
    assert [result["arm"] for result in found["results"]] == arms
    assert {result["metrics"]["images"] for result in found["results"]} == {40}
    assert found["results"][-1]["kept"] in ("probe", "finetuned")
    assert (here / "study" / "study.png").stat().st_size > 1000
    assert not list((here / "study" / "runs").glob("*/checkpoints"))
    assert not list((here / "study" / "runs").glob("*/evaluation"))  # its plots would take longer than training
    assert "init_from: checkpoint pre/" in (here / "study" / "logs" / "finetuned_2_0.log").read_text()


def full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # of a file that is open; it has no name


def test_a_study_that_is_cut_continues_and_measures_every_cell_once(fcmae_here, here, monkeypatch):
    measured = []

    def fake(plan, cell, folder, most=4):
        if len(measured) == most:
            raise Interrupted("stopped by SIGTERM")
        measured.append(cell.name)
        return {"top1": 50.0 + cell.seed, "images": 40}, {}

    monkeypatch.setattr("fcmae.studies.run.draw", lambda *a: None)
    monkeypatch.setattr(cells, "_measured", full_disk)
    full = fcmae_here(*STUDY, "seeds=1", check=1).stderr
    assert re.search(
        r"fcmae study: .*study cannot be written: No space left on device; the same command continues", full
    )
    monkeypatch.setattr(cells, "_measured", fake)
    stopped = fcmae_here(*STUDY, "seeds=1", check=75).stderr
    assert "4 of 10 measured; auto_all_0: stopped by SIGTERM; the same command with hydra.run.dir=" in stopped
    assert not (here / "study" / "study.json").exists()
    assert read_any(here / "study").progress == "4/10"
    with held(here / "study"):
        assert "study is in use by another run" in fcmae_here(*STUDY, "seeds=1", check=2).stderr
    monkeypatch.setattr(cells, "_measured", lambda *a: fake(*a, most=99))
    fcmae_here(*STUDY, "seeds=1")
    assert measured == [f"{arm}_{label}_0" for label in ("all", 2) for arm in ARMS]
    changed = fcmae_here(*STUDY, "seeds=1", "steps=3", check=2).stderr
    assert "give its values again, or another hydra.run.dir:\n  steps: 2 -> 3" in changed
    assert read_any(here / "study").state == "done"
    measured.clear()
    more = fcmae_here(*STUDY, "seeds=2", "labels=[2]", "arms=[random_probe,pretrained_probe]")  # of the same study
    assert "After ± is one standard deviation over the seeds" in more.stdout
    assert measured == ["random_probe_2_1", "pretrained_probe_2_1"]


def test_scores_that_are_not_defined(fcmae_here, here, monkeypatch):
    """As of an area under the curve of one class: other JSON readers take the files, and a second look is as the
    first."""
    scores = {"scratch_2_0": math.nan, "finetuned_2_0": 3.0, "scratch_2_1": math.inf}

    def fake(plan, cell, folder):
        return {"top1": scores.get(cell.name, 50.0 + cell.seed), "images": 40}, {}

    monkeypatch.setattr(cells, "_measured", fake)
    study = (*STUDY, "seeds=3", "labels=[2]", "arms=[scratch,finetuned]", "objective.best=top1")
    fcmae_here(*study)
    first = (here / "study" / "study.json").read_text()
    scratch = [each["metrics"]["top1"] for each in strict(first)["results"] if each["arm"] == "scratch"]
    assert scratch == [None, None, 52]
    assert strict((here / "study" / "cells" / "scratch_2_0.json").read_text())["metrics"]["top1"] is None
    assert "(+0)" in strict(first)["sentence"]
    fcmae_here(*study)
    assert (here / "study" / "study.json").read_text() == first


def test_a_metric_that_is_never_defined(fcmae_here, here, monkeypatch):
    monkeypatch.setattr(cells, "_measured", lambda *given: ({"top1": math.nan, "images": 40}, {}))
    for seeds in (1, 2):
        fcmae_here(*STUDY, f"seeds={seeds}", "labels=[2]", "arms=[scratch,finetuned]", "objective.best=top1")
        found = strict((here / "study" / "study.json").read_text())
        expected = "nothing to compare: top1 is not defined for finetuned and an arm without pretraining"
        assert (found["sentence"], len(found["table"])) == (expected, 2)
    fcmae_here("report", "study", "--out", "page.html")
    assert "top1 is not defined" in (here / "page.html").read_text()


def strict(text):
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_in_python(here, monkeypatch):
    monkeypatch.setattr("fcmae.studies.run.draw", lambda *a: None)
    monkeypatch.setattr(cells, "_measured", lambda plan, cell, _: ({"top1": 50.0, "images": 40}, {}))
    with unchanged():
        arms = ["scratch", "finetuned"]
        found = fcmae.study("pre", {"length": 40}, out="study", overrides=["data=synthetic"], labels=[2], arms=arms)
    assert found["arms"] == ["scratch", "finetuned"]
    assert "no gain at 2 per class" in found["sentence"]
    assert (here / "study" / "study.json").exists()


def test_other_weights_under_the_same_name_are_refused(here, pretrained):
    plan = make_plan(compose("study", list(STUDY[1:-1])))
    cells.begin(plan, here / "study")
    cells.begin(plan, here / "study")
    file = next((here / "pre" / "checkpoints").glob("*.pt"))
    file.write_bytes(file.read_bytes()[:-1] + b"\0")  # the checksum is at the end
    with pytest.raises(UsageError, match="weights of pretrained: others"):
        cells.begin(plan, here / "study")


def test_every_arm_of_a_budget_has_the_same_images_and_steps(here):
    plan = make_plan(compose("study", [*STUDY[1:-1], "others={again: pre}", "seeds=[5]"]))
    assert [arm.name for arm in plan.arms][-3:] == ["again_probe", "again_finetuned", "again_auto"]
    small = [cell for cell in plan.cells() if cell.budget.label == 2]
    assert len(small) == 8
    for cell in small:
        cfg = training(plan, cell)
        assert (cfg.data.labels_per_class, cfg.seed, cfg.optim.global_batch_size) == (2, 5, 20)
        assert cfg.schedule.epochs == 2
        assert cfg.trainer.eval_every_epochs is None
        assert (cfg.init_from is None) == cell.arm.name.startswith(("random", "scratch"))
        assert cfg.model.dims == plan.cfg.model.dims
        assert cfg.objective["best"] == plan.metric == "top1"
    assert training(plan, small[2]).optim.layer_decay is None
    assert training(plan, small[3]).optim.layer_decay == 0.9


def test_the_length_of_a_training():
    cfg = compose("study", ["data=synthetic"])
    assert [steps_of(cfg, images) for images in (10, 50, 320, 60_000)] == [200, 200, 1000, 2000]
    assert steps_of(compose("study", ["data=synthetic", "steps=7"]), 60_000) == 7


class Source:
    def __init__(self, *counts):
        self.labels = [label for label, count in enumerate(counts) for _ in range(count)]
        self.classes = [f"c{number}" for number in range(len(counts))]

    def __len__(self):
        return len(self.labels)

    def label(self, index):
        return self.labels[index]


@pytest.mark.parametrize(
    ("counts", "best", "metric"),
    [
        ((20, 22), "top1", "top1"),
        ((70, 30), "top1", "auroc"),
        ((70, 30, 30), "top1", "balanced_accuracy"),
        ((70, 30), "f1", "f1"),
    ],
)
def test_unequal_classes_choose_the_metric(counts, best, metric):
    cfg = compose("study", ["data=synthetic"])
    assert choose_metric(cfg, Classify(best), Source(*counts), True)[0] == metric
    given = compose("study", ["data=synthetic", "metric=average_precision"])
    assert choose_metric(given, Classify(best), Source(*counts), True)[0] == "average_precision"


@pytest.mark.parametrize("metric", ["-top1", "-auroc"])
def test_a_metric_that_should_be_high_takes_no_minus(metric):
    cfg = compose("study", ["data=synthetic", f"metric={metric}"])
    with pytest.raises(ConfigError, match=f"^metric must be {metric[1:]}, of which more is better; got {metric}$"):
        choose_metric(cfg, Classify(), Source(20, 22), True)
    for less in ("ece", "-ece"):
        cfg.metric = less
        assert choose_metric(cfg, Classify(), Source(20, 22), True)[0] == "-ece"
    cfg.metric, cfg.objective = metric, {"_target_": "mine.py:Own"}
    assert choose_metric(cfg, Classify(), Source(20, 22), False)[0] == metric


def test_budgets_that_the_images_have():
    cfg = compose("study", ["data=synthetic", "labels=[1,5,10,all]"])
    budgets, notes = choose_budgets(cfg, Source(8, 30), True)
    assert budgets == [Budget(5, "5 per class", 10), Budget("all", "all 38 images", 38)]
    assert len(notes) == 2
    budgets, notes = choose_budgets(cfg, Source(10), False)
    assert budgets == [Budget(1, "1 images", 1), Budget(5, "5 images", 5), Budget("all", "all 10 images", 10)]
    with pytest.raises(UsageError, match="class c0 has 3"):
        choose_budgets(compose("study", ["data=synthetic", "labels=[5]"]), Source(3, 30), True)


def test_what_arms_need():
    with pytest.raises(ConfigError, match="init_from is not set"):
        choose_arms(compose("study", ["data=synthetic"]), True)
    with pytest.raises(ConfigError, match="arms must be without auto"):
        choose_arms(compose("study", ["data=synthetic", "init_from=x", "arms=[auto]"]), False)
    names = [arm.name for arm in choose_arms(compose("study", ["data=synthetic", "init_from=x"]), False)]
    assert names == ["random_probe", "pretrained_probe", "scratch", "finetuned"]


def test_too_few_numbers_are_refused_before_anything_is_measured(fcmae_here, tmp_path):
    """Of a table that has the validation images, too."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    rows = [f"a.png,{number},{'train' if number else 'validation'}" for number in range(5)]
    (tmp_path / "t.csv").write_text("\n".join(["image,age,split", *rows, ""]))
    study = ("study", "data=table", "data.path=t.csv", "objective=regress", "data.label_column=[age]", "arms=[scratch]")
    told = fcmae_here(*study, "labels=[1,2,all]", "seeds=2", "hydra.run.dir=study", check=2).stderr
    assert (
        "labels=1 is too small: with seed 0, data.label_column: the column age of data.path has one value only" in told
    )


@pytest.mark.slow
def test_a_study_of_masks(fcmae_here, here):
    """Budgets in images; the probes train the head alone."""
    write_squares(here / "train", 6)
    write_squares(here / "val", 3, seed=1)
    fcmae_here(
        *("study", "init_from=pre", "objective=segment", "objective.classes=3", "objective.width=8", "labels=[2]"),
        *("data.path=train/images", "data.target_path=train/masks", "data.val_path=val/images"),
        *("data.val_target_path=val/masks", "seeds=1", "steps=1", "loader.workers=0", "precision=float32"),
        *("arms=[random_probe,finetuned]", "hydra.run.dir=study"),
    )
    found = json.loads((here / "study" / "study.json").read_text())
    assert found["metric"] == "miou"
    assert [(result["arm"], result["images"]) for result in found["results"]] == [("random_probe", 2), ("finetuned", 2)]


def test_the_interval_is_the_paired_t_interval():
    difference = paired({0: 3.0, 1: 5.0, 2: 7.0, 9: 0.0}, {0: 1.0, 1: 2.0, 2: 6.0})
    assert difference.mean == 2.0
    assert difference.half == pytest.approx(4.303 * 1.0 / math.sqrt(3))
    assert difference.sure == 0
    assert paired({0: 3.0}, {0: 1.0}) == Difference(2.0, None, 1)
    assert paired({0: 3.0}, {1: 1.0}) is None
    assert (Difference(2.0, 1.9, 3).sure, Difference(-2.0, 1.9, 3).sure) == (1, -1)


def test_how_many_labels_a_score_is_worth():
    curve = [(10, 50.0), (40, 60.0), (160, 58.0), (640, 80.0)]
    assert worth(curve, 10, 60.0) == Worth(4.0)
    assert worth(curve, 10, 55.0).factor == pytest.approx(2.0)
    assert worth(curve, 40, 70.0).factor == pytest.approx(8.0)  # 58 counts as 60
    assert worth(curve, 160, 81.0) == Worth(4.0, "at least")
    assert worth(curve, 40, 45.0) == Worth(0.25, "at most")
    assert str(compare.mean_worth([Worth(2.0), Worth(8.0, "at least")])) == "at least 4.0"


BUDGETS = [Budget(10, "10 per class", 100), Budget("all", "all 1000 images", 1000)]


def table(few, many):
    return {
        "10": {"scratch": {0: 50.0, 1: 51.0, 2: 50.0}, "auto": few},
        "all": {"scratch": {0: 70.0, 1: 71.0, 2: 70.0}, "auto": many},
    }


@pytest.mark.parametrize(
    ("few", "many", "said"),
    [
        ((60, 61, 60), (75, 77, 75), "pretraining is worth 3.2 times the labels: +10.0 ± 0.0 at 10 per class, +5.3"),
        (
            (80, 81, 80),
            (70, 71, 69),
            "worth at least 10.0 times the labels: +30.0 ± 0.0 at 10 per class; no gain at all",
        ),
        ((50, 50, 51), (69, 71, 70), "no gain at 10 per class (+0 ± 2.5), all 1000 images"),
        ((40, 40, 41), (80, 81, 80), "pretraining brings +10.0 ± 0.0 at all 1000 images; pretraining loses: -10.0"),
    ],
)
def test_the_sentence(few, many, said):
    found = verdict(
        table(dict(enumerate(few)), dict(enumerate(many))), BUDGETS, "auto", ["random_probe", "scratch"], "top1"
    )
    assert said in found.sentence
    assert found.sentence.endswith("(auto against the best of random_probe and scratch, top1)")
    assert found.rivals["10"] == "scratch"


def test_nothing_to_compare():
    scores = table({}, {})
    assert verdict(scores, BUDGETS, "auto", ["scratch"], "top1").sentence == "nothing to compare: auto is not measured"
    assert verdict(scores, BUDGETS, "auto", [], "top1").sentence == "nothing to compare: no arm has random weights"
    assert (
        verdict(scores, BUDGETS, "", ["scratch"], "top1").sentence
        == "nothing to compare: no arm has pretrained weights"
    )


def test_less_is_better_keeps_its_own_sign_in_the_table():
    scores = {"all": {"scratch": {0: -4.0, 1: -4.0}}}
    lines = compare.markdown(scores, BUDGETS[1:], ["scratch"], "-mae")
    assert lines[0] == "| mae | all 1000 images |"
    assert lines[2] == "| scratch | 4.0 ± 0.0 |"


@pytest.mark.slow
def test_processes_share_the_cells(here, monkeypatch):
    """Two processes, as on two GPUs, measure what one does; one that fails says why."""
    monkeypatch.setattr(processes, "devices", lambda plan: ["", ""])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as this process: other numbers of threads round otherwise
    plan = make_plan(compose("study", [*STUDY[1:-1], "labels=[2]", "seeds=1", "arms=[scratch,finetuned]"]))
    cells.begin(plan, here / "study")
    done = {}
    processes.measure_all(plan, plan.cells(), here / "study", lambda cell, result: done.setdefault(cell, result))
    assert set(done) == set(plan.cells())
    (here / "alone").mkdir()
    cells.begin(plan, here / "alone")
    cell = plan.cells()[1]
    (here / "pre").rename(here / "kept")
    (here / "study" / "cells" / f"{cell.name}.json").unlink()
    shutil.rmtree(here / "study" / "runs")
    (here / "study" / "runs").mkdir()
    fork = multiprocessing.get_context("fork")  # importing everything once more takes seconds
    monkeypatch.setattr(processes.multiprocessing, "get_context", lambda method: fork)
    with pytest.raises(processes.StudyError, match="finetuned_2_0: .*pre"):
        processes.measure_all(plan, [cell], here / "study", lambda *a: None)
    (here / "kept").rename(here / "pre")
    monkeypatch.setattr(processes, "devices", lambda plan: [])
    alone = {}
    with unchanged():
        processes.measure_all(plan, [cell], here / "alone", lambda cell, result: alone.setdefault(cell, result))
    assert alone[cell]["metrics"] == done[cell]["metrics"]
