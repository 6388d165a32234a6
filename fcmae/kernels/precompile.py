"""Compiling the Triton kernels of a network side by side, before its first step needs them.

A kernel takes seconds to compile, and a network needs a dozen, one after another where they are launched first. Here
each is compiled by a process of its own, which launches it once on a single image; Triton's cache on disk hands the
result to this process, which meanwhile traces and compiles everything else.
"""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from fcmae.kernels.depthwise import neighbors


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


def start(shapes: Iterable[BlockShape]) -> list[Callable[[], None]]:
    """Starts compiling the kernels of every shape that is new to this process.

    Returns:
        For each shape a function that waits until its kernels are there. A kernel that could not be compiled this way
        is compiled, or fails, where it is launched.
    """
    device = torch.cuda.current_device()
    return [functools.partial(_wait, _start(shape, device)) for shape in shapes]


def _wait(builds: tuple[Future, ...]) -> None:
    for build in builds:
        build.result()


@functools.cache
def _start(shape: BlockShape, device: int) -> tuple[Future, ...]:
    kernels = [name for name in KERNELS if shape.hidden is not None or not name.startswith("gelu_grn")]
    return tuple(_pool().submit(_run, [name, str(device), *map(json.dumps, shape)]) for name in kernels)


@functools.cache
def _pool() -> ThreadPoolExecutor:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return ThreadPoolExecutor(min(16, cores), thread_name_prefix="precompile")


def _run(arguments: list[str]) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    program = [sys.executable, "-m", "fcmae.kernels.precompile", *arguments]
    subprocess.run(program, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)


def _depthwise(shape: BlockShape) -> None:
    from fcmae.kernels import triton_depthwise

    x, weight, bias, tables = _depthwise_arguments(shape)
    triton_depthwise.forward(x, weight, bias, *tables)
    triton_depthwise.input_grad(x, weight, *tables)


def _depthwise_weight_grad(shape: BlockShape) -> None:
    from fcmae.kernels import triton_depthwise

    x, _, _, tables = _depthwise_arguments(shape)
    triton_depthwise.weight_grad(x, x, shape.kernel, *tables)


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
    name, device, grid, *rest = sys.argv[1:]
    torch.cuda.set_device(int(device))
    KERNELS[name](BlockShape(tuple(json.loads(grid)), *map(json.loads, rest)))
    torch.cuda.synchronize()
