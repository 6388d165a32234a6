"""torch.compile of the parts that a network repeats, and their recomputation.

Compiling a block once for each shape instead of the whole network takes seconds where that takes minutes, and all
blocks of a stage share the result: their parameters are inputs of the compiled code.
"""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch.utils.checkpoint import checkpoint

from fcmae.kernels.caches import use_private_cache

P = ParamSpec("P")
R = TypeVar("R")


SHAPES = 256
"""For how many stages of networks and sizes of batches a process may compile a function."""


@functools.cache
def _compiled(function: Callable[P, R]) -> Callable[P, R]:
    # Static shapes: each stage gets kernels of its own. A graph break is an error, not a slow surprise.
    return torch.compile(function, dynamic=False, fullgraph=True)


@functools.cache
def _prepare() -> None:
    """Sees to a private cache, and raises torch's limit of eight shapes for a function.

    The limit is there to find surprises, and two networks reach it.
    """
    use_private_cache()
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, SHAPES)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 4 * SHAPES)


def recomputed(function: Callable[P, R], wanted: bool) -> Callable[P, R]:
    """``function``, which keeps its inputs only and is run again in the backward pass, if wanted.

    Nothing random may happen in it: the generators are left alone, which also lets CUDA graphs record it.
    """
    if not wanted:
        return function
    return functools.partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False)


def region(function: Callable[P, R], compiled: bool) -> Callable[P, R]:
    """``function``, compiled if asked."""
    if not compiled:
        return function
    _prepare()
    return _compiled(function)
