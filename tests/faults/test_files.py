"""Rows 3, 4 and 11: damaged files, a full disk, and what does not belong together."""

import os
import random
import shutil
import signal
import subprocess

import pytest
import torch

from fcmae.training import checkpoint
from tests.conftest import TINY_PRETRAIN
from tests.faults.runs import (
    COMMANDS,
    FULL_FORM,
    SHORT,
    TINY,
    finish,
    kill_group,
    processes,
    start,
    steps,
    wait_until,
    weights_sha256,
)

COMMANDS_TRIED = ["pretrain", pytest.param("finetune", marks=FULL_FORM)]


def test_every_damage_is_noticed_and_the_one_before_used(tmp_path, reference):
    """120 damaged copies of a real run's newest checkpoint, and each file deleted."""
    shutil.copytree(reference("pretrain", 1), tmp_path / "run")
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


@pytest.mark.parametrize("command", COMMANDS_TRIED)
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


@pytest.mark.parametrize(
    ("command", "policy"),
    [("pretrain", "stop"), ("pretrain", "continue"), pytest.param("finetune", "stop", marks=FULL_FORM)],
)
def test_disk_full_in_a_background_save(tmp_path, small_disk, begun, command, policy):
    """Room for one checkpoint and, after the disk fills up, not for another."""
    begun(command, small_disk)
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


FULL_AT = """
import os, sys
from pathlib import Path
import {module} as place
function = getattr(place, "{name}")
def full(*args, **kwargs):
    if not Path("disk/filler").exists():
        with open("disk/filler", "wb", buffering=0) as filler:
            try:
                while True:
                    filler.write(b"0" * 4096)
            except OSError:
                pass
    return function(*args, **kwargs)
setattr(place, "{name}", full)
from fcmae.cli import main
sys.exit(main())
"""


@pytest.mark.parametrize(
    ("module", "name", "said", "finished"),
    [
        pytest.param("fcmae.training.loop", "_write_config", "config.yaml cannot be written", 3, marks=FULL_FORM),
        ("fcmae.training.logging", "_up_to", "metrics.jsonl cannot be written", 3),
        ("fcmae.training.tasks", "reconstruction_picture", "MetricsFile could not write", 9),
        ("fcmae.training.tasks", "write_encoder", "encoder.safetensors cannot be written", 9),
    ],
)
def test_disk_full_at_any_write(tmp_path, small_disk, begun, module, name, said, finished):
    """Not a byte is free from the given moment on. What is on the disk stays, and the run goes on later."""
    args = (*TINY_PRETRAIN, "hydra.run.dir=disk", "trainer.keep_checkpoints=1", "trainer.on_save_error=continue")
    begun("pretrain", small_disk)
    metrics = small_disk / "metrics.jsonl"
    with metrics.open("a") as file:
        file.write('{"st')  # as a kill leaves it, so that the file is written anew
    config, before = (small_disk / "config.yaml").read_bytes(), steps(small_disk)
    script = tmp_path / "full.py"
    script.write_text(FULL_AT.format(module=module, name=name))
    told = finish(tmp_path, *args, script=script, expect=1)
    assert said in told
    assert "No space left on device" in told
    assert "Traceback" not in told
    if name == "_write_config":
        assert (small_disk / "config.yaml").read_bytes() == config
    assert steps(small_disk)[:3] == before == [1, 2, 3]
    checkpoints = checkpoint.CheckpointDir(small_disk)
    (latest,) = checkpoints.paths()
    assert checkpoint.read(latest)["step"] == (3 if name != "write_encoder" else 9)
    assert checkpoint.step_of(latest) <= finished
    (small_disk / "filler").unlink()
    finish(tmp_path, *args)
    assert steps(small_disk) == list(range(1, 10))
    assert (small_disk / "encoder.safetensors").is_file()


UNREADABLE = """
import os, sys
from fcmae.errors import CheckpointError
from fcmae.training import checkpoint, resume
def read(path, *args, original=checkpoint.read):
    if path.name == "step_00000009.pt" and os.environ["RANK"] == sys.argv.pop():
        raise CheckpointError(f"checkpoint {path} cannot be read: Input/output error")
    return original(path, *args)
checkpoint.read = resume.read = read
from fcmae.cli import main
sys.exit(main())
"""


@pytest.mark.parametrize("rank", ["0", pytest.param("1", marks=FULL_FORM)])
def test_ranks_never_go_on_from_different_checkpoints(tmp_path, rank):
    """The newest cannot be read by one of two ranks."""
    args = (*TINY_PRETRAIN, "schedule.epochs=6", "hydra.run.dir=run")
    finish(tmp_path, *args, "trainer.max_steps=9", expect=75)
    script = tmp_path / "unreadable.py"
    script.write_text(UNREADABLE.replace("sys.argv.pop()", repr(rank)))
    said = finish(tmp_path, *args, ranks=2, script=script, expect=0 if rank == "0" else 1)
    assert "step_00000009.pt cannot be read: Input/output error" in said
    if rank == "0":
        assert "resumed at step 6" in said
        assert (tmp_path / "run" / "checkpoints" / "step_00000009.pt.unused").is_file()
    else:
        assert checkpoint.CheckpointDir(tmp_path / "run").paths()[-1].name == "step_00000009.pt"


@pytest.mark.parametrize("command", COMMANDS_TRIED)
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


def test_what_does_not_belong_to_the_run_is_refused(tmp_path, begun):
    begun("pretrain", tmp_path / "run")
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


def test_a_pickle_with_code_is_not_executed(tmp_path, begun):
    begun("pretrain", tmp_path / "run")
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


@FULL_FORM
def test_training_outlives_the_process_of_wandb(tmp_path, undisturbed):
    pytest.importorskip("wandb")
    args = [arg for arg in COMMANDS["pretrain"] if arg != "logger=quiet"]
    run = start(tmp_path, *args, "hydra.run.dir=run", "logger.wandb=offline")
    try:
        wait_until(lambda: max(steps(tmp_path / "run"), default=0) >= 5)
        (service,) = (pid for pid, command in processes(tmp_path) if "wandb-core" in command)
        os.kill(service, signal.SIGKILL)
        assert run.wait(60) == 0
    finally:
        kill_group(run)
    assert "WandbLogger could not write" in (tmp_path / "stderr.txt").read_text()
    assert weights_sha256(tmp_path / "run") == undisturbed("pretrain", 1)
