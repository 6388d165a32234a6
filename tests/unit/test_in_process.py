"""Commands that tests run in their own process: the same output as in another one, and nothing of it is left."""

import os
import signal

import torch

from tests.conftest import TINY_PRETRAIN


def test_a_run_in_this_process_is_as_in_another_and_changes_nothing_here(fcmae, fcmae_here, tmp_path):
    torch.manual_seed(5)
    before = os.getcwd(), signal.getsignal(signal.SIGTERM), dict(os.environ), torch.get_rng_state().tolist()
    args = (*TINY_PRETRAIN, "trainer.deterministic=true", "schedule.epochs=1", "schedule.warmup_epochs=0")
    here, there = fcmae_here(*args, "hydra.run.dir=run"), fcmae(*args, "hydra.run.dir=other")
    assert here.stdout == there.stdout.replace("/other/", "/run/")
    assert (tmp_path / "run" / "encoder.safetensors").is_file()
    assert "unknown key" in fcmae_here("pretrain", "optim.lrr=1", check=2).stderr
    assert "required" in fcmae_here("export", "x", check=2).stderr
    assert before == (os.getcwd(), signal.getsignal(signal.SIGTERM), dict(os.environ), torch.get_rng_state().tolist())
    assert not torch.are_deterministic_algorithms_enabled()
