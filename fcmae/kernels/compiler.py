"""Compiles Triton kernels into its cache on disk, side by side, for a GPU that this program does not touch.

``python -m fcmae.kernels.compiler`` reads an order from :mod:`fcmae.kernels.precompile`, a line of JSON, and answers
with the number of each task that is over, a line each. Kernels are launched on a small image in memory, by a process
that Triton compiles for and does not run: opening the GPU takes seconds, and longer the more processes do.
"""

import contextlib
import functools
import json
import multiprocessing
import os
import sys
from collections.abc import Callable
from threading import Thread
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fcmae.kernels import depthwise_launch
from fcmae.kernels.depthwise import neighbors
from fcmae.kernels.grn_triton import gelu_grn_backward, gelu_grn_forward
from fcmae.kernels.precompile import BlockShape
from fcmae.kernels.target import Target, pretend


def main() -> None:
    """Serves one order. It makes way for the process that waits, which meanwhile traces."""
    order = json.loads(sys.stdin.readline())
    with contextlib.suppress(OSError):
        os.nice(10)
    torch.set_num_threads(1)
    compile_only(GPUTarget(*order["target"]))
    pretend(Target(*order["gpu"]))
    with multiprocessing.get_context("fork").Pool(order["processes"]) as pool:
        Thread(target=_end_with_input, args=(pool.terminate,), daemon=True).start()
        for number in pool.imap_unordered(_work_off, enumerate(order["tasks"])):
            print(number, flush=True)


def compile_only(gpu: GPUTarget) -> None:
    """From now on a launch in this process compiles for ``gpu`` and does nothing else."""
    driver.set_active(_NoDevice(gpu))
    run = JITFunction.run

    def compile_for(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **options)

    JITFunction.run = compile_for


class _NoDevice:
    """Triton's driver, as far as compiling asks it."""

    def __init__(self, gpu: GPUTarget) -> None:
        self.gpu = gpu

    def get_current_target(self) -> GPUTarget:
        return self.gpu

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def _end_with_input(terminate: Callable[[], None]) -> None:
    """Ends this program, whatever it does, when the one that started it is gone or needs no more."""
    sys.stdin.read()
    terminate()
    os._exit(0)


def _work_off(numbered: tuple[int, tuple[str, list[Any]]]) -> int:
    number, (kernel, (grid, *rest)) = numbered
    with contextlib.suppress(Exception):
        KERNELS[kernel](BlockShape(tuple(grid), *rest))
    return number


def _forward(shape: BlockShape) -> None:
    x, weight, bias, tables = _depthwise_arguments(shape)
    depthwise_launch.forward(x, weight, bias, *tables)
    depthwise_launch.input_grad(x, weight, *tables)


def _weight_grad(shape: BlockShape) -> None:
    x, _, _, tables = _depthwise_arguments(shape)
    depthwise_launch.weight_grad(x, x, shape.kernel, *tables)


def _depthwise_arguments(shape: BlockShape) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    s, c, k = shape.sites, shape.channels, shape.kernel
    where = neighbors(torch.arange(shape.keep)[None], *shape.grid)
    x = torch.zeros(1, shape.keep, s, s, c, dtype=getattr(torch, shape.dtype))
    return x, torch.zeros(c, 1, k, k), torch.zeros(c), (where.slots, where.cells)


def _gelu_grn(shape: BlockShape, backward: bool = False) -> None:
    assert shape.hidden is not None
    x = torch.zeros(1, shape.keep * shape.sites**2, shape.hidden, dtype=getattr(torch, shape.dtype))
    parameter = torch.zeros(shape.hidden)
    if backward:
        gelu_grn_backward(x, x, parameter, parameter, parameter[None], parameter[:1], 1e-6)
    else:
        gelu_grn_forward(x, parameter, parameter, parameter, 1e-6)


KERNELS: dict[str, Callable[[BlockShape], None]] = {
    "forward": _forward,
    "weight_grad": _weight_grad,
    "gelu_grn": _gelu_grn,
    "gelu_grn_backward": functools.partial(_gelu_grn, backward=True),
}
"""By the names of :attr:`BlockShape.kernels`."""

if __name__ == "__main__":
    main()
