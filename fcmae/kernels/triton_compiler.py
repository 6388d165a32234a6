"""Compiles Triton kernels into the cache on disk, in parallel, for a GPU that this program does not open.

The program reads an order from :mod:`fcmae.kernels.precompile`, a line of JSON, and ends when it is done. Its processes
launch kernels on a small image in memory, but Triton only compiles: so they need neither memory of the GPU nor the time
to open it.
"""

import contextlib
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

from fcmae.kernels import depthwise_launch, grn_triton, norm_triton, patch_error_triton
from fcmae.kernels.depthwise import neighbors
from fcmae.kernels.float8_triton import scale, zero_largest
from fcmae.kernels.norm_triton import layer_norm_backward, layer_norm_forward
from fcmae.kernels.patch_rows_triton import patch_rows
from fcmae.kernels.precompile import Move
from fcmae.kernels.residual_triton import add_and_sum, residual, scale_and_sum
from fcmae.kernels.sums_triton import add_up, sum_many_rows
from fcmae.kernels.target import Target, pretend


def main() -> None:
    """Compiles one order, at low priority: the process that waits traces meanwhile."""
    order = json.loads(sys.stdin.readline())
    with contextlib.suppress(OSError):
        os.nice(10)
    torch.set_num_threads(1)
    compile_only(GPUTarget(*order["target"]))
    pretend(Target(*order["gpu"]))
    tasks = [(kernel, kind, shape) for kind, shape in order["shapes"] for kernel in KERNELS[kind]]
    with multiprocessing.get_context("fork").Pool(min(len(os.sched_getaffinity(0)), len(tasks))) as pool:
        Thread(target=_end_with_input, args=(pool.terminate,), daemon=True).start()
        pool.map(_work_off, tasks, chunksize=1)


def compile_only(gpu: GPUTarget) -> None:
    """Makes every launch in this process compile for ``gpu`` and run nothing."""
    driver.set_active(_NoDevice(gpu))
    run = JITFunction.run

    def compile_for(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **options)

    JITFunction.run = compile_for


class _NoDevice:
    """The part of Triton's driver that compiling uses."""

    def __init__(self, gpu: GPUTarget) -> None:
        self.gpu = gpu

    def get_current_target(self) -> GPUTarget:
        return self.gpu

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def _end_with_input(terminate: Callable[[], None]) -> None:
    """Ends this program when the one that started it ends or closes the pipe."""
    os.read(sys.stdin.fileno(), 1)  # not through a buffer, whose lock the end of Python needs
    terminate()
    os._exit(0)


def _work_off(task: tuple[str, str, list[Any]]) -> None:
    kernel, kind, shape = task
    with contextlib.suppress(Exception):
        KERNELS[kind][kernel](*shape)


def _forward(*shape: Any) -> None:
    x, weight, bias, tables = _depthwise_arguments(*shape)
    depthwise_launch.forward(x, weight, bias, *tables)
    depthwise_launch.input_grad(x, weight, *tables)


def _weight_grad(*shape: Any) -> None:
    x, weight, _, tables = _depthwise_arguments(*shape)
    depthwise_launch.partial_weight_grad(x, x, weight.shape[-1], *tables)


def _depthwise_arguments(
    grid: list[int], keep: int, s: int, c: int, k: int, dtype: str
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    where = neighbors(torch.arange(keep)[None], *grid)
    x = torch.zeros(1, keep, s, s, c, dtype=getattr(torch, dtype))
    return x, torch.zeros(c, 1, k, k), torch.zeros(c), (where.slots, where.cells)


def _largest() -> Tensor:
    return zero_largest(1, torch.device("cpu"))[0, 0]


def _gelu_grn(sites: int, channels: int, dtype: str, float8: bool = False) -> None:
    x, parameter = torch.zeros(1, sites, channels, dtype=getattr(torch, dtype)), torch.zeros(channels)
    grn_triton.launch_forward(x, parameter, parameter, parameter, 1e-6, _largest() if float8 else None)


def _gelu_grn_backward(sites: int, channels: int, dtype: str, float8: bool = False) -> None:
    x, parameter = torch.zeros(1, sites, channels, dtype=getattr(torch, dtype)), torch.zeros(channels)
    largest = _largest() if float8 else None
    grn_triton.launch_backward(x, x, parameter, parameter, parameter[None], parameter[:1], 1e-6, largest)


def _norm_forward(channels: int, dtype: str) -> None:
    x, parameter = torch.zeros(16, channels, dtype=getattr(torch, dtype)), torch.zeros(channels)
    layer_norm_forward(x, parameter, parameter, 1e-6)


def _norm(channels: int, dtype: str) -> None:
    x, parameter = torch.zeros(16, channels, dtype=getattr(torch, dtype)), torch.zeros(channels)
    layer_norm_forward(x, parameter, parameter, 1e-6)
    layer_norm_backward(x, x, parameter, torch.zeros(16), torch.zeros(16))


def _sums(kernel: int) -> None:
    add_up((), torch.zeros(1, kernel**2 + 1, 8), kernel)


def _float8(dtype: str) -> None:
    scale(torch.zeros(16, 16, dtype=getattr(torch, dtype)), _largest())


def _moving_norm(channels: int, dtype: str, *move: int) -> None:
    where = Move(*move)
    rows = where.height * where.width
    x, parameter = torch.zeros(rows, channels, dtype=getattr(torch, dtype)), torch.zeros(channels)
    means = torch.zeros(rows)
    norm_triton.launch_moving_forward(x, parameter, parameter, 1e-6, where)
    norm_triton.launch_moving_backward(x, x, parameter, means, means, where, 2)


def _patch_rows(image: list[int], pixels: str, stride: int, channels: int, side: int, dtype: str) -> None:
    imgs, index = torch.zeros(1, *image, dtype=getattr(torch, pixels)), torch.zeros(1, 16, dtype=torch.int64)
    patch_rows(imgs, index, side, stride, getattr(torch, dtype))


def _stem_norm(image: list[int], pixels: str, stride: int, channels: int, side: int, dtype: str) -> None:
    x, parameter = torch.zeros(16, channels, dtype=getattr(torch, dtype)), torch.zeros(channels)
    norm_triton.launch_moving_backward(x, x, parameter, torch.zeros(16), torch.zeros(16), None, 3)
    sum_many_rows(x)  # of the layers after it, too, and of the decoder
    sum_many_rows(x, torch.zeros(16, dtype=torch.bool))


def _patch_error(image: list[int], pixels: str, patch_size: int, dtype: str) -> None:
    channels, height, width = image
    imgs = torch.zeros(1, *image, dtype=getattr(torch, pixels))
    hidden = torch.zeros(1, height // patch_size * (width // patch_size), dtype=torch.bool)
    pred = torch.zeros(*hidden.shape, patch_size**2 * channels, dtype=getattr(torch, dtype))
    _, means, scales = patch_error_triton.launch_forward(pred, imgs, hidden, patch_size, 1e-6)
    patch_error_triton.launch_backward(means, pred, imgs, hidden, means, scales, patch_size)


def _residual(channels: int, dtype: str, drops: bool) -> None:
    x, bias = torch.zeros(16, channels, dtype=getattr(torch, dtype)), torch.zeros(channels)
    residual(x, x, bias, None)
    add_and_sum(x, x)
    if drops:
        residual(x, x, bias, x[:, 0].contiguous())
        scale_and_sum(x, x[:, 0].contiguous())


KERNELS: dict[str, dict[str, Callable[..., None]]] = {
    "DepthwiseShape": {"forward": _forward, "weight_grad": _weight_grad},
    "GeluGrnShape": {"forward": _gelu_grn, "backward": _gelu_grn_backward},
    "GeluGrnBackwardShape": {"backward": _gelu_grn_backward},
    "SumsShape": {"all": _sums},
    "Float8Shape": {"all": _float8},
    "NormShape": {"both": _norm},
    "NormForwardShape": {"forward": _norm_forward},
    "ResidualShape": {"all": _residual},
    "MovingNormShape": {"both": _moving_norm},
    "StemShape": {"pixels": _patch_rows, "others": _stem_norm},
    "PatchErrorShape": {"both": _patch_error},
}
"""By the kind of shape. Each function is called with the shape's fields."""

if __name__ == "__main__":
    main()
