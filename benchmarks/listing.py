"""What a folder of a million images costs before the first is read: time and memory, with and without a kept listing.

    python benchmarks/listing.py --images 1300000 --folder /tmp/listing --json benchmarks/listing.json

Makes the folder of empty files, in 1,000 classes, measures each case in a process of its own, and removes the folder.
The names of the folder are in the system's cache then: on a cold disk or over a network listing takes longer.
Memory is that of Linux: ``total`` is proportional set sizes (pages that are shared count once), ``private`` what a
worker has for itself.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from fcmae.bench.measure import machine
from fcmae.data.loading import TrainBatches, Workers
from fcmae.data.plan import BatchPlan
from fcmae.data.sources import ImageFolder

CLASSES = 1000
WORKERS = (0, 1, 4, 8)
READ = 200_000
"""Paths and labels that are looked up before memory is measured."""


class Paths(Dataset):
    """Lengths of paths and labels, without reading the files: they are empty."""

    def __init__(self, length: int, path: Callable[[int], str], label: Callable[[int], int | None]) -> None:
        self.length = length
        self.path = path
        self.label = label

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, key: tuple[int, int]) -> tuple[int, int]:
        return len(self.path(key[1])), self.label(key[1]) or 0


class Plain(Paths):
    """The same from a Python list, as torchvision's ImageFolder keeps it."""

    def __init__(self, folder: str) -> None:
        source = ImageFolder(folder)
        samples = [(source.describe(i), source.label(i)) for i in range(len(source))]
        super().__init__(len(samples), lambda i: samples[i][0], lambda i: samples[i][1])


def make(folder: Path, images: int) -> float:
    """Empty files; returns the seconds."""
    started = time.perf_counter()
    for c in range(CLASSES):
        subfolder = folder / f"n{c:08d}"
        subfolder.mkdir(parents=True)
        for i in range(c * images // CLASSES, (c + 1) * images // CLASSES):
            os.close(os.open(f"{subfolder}/n{c:08d}_{i}.JPEG", os.O_CREAT | os.O_WRONLY))
        os.utime(subfolder, (1, 1))  # as if made long ago
    os.utime(folder, (1, 1))
    return time.perf_counter() - started


def memory_mib(field: str, pid: int | str = "self") -> float:
    """A field of what Linux says of a process's memory: Rss, Pss, Private_Dirty, ..."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


def start(folder: str, relist: bool) -> dict[str, float]:
    """Seconds until the source is there, and what it takes."""
    before = memory_mib("Rss")
    started = time.perf_counter()
    source = ImageFolder(folder, relist=relist)
    seconds = time.perf_counter() - started
    peak = int(next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM")).split()[1])
    return {
        "images": len(source),
        "seconds": seconds,
        "mib": memory_mib("Rss") - before,
        "peak_mib": peak / 1024 - before,
    }


def workers(folder: str, count: int, plain: bool) -> dict[str, float]:
    """What all processes take after many samples were looked up, and of it the loader workers."""
    source = ImageFolder(folder)
    dataset = Plain(folder) if plain else Paths(len(source), source.describe, source.label)
    plan = BatchPlan.create(len(dataset), 256, None, 1, seed=0)
    batches = TrainBatches(dataset, plan, 0, range(plan.steps_per_epoch), Workers(count))
    for _ in itertools.islice(batches, READ // 256):
        pass
    pids = [child.pid for child in multiprocessing.active_children() if child.pid is not None]
    private = [memory_mib("Private_Dirty", pid) + memory_mib("Private_Clean", pid) for pid in pids]
    total = memory_mib("Pss") + sum(memory_mib("Pss", pid) for pid in pids)
    return {"workers": count, "total_mib": total, "private_mib_of_a_worker": sum(private) / max(1, count)}


def in_a_process(*args: Any) -> dict[str, float]:
    """Runs this file for one measurement."""
    command = [sys.executable, "-W", "ignore", __file__, "--measure", json.dumps(args)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1_300_000)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/fcmae-listing"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        name, *args = json.loads(given.measure)
        print(json.dumps({"start": start, "workers": workers}[name](*args)))
        return
    folder = given.folder / "images"
    result: dict[str, Any] = {"machine": machine(torch.device("cpu")), "images": given.images, "classes": CLASSES}
    try:
        result["made_in_seconds"] = make(folder, given.images)
        for name, relist in (("listed", True), ("kept", False)):
            result[name] = in_a_process("start", str(folder), relist)
            print(name, result[name], flush=True)
        result["file_mib"] = next(given.folder.glob(".*.fcmae-listing")).stat().st_size / 2**20
        for name, plain in (("fcmae", False), ("a Python list", True)):
            result[name] = [in_a_process("workers", str(folder), count, plain) for count in WORKERS]
            print(name, *result[name], sep="\n  ", flush=True)
    finally:
        shutil.rmtree(given.folder)
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
