"""Resumes all ranks from the same checkpoint."""

import sys

import torch

from fcmae.checkpoints.checkpoint import CheckpointDir, State, read
from fcmae.distributed import World


def newest_state(checkpoints: CheckpointDir, world: World) -> State | None:
    """The newest state that the first rank can read, on every rank; None without a checkpoint.

    Ranks that chose by themselves could differ, e.g. if a disk fails on one machine. Each unreadable checkpoint gets a
    line. Raises CheckpointError.
    """
    state: State | None = None

    def find() -> None:
        nonlocal state
        state = checkpoints.load_latest(say, world.device)

    def follow() -> None:
        nonlocal state
        if not world.is_main and step >= 0:
            state = read(checkpoints.path(step), world.device, checkpoints.alive)

    world.on_main(find)
    step = int(world.max(torch.tensor(-1 if state is None else state["step"])))
    world.together(follow)
    return state


def say(message: str) -> None:
    """Prints a line for the user."""
    print(message, file=sys.stderr, flush=True)
