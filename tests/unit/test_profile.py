"""A trace of some steps: which ones, where it is, and that it changes nothing."""

import gzip
import json

import pytest

from fcmae.training import profile
from tests.conftest import TINY_PRETRAIN
from tests.results import metrics_of


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    monkeypatch.setattr(profile, "WARM_UP", 3)


@pytest.mark.parametrize(("steps", "recorded"), [pytest.param(2, [3, 4], marks=pytest.mark.slow), (9, [3, 4, 5])])
def test_the_steps_after_the_warm_up_are_recorded(fcmae_here, tmp_path, steps, recorded):
    run = (*TINY_PRETRAIN, "schedule.epochs=2", "trainer.eval_every_epochs=null")
    done = fcmae_here(*run, f"trainer.profile_steps={steps}", "hydra.run.dir=run")
    path = tmp_path / "run" / "profiles" / "step_00000003.json.gz"
    said = [line for line in done.stderr.splitlines() if "profile_steps" in line]
    assert said == [
        f"trainer.profile_steps: a trace of {len(recorded)} steps is in {path}; open it at https://ui.perfetto.dev"
    ]
    with gzip.open(path) as file:
        events = json.load(file)["traceEvents"]
    names = {event["name"] for event in events if event["name"].startswith("ProfilerStep")}
    expected = [f"ProfilerStep#{step}" for step in (*recorded, recorded[-1] + 1)]
    assert set(expected[:-1]) <= names <= set(expected)  # the last one, of a run that ended, is empty
    assert any("convolution" in event["name"] for event in events)
    assert [file.name for file in (tmp_path / "run" / "profiles").iterdir()] == ["step_00000003.json.gz"]
    fcmae_here(*run, "hydra.run.dir=alone")
    losses = [[line["loss"] for line in metrics_of(tmp_path / name)] for name in ("run", "alone")]
    assert losses[0] == losses[1]


def test_a_run_that_is_too_short_says_so(fcmae_here, tmp_path):
    done = fcmae_here(
        *TINY_PRETRAIN, "schedule.epochs=1", "schedule.warmup_epochs=0", "trainer.profile_steps=2", "hydra.run.dir=run"
    )
    assert "trainer.profile_steps: no trace, because the process ended before its step 4" in done.stderr
    assert not (tmp_path / "run" / "profiles").exists()


def test_a_disk_that_is_full_stops_nothing(fcmae_here, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(profile, "replacing", full)
    done = fcmae_here(*TINY_PRETRAIN, "schedule.epochs=2", "trainer.profile_steps=1", "hydra.run.dir=run")
    assert "trainer.profile_steps: the trace was not written: [Errno 28] No space left on device" in done.stderr
    assert (tmp_path / "run" / "encoder.safetensors").is_file()
