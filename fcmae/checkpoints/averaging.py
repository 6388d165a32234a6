"""The mean of several networks' weights, which a run keeps as its averaged weights.

A model soup: networks that were fine-tuned from the same weights (https://arxiv.org/abs/2203.05482, section 2).
"""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fcmae.checkpoints import checkpoint
from fcmae.checkpoints.checkpoint import CheckpointDir
from fcmae.config.recipe import changes
from fcmae.errors import CheckpointError


def is_done(run_dir: Path, config: dict[str, Any]) -> bool:
    """Whether the newest checkpoint has averaged weights, and its recipe is that of ``config``."""
    for last in CheckpointDir(run_dir).paths()[-1:]:
        with contextlib.suppress(CheckpointError):  # training continues from an older one
            state = checkpoint.header(last)
            return state.get("ema") is not None and not changes(state["config"], config)
    return False


def add_mean(last: Path, others: Sequence[Path], alive: Callable[[], object]) -> None:
    """Gives a checkpoint, as averaged weights, the mean of its own and of the newest of other runs.

    Raises CheckpointError; OSError, with the checkpoint as it was.
    """
    state = checkpoint.read(last, alive=alive)
    files = [checkpoint.resolve(f"{run_dir}@last") for run_dir in others]
    weights = [checkpoint.read(file, alive=alive, mmap=True)["model"] for file in files]
    checkpoint.write_atomically(last, {**state, "ema": mean_weights([state["model"], *weights])}, alive)


def mean_weights(networks: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each weight, computed in float64; integers are the first network's."""
    return {
        name: torch.stack([weights[name].double() for weights in networks]).mean(0).to(value.dtype)
        if value.is_floating_point()
        else value
        for name, value in networks[0].items()
    }
