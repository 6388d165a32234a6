"""Rows 3, 4 and 11: damaged files, a full disk, and what does not belong together."""

import os
import random
import shutil
import subprocess

import pytest
import torch

from fcmae.training import checkpoint
from tests.conftest import TINY_FINETUNE, TINY_PRETRAIN
from tests.faults.runs import COMMANDS, SHORT, finish, kill_group, start, steps, wait_until, weights_sha256

TINY = {"pretrain": TINY_PRETRAIN, "finetune": TINY_FINETUNE}


def test_every_damage_is_noticed_and_the_one_before_used(tmp_path):
    """120 damaged copies of a real run's newest checkpoint, and each file deleted."""
    finish(tmp_path, *TINY_PRETRAIN, "hydra.run.dir=run")
    checkpoints = checkpoint.CheckpointDir(tmp_path / "run")
    older, newest = checkpoints.paths()
    whole = newest.read_bytes()
    rng = random.Random(0)
    damaged = [whole[:size] for size in rng.sample(range(len(whole)), 20)]
    for bit in rng.sample(range(8 * len(whole)), 100):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        damaged.append(bytes(flipped))
    for content in damaged:
        newest.write_bytes(content)
        said: list[str] = []
        state = checkpoints.load_latest(said.append)
        assert state is not None
        assert state["step"] == checkpoint.step_of(older)
        assert len(said) == 1
        assert newest.name in said[0]
    for gone, left in ((newest, older), (older, newest)):
        newest.write_bytes(whole)
        kept = gone.read_bytes()
        gone.unlink()
        state = checkpoints.load_latest(pytest.fail)
        assert state is not None
        assert state["step"] == checkpoint.step_of(left)
        gone.write_bytes(kept)


@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_a_damaged_checkpoint_in_the_real_command(tmp_path, undisturbed, command):
    args = (*COMMANDS[command], "hydra.run.dir=run")
    finish(tmp_path, *args, "trainer.max_steps=50", expect=75)
    newest = checkpoint.CheckpointDir(tmp_path / "run").paths()[-1]
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    said = finish(tmp_path, *args)
    assert f"{newest.name} cannot be read: its checksum is wrong" in said
    assert "resumed at step 48" in said
    assert weights_sha256(tmp_path / "run") == undisturbed(command, 1)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize(("command", "policy"), [("pretrain", "stop"), ("pretrain", "continue"), ("finetune", "stop")])
def test_disk_full_in_a_background_save(tmp_path, small_disk, command, policy):
    """Room for one checkpoint and, after the disk fills up, not for another."""
    finish(tmp_path, *TINY[command], "hydra.run.dir=disk", "trainer.max_steps=3", expect=75)
    (small_disk / "filler").write_bytes(b"0" * (os.statvfs(small_disk).f_bavail * 4096 - 100_000))
    before = checkpoint.CheckpointDir(small_disk).paths()
    said = finish(tmp_path, *TINY[command], "hydra.run.dir=disk", f"trainer.on_save_error={policy}", expect=1)
    assert "was not saved: No space left on device" in said
    assert "Traceback" not in said
    assert checkpoint.CheckpointDir(small_disk).paths() == before
    assert checkpoint.read(before[0])["step"] == 3
    if policy == "continue":
        assert steps(small_disk)[-1] == 9
    (small_disk / "filler").unlink()
    finish(tmp_path, *TINY[command], "hydra.run.dir=disk", "trainer.keep_checkpoints=1")  # 1 MB has no room for three


@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_a_second_run_is_refused_and_the_first_unharmed(tmp_path, command):
    args = (*COMMANDS[command], "schedule.epochs=9999", "hydra.run.dir=run")
    first = start(tmp_path, *args)
    try:
        wait_until((tmp_path / "run" / "run.lock").exists)
        second = tmp_path / "second"
        second.mkdir()
        said = finish(second, *args[:-1], "hydra.run.dir=../run", expect=2)
        assert f"is in use by another run (host {os.uname().nodename}, process {first.pid}, started" in said
        assert first.poll() is None
        wait_until(lambda: max(steps(tmp_path / "run"), default=0) >= 5)
        first.terminate()
        assert first.wait(60) == 75
    finally:
        kill_group(first)
    assert checkpoint.CheckpointDir(tmp_path / "run").load_latest(pytest.fail) is not None


def test_what_does_not_belong_to_the_run_is_refused(tmp_path):
    finish(tmp_path, *TINY_PRETRAIN, "hydra.run.dir=run", "trainer.max_steps=3", expect=75)
    digest = weights_sha256(tmp_path / "run")
    changed = (*TINY_PRETRAIN, "hydra.run.dir=run", "optim.lr=2e-3", "data.hflip=0.1", "data.workers=1")
    said = finish(tmp_path, *changed, expect=2)
    assert "  optim.lr: 0.001 -> 0.002\n" in said
    assert "  data.hflip: 0.5 -> 0.1\n" in said
    assert "workers" not in said
    other = (*TINY_PRETRAIN, "hydra.run.dir=run", "model.dims=[8,12,16,32]", "trainer.allow_changed_recipe=true")
    assert "do not fit the model" in finish(tmp_path, *other, expect=2)
    assert weights_sha256(tmp_path / "run") == digest
    if not SHORT:
        finish(tmp_path, *changed, "trainer.allow_changed_recipe=true")


class Code:
    """Runs a command when it is unpickled."""

    def __init__(self, proof):
        self.proof = proof

    def __reduce__(self):
        return (os.mkdir, (str(self.proof),))


def test_a_pickle_with_code_is_not_executed(tmp_path):
    finish(tmp_path, *TINY_PRETRAIN, "hydra.run.dir=run", "trainer.max_steps=3", expect=75)
    checkpoints = checkpoint.CheckpointDir(tmp_path / "run")
    proof = tmp_path / "executed"
    checkpoint.write_atomically(checkpoints.path(4), {"format": checkpoint.FORMAT, "code": Code(proof)})
    torch.save(Code(proof), checkpoints.path(5))
    said = finish(tmp_path, *TINY_PRETRAIN, "hydra.run.dir=run")
    assert "step_00000004.pt cannot be read" in said
    assert "step_00000005.pt cannot be read" in said
    assert "resumed at step 3" in said
    assert not proof.exists()
    shutil.rmtree(tmp_path / "run")
