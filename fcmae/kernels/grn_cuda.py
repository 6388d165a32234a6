"""The forward pass of GELU and GRN in CUDA C++: plans and launches of ``cuda/gelu_grn.cu``.

The blocks of a cluster have an image. They run at the same time by the GPU's own guarantee, and exchange their one
number through shared memory, where :mod:`fcmae.kernels.grn_triton` waits for memory. Half as many threads as registers
would allow, and several blocks on a multiprocessor: so some load while others compute.
"""

import functools
import math

import torch
from torch import Tensor

from fcmae.kernels import cuda_program

SOURCE = "gelu_grn.cu"
KERNEL = "gelu_grn_forward"
EPS = 1e-6
"""timm's."""
CLUSTERS = (8, 16)
"""Blocks of a cluster."""
LARGE_CLUSTERS = (9, 10)
"""Major compute capabilities of GPUs that can run 16 blocks at the same time; others can run 8."""
MOST_IMAGES = 2**16 - 1
"""As many rows of clusters as a launch can have."""
MOST_BYTES = 52 * 1024
"""Of an image in a block, so that several blocks share a multiprocessor; twice that is still faster than Triton."""
ELEMENTS_PER_THREAD = 152
"""The fastest of about ten plans for each of 19, 76, 304 and 1216 sites (H200, bf16, Base at batch 256)."""


class Launcher:
    """Launches the kernel for images of ``sites`` sites with ``width`` channels, a part of them per block."""

    def __init__(
        self, device: torch.device, dtype: torch.dtype, sites: int, width: int, cluster: int, eps: float
    ) -> None:
        channels, self.cluster = width // cluster, cluster
        threads, shared = _threads(sites, channels), _shared(sites, width, cluster)
        constants = {
            "BF16": int(dtype == torch.bfloat16), "R": sites, "D": width, "CH": channels, "THREADS": threads,
            "BLOCKS": max(1, 512 // threads), "EPS": f"{eps!r}f",
        }  # fmt: skip
        kernels = (cuda_program.Kernel(KERNEL, threads, shared, cluster),)
        self.program = cuda_program.program(SOURCE, device, tuple(constants.items()), kernels)

    def forward(
        self, x: Tensor, input_bias: Tensor | None, weight: Tensor, bias: Tensor, largest: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Output ``[N, R, D]``, norms ``[N, D]`` and mean norms ``[N]``.

        Args:
            largest: int32 ``[1]``, for the largest value of the output, bfloat16.
        """
        # A launch copies what begins elsewhere.
        assert largest is None or largest.data_ptr() % cuda_program.ALIGNMENT == 0
        n, _, width = x.shape
        y, norms, means = torch.empty_like(x), *(x.new_empty(shape, dtype=torch.float32) for shape in ((n, width), n))
        assert self.program is not None
        arguments = x, input_bias, weight, bias, y, norms, means, largest
        self.program.launch(KERNEL, (self.cluster, n), *arguments)
        return y, norms, means


def _threads(sites: int, channels: int) -> int:
    """Of a block: whole rows of four channels per thread, whole warps."""
    step = math.lcm(32, channels // 4)
    return step * max(1, round(max(128, sites * channels / ELEMENTS_PER_THREAD) / step))


def _shared(sites: int, width: int, cluster: int) -> int:
    """Bytes of shared memory of a block."""
    channels = width // cluster
    threads = _threads(sites, channels)
    groups = threads // (channels // 4)
    return sites * channels * 2 + (groups + 1) * channels * 4 + 8 + (cluster + threads // 32) * 4


@functools.cache
def launcher(device: torch.device, dtype: torch.dtype, sites: int, width: int, eps: float = EPS) -> Launcher | None:
    """What launches the kernel for 16-bit images of a shape, compiled; None where Triton's must."""
    cluster = takes(device, dtype, sites, width)
    if not cluster:
        return None
    found = Launcher(device, dtype, sites, width, cluster, eps)
    return found if found.program is not None else None


def takes(device: torch.device, dtype: torch.dtype, sites: int, width: int) -> int:
    """The blocks of a cluster for images of a shape; 0 where Triton's kernel must take them."""
    if dtype not in (torch.bfloat16, torch.float16) or not cuda_program.is_possible(device, (9, 0)):
        return 0
    room = cuda_program.shared_memory(device) - cuda_program.RESERVED
    most = max(CLUSTERS) if torch.cuda.get_device_capability(device)[0] in LARGE_CLUSTERS else min(CLUSTERS)
    possible = [cluster for cluster in CLUSTERS if cluster <= most and width % (8 * cluster) == 0]
    fitting = [cluster for cluster in possible if sites * width // cluster * 2 <= MOST_BYTES] or possible[-1:]
    for cluster in fitting:
        small = sites * width // cluster * 2 <= 2 * MOST_BYTES and _threads(sites, width // cluster) <= 512
        if small and _shared(sites, width, cluster) <= room:
            return cluster
    return 0
