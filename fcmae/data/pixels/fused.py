"""The Triton kernels that do on a GPU in one pass over memory what plain torch does in many, with the same bits."""

import functools
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from fcmae.toolchain import HAS_C_COMPILER


class Fused(NamedTuple):
    """Functions of :mod:`fcmae.kernels.operations_triton` and :mod:`fcmae.kernels.pixels_triton`."""

    changed: Callable[..., Tensor]
    normalized: Callable[[Tensor, Tensor, Tensor], Tensor]
    erase: Callable[[Tensor, Tensor, Tensor], None]


def fused(imgs: Tensor) -> Fused | None:
    """The kernels for ``imgs``; None on a CPU, and where Triton cannot run."""
    return _loaded() if HAS_C_COMPILER and imgs.is_cuda else None


@functools.cache
def _loaded() -> Fused | None:
    try:
        from fcmae.kernels.operations_triton import changed
        from fcmae.kernels.pixels_triton import erase, normalized
    except ModuleNotFoundError:
        return None
    return Fused(changed, normalized, erase)
