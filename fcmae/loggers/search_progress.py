"""How far ``recipe=auto`` is: lines for the user, and a file for ``fcmae status``."""

import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

from fcmae.distributed import World
from fcmae.errors import counted
from fcmae.files import write_result
from fcmae.status import minutes


class Size(NamedTuple):
    """The optimizer steps of a training, and the samples of each."""

    steps: int
    batch: int

    @property
    def samples(self) -> int:
        return self.steps * self.batch


class SearchProgress:
    """The trainings of a search that are left, and the time that they will take. Every rank calls its methods.

    Args:
        file: for :mod:`fcmae.status`.
        sizes: of each training of a fold, by name, in their order, and at the end of the last one, which has none of
            the names and is left out if the probe is better.
        done: the names of those that earlier processes have done.
    """

    def __init__(self, file: Path, sizes: Mapping[str, Size], last: Size, done: Collection[str], world: World) -> None:
        self.file, self.last, self.total, self.world = file, last, len(sizes) + 1, world
        self.left = {name: size for name, size in sizes.items() if name not in done}
        self.samples, self.seconds = 0, 0.0
        steps = sorted({size.steps for size in (*sizes.values(), last)})
        each = f"{steps[0]:,} to {steps[-1]:,} steps" if len(steps) > 1 else counted(steps[0], "step")
        left = f"{len(self.left) + 1} of {self.total}" if done else f"{self.total}"
        are_left = " are left" if done else ""
        world.say(f"recipe=auto: {left} trainings of {each}{are_left}, one fewer if the probe is better")
        self._write(None)

    def start(self, name: str) -> None:
        """A training begins."""
        self.began, self.size = time.perf_counter(), self.left.pop(name)
        self._write(name)

    def end(self, whole: bool) -> str:
        """The training has ended. Returns how long it took, and about how long the others will take.

        Args:
            whole: no earlier process had begun it.
        """
        took = time.perf_counter() - self.began
        if whole:
            self.samples, self.seconds = self.samples + self.size.samples, self.seconds + took
        about = f", about {minutes(self._samples() * self.seconds / self.samples)}" if self.samples else ""
        return f"({took:.0f} s); {counted(len(self.left) + 1, 'training')} left{about}"

    def _samples(self) -> int:
        """Of the trainings that have not begun."""
        return sum(size.samples for size in (*self.left.values(), self.last))

    def _write(self, name: str | None) -> None:
        done = self.total - len(self.left) - 1 - (name is not None)
        state = {"training": name, "done": done, "total": self.total, "samples_after": self._samples()}
        self.world.on_main(lambda: write_result(self.file, state))
