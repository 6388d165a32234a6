"""The packed depthwise convolution of small patches in CUDA C++: plans and launches of ``cuda/depthwise.cu``.

Where a patch is 1 or 2 sites a side, most of its neighbourhood lies in other patches. Triton's kernels read it from
memory, and two or three warps per scheduler, all that 49 taps leave room for, cannot hide the latency. Here a block
copies 64 channels of an image, and its tables, into shared memory, the next image's while it computes the last one's.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from fcmae.kernels import cuda_program
from fcmae.kernels.target import target

SOURCE = "depthwise.cu"
KERNEL = 7
HALO = KERNEL // 2
"""Empty cells around a grid of slots: the kernel reaches three patches of one site."""
SLAB = 64
"""Channels of a block: two per thread of a warp, 4 bytes."""
LEAST_WARPS = 9
"""Per multiprocessor. Where larger images leave room for fewer, Triton's kernels, with 8 to 12, are preferred. 12 were
measured."""


class _Plan(NamedTuple):
    warps: int
    """Of a block."""
    blocks: int
    """Per multiprocessor."""
    always: int
    """Neighbours with at most as many products are computed with zeros where they are not visible."""


# By patch side, the fastest measured on an H200 (bf16, ConvNeXt V2-Base at batch 256, mask ratio 0.6).
_PLANS = {2: _Plan(3, 4, 1), 1: _Plan(2, 6, 1)}


class Launcher:
    """Launches the kernels for one shape.

    Args:
        sites: per side of a patch; an image has ``keep`` patches of ``channels`` channels.
        table: rows and columns of an image's slots.
    """

    def __init__(
        self, device: torch.device, dtype: torch.dtype, keep: int, sites: int, channels: int, table: tuple[int, int]
    ) -> None:
        self.plan, self.keep, self.channels = _PLANS[sites], keep, channels
        self.shared = _shared(keep, sites, table)
        self.blocks = _blocks(keep, sites, table, device)
        self.processors = target(torch.empty(0, device=device)).processors
        constants = {
            "BF16": int(dtype == torch.bfloat16), "C": channels, "V": keep, "S": sites, "HEIGHT": table[0],
            "WIDTH": table[1], "WARPS": self.plan.warps, "BLOCKS": self.plan.blocks, "ALWAYS": self.plan.always,
        }  # fmt: skip
        kernels = tuple(
            cuda_program.Kernel(kernel, 32 * self.plan.warps, shared) for kernel, shared in self.shared.items()
        )
        self.program = cuda_program.program(SOURCE, device, tuple(constants.items()), kernels)

    def _divide(self, kernel: str, x: Tensor) -> tuple[tuple[int, int], int, int]:
        """The grid (slabs of channels, ranges of tiles), which fills the GPU once, tiles, and tiles of a range."""
        slabs, tiles = -(-self.channels // SLAB), len(x) * self.keep
        tiles_per_range = -(-tiles // max(1, self.processors * self.blocks[kernel] // slabs))
        return (slabs, -(-tiles // tiles_per_range)), tiles, tiles_per_range

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, slots: Tensor, cells: Tensor) -> Tensor:
        """The convolution of ``[N, V, S, S, C]``."""
        y = torch.empty_like(x)
        grid, *division = self._divide("packed_forward", x)
        self._launch("packed_forward", grid, x, weight, bias, y, slots, cells, *division)
        return y

    def input_grad(self, grad: Tensor, weight: Tensor, slots: Tensor, cells: Tensor) -> Tensor:
        """The gradient of the input."""
        dx = torch.empty_like(grad)
        grid, *division = self._divide("packed_input_grad", grad)
        self._launch("packed_input_grad", grid, grad, weight, dx, slots, cells, *division)
        return dx

    def input_grad_and_skip(
        self, grad: Tensor, weight: Tensor, slots: Tensor, cells: Tensor, skip: Tensor
    ) -> tuple[Tensor, Tensor]:
        """:meth:`input_grad` plus ``skip``, and sums of ``skip`` over sites, float32 ``[ranges, C]``."""
        dx = torch.empty_like(grad)
        grid, *division = self._divide("packed_input_grad_and_skip", grad)
        sums = grad.new_empty(grid[1], self.channels, dtype=torch.float32)
        self._launch("packed_input_grad_and_skip", grid, grad, weight, skip, dx, sums, slots, cells, *division)
        return dx, sums

    def weight_grad(self, x: Tensor, grad: Tensor, slots: Tensor, cells: Tensor) -> Tensor:
        """Sums of ``grad * x`` for every tap and of ``grad``, float32 ``[ranges, 50, C]``."""
        grid, *division = self._divide("packed_weight_grad", x)
        partial = x.new_empty(grid[1], KERNEL**2 + 1, self.channels, dtype=torch.float32)
        self._launch("packed_weight_grad", grid, x, grad, partial, slots, cells, *division)
        return partial

    def _launch(self, kernel: str, grid: tuple[int, int], *args: Tensor | int | None) -> None:
        assert self.program is not None
        self.program.launch(kernel, grid, *args)


def launcher(x: Tensor, kernel: int, slots: Tensor) -> Launcher | None:
    """What launches the kernels for packed patches ``[N, V, S, S, C]``; None where Triton's must."""
    _, keep, sites, _, channels = x.shape
    if not takes(x.device, x.dtype, keep, sites, channels, kernel, (slots.shape[1], slots.shape[2])):
        return None
    return launcher_for(x.device, x.dtype, keep, sites, channels, (slots.shape[1], slots.shape[2]))


@functools.cache
def takes(
    device: torch.device, dtype: torch.dtype, keep: int, sites: int, channels: int, kernel: int, table: tuple[int, int]
) -> bool:
    """Whether there are kernels for packed patches of a shape."""
    return (
        kernel == KERNEL
        and sites in _PLANS
        and channels % 8 == 0
        and dtype in (torch.bfloat16, torch.float16)
        and cuda_program.is_possible(device)
        and min(_blocks(keep, sites, table, device).values()) * _PLANS[sites].warps >= LEAST_WARPS
    )


@functools.cache
def launcher_for(
    device: torch.device, dtype: torch.dtype, keep: int, sites: int, channels: int, table: tuple[int, int]
) -> Launcher | None:
    """The launcher of a shape that :func:`takes` accepts, compiled; None if it cannot be compiled."""
    found = Launcher(device, dtype, keep, sites, channels, table)
    return found if found.program is not None else None


def _blocks(keep: int, sites: int, table: tuple[int, int], device: torch.device) -> dict[str, int]:
    """How many blocks a multiprocessor holds, by kernel."""
    room = cuda_program.shared_memory(device)
    needed = _shared(keep, sites, table).items()
    return {kernel: min(_PLANS[sites].blocks, room // (size + cuda_program.RESERVED)) for kernel, size in needed}


def _shared(keep: int, sites: int, table: tuple[int, int]) -> dict[str, int]:
    """Bytes of shared memory of a block, by kernel."""
    side = 2 * -(-(KERNEL // 2) // sites) + 1
    buffer = (keep + 1) * sites**2 * SLAB * 2
    rest = 2 * -(-(table[0] * table[1] + keep) // 4) * 16 + _PLANS[sites].warps * side * (8 if side > 4 else 4) * 4
    taps = KERNEL**2 * SLAB * 4
    return {
        "packed_forward": 2 * buffer + rest + taps,
        "packed_input_grad": 2 * buffer + rest + taps,
        "packed_input_grad_and_skip": 4 * buffer + rest + taps,
        "packed_weight_grad": max(4 * buffer + rest, taps + SLAB * 4),
    }
