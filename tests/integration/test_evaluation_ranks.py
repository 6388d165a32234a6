"""Evaluation, k-NN and probe come to the same on any number of ranks, also where these do not divide the images."""

import json

import pytest
from PIL import Image

from fcmae.cli import main
from tests.conftest import TINY_FINETUNE, TINY_PRETRAIN, run_python

SCRIPT = """
import json, sys
from fcmae.config import EvaluateConfig, KnnConfig, ProbeConfig, from_dict
from fcmae.evaluation import run
from fcmae import distributed

disconnect, distributed.disconnect = distributed.disconnect, lambda: None  # several commands in one process
ranks = sys.argv[1]
common = {"data": {"length": 31}, "batch_size": 4, "precision": "float32"}
tables = {"per_class": f"per_class_{ranks}.json", "confusion": f"confusion_{ranks}.json", "report": f"report_{ranks}"}
probe = {"checkpoint": "pretrained", **common, "train_batch_size": 8, "epochs": 2, "warmup_epochs": 1}
probe |= {"cache": f"features_{ranks}"}
results = [
    run.evaluate(from_dict(EvaluateConfig, {"checkpoint": "fine", **common, **tables})),
    run.knn(from_dict(KnnConfig, {"checkpoint": "pretrained", **common, "k": [1, 5], "gallery": 17, "cache": None})),
    run.probe(from_dict(ProbeConfig, probe)),
    run.probe(from_dict(ProbeConfig, probe)),  # from the cache
    run.probe(from_dict(ProbeConfig, {**probe, "random_crops": True})),
    run.probe(from_dict(ProbeConfig, {**probe, "solver": "lbfgs", "layer": "stages_std", "l2": [0.1, 1.0]})),
]
disconnect()
if results[0] is not None:
    print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "commands.py").write_text(SCRIPT)
    assert main([*TINY_PRETRAIN, "schedule.epochs=2", f"hydra.run.dir={folder}/pretrained"]) == 0
    assert main([*TINY_FINETUNE, "optim.ema_decay=0.5", f"hydra.run.dir={folder}/fine"]) == 0
    return folder


@pytest.fixture(scope="module")
def alone(folder):
    return run_python(folder, "commands.py", "1")


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_any_number_of_ranks(folder, alone, ranks):
    together = run_python(folder, "commands.py", str(ranks), ranks=ranks)
    expected = json.loads(alone.stdout)
    assert json.loads(together.stdout) == expected
    evaluated, knn, probed, again, _, solved = expected
    assert evaluated["images"] == 31
    assert (knn["gallery"], knn["queries"]) == (17, 31)
    assert probed == again
    assert solved["l2"] in (0.1, 1.0)
    for name in ("per_class", "confusion"):
        assert (folder / f"{name}_{ranks}.json").read_text() == (folder / f"{name}_1.json").read_text()
    files = {file.name: file.read_bytes() for file in (folder / "report_1").iterdir()}
    assert {file.name: file.read_bytes() for file in (folder / f"report_{ranks}").iterdir()} == files
    assert {"worst.png", "reliability.png", "per_class.csv"} <= files.keys()
    matrix = json.loads((folder / "confusion_1.json").read_text())["matrix"]
    assert sum(map(sum, matrix)) == 31
    per_class = json.loads((folder / "per_class_1.json").read_text())
    assert [one["images"] for one in per_class.values()] == [4, *[3] * 9]
    assert 100 * sum(one["right"] for one in per_class.values()) / 31 == pytest.approx(evaluated["ema_top1"])


def test_the_features_are_kept_in_the_run(folder, capfd):
    for _ in range(2):
        assert main(["knn", f"checkpoint={folder}/pretrained", "k=1"]) == 0
    out, err = capfd.readouterr()
    assert (
        len(list((folder / "pretrained" / "features").glob("*.safetensors"))) == 1
    )  # gallery and queries are the same
    assert err.count("24 features read from") == 3
    first, second = map(json.loads, out.splitlines())
    assert first == second == {"knn1": 100.0, "gallery": 24, "queries": 24, "copies": 24}
    assert main(["knn", f"checkpoint={folder}/pretrained", "k=1", "cache=null"]) == 0
    assert "features read from" not in capfd.readouterr().err


def test_labels_of_a_file(folder, capfd):
    (folder / "labels.json").write_text(json.dumps({f"synthetic[{i}]": [i % 10, 0] if i else [] for i in range(24)}))
    args = ["evaluate", f"checkpoint={folder}/fine", f"labels={folder}/labels.json"]
    assert main(args) == 0
    assert json.loads(capfd.readouterr().out)["images"] == 23
    assert main([*args, f"confusion={folder}/c.csv"]) == 2
    assert "need one class per image" in capfd.readouterr().err
    assert main([*args[:2], "per_class=classes.txt"]) == 2
    assert "per_class must be a file named .json or .csv; got 'classes.txt'" in capfd.readouterr().err


def test_knn_is_watched_during_pretraining(tmp_path, capfd):
    watched = ("monitor=knn", "monitor.knn_every_epochs=1", "monitor.knn_k=[1,3]", "monitor.knn_queries=5")
    assert main([*TINY_PRETRAIN, *watched, f"hydra.run.dir={tmp_path}/watched"]) == 0
    assert main([*TINY_PRETRAIN, f"hydra.run.dir={tmp_path}/alone"]) == 0
    lines = {name: (tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("watched", "alone")}
    logged = {name: [json.loads(line) for line in text] for name, text in lines.items()}
    assert [line["step"] for line in logged["watched"] if "knn1" in line] == [3, 6, 9]
    assert all(line["knn1"] == 100 for line in logged["watched"] if "knn1" in line)
    losses = {name: [line["loss"] for line in text if "loss" in line] for name, text in logged.items()}
    assert losses["watched"] == losses["alone"]  # looking leaves no trace


def test_watching_knn_needs_labels(tmp_path, capfd):
    for i in range(8):
        Image.new("RGB", (40, 40), (30 * i, 0, 0)).save(tmp_path / f"{i}.png")
    unlabelled = ("data=imagefolder", f"data.path={tmp_path}", f"data.val_path={tmp_path}")
    assert main([*TINY_PRETRAIN, *unlabelled, "monitor=knn", f"hydra.run.dir={tmp_path}/run"]) == 2
    error = capfd.readouterr().err.strip()
    assert "monitor.knn_every_epochs is 20, but data.path has no labels" in error
    assert "\n" not in error


ONE_CHECKPOINT = """
import json
from fcmae import ranks as launch
from fcmae.config import EvaluateConfig, from_dict
from fcmae.evaluation import run

if launch.detect().rank > 0:
    run.checkpoint.resolve = None  # another rank might find another checkpoint
result = run.evaluate(from_dict(EvaluateConfig, {"checkpoint": "fine", "data": {"length": 31}, "batch_size": 4}))
if result is not None:
    print(json.dumps(result))
"""


def test_all_ranks_take_the_checkpoint_that_the_first_finds(folder, alone):
    (folder / "one.py").write_text(ONE_CHECKPOINT)
    done = run_python(folder, "one.py", ranks=2)
    assert json.loads(done.stdout) == json.loads(alone.stdout)[0]


def test_a_mistake_is_said_once(folder):
    done = run_python(folder, "-m", "fcmae.cli", "knn", "checkpoint=nowhere", ranks=2, check=None)
    assert done.stderr.count("fcmae knn: no checkpoint or run directory nowhere") == 1
