"""What training asks of a task. A task knows its model, samples, loss and evaluation; training knows the rest."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from torch import Tensor, nn
from torch.utils.data import Dataset

from fcmae.config import RunConfig
from fcmae.data.plan import BatchPlan
from fcmae.data.sources import Source
from fcmae.tasks.monitors import Monitor

Losses: TypeAlias = tuple[Tensor, dict[str, Tensor]]
"""A loss, and the parts that it is made of by name: detached scalars, averaged over samples as the loss is.

A name is logged as ``loss_NAME``. A single part is the loss itself and is not logged.
"""


class Task(Protocol):
    """What the training loop asks of a task."""

    name: str
    source: Source
    monitors: list[Monitor]
    """What is measured during training, in this order."""
    notes: list[str]
    """What the user should know before training starts, a line each."""
    pairs: bool
    """Whether the samples at positions 2i and 2i + 1 of a global batch need each other."""
    mixes_micro_batch: bool
    """Whether a sample's loss depends on all others of its micro-batch."""

    @property
    def cfg(self) -> RunConfig: ...

    @property
    def model(self) -> nn.Module: ...

    def initialise(self) -> None:
        """Loads the weights that a new run begins with, on the first rank; a resumed run does without."""
        ...

    def dataset(self) -> Dataset:
        """Training samples by (epoch, index)."""
        ...

    def prepare(self, plan: BatchPlan) -> None:
        """Checks what depends on the sizes of batches, before the first is read."""
        ...

    def compile(self) -> None:
        """Has the network compiled by torch, for training."""
        ...

    def draw(self, step: int, positions: range) -> list[Tensor]:
        """What is random in an optimizer step for the samples at these positions of its global batch.

        Tensors ``[n, ...]`` on the CPU; functions of the seed, the step and the position.
        """
        ...

    def loss(self, model: nn.Module, batch: Sequence[Tensor], weight: Tensor | None = None) -> Losses:
        """The mean loss of a micro-batch on the device, by ``model``, which is :attr:`model`, and its parts.

        Args:
            batch: the parts of the samples of :meth:`dataset`, then those of :meth:`draw`.
            weight: ``[N]``, a factor on the loss of each sample.
        """
        ...

    def extra_metrics(self) -> dict[str, float]:
        """What is logged beside the means of losses: values at the time of the call. Waits for the device."""
        ...

    def warning(self, step: int, metrics: dict[str, float]) -> str | None:
        """Sees each line of training metrics, on the first rank, and says what is wrong, if anything."""
        ...

    def extra_state(self) -> dict[str, Any]:
        """What a checkpoint holds beyond the loop's own."""
        ...

    def finish(self, run_dir: Path, ema: nn.Module | None, step: int) -> None:
        """What the first rank leaves in the run directory at the end of the schedule."""
        ...
