"""What every benchmark needs: honest times, the machine's own ceilings, and which machine it was."""

import datetime
import itertools
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fcmae import ranks
from fcmae.config import check, from_dict
from fcmae.errors import ConfigError, UsageError
from fcmae.files import json_text, write_output
from fcmae.models import FCMAE

CACHE_BYTES = 2**28
"""More than any L2 cache; writing as much empties it."""


T = TypeVar("T")


def parse(schema: type[T], overrides: Sequence[str]) -> T:
    """A benchmark's config from ``key=value`` arguments. Raises ConfigError naming the key."""
    try:
        given = OmegaConf.to_container(OmegaConf.from_dotlist(list(overrides)))
    except OmegaConfBaseException as error:
        raise ConfigError(str(error)) from error
    assert isinstance(given, dict)
    return from_dict(schema, {str(key): value for key, value in given.items()})


def check_models(names: Sequence[str], image_size: int, mask_ratio: float, **network: Any) -> None:
    """Raises UsageError for no model, an unknown one, or images that cannot be masked so.

    Args:
        network: other arguments of :class:`fcmae.FCMAE`.
    """
    check("models", list(names), bool(names), "one model or more, in a list")
    try:
        for name in names:
            with torch.device("meta"):
                FCMAE(name, mask_ratio=mask_ratio, **network).len_keep(image_size, image_size)
    except ValueError as error:
        raise UsageError(str(error)) from error


def check_some_of(key: str, values: Iterable[str], allowed: Sequence[str]) -> None:
    """Raises ConfigError naming the value that is not allowed."""
    for value in values:
        check(key, value, value in allowed, f"some of {', '.join(allowed)}")


def check_positive(cfg: Any, *names: str) -> None:
    """Raises ConfigError for a number of a benchmark's config that is not positive."""
    for name in names:
        value = getattr(cfg, name)
        check(name, value, value > 0, f"a positive {'integer' if isinstance(value, int) else 'number'}")


def title(where: Mapping[str, str | int]) -> str:
    """What a table begins with: the processor that was measured, and torch's version."""
    return f"{where.get('gpu', where['cpu'])}, torch {where['torch']}"


def machine(device: torch.device) -> dict[str, str | int]:
    """The hardware and software that a result belongs to."""
    info: dict[str, str | int] = {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "cores": ranks.cores(),
    }
    if device.type == "cuda":
        import triton

        info |= {"gpu": torch.cuda.get_device_name(device), "triton": triton.__version__}
    return info


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def median_ms(call: Callable[[], object], device: torch.device, repeats: int = 20, warm_up: int = 3) -> float:
    """Median time of a call in ms, its results ready.

    On a GPU by events, from a cold L2 cache, and with the host far enough ahead that launch gaps don't count.
    """
    if device.type == "cpu":
        times = []
        for _ in range(warm_up + repeats):
            began = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - began))
        return statistics.median(times[warm_up:])
    cache = torch.empty(CACHE_BYTES, dtype=torch.uint8, device=device)
    events = []
    for _ in range(warm_up + repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        cache.zero_()
        torch.cuda._sleep(1_000_000)
        start.record()
        call()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events[warm_up:])


def median_step_ms(step: Callable[[int], None], repeats: int, device: torch.device) -> float:
    """Median time between the ends of consecutive steps, as training sees it: the host's launches count."""
    synchronize(device)
    if device.type == "cpu":
        ends = [time.perf_counter()]
        for i in range(repeats):
            step(i)
            ends.append(time.perf_counter())
        return 1e3 * statistics.median(b - a for a, b in itertools.pairwise(ends))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for i in range(repeats):
        step(i)
        events[i + 1].record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events))


def synchronize(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def write_report(json_file: Path | None, **report: Any) -> None:
    """Writes a benchmark's JSON if asked; dataclasses in it become objects."""
    if json_file is not None:
        write_output("--json", json_file, json_text(report, indent=1, default=asdict) + "\n")


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read plus written, of a large copy: the ceiling of whatever is bound by memory."""
    source = torch.randint(0, 100, (2**30 if device.type == "cuda" else 2**27,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / median_ms(lambda: target.copy_(source), device) * 1e3


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large matrix product: the ceiling of linear layers."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / median_ms(lambda: F.linear(a, b), device) * 1e3
