"""``probe solver=lbfgs`` and ``recipe=auto`` on a GPU."""

import json

import pytest
import torch

from fcmae.cli import main
from fcmae.evaluation import logistic
from fcmae.evaluation.logistic import cross_validate, fit, stratified_folds
from tests.conftest import TINY_PRETRAIN, relative_error
from tests.unit.test_few_labels import AUTO
from tests.unit.test_logistic import clusters

pytestmark = pytest.mark.gpu


def test_logistic_regression_agrees_with_the_cpu(monkeypatch):
    monkeypatch.setattr(logistic, "SMALL", 0)
    values, labels = clusters(200)
    folds = stratified_folds(labels, 5, 0)
    on_cpu, on_gpu = (
        cross_validate(values.to(device), labels.to(device), 3, folds, [0.01, 0.1, 1.0]) for device in ("cpu", "cuda")
    )
    assert on_cpu.l2 == on_gpu.l2
    assert list(on_cpu.log_loss.values()) == pytest.approx(list(on_gpu.log_loss.values()), rel=1e-5)
    one, other = (fit(values.to(device), labels.to(device), 3, [0.1])[0.1].weight.cpu() for device in ("cpu", "cuda"))
    assert relative_error(other, one) < 1e-4


def test_the_recipe_runs_and_continues(tmp_path, monkeypatch, capfd):
    """Each fold records CUDA graphs of its own."""
    monkeypatch.chdir(tmp_path)
    assert main([*TINY_PRETRAIN, "schedule.epochs=1", "schedule.warmup_epochs=0", "hydra.run.dir=pre"]) == 0
    auto = [*AUTO, "trainer.device=cuda", "trainer.compile=false", "auto.held_out=60", "auto.lrs=[1e-4,1e-3]"]
    assert main([*auto, "hydra.run.dir=run", "trainer.max_steps=1"]) == 75
    assert main([*auto, "hydra.run.dir=run"]) == 0
    assert "recipe=auto keeps" in capfd.readouterr().err
    assert main(["evaluate", "checkpoint=run@last", "device=cuda"]) == 0
    result = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert result["images"] == 60
    found = json.loads((tmp_path / "run" / "auto" / "chosen.json").read_text())
    assert len(found["finetuned"]) == 2
    assert torch.cuda.memory_allocated() < 2**28
