"""A quick start: torch and timm make half a million objects, which Python's garbage collector need not go through."""

import contextlib
import gc
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def quick_imports() -> Iterator[None]:
    """In this block of imports the garbage collector rests, and what they made it leaves alone from then on.

    Modules stay until the end of the process. Looking through them again and again would take a second at the start,
    and another at the end; and data workers, which are forked, go on sharing their memory.
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
