"""``data.name=table`` and the objectives that learn numbers of it: multilabel and regress."""

import csv
import dataclasses
import functools
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

import fcmae
from fcmae.cli import main
from fcmae.config import DataConfig, LoaderConfig
from fcmae.config.commands import DataOverrides
from fcmae.config.compose import compose
from fcmae.data.sources import train_source, val_source
from fcmae.data.sources.images import images_at
from fcmae.data.sources.table import TableImages
from fcmae.distributed import World
from fcmae.errors import ConfigError, UsageError
from fcmae.models.objective import Predictions
from fcmae.tasks.objectives import Classify, Multilabel, Regress, Segment, Translate
from tests.conftest import TINY
from tests.results import assert_same, newest

WORLD = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
HEADER = ["image", "kind", "dark", "wide", "age", "split"]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Twelve grey images; dark: 0 or 1, missing once; wide: random; age: the brightness times 100, in years."""
    folder = tmp_path_factory.mktemp("table")
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    lines = []
    for number in range(12):
        value = rng.integers(0, 256)
        Image.fromarray(np.full((20, 20, 3), value, dtype=np.uint8)).save(folder / "images" / f"{number}.png")
        dark = "" if number == 3 else int(value < 128)
        split = "validation" if number > 7 else "train"
        lines.append([f"images/{number}.png", "ab"[number % 2], dark, rng.integers(0, 2), 100 * value / 255, split])
    with (folder / "table.csv").open("w") as file:
        csv.writer(file).writerows([HEADER, *lines])
    return folder / "table.csv"


def edited(table, tmp_path, edit):
    """The table with its lines changed by ``edit``."""
    with table.open() as file:
        lines = edit(list(csv.reader(file)))
    with (tmp_path / "table.csv").open("w") as file:
        csv.writer(file).writerows(lines)
    return tmp_path / "table.csv"


def test_classes_and_splits(table):
    cfg = DataConfig(name="table", path=str(table), label_column="kind")
    train, val = train_source(cfg), val_source(cfg)
    assert (len(train), len(val), train.classes) == (8, 4, ["a", "b"])
    assert [train.label(i) for i in range(4)] == [0, 1, 0, 1]
    assert train[0].image.name == train.describe(0) == str(table.parent / "images" / "0.png")


def test_a_second_table_is_split_like_the_first(table, tmp_path):
    """Otherwise ``data.val_path=`` would measure on the rows that were trained on."""
    test = edited(table, tmp_path, lambda t: [t[0], *([*row[:-1], "test"] for row in t[1:])])
    both = {"name": "table", "path": str(table), "root": str(table.parent)}
    for val_path, rows in ((str(table), 4), (f"{table.parent}/./{table.name}", 4), (str(test), 12)):
        cfg = DataConfig(**both, val_path=val_path)
        assert (len(train_source(cfg)), len(val_source(cfg))) == (8, rows)
    assert len(val_source(DataConfig(**both, val_path=str(table), val_split="train"))) == 8
    with pytest.raises(UsageError, match="whose column split is 'test'; it has train, validation"):
        val_source(DataConfig(**both, val_path=str(table), val_split="test"))


def test_validation_rows_are_never_the_training_rows_unasked(table, tmp_path):
    both = {"name": "table", "root": str(table.parent)}
    named = edited(table, tmp_path, lambda t: [[*t[0][:-1], "Split "], *t[1:]])
    cfg = DataConfig(**both, path=str(named))
    assert (len(train_source(cfg)), len(val_source(cfg))) == (8, 4)
    without = edited(table, tmp_path, lambda t: [row[:-1] for row in t])
    cfg = DataConfig(**both, path=str(without))
    assert len(train_source(cfg)) == 12
    with pytest.raises(UsageError, match=r"table\.csv has no column split, .*; give data\.val_path=TABLE"):
        val_source(cfg)
    assert len(val_source(dataclasses.replace(cfg, val_path=str(without)))) == 12
    with pytest.raises(UsageError, match=r"table\.csv has no rows"):
        train_source(DataConfig(**both, path=str(edited(table, tmp_path, lambda t: t[:1]))))


def test_keys_of_the_command_are_those_of_its_paths(table, tmp_path):
    """``fcmae predict RUN TABLE data.root=FOLDER``: the message that names the key helped nobody."""
    named = edited(table, tmp_path, lambda t: [["img", *t[0][1:]], *t[1:]])
    given = DataOverrides(image_column="img", root=str(table.parent))
    assert len(images_at([str(named)], given, LoaderConfig())) == 12
    given.split = "validation"
    given.extensions = [".png"]
    both = [str(named), str(table.parent / "images")]
    assert [len(source) for source in images_at(both, given, LoaderConfig()).sources] == [4, 12]
    given.extensions = [".scan"]
    with pytest.raises(UsageError, match=r"no images; looked for \.scan"):
        images_at(both, given, LoaderConfig())


def test_semicolons_are_named(table, tmp_path):
    with_semicolons = tmp_path / "table.csv"
    with_semicolons.write_text(table.read_text().replace(",", ";"))
    with pytest.raises(UsageError, match=r"has one column, 'image;kind;.*; write it with commas instead of semicolons"):
        TableImages(with_semicolons)


def test_a_classifier_needs_two_classes(table, tmp_path):
    of_one = edited(table, tmp_path, lambda t: [t[0], *([row[0], "good", *row[2:]] for row in t[1:])])
    data = [f"data.path={of_one}", f"data.root={table.parent}", "data.label_column=kind"]
    cfg = compose("finetune", ["data=table", *data])
    with pytest.raises(UsageError, match=r"data\.path has one class only, 'good'"):
        Classify().fit(train_source(cfg.data), cfg)


def test_a_text_file_tsv_and_parquet_are_the_same(table, tmp_path):
    with table.open() as file:
        lines = list(csv.reader(file))
    (tmp_path / "t.txt").write_text("".join(f"{line[0]}\n" for line in lines[1:]))
    (tmp_path / "t.TSV").write_text("".join("\t".join(line) + "\n" for line in lines))
    root = str(table.parent)
    expected = TableImages(table, label_column=["dark", "age"])
    assert TableImages(tmp_path / "t.txt", root).paths == expected.paths
    pandas = pytest.importorskip("pandas")
    pandas.read_csv(table).to_parquet(tmp_path / "t.parquet")
    for name in ("t.TSV", "t.parquet"):
        source = TableImages(tmp_path / name, root, label_column=["dark", "age"])
        assert source.paths == expected.paths
        torch.testing.assert_close(source.values, expected.values, equal_nan=True, rtol=1e-6, atol=0)
    assert math.isnan(expected.values[3, 0])


def written(folder, content, **arguments):
    """A table with this content beside two images, a.png and b.png."""
    for name in ("a.png", "b.png", "a\nb.png", "a\u2028b.png"):
        Image.fromarray(np.zeros((4, 4, 3), dtype=np.uint8)).save(folder / name)
    (folder / "t.csv").write_bytes(content.encode())
    return TableImages(folder / "t.csv", **arguments)


def test_a_class_may_be_zero_or_false_in_parquet(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    written(tmp_path, "image\na.png\n")
    table = {"image": ["a.png", "b.png"], "kind": [0, 1], "good": [False, True], "gap": [0.0, math.nan]}
    parquet.write_table(arrow.table(table), tmp_path / "t.parquet")
    assert TableImages(tmp_path / "t.parquet", label_column="kind").classes == ["0", "1"]
    assert TableImages(tmp_path / "t.parquet", label_column="good").classes == ["False", "True"]
    assert "empty in row 2" in TableImages(tmp_path / "t.parquet", label_column="gap").unlabelled


def test_classes_that_differ_in_spaces_only_are_refused(tmp_path):
    assert written(tmp_path, "image,kind\na.png, a\nb.png,b \n", label_column="kind").classes == [" a", "b "]
    with pytest.raises(UsageError, match="column kind of .* classes that differ in spaces only: 'a '; remove"):
        written(tmp_path, "image,kind\na.png,a\nb.png,a \n", label_column="kind")


def test_line_ends_within_a_field_belong_to_it(tmp_path):
    source = written(tmp_path, 'image\n"a\nb.png"\na\u2028b.png\n')
    assert [path.rpartition("/")[2] for path in source.paths] == ["a\nb.png", "a\u2028b.png"]


def test_a_table_that_unpacks_to_much_is_refused_before(tmp_path, monkeypatch):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    names = arrow.DictionaryArray.from_arrays(arrow.array(np.zeros(10_000, dtype=np.int32)), ["a" * 1000])
    parquet.write_table(arrow.table({"image": names}), tmp_path / "t.parquet")
    assert (tmp_path / "t.parquet").stat().st_size < 10_000
    monkeypatch.setattr("fcmae.data.sources.table.MAX_BYTES", 5_000_000)
    with pytest.raises(UsageError, match="unpacks to more than 5000000 bytes"):
        TableImages(tmp_path / "t.parquet")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("image\na\0.png\n", r"not in .*: row 1 \('a\\x00.png'\)"),
        ("", "it is empty"),
        ("image,kind\n\na.png,1\n\nb.png\n", "not in line 5"),
        ("image\n" + 100_000 * "a" + "\n", r"row 1 \(a{80}\)"),
        ("image,age\na.png,1e39\n", r"must have numbers, but not in row 1 \('1e39'\)"),
    ],
)
def test_odd_content_is_one_short_line(tmp_path, content, message):
    with pytest.raises(UsageError, match=message) as raised:
        written(tmp_path, content, label_column=["age"] if "age" in content else None)
    assert len(str(raised.value)) < 500


MISTAKES = {
    "column": ({"label_column": "species"}, None, r"data.label_column is 'species'; .* columns image, kind"),
    "image column": ({"image_column": "photo"}, None, "data.image_column is 'photo'"),
    "no number": (
        {"label_column": ["kind"]},
        None,
        r"column kind of .* must have numbers, but not in row 1 \('a'\), 2",
    ),
    "missing": ({}, lambda t: [*t[:2], ["gone.png", *t[2][1:]], *t[3:]], r"not in .*: row 2 \(gone.png\)"),
    "outside": ({}, lambda t: [*t[:2], ["/etc/passwd", *t[2][1:]], *t[3:]], r"outside of .*: row 2 \(/etc/passwd\)"),
    "up": ({}, lambda t: [*t[:2], ["../../x.png", *t[2][1:]], *t[3:]], r"outside of .*: row 2"),
    "cut": ({}, lambda t: [*t[:2], t[2][:2], *t[3:]], "has 6 columns, but not in line 3"),
    "empty": ({}, lambda t: [], "is no table: "),
    "header only": ({}, lambda t: t[:1], "has no rows"),
    "split": ({"split": "test"}, None, "has no row whose column split is 'test'"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_name_the_first_rows(table, tmp_path, name):
    arguments, edit, message = MISTAKES[name]
    path = table if edit is None else edited(table, tmp_path, edit)
    with pytest.raises((UsageError, ConfigError), match=message):
        TableImages(path, str(table.parent), **arguments)


def share(outputs, targets):
    """Two batches, in another order than the source's."""
    order = torch.tensor([3, 4, 5, 0, 1, 2])
    return [Predictions(outputs[o], targets[o], o) for o in (order[:3], order[3:])]


@pytest.mark.parametrize(("objective", "best"), [(Classify, "map"), (Multilabel, "mae"), (Regress, 3), (Regress, "")])
def test_the_metric_of_the_best_checkpoint_is_checked_before_training(objective, best):
    with pytest.raises(ValueError, match=r"best must be one of .*, after - where less is better; got"):
        objective(best=best)
    assert Regress(best="-rmse_age").best == "-rmse_age"


@pytest.mark.parametrize(
    ("objective", "best"),
    [
        (Classify, "-top1"),
        (Multilabel, "-auroc"),
        (Regress, "-r2"),
        (Regress, "-r2_age"),
        (functools.partial(Segment, ["a", "b"]), "-miou"),
        (functools.partial(Segment, ["a", "b"]), "-iou_b"),
        (functools.partial(Translate, 2), "-ssim"),
        (functools.partial(Translate, 2), "-pearson_1"),
    ],
)
def test_the_worst_checkpoint_is_nobodys_best(objective, best):
    message = f"best must be one of .*, after - where less is better; got '{best}', but more of {best[1:]} is better$"
    with pytest.raises(ValueError, match=message):
        objective(best=best)
    assert objective(best=best[1:]).best == best[1:]


def test_a_minus_stays_right_where_less_is_better():
    for minus in ("", "-"):
        assert Classify(best=f"{minus}ece").best == "-ece"
        assert [Regress(best=minus + name).best for name in ("mae", "rmse", "mae_age")] == ["-mae", "-rmse", "-mae_age"]
        assert [Translate(2, best=minus + name).best for name in ("mae", "mae_1")] == ["-mae", "-mae_1"]


@pytest.mark.parametrize(
    ("objective", "columns", "best"),
    [(Multilabel, ["dark", "wide"], "map_dark"), (Regress, ["age"], "mae_age"), (Regress, ["age", "wide"], "-mae_dark"),
     (Classify, "kind", "f1_a"), (Classify, "kind", "top5"), (Classify, "kind", "auroc_a")],
)  # fmt: skip
def test_a_metric_that_is_not_measured_is_refused_before_training(table, objective, columns, best):
    cfg = compose("finetune", [*TINY[:3], "objective=regress"])
    with pytest.raises((ConfigError, ValueError), match=r"best must (be one of|not be top5)"):
        objective(best=best).fit(TableImages(table, label_column=columns), cfg)


def test_the_least_error_is_the_best(table):
    """Also without "-": a run that keeps its worst checkpoint helps nobody."""
    assert [Regress(best=best).best for best in ("mae", "-mae", "rmse_age", "r2")] == [
        "-mae",
        "-mae",
        "-rmse_age",
        "r2",
    ]
    assert (Classify(best="ece").best, Translate(2, best="mae_1").best) == ("-ece", "-mae_1")
    regress = Regress(best="rmse_age")
    regress.fit(TableImages(table, label_column=["age", "wide"]), compose("finetune", [*TINY[:3], "objective=regress"]))


@pytest.mark.parametrize("values", [[0.1] * 7, [1e9, 1e9 + 64, 1e9 + 128], [0.1, math.nan, 0.1]])
def test_a_column_that_float32_cannot_tell_apart_is_refused(values):
    """The mean of 0.1, 0.1, ... differs from 0.1 by a rounding, which must not become the unit of the targets."""
    objective = Regress()
    objective._set_columns(["age"])
    with pytest.raises(UsageError, match="column age of data.path (has one value only|goes from .* to )"):
        objective._fit(torch.tensor(values)[:, None])


@pytest.mark.parametrize("objective", ["multilabel", "regress"])
def test_the_commands_of_the_documentation_train_without_further_keys(objective):
    cfg = compose("finetune", [f"objective={objective}", "data=table", "data.path=t.csv", "data.label_column=[a]"])
    assert (cfg.augment.mixup, cfg.augment.cutmix, cfg.augment.label_smoothing) == (0, 0, 0)
    assert cfg.augment.auto_augment is not None


def test_a_cache_keeps_numbers_and_their_names(table):
    cfg = DataConfig(name="table", path=str(table), label_column=["age", "dark"], cache="ram")
    kept, read = train_source(cfg), train_source(dataclasses.replace(cfg, cache=None))
    assert kept.columns == read.columns == ["age", "dark"]
    torch.testing.assert_close(kept[3].label, read[3].label, equal_nan=True)


def test_metrics_of_labels():
    outputs = torch.tensor([[2.0, -1], [1, 1], [-1, 1], [0.5, 0], [-2, 3], [-3, 2]])
    targets = torch.tensor([[1.0, 1], [0, 1], [0, 1], [1, 1], [0, math.nan], [math.nan, 1]])
    objective = Multilabel()
    objective.load_state_dict({"classes": ["a", "b"]})
    metrics = objective.metrics(share(outputs, targets), WORLD)
    # b has one value only; of a: 1 0 0 1 0 ranked 2 1 -1 .5 -2: precision 1/1 and 2/3; 5 of 6 pairs in order
    assert metrics["map"] == pytest.approx(100 * (1 + 2 / 3) / 2)
    assert metrics["auroc"] == pytest.approx(100 * 5 / 6)
    assert metrics["f1"] == pytest.approx(100 * 0.8)
    loss, _ = objective.loss(outputs, targets)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(outputs[5, 1], targets[5, 1])
    torch.testing.assert_close(loss[5], expected)
    assert loss.isfinite().all()


def test_metrics_of_numbers():
    objective = Regress()
    objective.columns = ["age"]
    objective._set_columns(["age"])
    objective._fit(torch.tensor([[10.0], [20], [math.nan], [30]]))
    assert objective.mean.item() == 20
    predicted, true = (
        torch.tensor([[12.0], [20], [31], [18], [25], [9]]),
        torch.tensor([[10.0], [20], [30], [math.nan], [20], [10]]),
    )
    standard = (predicted - objective.mean) / objective.std, (true - objective.mean) / objective.std
    metrics = objective.metrics(share(*standard), WORLD)
    errors = np.array([2, 0, 1, 5, -1.0])
    spread = np.array([10, 20, 30, 20, 10.0])
    assert metrics["mae"] == pytest.approx(np.abs(errors).mean(), rel=1e-5)
    assert metrics["rmse"] == pytest.approx(np.sqrt((errors**2).mean()), rel=1e-5)
    assert metrics["r2"] == pytest.approx(1 - (errors**2).sum() / ((spread - spread.mean()) ** 2).sum(), rel=1e-5)
    torch.testing.assert_close(objective.predict(standard[0]), predicted)


def test_a_column_without_values_takes_no_part_in_the_means():
    objective = Regress()
    objective._set_columns(["age", "height", "zero"])
    objective._fit(torch.tensor([[0.0, 0, 0], [2, 2, 2]]))
    true = torch.tensor([[1.0, math.nan, 1]] * 5 + [[2.0, math.nan, 1]])
    metrics = objective.metrics(share(true + 1, true), WORLD)
    assert metrics["mae"] == metrics["mae_age"] == metrics["mae_zero"]
    assert math.isnan(metrics["mae_height"])
    assert math.isnan(metrics["r2_zero"])  # all are equal
    assert metrics["r2"] == metrics["r2_age"]


@pytest.mark.parametrize(
    ("objective", "column", "metric"),
    [
        ("multilabel", "[dark,wide]", "auroc"),
        pytest.param("regress", "[age]", "mae", marks=pytest.mark.slow),
        pytest.param("classify", "kind", "top1", marks=pytest.mark.slow),
    ],
)
def test_from_a_table_to_predictions(table, tmp_path, capsys, objective, column, metric):
    """Pretrained on the table's images, fine-tuned on its columns, resumed bit for bit, evaluated, predicted."""
    small = [o for o in TINY if not o.startswith("data")]
    data = ["data=table", f"data.path={table}", "data.image_size=16", "loader.workers=0"]
    pre = [
        "schedule.epochs=1",
        "schedule.warmup_epochs=0",
        "model.decoder_embed_dim=16",
        "trainer.eval_every_epochs=null",
    ]
    assert main(["pretrain", *small, *data, *pre, f"hydra.run.dir={tmp_path}/pre"]) == 0
    args = ["finetune", *[o for o in small if "model" not in o], *data, f"objective={objective}", "augment=none"]
    args += [
        f"data.label_column={column}",
        f"init_from={tmp_path}/pre",
        "schedule.epochs=3",
        "schedule.warmup_epochs=1",
    ]
    assert main([*args, f"hydra.run.dir={tmp_path}/whole"]) == 0
    assert main([*args, f"hydra.run.dir={tmp_path}/run", "trainer.max_steps=1"]) == 75
    assert main([*args, f"hydra.run.dir={tmp_path}/run"]) == 0
    states = [newest(tmp_path / name) for name in ("whole", "run")]
    assert_same(states[0]["model"], states[1]["model"])
    assert states[0]["best"] == states[1]["best"]
    capsys.readouterr()
    assert main(["evaluate", f"checkpoint={tmp_path}/run", "report=null"]) == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out.splitlines()[-1])
    assert result["images"] == 4
    assert metric in result
    assert "of one class" not in printed.err
    other = "kind" if objective == "classify" else "[age,dark,wide]"
    expected = 0 if objective == "classify" else 2
    assert main(["evaluate", f"checkpoint={tmp_path}/run", f"data.label_column={other}"]) == expected
    assert ("the columns of data.val_path are age, dark, wide" in capsys.readouterr().err) == bool(expected)
    folder = ["data.name=imagefolder", f"data.path={table.parent}/images"]
    assert len(fcmae.predict(f"{tmp_path}/run", folder).paths) == 12
    assert fcmae.predict(f"{tmp_path}/run", str(table)).paths == TableImages(table).paths
    images, predicted = str(table.parent / "images"), tmp_path / "predicted.csv"
    assert main(["predict", f"{tmp_path}/run", images, "--out", str(predicted)]) == 0
    names = ["class", "probability", "a", "b"] if objective == "classify" else column[1:-1].split(",")
    assert predicted.read_text().splitlines()[0] == ",".join(["path", *names])
    rows = fcmae.predict(f"{tmp_path}/run", [str(table.parent / "images")])
    assert rows.columns == (["a", "b"] if objective == "classify" else column[1:-1].split(","))
    assert rows.values.shape == (12, len(rows.columns))
    if objective == "classify":
        torch.testing.assert_close(rows.values.sum(1), torch.ones(12))
    elif objective == "multilabel":
        assert ((rows.values > 0) & (rows.values < 1)).all()
    else:
        assert 0 < rows.values.mean() < 100  # years, not standard deviations


@pytest.mark.parametrize(
    ("objective", "column", "message"),
    [
        ("multilabel", "[age]", r"data.label_column: age must be 0, 1 or empty; image \d+ of data.path has"),
        ("multilabel", "kind", r"data.path has no numbers; give data.name=table and data.label_column=\[COLUMN,...\]"),
        ("regress", "[kind]", "column kind of .* must have numbers"),
        ("classify", "[age]", "data.path has no labels: data.label_column is a list"),
        ("regress", "[age,age]", "data.label_column must be .* a list of different ones"),
        ("regress", "[aeg]", "data.label_column is 'aeg'"),
    ],
)
def test_objectives_refuse_other_columns(table, tmp_path, capsys, objective, column, message):
    import re

    args = ["finetune", *TINY, "data=table", f"data.path={table}", f"objective={objective}", "augment=none"]
    assert main([*args, f"data.label_column={column}", f"hydra.run.dir={tmp_path}/run"]) == 2
    assert re.search(message, capsys.readouterr().err)
