"""Sweeps (``--multirun``): every job's own outputs, and a table of what was tried. The commands are stand-ins."""

import csv
import json

import pytest

from fcmae import cli
from fcmae.errors import DiskError, Interrupted, UsageError
from fcmae.sweep import report


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """``stand_in(command, action)`` replaces what a command does."""
    monkeypatch.chdir(tmp_path)
    return lambda command, action: monkeypatch.setitem(cli._HYDRA, command, action)


def table(folder):
    with next(folder.glob("**/results.csv")).open() as file:
        return list(csv.DictReader(file))


def test_a_sweep_ends_with_a_table_of_its_jobs(stand_in, tmp_path, capfd):
    """Of training: the last value of each metric; also of jobs that stopped or failed, whose reason is there."""

    def train(cfg, run_dir):
        lines = [{"step": step, "loss": cfg.seed / step, "lr": 0.1} for step in (1, 2)]
        lines.append({"step": 2, "knn10": 50.0 + cfg.seed})
        (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        if cfg.seed == 2:
            raise Interrupted("stopped after step 2")
        if cfg.seed == 3:
            raise DiskError("the disk is full\nlong story")

    stand_in("pretrain", train)
    args = ["pretrain", "data=synthetic", "seed=1,2,3", "-m", "hydra.sweep.dir=sweep", "optim.lr=1"]
    assert cli.main(args) == 75
    shared = {"job", "overrides", "loss", "knn10", "status", "run directory"}
    rows = table(tmp_path)
    assert all(row.keys() == shared for row in rows)
    assert [(row["job"], row["overrides"], row["loss"], row["knn10"]) for row in rows] == [
        ("0", "seed=1", "0.5", "51.0"),
        ("1", "seed=2", "1.0", "52.0"),
        ("2", "seed=3", "1.5", "53.0"),
    ]
    assert [row["status"] for row in rows] == ["done", "stopped", "failed: the disk is full"]
    assert [row["run directory"] for row in rows] == ["sweep/0", "sweep/1", "sweep/2"]
    said = capfd.readouterr().err
    assert "0    seed=1     0.5   51     done                      sweep/0\n" in said
    assert "the same table: sweep/results.csv\n" in said
    (tmp_path / "sweep" / "1" / "sweep.json").write_text('{"job": 1}')
    with pytest.raises(UsageError, match="without overrides, status, metrics"):
        report(tmp_path / "sweep")


def test_every_job_writes_its_own_results(stand_in, tmp_path, capfd):
    (tmp_path / "run").mkdir()
    outputs = []

    def evaluate(cfg, _):
        outputs.append((cfg.out, cfg.per_class))
        assert cfg.report is None
        return cli._report({"top1": float(cfg.batch_size)}, cfg.out)

    stand_in("evaluate", evaluate)
    args = ["evaluate", "-m", "checkpoint=run", "batch_size=5,6", "out=a/result.json", "per_class=classes.csv"]
    assert cli.main(args) == 0
    assert outputs == [("a/result_0.json", "classes_0.csv"), ("a/result_1.json", "classes_1.csv")]
    assert [json.loads((tmp_path / out).read_text())["top1"] for out, _ in outputs] == [5.0, 6.0]
    assert "job 1: out=a/result_1.json\njob 1: per_class=classes_1.csv\n" in capfd.readouterr().err
    assert [(row["overrides"], row["top1"]) for row in table(tmp_path)] == [
        ("batch_size=5", "5.0"),
        ("batch_size=6", "6.0"),
    ]


@pytest.mark.parametrize("out", ["x.json,y.json", "result_${batch_size}.json"])
def test_outputs_that_differ_already_stay_as_they_are(stand_in, tmp_path, out):
    (tmp_path / "run").mkdir()
    outputs = []
    stand_in("knn", lambda cfg, _: outputs.append(cfg.out))
    assert cli.main(["knn", "-m", "checkpoint=run", "batch_size=5,6", f"out={out}"]) == 0
    assert len(set(outputs)) == 2
    assert not any(name.endswith("_0.json") for name in outputs)


def test_one_run_is_not_numbered(stand_in, tmp_path):
    (tmp_path / "run").mkdir()
    outputs = []
    stand_in("knn", lambda cfg, _: outputs.append(cfg.out))
    assert cli.main(["knn", "checkpoint=run", "out=result.json"]) == 0
    assert outputs == ["result.json"]
    assert not list(tmp_path.glob("**/sweep.json"))
