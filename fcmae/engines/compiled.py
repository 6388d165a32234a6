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
"""How often a process may compile a function: once for each stage of a network and size of a batch."""


@functools.cache
def _compiled(function: Callable[P, R]) -> Callable[P, R]:
    # Static shapes: each stage gets kernels of its own. A graph break is an error, not a slow surprise.
    return torch.compile(function, dynamic=False, fullgraph=True)


@functools.cache
def _prepare() -> None:
    """Sets a private cache, and raises torch's limit of eight shapes per function, which two networks reach."""
    use_private_cache()
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, SHAPES)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 4 * SHAPES)


def recomputed(function: Callable[P, R], wanted: bool) -> Callable[P, R]:
    """``function``; if wanted, one that keeps only its inputs and runs again in the backward pass.

    It must not draw random numbers: generators are not restored, so that CUDA graphs can record it.
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
