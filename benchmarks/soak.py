"""A long run of a tiny network with everything on, and whether what it uses and the time of a step stay the same.

    python -m benchmarks.soak steps=20000               on the CPU, with a data worker (make soak)
    python -m benchmarks.soak steps=20000 ranks=2       two ranks
    python -m benchmarks.soak device=cuda minutes=10    on a GPU, with torch.cuda's memory

Saves every 80 steps; every 200 the loss of validation images, k-NN and pictures. A table gives the mean and a linear
fit of memory, handles and threads of every process, of the disk and the time of a step, and of what the training
process has allocated and not freed. Every other KEY=VALUE is an override of `fcmae pretrain`; `out=FOLDER` keeps the
run and `samples.jsonl`. Exit code 1: something grew by more than `limit` percent an hour (1) and by more than twice the
standard error of the fit. The memory of processes counts from 40 minutes on, because allocators keep what was freed and
take long to settle: in 10 minutes, a few blocks of 1 MiB are 1 % an hour. Linux only.
"""

import ctypes
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

GROWS = ("metrics.jsonl", "reconstructions", "memory.jsonl")
"""What becomes more with every step: results of a run directory, and what :class:`MemorySink` writes."""
WARM_UP = 0.25
"""Share of the run that is left out of the fits: caches fill, the allocator settles."""
WINDOWS = 40
"""For the CPU time of a step, which is a difference of two samples."""
PARTS = 10
"""Of a run, for what goes up and down by much."""
SETTLED = 0.5
"""Hours of samples from which on the memory of processes is judged; before, what is in use."""
SINK = f"logger.sinks.memory._target_={Path(__file__).resolve()}:MemorySink"
TICKS = os.sysconf("SC_CLK_TCK")
MALLINFO = ["arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"]
SLOTS = ("memory, MiB", "shared memory, MiB", "handles", "threads")


class Mallinfo(ctypes.Structure):
    """``struct mallinfo2`` of glibc 2.33 and newer."""

    _fields_ = [(name, ctypes.c_size_t) for name in MALLINFO]


def in_use() -> dict[str, float]:
    """What this process has allocated and not freed. Its memory is more: allocators keep what was freed."""
    import torch

    used: dict[str, float] = {"Python's blocks": sys.getallocatedblocks()}
    if hasattr(libc := ctypes.CDLL(None), "mallinfo2"):
        libc.mallinfo2.restype = Mallinfo
        info = libc.mallinfo2()
        used["heap in use, MiB"] = (info.uordblks + info.hblkhd) / 2**20
    if torch.cuda.is_initialized():
        used["torch.cuda: allocated, MiB"] = torch.cuda.memory_allocated() / 2**20
        used["torch.cuda: reserved, MiB"] = torch.cuda.memory_reserved() / 2**20
    return used


class MemorySink:
    """A logger sink that appends :func:`in_use` of the training process to ``memory.jsonl``."""

    def __init__(self, run_dir: Path, start_step: int) -> None:
        self.path = run_dir / "memory.jsonl"

    def log(self, step: int, metrics: dict[str, float]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"time": time.time(), **in_use()}) + "\n")

    def picture(self, step: int, name: str, image: Image.Image) -> None:
        pass

    def close(self) -> None:
        pass


def write_images(folder: Path) -> None:
    """64 training and 32 validation PNGs of 40 x 48 pixels, in two classes."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 64), ("val", 32)):
        for i in range(count):
            path = folder / part / "ab"[i % 2] / f"{i:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            coarse = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((48, 40), Image.Resampling.BICUBIC).save(path)


def overrides(folder: Path, steps: int, device: str) -> list[str]:
    """Of ``fcmae pretrain``: a step of 8 images, 8 steps an epoch."""
    return [
        *("model=demo", "model.dims=[8,12,16,24]", "model.depths=[1,1,1,1]", "model.decoder_embed_dim=16"),
        *("data=imagefolder", f"data.path={folder}/train", f"data.val_path={folder}/val", "data.image_size=32"),
        *("optim.global_batch_size=8", "optim.lr=1e-3", f"schedule.epochs={steps / 8}", "schedule.warmup_epochs=1"),
        *("trainer.checkpoint_every_epochs=10", "trainer.eval_every_epochs=25", "monitor.knn_every_epochs=25"),
        *("monitor.knn_k=5", "trainer.log_every=20", f"trainer.device={device}", "loader.workers=1"),
        *("logger=quiet", "logger.progress=false", f"hydra.run.dir={folder}/run", SINK),
    ]


def family(pid: int) -> list[int]:
    """A process and its descendants that are alive."""
    found = [pid]
    for one in found:
        for task in Path(f"/proc/{one}/task").glob("*/children"):
            try:
                found += map(int, task.read_text().split())
            except OSError:
                continue
    return found


def measure(pid: int) -> dict[str, float] | None:
    """What a process uses now; None if it has ended."""
    try:
        status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        handles = len(os.listdir(f"/proc/{pid}/fd"))
        anonymous, shared = (int(status[name].split()[0]) / 1024 for name in ("RssAnon", "RssShmem"))
    except (OSError, KeyError, ValueError):
        return None
    used = dict(zip(SLOTS, (anonymous, shared, handles, int(status["Threads"])), strict=True))
    return {**used, "cpu": sum(map(int, stat[11:15])) / TICKS}


def disk(*folders: Path) -> tuple[float, int]:
    """MiB and number of files below folders, without what a run adds with every step."""
    size = count = 0
    for path, _, names in itertools.chain(*map(os.walk, folders)):
        for name in names:
            file = Path(path, name)
            if not set(GROWS) & set(file.parts):
                try:
                    size, count = size + file.stat().st_size, count + 1
                except OSError:  # deleted meanwhile
                    continue
    return size / 2**20, count


def last_step(run_dir: Path) -> int:
    """The newest step in metrics.jsonl."""
    try:
        with (run_dir / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            return json.loads(file.read().splitlines()[-1])["step"]
    except (OSError, ValueError, IndexError):
        return 0


def sample(pid: int, folder: Path) -> dict[str, Any]:
    """All measurements of one moment."""
    processes = {one: used for one in family(pid) if (used := measure(one)) is not None}
    size, files = disk(folder / "run", folder / "tmp")
    now = {"time": time.time(), "step": last_step(folder / "run"), "disk, MiB": size, "files": files}
    return {**now, "processes": processes}


def watch(pid: int, is_over: Callable[[], bool], folder: Path, every: float) -> Iterator[dict[str, Any]]:
    """Samples a process and its descendants until it ends."""
    while not is_over():
        yield sample(pid, folder)
        time.sleep(every)


@dataclass
class Fit:
    """A straight line through a quantity over time, by least squares."""

    name: str
    mean: float
    slope: float
    """Percent of the mean per hour."""
    error: float
    """Its standard error, if the residuals were independent."""
    change: float
    """Percent of the mean, over the measured time."""
    hours: float
    """The measured time."""

    @classmethod
    def of(cls, name: str, hours: Sequence[float], values: Sequence[float]) -> "Fit":
        x, y = np.asarray(hours) - np.mean(hours), np.asarray(values, dtype=float)
        mean = float(y.mean())
        slope = float((x * y).sum() / (x * x).sum())
        residual = float(np.sqrt(((y - mean - slope * x) ** 2).sum() / max(1, len(x) - 2)))
        percent = 100 / mean if mean else 0.0
        error = residual / float(np.sqrt((x * x).sum()))
        time = float(np.ptp(x))
        return cls(name, mean, slope * percent, error * percent, slope * percent * time, time)

    def is_flat(self, limit: float) -> bool:
        return self.slope < limit or self.slope < 2 * self.error


def fits(samples: list[dict[str, Any]], run_dir: Path) -> list[Fit]:
    """One for each quantity of the processes that lived all the time, of the disk and of the time of a step."""
    running = [one for one in samples if 0 < one["step"] < samples[-1]["step"]]
    begin, end = running[0]["time"], running[-1]["time"]
    kept = [one for one in running if one["time"] >= begin + WARM_UP * (end - begin)]
    hours = [one["time"] / 3600 for one in kept]
    everywhere = [pid for pid in kept[0]["processes"] if all(pid in one["processes"] for one in kept)]
    found = []
    for number, pid in enumerate(everywhere):
        for what in SLOTS:
            values = [one["processes"][pid][what] for one in kept]
            found.append(Fit.of(f"process {number}: {what}", hours, values))
    for what in SLOTS:
        found.append(Fit.of(f"all: {what}", hours, [sum(p[what] for p in one["processes"].values()) for one in kept]))
    found.append(Fit.of("all: processes", hours, [len(one["processes"]) for one in kept]))
    found += [_highest(what, kept) for what in ("disk, MiB", "files")]
    found.append(_cpu_of_a_step(kept, everywhere))
    logged = [line for line in read_lines(run_dir / "metrics.jsonl") if "images_per_second" in line]
    logged = logged[int(WARM_UP * len(logged)) :]
    spread = np.linspace(hours[0], hours[-1], len(logged))  # lines have no time; they come evenly
    found.append(Fit.of("step, ms", spread.tolist(), [8000 / line["images_per_second"] for line in logged]))
    inside = [line for line in read_lines(run_dir / "memory.jsonl") if line["time"] >= kept[0]["time"]]
    times = [line.pop("time") / 3600 for line in inside]
    found += [Fit.of(what, times, [line[what] for line in inside]) for what in inside[0]]
    return found


def _highest(what: str, kept: list[dict[str, Any]]) -> Fit:
    """Of the largest values of parts of the run: there are two or three checkpoints, and one that is being written."""
    parts = [part for part in np.array_split(np.arange(len(kept)), PARTS) if len(part)]
    hours = [float(np.mean([kept[i]["time"] for i in part])) / 3600 for part in parts]
    return Fit.of(what, hours, [max(kept[i][what] for i in part) for part in parts])


def _cpu_of_a_step(kept: list[dict[str, Any]], pids: list[int]) -> Fit:
    """Of the processes that live all the time; unlike the time of a step it hardly depends on the machine's load."""
    width = max(1, (kept[-1]["step"] - kept[0]["step"]) // WINDOWS)
    chosen = [kept[0]]
    for one in kept:
        if one["step"] >= chosen[-1]["step"] + width:
            chosen.append(one)
    used, hours = [], []
    for before, after in itertools.pairwise(chosen):
        seconds = sum(after["processes"][pid]["cpu"] - before["processes"][pid]["cpu"] for pid in pids)
        used.append(1000 * seconds / (after["step"] - before["step"]))
        hours.append((before["time"] + after["time"]) / 7200)
    return Fit.of("CPU of a step, ms", hours, used)


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def table(found: Sequence[Fit]) -> str:
    """Markdown."""
    rows = ["| quantity | mean | % per hour | standard error | % in all |", "|---|---|---|---|---|"]
    rows += [f"| {f.name} | {f.mean:.4g} | {f.slope:+.2f} | {f.error:.2f} | {f.change:+.2f} |" for f in found]
    return "\n".join(rows)


def main(arguments: Sequence[str]) -> int:
    given = {"steps": "20000", "ranks": "1", "device": "cpu", "minutes": "", "every": "2", "limit": "1", "out": ""}
    own = [argument for argument in arguments if argument.partition("=")[0] in given]
    given |= dict(argument.split("=", 1) for argument in own)
    others = [argument for argument in arguments if argument not in own]
    steps = 10_000_000 if given["minutes"] else int(given["steps"])
    with tempfile.TemporaryDirectory(prefix="fcmae_soak_") as temporary:
        folder = Path(given["out"] or temporary).resolve()
        write_images(folder)
        (folder / "tmp").mkdir(exist_ok=True)
        launcher = ["-m", "fcmae.torchrun", "--standalone", f"--nproc-per-node={given['ranks']}"]
        command = [sys.executable, *(launcher if given["ranks"] != "1" else []), "-m", "fcmae.cli", "pretrain"]
        command += [*overrides(folder, steps, given["device"]), *others]
        command += [f"trainer.max_hours={float(given['minutes']) / 60}"] if given["minutes"] else []
        environment = {**os.environ, "TMPDIR": str(folder / "tmp"), "OMP_NUM_THREADS": "1"}
        with (
            subprocess.Popen(command, env=environment, cwd=folder) as run,
            (folder / "samples.jsonl").open("w", buffering=1) as log,
        ):
            samples = []
            for one in watch(run.pid, lambda: run.poll() is not None, folder, float(given["every"])):
                samples.append(one)
                log.write(json.dumps(one) + "\n")
        if run.returncode not in (0, 75):
            return run.returncode
        found = fits(samples, folder / "run")
        took = samples[-1]["time"] - samples[0]["time"]
        print(f"{last_step(folder / 'run')} steps in {took / 60:.1f} minutes, {len(samples)} samples")
        print(table(found))
        judged = [fit for fit in found if fit.hours >= SETTLED or not fit.name.endswith(": memory, MiB")]
        grown = [fit.name for fit in judged if not fit.is_flat(float(given["limit"]))]
        print(f"grows: {'; '.join(grown)}" if grown else "nothing grows")
        return int(bool(grown))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
