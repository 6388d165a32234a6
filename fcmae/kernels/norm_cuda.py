"""The backward pass of a layer norm in CUDA C++: plans and launches of ``cuda/layer_norm.cu``.

A warp has a row and needs no other, where Triton's tiles of several rows wait for all warps twice.
"""

import functools

import torch
from torch import Tensor

from fcmae.kernels import cuda_program
from fcmae.kernels.target import target

SOURCE, KERNEL = "layer_norm.cu", "layer_norm_backward"
WARPS = 4
CHUNK = 128
"""Channels of a row that a warp has at once, four per lane."""
BLOCKS = {1: 10, 2: 8, 3: 5, 4: 4, 5: 3, 6: 3, 7: 2, 8: 2, 9: 2, 10: 2, 11: 2, 12: 2}
"""Per multiprocessor, as many as the registers hold, by the chunks of a row; from ten on, some numbers spill."""


class Launcher:
    """Launches the kernel for rows of ``channels``."""

    def __init__(self, device: torch.device, dtype: torch.dtype, channels: int) -> None:
        chunks = -(-channels // CHUNK)
        self.blocks = BLOCKS[chunks] * target(torch.empty(0, device=device)).processors
        constants = {"BF16": int(dtype == torch.bfloat16), "C": channels, "WARPS": WARPS, "BLOCKS": BLOCKS[chunks]}
        kernels = (cuda_program.Kernel(KERNEL, 32 * WARPS, 2 * chunks * CHUNK * 4),)
        self.program = cuda_program.program(SOURCE, device, tuple(constants.items()), kernels)

    def backward(self, dy: Tensor, x: Tensor, weight: Tensor, means: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient of ``x``, and partial sums ``[blocks, 2, C]`` of the gradients of weight and bias."""
        rows, channels = len(means), x.shape[-1]
        blocks = min(self.blocks, -(-rows // WARPS))
        dx, partial = torch.empty_like(x), x.new_empty(blocks, 2, channels, dtype=torch.float32)
        assert self.program is not None
        self.program.launch(KERNEL, (blocks, 1), dy, x, weight, means, scales, dx, partial, rows)
        return dx, partial


@functools.cache
def launcher(device: torch.device, dtype: torch.dtype, channels: int) -> Launcher | None:
    """What launches the kernel for 16-bit rows of ``channels``, compiled; None where Triton's must."""
    if not takes(device, dtype, channels):
        return None
    found = Launcher(device, dtype, channels)
    return found if found.program is not None else None


def takes(device: torch.device, dtype: torch.dtype, channels: int) -> bool:
    """Whether there is a kernel for rows of ``channels``."""
    possible = channels % 4 == 0 and -(-channels // CHUNK) in BLOCKS
    return possible and dtype in (torch.bfloat16, torch.float16) and cuda_program.is_possible(device)
