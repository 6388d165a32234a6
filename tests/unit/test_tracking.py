"""MLflow, artifacts, and what a sweep returns to the sweeper. Servers and sweepers are stand-ins."""

import importlib.util
import json
import sys
from types import SimpleNamespace

import pytest
from PIL import Image

from fcmae import hydra_run
from fcmae.cli import main
from fcmae.loggers.logger import RunLogger
from fcmae.loggers.mlflow import MLflow
from fcmae.loggers.progress import create_progress
from fcmae.sweep import score
from tests.conftest import TINY_FINETUNE
from tests.in_process import unchanged


class Client:
    """mlflow.MlflowClient, as far as it is used."""

    calls: list = []  # noqa: RUF012

    def __init__(self, uri):
        self.calls.append(("uri", uri))

    def get_experiment_by_name(self, name):
        return None

    def create_experiment(self, name):
        return name

    def create_run(self, experiment, run_name):
        self.calls.append(("run", experiment, run_name))
        return SimpleNamespace(info=SimpleNamespace(run_id="abc"))

    def __getattr__(self, name):
        return lambda *args, **kwargs: self.calls.append((name, *args, *kwargs.values()))


@pytest.fixture
def mlflow(monkeypatch):
    entities = SimpleNamespace(Metric=lambda *given: given, Param=lambda *given: given)
    monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace(MlflowClient=Client, entities=entities))
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    monkeypatch.setattr(Client, "calls", [])
    return Client.calls


def test_an_mlflow_run_continues_with_its_run(tmp_path, mlflow):
    (tmp_path / "config.yaml").write_text("name: a\nlogger: {sinks: {own: {_target_: x.Y, key: secret}}}\nseed: 1\n")
    for _ in range(2):
        sink = MLflow(tmp_path, 0, uri="http://server", artifact=True)
        sink.log(3, {"loss": 0.5})
        sink.picture(3, "pixels", Image.new("RGB", (4, 4)))
        (tmp_path / "encoder.safetensors").touch()
        logger = RunLogger([sink, object()], create_progress("a", 0, 1, enabled=False))
        logger.artifact(tmp_path / "missing")
        logger.artifact(tmp_path / "encoder.safetensors")
        sink.close()
    names = [call[0] for call in mlflow]
    assert names.count("run") == 1
    assert names.count("log_artifact") == 2
    assert names[-1] == "set_terminated"
    (params,) = [call[2] for call in mlflow if call[0] == "log_batch" and len(call[2][0]) == 2]
    assert ("logger.sinks.own._target_", "x.Y") in params
    assert "secret" not in str(mlflow)
    metrics = [call[2] for call in mlflow if call[0] == "log_batch" and len(call[2][0]) == 4]
    assert [(name, value, step) for ((name, value, _, step),) in metrics] == [("loss", 0.5, 3)] * 2


@pytest.fixture
def scores(monkeypatch, tmp_path):
    """What the jobs of a sweep return."""
    found = []
    run_job = hydra_run._run_job_of_sweep
    monkeypatch.setattr(hydra_run, "_run_job_of_sweep", lambda *given: found.append(run_job(*given)) or found[-1])
    monkeypatch.chdir(tmp_path)
    with unchanged():
        yield found


def test_jobs_return_the_score_of_the_best_checkpoint(scores, tmp_path):
    assert main([*TINY_FINETUNE, "-m", "schedule.epochs=1", "hydra.sweep.dir=ft"]) == 0
    lines = (tmp_path / "ft" / "0" / "metrics.jsonl").read_text().splitlines()
    assert scores == [max(line["top1"] for line in map(json.loads, lines) if "top1" in line)]


def test_other_scores(tmp_path):
    """Higher is better for every command; without an evaluation it is the last loss."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.75}\n{"step": 2, "loss": 0.5}\n')
    assert score(tmp_path, {}) == -0.5
    assert score(tmp_path, {"images": 3, "auroc": 0.9, "top1": 70}) == 70
    assert score(tmp_path, {"images": 3, "auroc": 0.9}) == 0.9
    assert score(tmp_path / "missing", {}) is None


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("hydra_plugins.hydra_optuna_sweeper") is None, reason="not installed")
@pytest.mark.filterwarnings("default")
def test_optuna_searches(scores, tmp_path):
    search = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", "hydra.sweeper.direction=maximize"]
    rate = "optim.lr=interval(0.0001,0.1)"
    fixed = [word for word in TINY_FINETUNE if not word.startswith("optim.lr")]
    assert main([*fixed, "-m", "schedule.epochs=1", *search, rate, "hydra.sweep.dir=search"]) == 0
    assert len(scores) == 3
    assert "best_value" in (tmp_path / "search" / "optimization_results.yaml").read_text()
