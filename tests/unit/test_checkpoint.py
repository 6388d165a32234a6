"""Checkpoints: what is kept, what damage is noticed, what is refused."""

import errno
import gc
import io
import os
import pickle
import random

import pytest
import torch
from safetensors.torch import load_file

from fcmae.checkpoints import checkpoint
from fcmae.checkpoints.checkpoint import CheckpointDir
from fcmae.config import PretrainConfig, to_dict
from fcmae.errors import CheckpointError
from fcmae.models import FCMAE, create_backbone
from fcmae.training.saver import Saver


def save_three(tmp_path, keep=2):
    checkpoints = CheckpointDir(tmp_path, keep)
    for step in (1, 2, 3):
        checkpoints.save({"task": "pretrain", "step": step, "model": {"w": torch.full((4,), float(step))}})
    return checkpoints


def test_checkpoints_keep_the_newest_and_leave_no_temporary_files(tmp_path):
    checkpoints = save_three(tmp_path)
    assert sorted(p.name for p in checkpoints.folder.iterdir()) == ["step_00000002.pt", "step_00000003.pt"]
    state = checkpoints.load_latest(pytest.fail)
    assert state is not None
    assert state["step"] == 3
    assert state["versions"].keys() == {"fcmae", "torch", "timm", "python"}


def test_a_cut_off_checkpoint_is_named_and_the_one_before_used(tmp_path):
    checkpoints = save_three(tmp_path)
    newest = checkpoints.paths()[-1]
    newest.write_bytes(newest.read_bytes()[:100])
    said = []
    state = checkpoints.load_latest(said.append)
    assert state is not None
    assert state["step"] == 2
    assert len(said) == 1
    assert "step_00000003.pt cannot be read" in said[0]
    checkpoints.paths()[0].write_bytes(b"")
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints"):
        checkpoints.load_latest(said.append)


def test_a_save_leaves_nothing_for_the_garbage_collector(tmp_path):
    """torch.save defines a class each time, and a class is a cycle."""
    gc.collect()
    checkpoint.write_atomically(tmp_path / "step_00000001.pt", {"step": 1, "model": {"w": torch.ones(3)}})
    assert not [kind for kind in pickle.Pickler.__subclasses__() if "_save.<locals>" in kind.__qualname__]


def test_a_failed_save_leaves_the_old_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "state.pt"
    checkpoint.write_atomically(path, {"format": checkpoint.FORMAT, "step": 1})
    fsync = os.fsync

    def disk_full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.write_atomically(path, {"format": checkpoint.FORMAT, "step": 2})
    monkeypatch.setattr(os, "fsync", fsync)
    assert checkpoint.read(path)["step"] == 1
    assert list(tmp_path.iterdir()) == [path]


class FullDisk(io.RawIOBase):
    """Takes 2,000 bytes."""

    def __init__(self):
        self.free = 2000

    def write(self, data):
        self.free -= len(data)
        if self.free < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return len(data)


def test_a_failed_write_keeps_its_reason():
    with pytest.raises(OSError, match="No space left on device"):
        checkpoint._save_with_checksum({"w": torch.zeros(10_000)}, FullDisk())


def test_every_flipped_bit_and_every_cut_is_noticed(tmp_path):
    path = tmp_path / "state.pt"
    checkpoint.write_atomically(path, {"format": checkpoint.FORMAT, "w": torch.randn(500)})
    whole = path.read_bytes()
    assert torch.equal(checkpoint.read(path)["w"], torch.load(path, weights_only=True)["w"])
    rng = random.Random(0)
    damaged = [whole[: rng.randrange(len(whole))] for _ in range(20)]
    for bit in [*rng.sample(range(8 * len(whole)), 100), *range(8 * (len(whole) - 40), 8 * len(whole))]:
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        damaged.append(bytes(flipped))
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="it is cut off|its checksum is wrong"):
            checkpoint.read(path)


def test_a_checkpoint_that_is_cut_off_is_called_so_where_its_header_is_read(tmp_path):
    path = tmp_path / "state.pt"
    checkpoint.write_atomically(path, {"format": checkpoint.FORMAT, "w": torch.randn(500)})
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"state.pt cannot be read: it is cut off, or no checkpoint$"):
        checkpoint.header(path)


def test_milestones_and_chosen_steps_outlive_the_rotation(tmp_path):
    checkpoints = CheckpointDir(tmp_path, keep=1, keep_every=3)
    for step in range(1, 9):
        checkpoints.save({"step": step}, keep_steps=[2])
    assert [checkpoint.step_of(path) for path in checkpoints.paths()] == [2, 3, 6, 8]


def test_stray_temporary_files_are_swept(tmp_path):
    checkpoints = save_three(tmp_path)
    (checkpoints.folder / "step_00000004.pt.123.tmp").write_bytes(b"half")
    checkpoints.sweep()
    assert [checkpoint.step_of(path) for path in sorted(checkpoints.folder.iterdir())] == [2, 3]


def test_checkpoints_that_a_run_does_not_go_on_from_count_no_more(tmp_path):
    """Damaged and newest by their names, they would push out the good ones."""
    checkpoints = save_three(tmp_path, keep=1)
    checkpoints.path(9).write_bytes(b"damaged")
    state = checkpoints.load_latest(lambda _: None)
    assert state is not None
    assert state["step"] == 3
    said: list[str] = []
    checkpoints.set_aside(3, said.append)
    assert said == ["step_00000009.pt is no longer used: renamed to step_00000009.pt.unused"]
    checkpoints.save({"step": 4})
    assert [checkpoint.step_of(path) for path in checkpoints.paths()] == [4]
    assert (checkpoints.folder / "step_00000009.pt.unused").read_bytes() == b"damaged"


def test_a_milestone_of_pretraining_has_the_encoder_alone(tmp_path):
    model = FCMAE("convnextv2_atto", decoder_embed_dim=8)
    saver = Saver(CheckpointDir(tmp_path, keep=1, keep_every=2), "stop", enabled=True)
    state = {"task": "pretrain", "model": model.state_dict(), "best": None}
    state["config"] = to_dict(PretrainConfig())
    for step in (1, 2, 3):
        saver.save(lambda step=step: {**state, "step": step})  # type: ignore[misc]
    saver.finish()
    names = sorted(path.name for path in saver.checkpoints.folder.iterdir())
    assert names == ["encoder_00000002.safetensors", "step_00000002.pt", "step_00000003.pt"]
    backbone = create_backbone("convnextv2_atto", num_classes=0)
    backbone.load_state_dict(load_file(saver.checkpoints.folder / names[0]))
    for name, value in model.backbone.state_dict().items():
        assert torch.equal(backbone.state_dict()[name], value)


def test_resolve_takes_a_run_its_checkpoint_folder_or_a_file(tmp_path):
    checkpoints = save_three(tmp_path)
    newest = checkpoints.paths()[-1]
    for path in (tmp_path, checkpoints.folder, newest):
        assert checkpoint.resolve(path) == newest
    with pytest.raises(CheckpointError, match=r"has no checkpoint; looked for checkpoints/step_\*.pt"):
        checkpoint.resolve(tmp_path.parent)


def run_with_best(tmp_path, best=2):
    """Checkpoints of steps 2 and 4, the first with the best score of 81.25."""
    checkpoints = CheckpointDir(tmp_path / "run", keep=1)
    for step, score in ((2, best and {"step": 2, "score": 81.25}), (4, best and {"step": best, "score": 81.25})):
        checkpoints.save({"step": step, "best": score, "w": torch.zeros(3)}, keep_steps=[2])
    return checkpoints


def test_the_best_of_a_run_is_taken_where_one_was_kept(tmp_path):
    checkpoints = run_with_best(tmp_path)
    run, best, last = checkpoints.folder.parent, checkpoints.path(2), checkpoints.path(4)
    for path in (run, f"{run}@best", f"{run}@2", best, f"{run}/checkpoints", f"{run}/checkpoints@best"):
        assert checkpoint.resolve(path) == best, path
    for path in (f"{run}@last", f"{run}@4", f"{run}@004", last):
        assert checkpoint.resolve(path) == last, path
    assert (
        checkpoint.describe(best, checkpoint.read(best)) == f"checkpoint {best} (step 2, score 81.25, the best so far)"
    )
    assert checkpoint.describe(last, checkpoint.read(last)).endswith("(step 4; the best: step 2, score 81.25)")
    last.write_bytes(last.read_bytes()[:50])  # the one before says which is the best
    assert checkpoint.resolve(run) == best


@pytest.mark.parametrize("best", [None, 3])
def test_without_a_best_checkpoint_the_newest_is_taken(tmp_path, best):
    """None was kept, or its file is missing."""
    checkpoints = run_with_best(tmp_path, best)
    run = checkpoints.folder.parent
    assert checkpoint.resolve(run) == checkpoint.resolve(f"{run}@last") == checkpoints.path(4)
    with pytest.raises(CheckpointError, match="run has kept no best checkpoint; .*run@last is step 4"):
        checkpoint.resolve(f"{run}@best")
    with pytest.raises(CheckpointError, match="has no checkpoint of step 3; it has steps 2, 4"):
        checkpoint.resolve(f"{run}@3")


def test_a_path_that_exists_is_taken_as_it_is(tmp_path):
    checkpoints = CheckpointDir(tmp_path / "run@last")
    path = checkpoints.save({"step": 1})
    assert checkpoint.resolve(tmp_path / "run@last") == checkpoint.resolve(f"{tmp_path}/run@last@last") == path
    for missing in ("me@home", "run@first", "run@", f"{path}@last", "run@²"):
        with pytest.raises(CheckpointError, match="no checkpoint or run directory"):
            checkpoint.resolve(missing)


@pytest.mark.parametrize("best", ["yes", 3, [], {}, {"step": "x", "score": 1}, {"step": 1, "score": None}])
def test_a_best_that_is_none_counts_as_none(tmp_path, best):
    path = CheckpointDir(tmp_path).save({"step": 4, "best": best})
    assert checkpoint.resolve(tmp_path) == path
    assert checkpoint.describe(path, checkpoint.read(path)) == f"checkpoint {path} (step 4)"


@pytest.mark.parametrize("restarted", [False, True])
def test_a_new_best_that_cannot_be_saved_leaves_the_old_one(tmp_path, monkeypatch, capsys, restarted):
    checkpoints = CheckpointDir(tmp_path, keep=1)
    saver = Saver(checkpoints, "continue", enabled=True)

    def save(step, best, fails=False):
        nonlocal saver
        if restarted:
            saver = Saver(checkpoints, "continue", enabled=True)
        with monkeypatch.context() as patch:
            if fails:
                patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "disk full")))
            saver.save(lambda: {"task": "finetune", "step": step, "best": {"step": best, "score": float(best)}})
            saver.close()

    save(1, best=1)
    save(2, best=1)
    save(3, best=3, fails=True)
    assert "step_00000003.pt was not saved: disk full" in capsys.readouterr().err
    save(4, best=3)
    save(5, best=3)
    assert [checkpoint.step_of(path) for path in checkpoints.paths()] == [1, 5]
    assert checkpoint.read(checkpoints.path(5))["best"] == {"step": 1, "score": 1.0}
    assert checkpoint.resolve(tmp_path) == checkpoints.path(1)
    save(6, best=6)
    save(7, best=6)
    assert [checkpoint.step_of(path) for path in checkpoints.paths()] == [6, 7]


def test_what_is_not_ours_is_refused(tmp_path):
    torch.save({"model": {}}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="was not written by fcmae"):
        checkpoint.read(tmp_path / "other.pt")
    checkpoint.write_atomically(tmp_path / "old.pt", {"format": 1})
    with pytest.raises(CheckpointError, match="is not a checkpoint of fcmae"):
        checkpoint.read(tmp_path / "old.pt")
