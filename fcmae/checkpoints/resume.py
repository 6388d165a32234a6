"""Resumes all ranks from the same checkpoint."""

import torch

from fcmae.checkpoints.checkpoint import CheckpointDir, State, read
from fcmae.distributed import World
from fcmae.messages import say


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
