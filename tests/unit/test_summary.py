"""What ``fcmae evaluate`` prints and writes beside its metrics."""

import csv
import json
import math
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn
from torchmetrics.functional import classification as of

from fcmae.config import DataConfig, LoaderConfig
from fcmae.data.sources import ImageFolder
from fcmae.distributed import World
from fcmae.errors import ImageError, UsageError
from fcmae.evaluation import plots as plots_of
from fcmae.evaluation import reports, summary
from fcmae.evaluation.class_metrics import binary_areas
from fcmae.evaluation.classify import predictions
from fcmae.evaluation.summary import Recorder, folder_of, worst_of
from fcmae.models.objective import Objective, Predictions, Report
from fcmae.plugins import members
from fcmae.tasks.objectives import Multilabel, Regress
from tests.conftest import TINY_FINETUNE
from tests.dense_files import write_squares

CPU = World(0, 1, 0, 1, torch.device("cpu"))


def rows(file):
    with open(file, newline="") as text:
        return list(csv.DictReader(text))


def test_a_row_per_class_is_torchmetrics():
    labels = torch.randint(4, (90,))
    logits = torch.randn(90, 4) + 2 * torch.eye(4)[labels]
    labels[5] = -1
    report, known = reports.of_classes(logits, labels, list("abcd")), labels >= 0
    given = (logits[known], labels[known], 4)
    for name, metric in (
        ("precision", of.multiclass_precision), ("recall", of.multiclass_recall), ("f1", of.multiclass_f1_score),
        ("auroc", of.multiclass_auroc), ("average_precision", of.multiclass_average_precision),
    ):  # fmt: skip
        expected = 100 * metric(*given, average="none")
        assert [row[name] for row in report.per_class.values()] == pytest.approx(expected.tolist(), rel=1e-5), name
    assert sum(row["images"] for row in report.per_class.values()) == 89
    assert list(report.plots) == ["confusion", "roc", "precision_recall", "reliability"]
    worst = worst_of(report.errors)
    losses = torch.nn.functional.cross_entropy(logits, labels.clamp(min=0), reduction="none")
    wrong = known & (logits.argmax(1) != labels)
    assert losses[worst].tolist() == losses[wrong].sort(descending=True).values[: len(worst)].tolist()
    assert report.caption(worst[0]).startswith(f"true: {'abcd'[labels[worst[0]]]}\npredicted: ")


def test_no_area_is_above_100_percent():
    """Here torchmetrics has 1.0000001."""
    score, truth = torch.linspace(-1, 1, 13), (torch.arange(13) > 10).float()
    labels = Multilabel()
    labels._set_columns(["a"])
    assert labels.metrics([Predictions(score[:, None], truth[:, None], torch.arange(13))], CPU)["auroc"] == 100
    assert binary_areas(score, truth)["auroc"] == 1


def test_labels_and_numbers_that_are_missing_do_not_count():
    target = torch.tensor([[1, 0], [0, math.nan], [1, 1], [0, 0.0]])
    labels = Multilabel()
    labels._set_columns(["a", "b"])
    report = labels.report(Predictions(torch.tensor([[3.0, 3], [-2, 5], [-1, 1], [-3, -3]]), target, None))
    assert report.per_class["a"] == {"images": 4, "positive": 2, "precision": 100, "recall": 50,
                                     "f1": pytest.approx(200 / 3), "auroc": 100, "average_precision": 100}  # fmt: skip
    assert report.per_class["b"]["images"] == 3
    assert worst_of(report.errors) == [0, 2]
    assert report.caption(0) == "b: 0, predicted 0.95"
    numbers = Regress()
    numbers._set_columns(["x", "y"])
    numbers.mean, numbers.std = torch.tensor([10.0, 0]), torch.tensor([2.0, 1])
    target = torch.tensor([[0, 0], [1, math.nan], [0, 1.0]])
    report = numbers.report(Predictions(torch.tensor([[1.0, 0], [0, 0], [0, 3]]), target, None))
    assert report.per_class["x"]["mae"] == pytest.approx(4 / 3)
    assert report.per_class["y"]["mae"] == pytest.approx(1)
    assert worst_of(report.errors) == [1, 2, 0]
    assert report.caption(1) == "x: 12\npredicted: 10"
    assert list(report.plots) == ["scatter"]


def test_what_is_recorded_is_in_the_order_of_the_source():
    logits, labels, places = torch.randn(7, 3), torch.arange(7), torch.randperm(7)
    recorder = Recorder([Predictions(logits[i], labels[i], i) for i in places.split(3)], CPU)
    assert len(list(recorder)) == 3
    found = recorder.gathered()
    assert found.outputs.equal(logits)
    assert found.targets.equal(labels)
    assert Recorder([], CPU).gathered() is None
    other = Recorder([Predictions({"boxes": logits}, labels, places)], CPU)  # as an objective of one's own may give
    assert len(list(other)) == 1
    assert other.gathered() is None


def test_a_table_leaves_classes_out_and_has_the_averaged_weights():
    text = summary.table({"miou": 50.123, "iou_sky": 1, "ema_miou": 51, "ema_iou_sky": 2, "images": 3}, ["sky"])
    assert text.split() == ["metric", "value", "ema", "miou", "50.123", "51", "images", "3"]


def test_metrics_alone(tmp_path, capfd):
    """As with accepted labels."""
    metrics = {"map": 41.5, "map_car": 3.0, "images": 7, "ece": math.nan}
    summary.describe(metrics, Report(), ["car"])
    summary.write(tmp_path / "report", metrics, Report())
    table = {row["metric"]: row["value"] for row in rows(tmp_path / "report" / "metrics.csv")}
    assert table == {"map": "41.5", "map_car": "3.0", "images": "7", "ece": ""}
    written = json.loads((tmp_path / "report" / "metrics.json").read_text(), parse_constant=pytest.fail)
    assert written == {**metrics, "ece": None}
    assert [line.split() for line in capfd.readouterr().err.splitlines()][1:3] == [["map", "41.5"], ["images", "7"]]


def test_reports_belong_to_a_run(tmp_path):
    assert folder_of("run", tmp_path / "run" / "checkpoints" / "step_1.pt") is None  # there is no such folder
    (tmp_path / "run").mkdir()
    assert folder_of("run", tmp_path / "run" / "checkpoints" / "step_1.pt") == tmp_path / "run" / "evaluation"
    assert folder_of("run", tmp_path / "best.pt") is None
    assert folder_of(None, tmp_path / "run" / "checkpoints" / "step_1.pt") is None


def test_an_objective_needs_no_report():
    """Classes written before there were reports, which need not inherit from Objective."""
    assert "report" not in members(Objective)[0]
    recorder = Recorder([Predictions(torch.randn(2, 1), torch.randn(2), torch.arange(2))], CPU)
    list(recorder)
    summary.finish_images(None, SimpleNamespace(), {"error": 1.0}, recorder, None, None, 1, [])


def test_a_report_of_a_classifier(fcmae_here, tmp_path, monkeypatch):
    fcmae_here(*TINY_FINETUNE, "schedule.epochs=1", "optim.ema_decay=0.5", "hydra.run.dir=run")
    evaluate = ("evaluate", "checkpoint=run", "loader.workers=0", "data.length=30", "batch_size=7")
    done = fcmae_here(*evaluate, "report=run", "confusion=confusion.csv")
    folder, metrics = tmp_path / "run" / "evaluation", json.loads(done.stdout)
    assert sorted(file.name for file in folder.iterdir()) == [
        "confusion.png", "metrics.csv", "metrics.json", "per_class.csv", "precision_recall.png", "reliability.png",
        "roc.png", "worst.csv", "worst.png"]  # fmt: skip
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    assert {row["metric"]: float(row["value"]) for row in rows(folder / "metrics.csv")} == metrics
    assert f"ece {metrics['ece']:.5g} {metrics['ema_ece']:.5g}" in " ".join(done.stderr.split())
    per_class = rows(folder / "per_class.csv")
    assert sum(int(row["images"]) for row in per_class) == 30
    recalls = [float(row["recall"]) for row in per_class]
    assert sum(recalls) / len(recalls) == pytest.approx(metrics["ema_balanced_accuracy"])
    wrong = 30 - round(0.3 * metrics["ema_top1"])
    assert len(rows(folder / "worst.csv")) == min(16, wrong)
    with Image.open(folder / "worst.png") as picture:
        assert picture.width > 700
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    told = fcmae_here(*evaluate, "report=elsewhere").stderr
    assert "no plots: matplotlib is missing; pip install 'fcmae[plots]'" in told
    assert sorted(file.name for file in (tmp_path / "elsewhere").iterdir()) == [
        "metrics.csv", "metrics.json", "per_class.csv", "worst.csv", "worst.png"]  # fmt: skip
    assert (
        "report must be a new folder, or one with an older report" in fcmae_here(*evaluate, "report=.", check=2).stderr
    )
    (tmp_path / "metrics.json").write_text("not a result")
    assert "report must be a new file or JSON" in fcmae_here(*evaluate, "report=.", check=2).stderr


def test_a_report_of_maps(fcmae_here, tmp_path):
    folder = write_squares(tmp_path / "squares", 5)
    data = (f"data.path={folder}/images", f"data.target_path={folder}/masks", f"data.val_path={folder}/images")
    of = ("objective=segment", "objective.classes=[bg,red,green]", "objective.width=8", "data.name=imagefolder")
    fcmae_here(*TINY_FINETUNE, *data, *of, "schedule.epochs=1", "optim.global_batch_size=5", "hydra.run.dir=run")
    done = fcmae_here("evaluate", "checkpoint=run", "report=run", "loader.workers=0", "batch_size=3")
    report, metrics = tmp_path / "run" / "evaluation", json.loads(done.stdout)
    assert sorted(file.name for file in report.iterdir()) == [
        "confusion.png", "metrics.csv", "metrics.json", "per_class.csv", "worst.csv", "worst.png"]  # fmt: skip
    per_class = {row["class"]: row for row in rows(report / "per_class.csv")}
    assert float(per_class["red"]["iou"]) == pytest.approx(metrics["iou_red"])
    assert float(per_class["bg"]["dice"]) == pytest.approx(metrics["dice_bg"])
    worst = [float(row["error"]) for row in rows(report / "worst.csv")]
    assert worst == sorted(worst, reverse=True)
    with Image.open(report / "worst.png") as picture:
        assert picture.height == 5 * (40 + 4) + 4 + 16
        assert (242, 85, 85) in {colour for _, colour in picture.getcolors(2**16)}  # of bg
    assert 100 * sum(worst) / 5 == pytest.approx(100 - metrics["accuracy"])  # all have as many labelled pixels


def test_the_largest_image_is_that_of_loader_max_pixels_in_evaluation_too(tmp_path):
    (tmp_path / "a").mkdir()
    Image.new("RGB", (20, 20)).save(tmp_path / "a" / "x.png")
    source, data, too_large = ImageFolder(tmp_path), DataConfig(image_size=16), "20x20 pixels; loader.max_pixels is 399"
    loaders = [LoaderConfig(workers=0, max_pixels=most) for most in (399, 400)]
    with pytest.raises(UsageError, match=too_large):
        next(predictions(nn.Flatten(), source, data, loaders[0], 1, "float32", CPU))
    assert next(predictions(nn.Flatten(), source, data, loaders[1], 1, "float32", CPU)).outputs.shape == (1, 768)
    with pytest.raises(ImageError, match=too_large):
        summary.write_worst(tmp_path, Report(errors=torch.ones(1)), source, torch.zeros(1), data, 399)


def test_a_class_of_any_name_is_one_line():
    rows = {name: {"recall": 50.0} for name in ("on", "c\nd")}
    assert [line.split() for line in summary.class_table(rows).splitlines()[1:]] == [["on", "50"], ["'c\\nd'", "50"]]


def test_plots_of_classes_of_any_name(tmp_path):
    """matplotlib takes $ for formulas, leaves names that begin with _ out of legends, and refuses what is no UTF-8."""
    pytest.importorskip("matplotlib")
    names = ["$\\frac{$x", "_under", "\udcff\t", "\N{CJK UNIFIED IDEOGRAPH-65E5}", "n" * 200]
    right = torch.arange(5).repeat(2)
    drawings = dict(reports.of_classes(torch.eye(5)[right] + 0.1, right, names).plots)

    def with_legend(figure):
        drawings["roc"](figure)
        assert len(figure.axes[0].get_legend().get_texts()) == len(names)

    truth = torch.arange(3.0)
    plots = {"confusion": drawings["confusion"], "with_legend": with_legend}
    plots["scatter"] = lambda figure: plots_of.scatter(figure, {"$a_{$": (truth, truth)})
    summary.draw(tmp_path, plots)
    assert {file.stem for file in tmp_path.iterdir()} == set(plots)
