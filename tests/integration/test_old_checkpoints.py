"""Checkpoints that version 0.1.0 wrote (tests/old) resume, fine-tune, evaluate and export."""

import json
import shutil

import pytest
import torch

import fcmae
from fcmae.cli import main
from tests.conftest import TESTS
from tests.results import metrics_of, newest

OLD = TESTS / "old"
COMMON = (
    *("model=demo", "model.dims=[4,6,8,12]", "model.depths=[1,1,1,1]", "data=synthetic", "data.image_size=32"),
    *("data.length=24", "loader.workers=0", "optim.global_batch_size=8", "optim.lr=1e-3", "precision=float32"),
    *("trainer.log_every=1", "optim.ema_decay=0.5", "trainer.checkpoint_every_epochs=1"),
    *("trainer.keep_checkpoints=1", "logger=quiet", "logger.progress=false"),
)
COMMANDS = {
    "pretrain": (
        *COMMON,
        *("model.decoder_embed_dim=8", "schedule.epochs=3", "schedule.warmup_epochs=1"),
        "trainer.eval_every_epochs=null",
    ),
    "finetune": (*COMMON, "augment=none", "schedule.epochs=3", "schedule.warmup_epochs=0", "init_from=pretrain"),
}


@pytest.fixture(autouse=True)
def old_runs(tmp_path, monkeypatch):
    """Copies of the runs in the current folder."""
    shutil.copytree(OLD, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS)
def test_an_old_run_resumes(capsys, old_runs, command):
    if command == "finetune":
        shutil.rmtree("pretrain")  # init_from, which a run with a checkpoint of its own does without
    assert main([command, *COMMANDS[command], f"hydra.run.dir={command}"]) == 0
    assert "resumed at step " in capsys.readouterr().err
    assert newest(old_runs / command)["step"] == 9
    logged = metrics_of(old_runs / command)
    losses = {str(line["step"]): line["loss"] for line in logged if "loss" in line}
    assert losses == pytest.approx(json.loads((OLD / "losses.json").read_text())[command], rel=1e-4)


def test_an_old_pretraining_run_fine_tunes(old_runs):
    assert main(["finetune", *COMMANDS["finetune"], "hydra.run.dir=new", "optim.lr=1e-12", "schedule.min_lr=0"]) == 0
    before, after = newest(old_runs / "pretrain")["ema"], newest(old_runs / "new")["model"]
    for name in after:
        if name.startswith("stages."):
            torch.testing.assert_close(after[name], before[f"backbone.{name}"], rtol=0, atol=1e-8)


def test_old_runs_are_evaluated(capsys):
    assert main(["evaluate", "checkpoint=finetune", "report=null"]) == 0
    printed = capsys.readouterr()
    taken = "checkpoint finetune/checkpoints/step_00000006.pt (step 6, score 16.67, the best so far)\n"
    assert printed.err.startswith(taken)
    result = json.loads(printed.out)
    assert result["images"] == 24
    assert result["ema_top1"] == pytest.approx(100 / 6)
    for run in ("pretrain", "finetune"):
        assert main(["knn", f"checkpoint={run}", "k=1", "cache=null"]) == 0
        assert json.loads(capsys.readouterr().out)["knn1"] == 100.0  # gallery and test images are the same
    assert main(["probe", "checkpoint=pretrain", "epochs=1", "warmup_epochs=0", "cache=null"]) == 0


@pytest.mark.parametrize("run", ["pretrain", "finetune"])
def test_old_runs_are_exported(capsys, old_runs, run):
    assert main(["export", run, "--to", "timm", "--out", "exported"]) == 0
    assert "checked with timm" in capsys.readouterr().out
    assert (old_runs / "exported" / "model.safetensors").is_file()


def test_old_runs_are_loaded(old_runs):
    model = fcmae.load("pretrain")
    assert isinstance(model, fcmae.FCMAE)
    for name, value in newest(old_runs / "pretrain")["ema"].items():
        assert torch.equal(model.state_dict()[name], value)
