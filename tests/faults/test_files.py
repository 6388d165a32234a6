"""Rows 3, 4 and 11: damaged files, a full disk, and what does not belong together."""

import contextlib
import os
import random
import shutil
import signal
import subprocess

import pytest
import torch

from fcmae.checkpoints import checkpoint
from tests.conftest import TINY_PRETRAIN
from tests.faults.runs import (
    COMMANDS,
    FULL_FORM,
    SHORT,
    STEPS,
    TINY,
    finish,
    kill_group,
    processes,
    side_by_side,
    start,
    steps,
    wait_until,
)
from tests.pace import limit
from tests.results import weights_sha256

TINY_STEPS = {"pretrain": 9, "finetune": 6}
"""Of the tiny runs."""


def test_every_damage_is_noticed_and_the_one_before_used(tmp_path, reference):
    """120 damaged copies of a real run's newest checkpoint (36 in the short form), and each file deleted."""
    shutil.copytree(reference("pretrain", 1), tmp_path / "run")
    checkpoints = checkpoint.CheckpointDir(tmp_path / "run")
    older, newest = checkpoints.paths()
    whole = newest.read_bytes()
    rng = random.Random(0)
    damaged = [whole[:size] for size in rng.sample(range(len(whole)), 6 if SHORT else 20)]
    for bit in rng.sample(range(8 * len(whole)), 30 if SHORT else 100):
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


def test_a_damaged_checkpoint_in_the_real_command(tmp_path, reference, undisturbed):
    def damage_and_resume(folder, command):
        shutil.copytree(reference(command, 1), folder / "run")
        newest = checkpoint.CheckpointDir(folder / "run").paths()[-1]
        content = bytearray(newest.read_bytes())
        content[len(content) // 2] ^= 1
        newest.write_bytes(content)
        said = finish(folder, *COMMANDS[command], "hydra.run.dir=run")
        assert f"{newest.name} cannot be read: its checksum is wrong" in said
        assert f"resumed at step {STEPS - 3}" in said
        assert weights_sha256(folder / "run") == undisturbed(command, 1)

    side_by_side(damage_and_resume, [("pretrain",), ("finetune",)], tmp_path)


@contextlib.contextmanager
def small_disk(folder):
    """A file system of 1 MB."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_disk_full_in_a_background_save(tmp_path, begun):
    """Room for one checkpoint and, after the disk fills up, not for another."""

    def fill_up(folder, command, policy):
        with small_disk(folder / "disk") as disk:
            begun(command, disk)
            (disk / "filler").write_bytes(b"0" * (os.statvfs(disk).f_bavail * 4096 - 100_000))
            before = checkpoint.CheckpointDir(disk).paths()
            args = (*TINY[command], "hydra.run.dir=disk")
            said = finish(folder, *args, f"trainer.on_save_error={policy}", expect=1)
            assert "was not saved: No space left on device" in said
            assert "Traceback" not in said
            assert checkpoint.CheckpointDir(disk).paths() == before
            assert checkpoint.read(before[0])["step"] == 3
            if policy == "continue":
                assert steps(disk)[-1] == TINY_STEPS[command]
            (disk / "filler").unlink()
            finish(folder, *args, "trainer.keep_checkpoints=1")  # 1 MB has no room for three

    side_by_side(fill_up, [("pretrain", "stop"), ("finetune", "stop"), ("pretrain", "continue")], tmp_path)


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


WRITES = [
    ("write_config", "fcmae.training.loop", "config.yaml cannot be written", 3),
    ("_up_to", "fcmae.loggers.logger", "metrics.jsonl cannot be written", 3),
    ("reconstruction_picture", "fcmae.tasks.pretraining", "MetricsFile could not write", 9),
    ("write", "fcmae.checkpoints.encoder", "encoder.safetensors cannot be written", 9),
]


def test_disk_full_at_any_write(tmp_path, begun):
    """The disk is full from the given moment on. What is on it stays, and the run continues later."""
    args = (*TINY_PRETRAIN, "hydra.run.dir=disk", "trainer.keep_checkpoints=1", "trainer.on_save_error=continue")
    args += ("trainer.eval_every_epochs=1",)
    writes = {name: what for name, *what in WRITES}

    def fill_up(folder, name):
        module, said, finished = writes[name]
        with small_disk(folder / "disk") as disk:
            begun("pretrain", disk)
            with (disk / "metrics.jsonl").open("a") as file:
                file.write('{"st')  # as a kill leaves it, so that the file is written anew
            config, before = (disk / "config.yaml").read_bytes(), steps(disk)
            script = folder / "full.py"
            script.write_text(FULL_AT.format(module=module, name=name))
            told = finish(folder, *args, script=script, expect=1)
            assert said in told
            full, over = (path.stat().st_mtime for path in (disk / "filler", folder / "stderr.txt"))
            assert over - full <= limit(5)
            assert "No space left on device" in told
            assert "Traceback" not in told
            if name == "write_config":
                assert (disk / "config.yaml").read_bytes() == config
            assert steps(disk)[:3] == before == [1, 2, 3]
            checkpoints = checkpoint.CheckpointDir(disk)
            (latest,) = checkpoints.paths()
            assert checkpoint.read(latest)["step"] == (3 if name != "write" else 9)
            assert checkpoint.step_of(latest) <= finished
            (disk / "filler").unlink()
            finish(folder, *args)
            assert steps(disk) == list(range(1, 10))
            assert (disk / "encoder.safetensors").is_file()

    side_by_side(fill_up, [(name,) for name in writes], tmp_path)


UNREADABLE = """
import os, sys
from fcmae.errors import CheckpointError
from fcmae.checkpoints import checkpoint
from fcmae.checkpoints import resume
def read(path, *args, original=checkpoint.read):
    if path.name == "{name}" and os.environ["RANK"] == "{rank}":
        raise CheckpointError(f"checkpoint {{path}} cannot be read: Input/output error")
    return original(path, *args)
checkpoint.read = resume.read = read
from fcmae.cli import main
sys.exit(main())
"""


@pytest.mark.parametrize("rank", ["0", pytest.param("1", marks=FULL_FORM)])
def test_ranks_never_go_on_from_different_checkpoints(tmp_path, reference, rank):
    """The newest cannot be read by one of two ranks."""
    shutil.copytree(reference("pretrain", 1), tmp_path / "run")
    checkpoints = checkpoint.CheckpointDir(tmp_path / "run")
    older, newest = checkpoints.paths()
    script = tmp_path / "unreadable.py"
    script.write_text(UNREADABLE.format(name=newest.name, rank=rank))
    args = (*COMMANDS["pretrain"], "hydra.run.dir=run")
    said = finish(tmp_path, *args, ranks=2, script=script, expect=0 if rank == "0" else 1)
    assert f"{newest.name} cannot be read: Input/output error" in said
    if rank == "0":
        assert f"resumed at step {checkpoint.step_of(older)}" in said
        assert newest.with_name(f"{newest.name}.unused").is_file()
    else:
        assert checkpoints.paths()[-1] == newest


def test_a_second_run_is_refused_and_the_first_unharmed(tmp_path):
    def start_two(folder, command):
        args = (*COMMANDS[command], "schedule.epochs=9999", "hydra.run.dir=run")
        first = start(folder, *args)
        try:
            wait_until((folder / "run" / "run.lock").exists)
            second = folder / "second"
            second.mkdir()
            said = finish(second, *args[:-1], "hydra.run.dir=../run", expect=2)
            assert f"is in use by another run (host {os.uname().nodename}, process {first.pid}, started" in said
            assert first.poll() is None
            wait_until(lambda: max(steps(folder / "run"), default=0) >= 5)
            first.terminate()
            assert first.wait(limit(60)) == 75
        finally:
            kill_group(first)
        assert checkpoint.CheckpointDir(folder / "run").load_latest(pytest.fail) is not None

    side_by_side(start_two, [("pretrain",), ("finetune",)], tmp_path)


def test_what_does_not_belong_to_the_run_is_refused(tmp_path, begun):
    begun("pretrain", tmp_path / "run")
    digest = weights_sha256(tmp_path / "run")
    changed = (*TINY_PRETRAIN, "hydra.run.dir=run", "optim.lr=2e-3", "data.hflip=0.1", "loader.workers=1")
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
        assert run.wait(limit(60)) == 0
    finally:
        kill_group(run)
    assert "WandbLogger could not write" in (tmp_path / "stderr.txt").read_text()
    assert weights_sha256(tmp_path / "run") == undisturbed("pretrain", 1)
