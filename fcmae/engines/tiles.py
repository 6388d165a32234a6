"""Whole maps in square tiles ``[N, V, S, S, C]``, as the packed engine keeps visible patches."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from fcmae.kernels import Neighbors, neighbors

P = ParamSpec("P")
T = TypeVar("T")

SIDES = (8, 4, 14, 7, 12, 16, 10, 6, 13, 11, 9, 15, 5, 3, 2, 1)
"""Sides of a tile, the best first. Measured for the first four (H200, bf16, Base at batch 256): times over the byte
floor, forward and weight gradient, at 56 sites 8: 3.8, 3.5; at 28 sites 4: 3.2, 3.2 (14: 4.5, 4.2); at 14 sites
14: 3.9, 3.7 (7: 4.7, 5.1; 2: 6.0, 5.8); at 7 sites 7: 5.0, 5.3 (1: 16.7, 14.8)."""


class Layout(NamedTuple):
    """How a map of ``height`` x ``width`` sites is kept: in tiles of ``side`` x ``side``, or without tiles (0)."""

    height: int
    width: int
    side: int


def best(height: int, width: int) -> Layout:
    """Tiles of the fastest side."""
    return Layout(height, width, next(s for s in SIDES if height % s == width % s == 0))


_recorded: dict[Any, Any] = {}
"""Tables that a CUDA graph reads at each replay, which may be long after others have pushed them out of a cache."""


def _kept(make: Callable[P, T]) -> Callable[P, T]:
    """``make`` of tables, which remembers the last 64."""
    cached = functools.lru_cache(maxsize=64)(make)

    @functools.wraps(make)
    def tables(*args: P.args, **kwargs: P.kwargs) -> T:
        if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
            return make(*args, **kwargs)  # of tensors without values, as torch.export's, which must not be kept
        found: T = cached(*args, **kwargs)  # type: ignore[arg-type]  # all of them can be hashed
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            _recorded[(make, *args)] = found
        return found

    return tables


@_kept
def all_visible(images: int, layout: Layout, device: torch.device) -> Neighbors:
    """The tables of the depthwise kernels for whole images."""
    rows, cols = layout.height // layout.side, layout.width // layout.side
    with torch.inference_mode(False):  # an evaluation may make them first, and training use them
        return neighbors(torch.arange(rows * cols, device=device).repeat(images, 1), rows, cols)


def places(index: Tensor, rows: int, cols: int, sites: int, layout: Layout) -> Tensor:
    """Where the sites of patches lie among those of whole maps in tiles: int64 ``[N * V * sites * sites]``.

    Args:
        index: int64 ``[N, V]``, the patches in row-major order on a grid of ``rows`` x ``cols``.
        sites: per side of a patch.
    """
    of_image, first = _places(len(index), rows, cols, sites, layout, index.device)
    return (of_image[index] + first).flatten()


@_kept
def _places(
    images: int, rows: int, cols: int, sites: int, layout: Layout, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The places of the sites of every patch of an image ``[rows * cols, sites**2]``, and each image's first."""
    count = layout.height * layout.width
    with torch.inference_mode(False):
        sites_in_tiles = tiled(torch.arange(count, device=device).view(1, layout.height, layout.width, 1), layout)
        of_site = torch.empty(count, dtype=torch.int64, device=device)
        of_site[sites_in_tiles.flatten()] = torch.arange(count, device=device)
        of_patch = tiled(of_site.view(1, rows * sites, cols * sites, 1), Layout(rows * sites, cols * sites, sites))
        return of_patch.reshape(rows * cols, -1), torch.arange(images, device=device).view(-1, 1, 1) * count


def tiled(x: Tensor, layout: Layout) -> Tensor:
    """``[N, H, W, C]`` to ``[N, V, S, S, C]``, or as it is."""
    height, width, s = layout
    if not s:
        return x
    x = x.unflatten(2, (width // s, s)).unflatten(1, (height // s, s)).transpose(2, 3)
    return x.reshape(len(x), -1, s, s, x.shape[-1])


def untiled(x: Tensor, layout: Layout) -> Tensor:
    """The inverse of :func:`tiled`."""
    height, width, s = layout
    if not s:
        return x
    x = x.unflatten(1, (height // s, width // s)).transpose(2, 3)
    return x.reshape(len(x), height, width, x.shape[-1])
