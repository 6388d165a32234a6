"""What happens to a life. Each function waits for nothing but its own duration and says what it did."""

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.jobs import rewrite
from tests.chaos.life import Life
from tests.faults.runs import catches, children

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


@dataclass(frozen=True)
class Event:
    """Something that happens.

    Args:
        act: does it, and returns what to say of it.
        harmless: the life goes on to the end of its work.
        fits: whether it can happen to a life.
        weight: how often, in relation to others.
    """

    act: Callable[[Life, random.Random], str]
    harmless: bool = False
    fits: Callable[[Life], bool] = lambda life: True
    weight: float = 1.0


def kill(life: Life, rng: random.Random) -> str:
    pids = [pid for pid in life.pids() if not _is_pythons(pid)]
    if not pids:
        return "nothing left to kill"
    pid = rng.choice(pids)
    life.killed_all = pid in (life.run.pid, *(children(life.run.pid) if life.ranks > 1 else ()))  # torchrun would tell
    _send(pid, signal.SIGKILL)
    return f"SIGKILL for process {pids.index(pid)} of {len(pids)}"


def stop(life: Life, rng: random.Random) -> str:
    """For the launcher or only process, or for one of the ranks; training saves, other commands just end."""
    number = rng.choice(STOPS if life.job.resumes and life.job.command != "prepare" else STOPS[:2])
    pids = life.pids()
    pid = rng.choice(pids[: 1 + life.ranks]) if life.ranks > 1 and pids else life.run.pid
    _ask(life, pid, number)
    return number.name


def stop_in_a_hurry(life: Life, rng: random.Random) -> str:
    """Two SIGTERMs: the second ends the process at once."""
    _ask(life, life.run.pid, signal.SIGTERM)
    time.sleep(0.7)
    _ask(life, life.run.pid, signal.SIGTERM)
    return "SIGTERM twice"


def pause(life: Life, rng: random.Random) -> str:
    pids = life.pids()
    seconds = rng.uniform(0.1, 2.0)
    if not pids:
        return "nothing left to pause"
    pid = rng.choice(pids)
    _send(pid, signal.SIGSTOP)
    time.sleep(seconds)
    _send(pid, signal.SIGCONT)
    return f"process {pids.index(pid)} of {len(pids)} paused for {seconds:.1f} s"


def freeze(life: Life, rng: random.Random) -> str:
    """A rank that never wakes up; the watchdogs of the others end the run."""
    pids = life.pids()
    if len(pids) > life.ranks:
        _send(pids[rng.randint(1, life.ranks)], signal.SIGSTOP)
    return "a rank stopped for good"


def full_disk(life: Life, rng: random.Random) -> str:
    """Until the life ends, or some seconds in which nothing was written."""
    life.disturb(full=True)
    _wait(life, rng.uniform(0.5, 4.0))
    life.disturb()
    return "disk full"


def slow_disk(life: Life, rng: random.Random) -> str:
    delay, seconds = rng.choice((0.002, 0.01, 0.05)), rng.uniform(0.5, 3.0)
    life.disturb(delay=delay)
    _wait(life, seconds)
    life.disturb()
    return f"{delay * 1000:g} ms per read and write for {seconds:.1f} s"


def wrong_clock(life: Life, rng: random.Random) -> str:
    """It jumps, and for some lives back again."""
    seconds = rng.choice((-1, 1)) * 10 ** rng.uniform(0, 7)
    life.disturb(clock=seconds)
    if rng.random() < 0.5:
        _wait(life, rng.uniform(0.1, 1.0))
        life.disturb()
    return f"clock {seconds:+.0f} s"


def cut(life: Life, rng: random.Random) -> str:
    """A rank's cable is pulled out for a while."""
    assert life.network is not None
    rank, seconds = rng.randrange(life.ranks), rng.uniform(0.2, 2.0)
    life.network.cut(rank)
    time.sleep(seconds)
    life.network.restore(rank)
    return f"network of rank {rank} cut for {seconds:.1f} s"


def cut_for_good(life: Life, rng: random.Random) -> str:
    """Until the run has ended: the ranks give each other up."""
    assert life.network is not None
    rank = rng.randrange(life.ranks)
    life.network.cut(rank)
    _wait(life, 120)
    life.network.restore(rank)
    return f"network of rank {rank} cut"


def replace_file(life: Life, rng: random.Random) -> str:
    path = _image(life, rng)
    rewrite(path)
    return f"{path.name} written again with the same pixels"


def delete_file(life: Life, rng: random.Random) -> str:
    """Gone until the life ends or for some seconds."""
    path = _image(life, rng)
    aside = life.folder / path.name
    path.rename(aside)
    _wait(life, rng.uniform(0.5, 4.0))
    aside.rename(path)
    return f"{path.name} deleted, and brought back"


def damage_file(life: Life, rng: random.Random) -> str:
    """Cut off until the life ends or for some seconds."""
    path = _image(life, rng)
    whole = path.read_bytes()
    path.write_bytes(whole[: rng.randrange(len(whole) - 20)])
    _wait(life, rng.uniform(0.5, 4.0))
    path.write_bytes(whole)
    return f"{path.name} cut off, and made whole"


def _with_images(life: Life) -> bool:
    return bool(life.job.images)


def _has_begun(life: Life) -> bool:
    """Whether the number of images is settled: a run that finds one less at its start takes what is there."""
    return any((life.folder / "disk" / "run" / "checkpoints").glob("step_*.pt"))


def _with_network(life: Life) -> bool:
    return life.network is not None


def _trains(life: Life) -> bool:
    return life.ranks > 1 and life.job.out == "disk/run"


EVENTS = {
    "kill": Event(kill, weight=3),
    "stop signal": Event(stop, weight=2),
    "two stop signals": Event(stop_in_a_hurry, weight=0.5),
    "full disk": Event(full_disk, weight=1.5),
    "file deleted": Event(delete_file, fits=_has_begun),
    "file damaged": Event(damage_file, fits=_with_images),
    "rank frozen": Event(freeze, fits=_trains, weight=0.3),
    "network cut for good": Event(cut_for_good, fits=lambda life: _trains(life) and _with_network(life), weight=0.3),
    "pause": Event(pause, harmless=True, weight=1.5),
    "slow disk": Event(slow_disk, harmless=True, weight=1.5),
    "clock": Event(wrong_clock, harmless=True, weight=1.5),
    "network cut": Event(cut, harmless=True, fits=_with_network, weight=2),
    "file replaced": Event(replace_file, harmless=True, fits=lambda life: bool(life.job.images)),
}


def choose(life: Life, rng: random.Random) -> str:
    """The name of the event that comes next."""
    fitting = {name: event.weight for name, event in EVENTS.items() if event.fits(life)}
    return rng.choices(list(fitting), list(fitting.values()))[0]


def _image(life: Life, rng: random.Random) -> Path:
    return rng.choice(sorted((life.folder / "disk" / "data" / life.job.images).rglob("*.png")))


def _wait(life: Life, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not life.is_over and time.monotonic() < end:
        time.sleep(0.02)


def _ask(life: Life, pid: int, number: signal.Signals) -> None:
    """Sends a stop signal. Python's own end by one says nothing, nor does a process that only just starts."""
    with contextlib.suppress(OSError):  # it has ended
        life.killed_all |= life.job.out != "disk/run" or not catches(pid, number)
        os.kill(pid, number)


def _is_pythons(pid: int) -> bool:
    """Whether it is the tracker of multiprocessing, whose successor prints tracebacks of its own."""
    with contextlib.suppress(OSError):
        return b"resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def _send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
