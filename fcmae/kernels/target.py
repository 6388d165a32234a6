"""The GPU that Triton's kernels are divided and compiled for."""

from typing import NamedTuple

from torch import Tensor, cuda, version


class Target(NamedTuple):
    """What a launch depends on besides its arguments."""

    processors: int
    """Multiprocessors; 0 without a GPU, where Triton's interpreter runs programs one after another."""
    nvidia: bool
    converts_pairs: bool
    """One instruction makes a word of two 16-bit numbers: NVIDIA's GPUs from compute capability 8.0."""


_instead: Target | None = None


def target(x: Tensor) -> Target:
    """The GPU of a tensor."""
    if _instead is not None:
        return _instead
    if not x.is_cuda:
        return Target(0, False, False)
    properties, nvidia = cuda.get_device_properties(x.device), version.hip is None
    return Target(properties.multi_processor_count, nvidia, nvidia and properties.major >= 8)


def pretend(gpu: Target) -> None:
    """Makes this process launch on any device as if it were ``gpu``."""
    global _instead
    _instead = gpu
