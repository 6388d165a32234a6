"""The precisions by name: what ``auto`` chooses, autocast, and TF32.

Nothing here imports torch before it is needed, so that the config can name precisions at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING

from fcmae.errors import UsageError
from fcmae.messages import say

if TYPE_CHECKING:
    import torch

AUTO = "auto"
PRECISIONS: tuple[str, ...] = (AUTO, "float32", "tf32", "bf16", "fp16")
FLOAT8 = "fp8"
"""Of pretraining alone: bf16, and products of the encoder's blocks in float8."""
BY_DEMAND = ("float32", "fp16", "bf16")
"""What ``auto`` may choose. A device that computes one of them fast also computes the ones before it fast."""


def settle(
    key: str,
    asked: str,
    device: torch.device,
    *,
    recorded: str | None = None,
    smallest: Callable[[int], int] = int,
    main: bool = True,
) -> str:
    """Returns the precision to compute in, the same on all ranks, and sets TF32 for it; prints what ``auto`` chose.

    Args:
        key: the config key that holds ``asked``.
        recorded: the precision that a resumed run has used so far; ``auto`` keeps it.
        smallest: the smallest value over the ranks.
        main: whether this rank speaks for all.

    Raises UsageError for ``bf16`` and ``fp8`` where the device of some rank lacks it.
    """
    best = BY_DEMAND[smallest(BY_DEMAND.index(fastest(device)))]
    chosen, why = asked, ""
    if asked == AUTO:
        chosen, why = best, f"on {name_of(device)}" if best == fastest(device) else "for the slowest of the devices"
        if recorded in (*PRECISIONS[1:], FLOAT8):
            chosen, why = recorded, "as in the run so far"
        if main:
            say(f"{key}=auto takes {chosen} {why}")
    lacks = ""
    if chosen == "bf16" and device.type == "cuda" and best != "bf16":
        lacks = "or a GPU of another rank, does not compute bf16"
    elif chosen == FLOAT8 and not smallest(int(_multiplies_float8(device))):
        lacks = "or the device of another rank, is no NVIDIA GPU of compute capability 9.0 or more"
    if lacks:
        hint = f"{key}=auto takes {best}"
        if asked == AUTO:
            hint = f"the run so far used it; {key}={best} trainer.allow_changed_recipe=true continues without"
        raise UsageError(f"{key}={chosen}: {name_of(device)}, {lacks}; {hint}")
    set_tf32(chosen)
    return chosen


def check_float8(precision: str, device: torch.device) -> None:
    """Raises UsageError where ``fp8`` was asked for and the device does not have it: before anything is read."""
    if precision == FLOAT8 and not _multiplies_float8(device):
        raise UsageError(
            "precision=fp8 needs an NVIDIA GPU of compute capability 9.0 or more (H100 or newer), and here is "
            f"{name_of(device)}; precision=auto takes {fastest(device)}"
        )


def _multiplies_float8(device: torch.device) -> bool:
    import torch

    is_nvidia = device.type == "cuda" and torch.version.hip is None
    return is_nvidia and torch.cuda.get_device_capability(device) >= (9, 0)


def fastest(device: torch.device) -> str:
    """What ``auto`` takes on one device: a rule, not a measurement, so that it is reproducible.

    bf16 on a GPU with bf16 units, fp16 on an older one, float32 on a CPU: without bf16 instructions bf16 takes up to 20
    times as long, and with them (AMX) a training step of ConvNeXt V2-Atto saves a sixth at most.
    """
    import torch

    if device.type != "cuda":
        return "float32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def name_of(device: torch.device) -> str:
    """``the CPU``, or a GPU's name."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"


def dtype_of(precision: str) -> torch.dtype:
    """The dtype that matrix products take their inputs in."""
    import torch

    sixteen = {"bf16": torch.bfloat16, "fp16": torch.float16, FLOAT8: torch.bfloat16}
    return sixteen.get(precision, torch.float32)


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """Autocast to ``bf16`` or ``fp16``; nothing for ``float32`` and ``tf32``. ``fp8`` is as ``bf16``."""
    import torch

    dtype = dtype_of(precision)
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


_float8: ContextVar[bool] = ContextVar("float8", default=False)


@contextlib.contextmanager
def training(device: torch.device, precision: str) -> Iterator[None]:
    """:func:`autocast`, and with ``fp8`` :func:`has_float8_products`; evaluation has bf16 then."""
    token = _float8.set(precision == FLOAT8)
    try:
        with autocast(device, precision):
            yield
    finally:
        _float8.reset(token)


def has_float8_products() -> bool:
    """Whether the encoder's blocks multiply in float8 here."""
    return _float8.get()


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """In this block operators compute in the types that they are given."""
    import torch

    return torch.autocast(device.type, enabled=False)


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """A block without TF32, for products that need all bits of float32."""
    import torch

    if device.type != "cuda":
        yield
        return
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, False
    try:
        yield
    finally:
        matmul.allow_tf32 = before


def set_tf32(precision: str) -> None:
    """Lets a GPU round the inputs of float32 products to TF32, unless the precision is ``float32``."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision != "float32"
