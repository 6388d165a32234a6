"""What is looked at while a run trains."""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

from torch import nn

from fcmae.training.distributed import World
from fcmae.training.logging import RunLogger

Wish: TypeAlias = Callable[[], bool]
"""Whether this rank wishes to stop."""

Look: TypeAlias = Callable[[nn.Module | None, int, RunLogger, World, Wish], float | None]
"""Takes the model with averaged weights (if the run keeps one), the step, the logger and the world; looks and logs.

All ranks call it. Returns what the best checkpoint is chosen by, the same on all ranks, if anything; leaves the model
in training mode and no trace in what is trained. Raises EvaluationStopped, on all ranks, if one of them wishes to stop.
"""


class Monitor(NamedTuple):
    """Something to look at every so many epochs, and at the end."""

    every_epochs: float
    look: Look
