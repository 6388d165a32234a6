"""``trainer.budget``: the speed of some steps gives the epochs, which a run that resumes keeps."""

import json
import os
import re
import signal

import pytest

from fcmae import interrupt
from fcmae.config import OptimConfig, PretrainConfig, ScheduleConfig
from fcmae.training import budget
from fcmae.training.agree_to_stop import StopAgreement, Verdict
from tests.conftest import TINY_FINETUNE, TINY_PRETRAIN
from tests.results import assert_same, metrics_of, weights

RUN = (
    *(*TINY_PRETRAIN, "trainer.budget=100s", "schedule.epochs=30", "schedule.warmup_epochs=6", "seed=3"),
    "data.length=28",  # an epoch is three batches, without the last four images
)
QUIET = ("trainer.checkpoint_every_epochs=99", "trainer.eval_every_epochs=99")


@pytest.fixture
def speed(monkeypatch):
    """The measured speed, and a start of the process 10 s ago."""
    speeds = [1.0]
    monkeypatch.setattr(budget, "STEPS", 2)
    monkeypatch.setattr(budget, "median_speed", lambda folder: speeds[-1])
    monkeypatch.setattr(budget.time, "monotonic", lambda: interrupt.STARTED + 10)
    return speeds


def test_the_epochs_fit_and_a_run_that_resumes_keeps_them(fcmae_here, tmp_path, speed):
    whole = fcmae_here(*RUN, *QUIET, "hydra.run.dir=whole")
    assert "trainer.budget=100s: 1 images/s, so schedule.epochs=3.375 schedule.warmup_epochs=0.675" in whole.stderr
    few = f"warning: 10 steps of 8 images fit, and fewer than {budget.FEW_STEPS} teach a network little; give trainer."
    assert whole.stderr.index("trainer.budget=100s: 1 images/s") < whole.stderr.index(few)
    assert whole.stderr.count("from the start") == 2  # the steps that are measured, and the run
    assert not (tmp_path / "whole" / "speed").exists()
    lines = metrics_of(tmp_path / "whole")
    assert lines[-1]["step"] == 10  # 3.375 epochs of 3 steps
    pictures = sorted(file.name for file in (tmp_path / "whole" / "reconstructions").iterdir())
    quarters = (3, 6, 9, 10)  # although 99 epochs were asked for
    assert pictures == [f"reconstruction_{step:08}.png" for step in quarters]
    fcmae_here(*RUN, *QUIET, "hydra.run.dir=cut", "trainer.max_steps=4", check=75)
    speed.append(1000.0)
    resumed = fcmae_here(*RUN, *QUIET, "hydra.run.dir=cut")
    assert "resumed at step 4" in resumed.stderr
    assert "so schedule.epochs" not in resumed.stderr
    assert "is not used" not in resumed.stderr
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert few in json.loads((tmp_path / "whole" / "events.jsonl").read_text())["notes"][-1]

    done = fcmae_here(*RUN, *QUIET, "hydra.run.dir=cut", "trainer.budget=1h").stderr
    kept = "keeps schedule.epochs=3.375 of trainer.budget=100s; another hydra.run.dir starts a run that takes it"
    assert re.search(rf"trainer.budget=1h is not used: \S+/cut {kept}", done)
    assert "resumed at step 10, the last: nothing is left to train" in done
    refused = fcmae_here(*RUN, *QUIET, "hydra.run.dir=cut", "trainer.budget=null", check=2).stderr
    assert "give its values again (trainer.budget=100s gives those of its schedule), hydra.run.dir=ANOTHER" in refused


def test_a_budget_that_is_over_is_refused(fcmae_here, speed):
    speed.append(0.01)
    refused = fcmae_here(*TINY_FINETUNE, "trainer.budget=20s", "hydra.run.dir=run", check=2).stderr
    assert (
        "trainer.budget=20s leaves no time to train: starting and measuring took 10 s; give trainer.budget=" in refused
    )


def test_a_slow_machine_measures_fewer_steps(fcmae_here, tmp_path, monkeypatch):
    """Sixty steps may take longer than the budget. A start that takes the whole share leaves no speed."""
    given = []

    class Late(StopAgreement):
        def __init__(self, world, max_hours):
            super().__init__(world)
            given.append(3600 * max_hours)

        def after_step(self, failed):
            return Verdict.STOP

    monkeypatch.setattr(budget, "StopAgreement", Late)
    monkeypatch.setattr(budget.time, "monotonic", lambda: interrupt.STARTED + 10)
    done = fcmae_here(*RUN, *QUIET, "trainer.max_steps=1", "hydra.run.dir=run", check=75)
    assert "trainer.budget=100s: measures the speed of 60 steps first, or of fewer in 25 s" in done.stderr
    assert "images/s, so schedule.epochs=" in done.stderr
    assert given == [pytest.approx(10 + 25)]
    assert budget.median_speed(tmp_path) == 0


def test_a_stop_while_the_speed_is_measured_names_no_folder(fcmae_here, tmp_path, monkeypatch):
    def signalled(*_):
        os.kill(os.getpid(), signal.SIGINT)
        return 1.0, 28

    monkeypatch.setattr(budget, "_measure", signalled)
    stopped = fcmae_here(*RUN, "hydra.run.dir=run", check=75).stderr
    assert stopped.splitlines()[-1] == "fcmae pretrain: stopped before the first step (SIGINT)"
    assert not (tmp_path / "run").exists()


def test_enough_steps_and_pretrained_weights_have_no_warning():
    for speed, init_from, expected in ((1.0, None, 1), (16.0, None, 0), (1.0, "runs/photos", 0)):
        cfg = PretrainConfig(optim=OptimConfig(global_batch_size=8), init_from=init_from)
        assert len(budget._few_steps(cfg, speed, 100, 10)) == expected


def test_warm_up_keeps_its_share():
    assert budget.scaled(ScheduleConfig(epochs=100, warmup_epochs=10), 7.5) == ScheduleConfig(7.5, 0.75)
    assert budget.scaled(ScheduleConfig(epochs=1, warmup_epochs=1), 1e-3).warmup_epochs == 1e-3
