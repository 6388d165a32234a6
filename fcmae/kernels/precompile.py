"""Compiling the Triton kernels of a network side by side, before its first step needs them.

A kernel takes seconds to compile, and a network needs a dozen, one after another where they are launched first. Here
another program (:mod:`fcmae.kernels.compiler`) compiles them, in as many processes as there are cores; Triton's cache
on disk hands the results to this process, which meanwhile traces and compiles everything else.
"""

import contextlib
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from threading import Event, Thread
from typing import Any, NamedTuple, TextIO, cast

import torch

from fcmae.kernels.target import target


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

    @property
    def kernels(self) -> list[str]:
        """Those that such blocks launch."""
        return ["forward", "weight_grad", *(["gelu_grn", "gelu_grn_backward"] if self.hidden is not None else [])]


class _Task(NamedTuple):
    kernel: str
    shape: BlockShape
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
    for shape in new:
        _started[shape, device] = [_Task(kernel, shape, Event()) for kernel in shape.kernels]
    if new:
        tasks = [task for shape in new for task in _started[shape, device]]
        Thread(target=_compile, args=(tasks, _gpu()), daemon=True, name="precompile").start()
    return [functools.partial(_wait, _started[shape, device]) for shape in shapes]


def _gpu() -> dict[str, Any]:
    """What the current device is, for the compiler, which does not look at it."""
    from triton.runtime import driver

    found = driver.active.get_current_target()
    return {"target": [found.backend, found.arch, found.warp_size], "gpu": target(torch.empty(0, device="cuda"))}


def _wait(tasks: list[_Task]) -> None:
    for task in tasks:
        task.done.wait()


def _compile(tasks: list[_Task], gpu: dict[str, Any]) -> None:
    """Hands the tasks to the compiler and learns which are done. It ends with this process: its input does."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    order = {**gpu, "processes": min(cores, len(tasks)), "tasks": [(task.kernel, task.shape) for task in tasks]}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    program = [sys.executable, "-m", "fcmae.kernels.compiler"]
    start_compiler = functools.partial(subprocess.Popen, program, env=environment, text=True, stderr=subprocess.DEVNULL)
    with contextlib.suppress(OSError), start_compiler(stdin=subprocess.PIPE, stdout=subprocess.PIPE) as compiler:
        print(json.dumps(order), file=compiler.stdin, flush=True)
        for number in cast(TextIO, compiler.stdout):
            tasks[int(number)].done.set()
    for task in tasks:  # the compiler could not be started, or is gone
        task.done.set()
