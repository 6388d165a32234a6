"""Jobs side by side, the events that happen to them, and what is checked."""

import collections
import itertools
import os
import random
import shutil
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.chaos import jobs, network
from tests.chaos.events import EVENTS, choose
from tests.chaos.jobs import Job
from tests.chaos.life import Failure, Life

SHARE = (4, 10)
"""Events of a job, least and most."""
LIVES = 12
"""After so many starts a job is left alone."""


OTHERS = ("torchinductor_", "torchelastic_", "pymp-")
"""Beginnings of names of torch's and Python's folders in TMPDIR: a cache, and what stays there after SIGKILL."""


class Play:
    """All jobs. ``given`` are the program's arguments, as strings."""

    def __init__(self, folder: Path, given: dict[str, str]) -> None:
        self.folder, self.seed = folder, int(given["seed"])
        self.wanted = int(given["events"] or 1 << 30)
        self.deadline = time.monotonic() + 60 * float(given["minutes"])
        self.slots = int(given["jobs"])
        chosen = [job for job in jobs.JOBS if not given["only"] or job.name in given["only"].split(",")]
        self.cast = [(job, ranks) for job in chosen for ranks in job.ranks if given["ranks"] in ("", str(ranks))]
        random.Random(self.seed).shuffle(self.cast)
        self.lock = threading.RLock()
        self.digests: dict[tuple[str, int], str] = {}
        self.tally: collections.Counter[str] = collections.Counter()
        self.lives: collections.Counter[str] = collections.Counter()
        self.lines: collections.Counter[int] = collections.Counter()
        """How many lines told of an end."""
        self.failures: list[str] = []
        self.started = time.monotonic()

    def run(self) -> int:
        jobs.write_data(self.folder / "data")
        (self.folder / "start").mkdir(exist_ok=True)
        numbers = itertools.count()
        with ThreadPoolExecutor(self.slots) as pool:
            list(pool.map(lambda slot: self._slot(slot, numbers), range(self.slots)))
        if own_memory := os.environ.get("FCMAE_CHAOS") == "namespaces" and os.listdir("/dev/shm"):
            self._fail(f"shared memory is left behind: {own_memory}")
        events = sum(self.tally.values())
        print(f"{events} events in {(time.monotonic() - self.started) / 60:.1f} minutes, seed {self.seed}")
        print("events: " + ", ".join(f"{name} {count}" for name, count in sorted(self.tally.items())))
        print("runs (starts): " + ", ".join(f"{name} {count}" for name, count in sorted(self.lives.items())))
        print("lines that told of an end: " + ", ".join(f"{n}: {count}" for n, count in sorted(self.lines.items())))
        print(f"{len(self.failures)} failures" + "".join(f"\n{failure.splitlines()[0]}" for failure in self.failures))
        return int(bool(self.failures))

    def _slot(self, slot: int, numbers: "itertools.count[int]") -> None:
        """Plays one job after another."""
        own = network.Network(slot) if os.environ.get("FCMAE_CHAOS") == "namespaces" else None
        try:
            while not self._is_over():
                number = next(numbers)
                job, ranks = self.cast[number % len(self.cast)]
                try:
                    self._play(number, job, ranks, own)
                except Failure as failure:
                    self._fail(f"{number} {job.name}, {ranks} ranks: {failure}")
                except Exception:
                    self._fail(f"{number} {job.name}, {ranks} ranks: {traceback.format_exc()}")
        finally:
            if own is not None:
                own.close()

    def _is_over(self) -> bool:
        return sum(self.tally.values()) >= self.wanted or time.monotonic() > self.deadline

    def _undisturbed(self, job: Job, ranks: int) -> str:
        """The digest of a job that nothing disturbs, made once; what it leaves is where other jobs start."""
        with self.lock:
            if (job.name, ranks) not in self.digests:
                for other in jobs.JOBS:
                    if other.name in job.needs:
                        self._undisturbed(other, 1)
                self.digests[job.name, ranks] = self._made(job, ranks)
            return self.digests[job.name, ranks]

    def _made(self, job: Job, ranks: int) -> str:
        folder = self.folder / f"undisturbed_{job.name}_{ranks}".replace(" ", "_")
        jobs.prepare_folder(folder, self.folder / "data", self.folder / "start")
        life = Life(job, folder, ranks, None)
        if code := life.end():
            raise Failure(f"undisturbed it ends with {code}:\n{life.end_of_said()}")
        if ranks == 1 and job.out == jobs.RUN:
            (self.folder / "start" / job.name).symlink_to(folder / jobs.RUN)
        return job.result(folder)

    def _play(self, number: int, job: Job, ranks: int, own: network.Network | None) -> None:
        """One job from its first start to its end."""
        rng = random.Random(f"{self.seed} {number}")
        expected = self._undisturbed(job, ranks)
        folder = self.folder / f"{number:03d}_{job.name}_{ranks}".replace(" ", "_")
        jobs.prepare_folder(folder, self.folder / "data", self.folder / "start")
        left = rng.randint(*SHARE)
        said: list[str] = []
        for count in range(LIVES + 1):
            life = Life(job, folder, ranks, own)
            self.lives[f"{job.name} {ranks}"] += 1
            try:
                done, events = self._live(life, rng, left if count < LIVES else 0, said)
            except Failure as failure:
                life.kill()
                raise Failure(f"{failure}; events: {'; '.join(said)}; stderr:\n{life.end_of_said()}") from None
            left -= events
            if done:
                break
        self._check(job, folder, expected, said)
        shutil.rmtree(folder)

    def _live(self, life: Life, rng: random.Random, left: int, said: list[str]) -> tuple[bool, int]:
        """One start. Returns whether the command reached its end, and how many events happened."""
        events, harmless = 0, True
        while harmless and events < left and life.until_struck(rng):
            name = choose(life, rng)
            told = f"{name}: {EVENTS[name].act(life, rng)}"
            said.append(told)
            events += 1
            self.tally[name] += 1
            harmless = EVENTS[name].harmless
        code = life.end()
        lines = life.check_told(code)
        said.append(f"-> {code}")
        if code and harmless:
            raise Failure(f"exit code {code} although nothing happened that may end it")
        if code and not life.killed_all:
            self.lines[len(lines)] += 1
        print(f"[{time.monotonic() - self.started:5.0f} s] {life.folder.name}: {'; '.join(said[-events - 1 :])}"
              f" | {' | '.join(lines)}", flush=True)  # fmt: skip
        return code == 0, events

    def _check(self, job: Job, folder: Path, expected: str, said: list[str]) -> None:
        """The result, and what is left behind."""
        strays = [str(path) for place in ("disk", "tmp") for path in (folder / place).rglob("*.tmp")]
        strays += [str(path) for path in (folder / "tmp").iterdir() if not path.name.startswith(OTHERS)]
        if strays:
            raise Failure(f"left behind: {strays}; events: {'; '.join(said)}")
        if job.result(folder) != expected:
            raise Failure(f"another result than undisturbed, in {folder}; events: {'; '.join(said)}")

    def _fail(self, what: str) -> None:
        print(f"FAILED {what}", flush=True)
        self.failures.append(what)
