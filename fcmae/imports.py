"""A quick start: torch and timm make half a million objects, which Python's garbage collector need not go through."""

import contextlib
import gc
import importlib
import pickle
import sys
from collections.abc import Iterator
from typing import Any

from fcmae.errors import UsageError


@contextlib.contextmanager
def quick_imports() -> Iterator[None]:
    """In this block of imports the garbage collector is off, and it ignores their objects from then on.

    Going through them would take a second at the start and another one at the end. And data workers, which are forked,
    go on sharing their memory.
    """
    collecting, modules = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > modules:
            gc.freeze()
        if collecting:
            gc.enable()


@contextlib.contextmanager
def needed(message: str) -> Iterator[None]:
    """In this block of imports a missing package is a UsageError, which says what to install."""
    try:
        yield
    except ImportError as error:
        raise UsageError(message) from error


def load(target: str) -> Any:
    """What ``MODULE:NAME`` names, imported quickly."""
    module, _, name = target.partition(":")
    with quick_imports():
        return getattr(importlib.import_module(module), name)


def call_pickled(content: bytes, *args: Any) -> None:
    """Calls the pickled ``(function, *first_args)`` with further ``args``: a spawned process imports it quickly."""
    with quick_imports():
        function, *first = pickle.loads(content)  # noqa: S301 - from the process that started this one
    function(*first, *args)
