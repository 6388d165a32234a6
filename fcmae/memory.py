"""The memory of a device: how much is in use, and a message of one line when it runs out."""

import contextlib
import os
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from fcmae.errors import OutOfMemory

SIGNS = ("out of memory", "_STATUS_ALLOC_FAILED", "DefaultCPUAllocator")
"""Parts of the messages of torch, of CUDA's libraries and of the CPU's allocator."""
GIB = 2**30
CGROUP = Path("/sys/fs/cgroup")


def ran_out(error: BaseException | None) -> bool:
    """Whether an error means a lack of memory, or follows from one that does, as in a CUDA graph."""
    while error is not None:
        if isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def explained(device: torch.device, what_to_do: Callable[[], str]) -> Iterator[None]:
    """Turns errors for lack of memory into OutOfMemory of one line: what is in use and what to do."""
    try:
        yield
    except RuntimeError as error:
        if not ran_out(error):
            raise
        raise OutOfMemory(f"out of memory on {in_use(device)}: {what_to_do()}") from error


def in_use(device: torch.device) -> str:
    """The device and its memory in use, for a message."""
    own = f"this process held up to {peak(device) / GIB:.1f} GiB"
    if device.type != "cuda":
        return f"the CPU ({own})"
    free, total = torch.cuda.mem_get_info(device)
    name, used = torch.cuda.get_device_name(device), (total - free) / GIB
    return f"{name} ({used:.1f} of {total / GIB:.1f} GiB in use, {own})"


def peak(device: torch.device) -> int:
    """The largest number of bytes held so far: by tensors on a GPU, or by this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def available_memory() -> int:
    """Bytes that this machine and this process's cgroup have left."""
    found = [os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found = [1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))]
    for most, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):
            found.append(int((CGROUP / most).read_text()) - int((CGROUP / used).read_text()))
    return max(0, min(found))
