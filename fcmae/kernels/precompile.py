"""Compiling the Triton kernels of a network side by side, before its first step needs them.

A kernel takes seconds to compile, and a network needs a dozen, one after another where they are launched first. Here
each is launched once on a single image by one of a few processes, as many as there are cores; Triton's cache on disk
hands the result to this process, which meanwhile traces and compiles everything else.
"""

import contextlib
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from queue import Empty, SimpleQueue
from threading import Event, Thread
from typing import NamedTuple, TextIO, cast

import torch
from torch import Tensor

from fcmae.kernels.depthwise import neighbors

MAX_PROCESSES = 16
"""A process takes seconds of a core, and half a GiB of the GPU's memory, before it compiles anything."""


class BlockShape(NamedTuple):
    """What the kernels of a stage's blocks are specialised for."""

    grid: tuple[int, int]
    """Rows and columns of patches in an image, of which ``keep`` are visible."""
    keep: int
    sites: int
    """A side of a patch."""
    channels: int
    kernel: int
    hidden: int | None
    """Channels of GELU and GRN; None where they are not fused."""
    dtype: str
    """Of the activations, as torch names it: ``bfloat16``."""


class _Task(NamedTuple):
    kernel: str
    shape: BlockShape
    device: int
    done: Event


_started: dict[tuple[BlockShape, int], list[_Task]] = {}
"""Of every shape and device, what was started."""


def start(shapes: Iterable[BlockShape]) -> list[Callable[[], None]]:
    """Starts compiling the kernels of every shape that is new to this process.

    Returns:
        For each shape a function that waits until its kernels are there. A kernel that could not be compiled this way
        is compiled, or fails, where it is launched.
    """
    device, shapes = torch.cuda.current_device(), list(shapes)
    new = [shape for shape in dict.fromkeys(shapes) if (shape, device) not in _started]
    tasks: SimpleQueue[_Task] = SimpleQueue()
    for shape in new:
        names = [name for name in KERNELS if shape.hidden is not None or not name.startswith("gelu_grn")]
        _started[shape, device] = [_Task(name, shape, device, Event()) for name in names]
        for task in _started[shape, device]:
            tasks.put(task)
    for _ in range(min(MAX_PROCESSES, _cores(), tasks.qsize())):
        Thread(target=_work_off, args=(tasks,), daemon=True, name="precompile").start()
    return [functools.partial(_wait, _started[shape, device]) for shape in shapes]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _wait(tasks: list[_Task]) -> None:
    for task in tasks:
        task.done.wait()


def _work_off(tasks: SimpleQueue[_Task]) -> None:
    """Hands tasks to a process, one after another, until none are left. It ends with this one: its input does."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    program = [sys.executable, "-m", "fcmae.kernels.precompile"]
    start_process = functools.partial(subprocess.Popen, program, env=environment, text=True, stderr=subprocess.DEVNULL)
    with contextlib.suppress(OSError), start_process(stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        answers = cast(TextIO, process.stdout)
        for task in _left(tasks):
            try:
                print(json.dumps([task.kernel, task.device, *task.shape]), file=process.stdin, flush=True)
                answers.readline()
            finally:
                task.done.set()
    for task in _left(tasks):  # the process could not be started, or is gone
        task.done.set()


def _left(tasks: SimpleQueue[_Task]) -> Iterator[_Task]:
    with contextlib.suppress(Empty):
        while True:
            yield tasks.get_nowait()


def _serve() -> None:
    """What the process does: a task a line, answered by a line when it is over.

    It makes way for the process that waits, which meanwhile traces: with few cores that is what takes longest.
    """
    with contextlib.suppress(OSError):
        os.nice(10)
    for line in sys.stdin:
        kernel, device, grid, *rest = json.loads(line)
        with contextlib.suppress(Exception):
            torch.cuda.set_device(device)
            KERNELS[kernel](BlockShape(tuple(grid), *rest))
            torch.cuda.synchronize()
        print(flush=True)


def _depthwise(shape: BlockShape) -> None:
    from fcmae.kernels import depthwise_launch

    x, weight, bias, tables = _depthwise_arguments(shape)
    depthwise_launch.forward(x, weight, bias, *tables)
    depthwise_launch.input_grad(x, weight, *tables)


def _depthwise_weight_grad(shape: BlockShape) -> None:
    from fcmae.kernels import depthwise_launch

    x, _, _, tables = _depthwise_arguments(shape)
    depthwise_launch.weight_grad(x, x, shape.kernel, *tables)


def _depthwise_arguments(shape: BlockShape) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    s, c, k = shape.sites, shape.channels, shape.kernel
    where = neighbors(torch.arange(shape.keep, device="cuda")[None], *shape.grid)
    x = torch.zeros(1, shape.keep, s, s, c, dtype=getattr(torch, shape.dtype), device="cuda")
    return x, torch.zeros(c, 1, k, k, device="cuda"), torch.zeros(c, device="cuda"), (where.slots, where.cells)


def _gelu_grn(shape: BlockShape) -> None:
    from fcmae.kernels.grn_triton import gelu_grn_forward

    x, parameter = _gelu_grn_arguments(shape)
    gelu_grn_forward(x, parameter, parameter, parameter, 1e-6)


def _gelu_grn_backward(shape: BlockShape) -> None:
    from fcmae.kernels.grn_triton import gelu_grn_backward

    x, parameter = _gelu_grn_arguments(shape)
    gelu_grn_backward(x, x, parameter, parameter, parameter[None], parameter[:1], 1e-6)


def _gelu_grn_arguments(shape: BlockShape) -> tuple[Tensor, Tensor]:
    assert shape.hidden is not None
    size = (1, shape.keep * shape.sites**2, shape.hidden)
    x = torch.zeros(size, dtype=getattr(torch, shape.dtype), device="cuda")
    return x, torch.zeros(shape.hidden, device="cuda")


KERNELS: dict[str, Callable[[BlockShape], None]] = {
    "depthwise": _depthwise,
    "depthwise_weight_grad": _depthwise_weight_grad,
    "gelu_grn": _gelu_grn,
    "gelu_grn_backward": _gelu_grn_backward,
}
"""What each process compiles."""

if __name__ == "__main__":
    _serve()
