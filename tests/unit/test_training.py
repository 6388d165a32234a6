"""Schedule, parameter groups, checkpoints and the guard against non-finite gradients."""

import errno
import io
import json
import math
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fcmae.config import FinetuneConfig, OptimConfig, PretrainConfig, to_dict
from fcmae.errors import CheckpointError, UsageError
from fcmae.models import FCMAE, create_backbone
from fcmae.processes import Process, is_stopped
from fcmae.training import checkpoint
from fcmae.training import lock as lock_module
from fcmae.training.checkpoint import CheckpointDir
from fcmae.training.distributed import World
from fcmae.training.finite import FiniteGuard, infectious
from fcmae.training.lock import RunLock
from fcmae.training.logging import MetricsFile, Progress, RunLogger
from fcmae.training.loop import _optimizer_step
from fcmae.training.meter import Meter
from fcmae.training.optim import create_optimizer, layer_scale, param_groups, set_lr
from fcmae.training.recipe import HARMLESS, check_recipe
from fcmae.training.saver import Saver
from fcmae.training.schedule import CosineSchedule
from fcmae.training.state import TrainState
from fcmae.training.watchdog import Watchdog

CPU = World(0, 1, 0, 1, torch.device("cpu"))


def test_schedule_warms_up_linearly_and_ends_at_min_lr():
    schedule = CosineSchedule(peak=1.0, min_lr=0.1, warmup_steps=10, total_steps=110)
    assert schedule(0) == 0
    assert schedule(5) == 0.5
    assert schedule(10) == 1.0
    assert schedule(60) == pytest.approx(0.1 + 0.9 * 0.5)
    assert schedule(35) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert schedule(110) == pytest.approx(0.1)


def test_lr_follows_the_global_batch():
    assert OptimConfig(blr=1.5e-4).peak_lr(4096) == pytest.approx(2.4e-3)
    assert OptimConfig(blr=1.5e-4, lr=1e-3).peak_lr(4096) == 1e-3


def test_vectors_and_the_mask_token_are_not_decayed():
    groups = param_groups(FCMAE("convnextv2_atto"), OptimConfig(weight_decay=0.05))
    decay = {name: group["weight_decay"] for group in groups for name in group["names"]}
    for name, value in decay.items():
        vector = name.endswith(("bias", "mask_token")) or ".norm" in name or ".grn." in name or "stem.1" in name
        assert value == (0.0 if vector or ".downsample.0." in name else 0.05), name
    assert "decoder.mask_token" in decay
    assert not any(name.startswith("backbone.head") for name in decay)


def test_set_lr_scales_each_group():
    model = create_backbone("convnextv2_atto", num_classes=10, depths=(1, 1, 1, 1), dims=(8, 8, 8, 8))
    optimizer = create_optimizer(model, OptimConfig(layer_decay=0.5))
    set_lr(optimizer, 2.0)
    lrs = {name: group["lr"] for group in optimizer.param_groups for name in group["names"]}
    assert lrs["head.fc.weight"] == 2.0
    assert lrs["stages.3.blocks.0.mlp.fc1.weight"] == 1.0
    assert lrs["stem.0.weight"] == lrs["stages.0.blocks.0.norm.bias"] == 2.0 * 0.5**4


def test_layer_decay_is_for_backbones():
    with pytest.raises(ValueError, match="optim.layer_decay is 0.9"):
        param_groups(FCMAE("convnextv2_atto"), OptimConfig(layer_decay=0.9))
    with pytest.raises(ValueError, match="'decoder.pred.bias' is not a parameter of a ConvNeXt"):
        layer_scale("decoder.pred.bias", (1, 1, 1, 1), 0.9, "single")


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
    assert said == ["step_00000009.pt is not used any more: renamed to step_00000009.pt.unused"]
    checkpoints.save({"step": 4})
    assert [checkpoint.step_of(path) for path in checkpoints.paths()] == [4]
    assert (checkpoints.folder / "step_00000009.pt.unused").read_bytes() == b"damaged"


def test_a_milestone_of_pretraining_has_the_encoder_alone(tmp_path):
    model = FCMAE("convnextv2_atto", decoder_embed_dim=8)
    saver = Saver(CheckpointDir(tmp_path, keep=1, keep_every=2), "stop", enabled=True)
    state = {"task": "pretrain", "model": model.state_dict(), "best": None}
    state["config"] = {"model": {"backbone": "convnextv2_atto"}}
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


def test_what_is_not_ours_is_refused(tmp_path):
    torch.save({"model": {}}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="was not written by fcmae"):
        checkpoint.read(tmp_path / "other.pt")
    checkpoint.write_atomically(tmp_path / "old.pt", {"format": 1})
    with pytest.raises(CheckpointError, match="is not a checkpoint of fcmae"):
        checkpoint.read(tmp_path / "old.pt")


def test_the_guard_stops_the_optimizer_at_the_first_bad_step_and_keeps_it_stopped():
    layer = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    guard = FiniteGuard(torch.device("cpu"))
    assert guard.first_bad_step(CPU) is None
    weights = []
    for step, gradient in enumerate((1.0, 1.0, float("nan"), 1.0)):
        for param in layer.parameters():
            param.grad = torch.full_like(param, gradient)
        norm = torch.nn.utils.get_total_norm([p.grad for p in layer.parameters()])
        optimizer.found_inf = guard.check(torch.isfinite(norm), step)
        optimizer.step()
        weights.append(layer.weight.detach().clone())
    assert guard.first_bad_step(CPU) == 2
    assert not torch.equal(weights[0], weights[1])
    assert torch.equal(weights[1], weights[2])
    assert torch.equal(weights[1], weights[3])


def test_a_loss_that_is_not_finite_spoils_its_gradient_and_a_finite_one_does_not():
    weight = torch.tensor([1e19, 2e19], requires_grad=True)
    (weight * 2).square().sum().backward()
    assert weight.grad is not None
    assert weight.grad.isfinite().all()  # although the loss is infinite
    weight.grad = None
    infectious((weight * 2).square().sum()).backward()
    assert weight.grad.isnan().all()
    small = torch.randn(1000, requires_grad=True)
    losses = small.sin().sum(), infectious(small.sin().sum())
    plain, same = (torch.autograd.grad(loss, small)[0] for loss in losses)
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(plain, same)


@pytest.mark.parametrize(("scale", "noticed"), [(2.0**16, False), (0.5, True)])
def test_only_a_scale_excuses_a_gradient_of_float16_that_is_not_finite(scale, noticed):
    layer = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    scaler.scale(layer(torch.full((1, 2), math.inf)).sum()).backward()
    before = layer.weight.detach().clone()
    guard = FiniteGuard(torch.device("cpu"))
    _optimizer_step(TrainState(7, layer, optimizer, scaler, None), guard, None, 7, torch.tensor(1.0))
    assert torch.equal(layer.weight, before)
    assert guard.first_bad_step(CPU) == (7 if noticed else None)


def test_skipping_leaves_out_the_bad_step_alone():
    layer = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    guard = FiniteGuard(torch.device("cpu"), skip=True)
    weights = []
    for step, gradient in enumerate((1.0, float("inf"), 1.0)):
        for param in layer.parameters():
            param.grad = torch.full_like(param, gradient)
        optimizer.found_inf = guard.check(torch.tensor(math.isfinite(gradient)), step)
        optimizer.step()
        weights.append(layer.weight.detach().clone())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])
    assert guard.first_bad_step(CPU) == 1
    assert guard.first_bad_step(CPU) is None
    assert guard.count(CPU) == 1


DETERMINISTIC = """
import os, torch
from fcmae.training.determinism import only_deterministic_algorithms
only_deterministic_algorithms()
from torch._inductor import config
assert torch.are_deterministic_algorithms_enabled()
assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
assert config.deterministic
assert not torch.cuda.is_initialized()
print(os.environ["CUBLAS_WORKSPACE_CONFIG"])
"""


def test_determinism_is_set_up_before_cuda_and_keeps_what_the_user_chose():
    for given, used in ((None, ":4096:8"), (":16:8", ":16:8")):
        environment = {k: v for k, v in os.environ.items() if k != "CUBLAS_WORKSPACE_CONFIG"}
        environment |= {} if given is None else {"CUBLAS_WORKSPACE_CONFIG": given}
        done = subprocess.run(
            [sys.executable, "-c", DETERMINISTIC], env=environment, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == used


def test_the_meter_leaves_out_what_is_not_finite():
    meter = Meter(CPU, images_per_step=8)
    for loss in (1.0, math.nan, 3.0):
        meter.add(torch.tensor(loss), torch.tensor(5.0))
    assert meter.read()["loss"] == 2.0


class BrokenSink:
    """Fails like a process of wandb that died."""

    def __init__(self):
        self.calls = 0

    def log(self, *_):
        self.calls += 1
        raise ConnectionResetError("Connection lost\nlong story")

    picture = close = log


def test_what_cannot_be_logged_is_told_once_and_stops_nothing(tmp_path, capsys):
    broken, written = BrokenSink(), MetricsFile(tmp_path, 0)
    logger = RunLogger([broken, written], Progress("run", 0, 3, enabled=False))
    for step in (1, 2):
        logger.log(step, {"loss": 1.0})
    logger.close()
    assert broken.calls == 3
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    assert capsys.readouterr().err == "BrokenSink could not write: Connection lost\n"


def test_resuming_cuts_the_metrics_after_its_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    MetricsFile(tmp_path, 2).close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert list(tmp_path.iterdir()) == [path]


HANGING = """
import sys, time
from pathlib import Path
from fcmae.training.state import TrainState
from fcmae.training.watchdog import Watchdog
watchdog = Watchdog(0.5, Path(sys.argv[1]), rank=3)
for _ in range(4):
    time.sleep(0.2)
    watchdog.beat()
def stuck():
    time.sleep(60)
stuck()
"""


def test_the_watchdog_ends_what_stands_still_and_leaves_the_stacks(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", HANGING, tmp_path], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 1
    assert "rank 3: no step was finished for 0.5 s (trainer.hang_timeout); the stacks are in" in done.stderr
    assert "in stuck" in (tmp_path / "stacks_rank3.txt").read_text()


STOPPED = """
import os, signal, sys
from pathlib import Path
from fcmae.processes import Process
from fcmae.training.state import TrainState
from fcmae.training.watchdog import Watchdog
Watchdog(3600, Path(sys.argv[1]), rank=1)
def stands():
    print(os.getpid(), Process.this().born, flush=True)
    os.kill(os.getpid(), signal.SIGSTOP)
    while True:
        pass
stands()
"""


def test_the_watchdog_of_one_rank_ends_a_stopped_one_and_gets_its_stacks(tmp_path):
    with subprocess.Popen([sys.executable, "-c", STOPPED, tmp_path], stdout=subprocess.PIPE, text=True) as stopped:
        assert stopped.stdout is not None
        pid, born = stopped.stdout.readline().split()
        while not is_stopped(int(pid)):
            time.sleep(0.01)
        biting = HANGING.replace("rank=3", f"rank=0, siblings={{1: Process({pid}, {born!r}, Process.this().place)}}")
        biting = f"from fcmae.processes import Process\n{biting}"
        done = subprocess.run([sys.executable, "-c", biting, tmp_path], capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert f"rank 1 (process {pid}) was stopped" in done.stderr
        assert stopped.wait(10) == -signal.SIGKILL
    assert "in stands" in (tmp_path / "stacks_rank1.txt").read_text()


def test_a_process_with_the_number_of_a_dead_one_is_not_signalled():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        this = Process.this()
        Process(other.pid, "1", this.place).send(signal.SIGKILL)
        other.communicate(b"\n")
        assert other.returncode == 0
    assert this.is_alive()
    assert not Process(this.pid, this.born, "elsewhere").is_alive()


def test_the_watchdog_leaves_nothing_behind(tmp_path):
    Watchdog(60, tmp_path, rank=0).close()
    assert list(tmp_path.iterdir()) == []


def test_the_meter_averages_since_the_last_reading():
    meter = Meter(CPU, images_per_step=8)
    for loss in (1.0, 3.0):
        meter.add(torch.tensor(loss), torch.tensor(5.0))
    metrics = meter.read()
    assert (metrics["loss"], metrics["grad_norm"]) == (2.0, 5.0)
    assert 0.05 < metrics["memory_gib"] < 100
    meter.add(torch.tensor(7.0), torch.tensor(1.0))
    assert meter.read()["loss"] == 7.0


HOLDER = """
import sys, time
from pathlib import Path
from fcmae.training.lock import RunLock
lock = RunLock(Path(sys.argv[1]))
lock.acquire()
print("held", flush=True)
time.sleep(60)
"""


def test_a_lock_names_its_holder_and_a_dead_holders_lock_is_taken_over(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(UsageError, match=f"in use by another run \\(host .*, process {holder.pid}, started 2"):
            RunLock(tmp_path).acquire()
        holder.kill()
    lock = RunLock(tmp_path)
    lock.acquire()
    lock.close()
    assert list(tmp_path.iterdir()) == []


def test_without_locks_a_holder_counts_in_the_file(tmp_path, monkeypatch):
    """As on a file system that knows no locks, by two that believe to be on different machines, or on the same."""

    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock_module.fcntl, "lockf", no_locks)
    monkeypatch.setattr(RunLock, "BEAT", 0.05)
    first = RunLock(tmp_path)
    first.acquire()
    with pytest.raises(UsageError, match=f"in use by another run .*, process {os.getpid()}, "):
        RunLock(tmp_path).acquire()
    told = json.loads(first.path.read_text())
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(Process, "is_here", lambda _: False)
        with pytest.raises(UsageError, match="in use by another run"):
            RunLock(tmp_path).acquire()
        first.close()
        for dead in ({**told, "place": "elsewhere"}, {**told, "host": "gone", "pid": 1}):
            first.path.write_text(json.dumps(dead))
            taken = RunLock(tmp_path)
            taken.acquire()
            taken.close()
    first.path.write_text(json.dumps({**told, "born": "1"}))
    RunLock(tmp_path).acquire()
    assert json.loads(first.path.read_text())["pid"] == os.getpid()


def test_a_changed_recipe_is_refused_key_by_key():
    old, new = to_dict(PretrainConfig()), to_dict(PretrainConfig(seed=1, optim=OptimConfig(betas=[0.9, 0.99])))
    new["trainer"]["micro_batch_size"] = 8
    new["logger"]["project"] = "other"
    del old["data"]["hflip"]
    with pytest.raises(UsageError) as caught:
        check_recipe(old, new)
    assert str(caught.value).split("\n")[1:] == ["  seed: 0 -> 1", "  optim.betas: (0.9, 0.95) -> (0.9, 0.99)"]
    check_recipe(old, {**new, "seed": 0, "optim": old["optim"]})


def test_every_harmless_key_exists():
    known = set()
    for config in (to_dict(PretrainConfig()), to_dict(FinetuneConfig())):
        for group, value in config.items():
            known |= {f"{group}.{key}" for key in value} if isinstance(value, dict) else {group}
    assert known >= HARMLESS
