"""Gathers the facts of this machine for the checks."""

import contextlib
import ctypes
import os
import shutil
import socket
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import torch

from fcmae import toolchain
from fcmae.config import LoaderConfig, LoggerConfig
from fcmae.data.cores import default_workers
from fcmae.doctor import checks
from fcmae.doctor.checks import Finding
from fcmae.errors import UsageError, reason_of
from fcmae.loggers.wandb import wandb_mode
from fcmae.models import FCMAE
from fcmae.precision import autocast

SHM = Path("/dev/shm")


def findings() -> Iterator[Finding]:
    """A line for each check of this machine."""
    header = toolchain.python_header()
    yield checks.compilers(toolchain.c_compiler(), toolchain.cxx_compiler(), header if header.is_file() else None)
    yield checks.cpu(_cpu_flags(), torch.backends.cpu.get_cpu_capability(), _bf16_time())
    gpus = range(torch.cuda.device_count())
    if torch.version.hip is None:
        yield checks.driver(torch.version.cuda, _driver(), Path("/proc/driver/nvidia/version").exists())
        for index in gpus:
            name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
            yield checks.architecture(f"cuda:{index} {name}", capability, torch.cuda.get_arch_list())
            yield checks.gpu_precision(f"cuda:{index} {name}", capability)
    if SHM.is_dir():
        usage, ranks = shutil.disk_usage(SHM), max(1, len(gpus))
        device = torch.device("cuda" if gpus else "cpu")
        yield checks.shared_memory(
            usage.total, usage.free, default_workers(device, ranks), ranks, LoaderConfig().prefetch
        )
    yield from checks.rendezvous({port: why_not_open(port) for port in checks.ports(os.environ)})
    yield from _versions()
    yield _wandb()
    yield checks.disk(Path.cwd(), shutil.disk_usage(".").free)


def _cpu_flags() -> set[str]:
    """The instructions of the first processor; empty if unknown."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("flags", "Features"):
                return set(value.split())
    return set()


def _bf16_time() -> float:
    """The CPU time of a step of ConvNeXt V2-Atto in bf16 divided by its time in float32."""
    model, imgs, cpu = FCMAE("convnextv2_atto"), torch.randn(4, 3, 96, 96), torch.device("cpu")

    def seconds(name: str) -> float:
        began = time.process_time()  # other processes may use the machine too
        with autocast(cpu, name):
            loss = model(imgs).loss
        loss.backward()
        return time.process_time() - began

    return min(seconds("bf16") for _ in range(2)) / min(seconds("float32") for _ in range(2))


def _driver() -> int | None:
    """The newest version of CUDA that the driver supports, such as 12040 for 12.4; None without a driver."""
    version = ctypes.c_int(0)
    with contextlib.suppress(OSError, AttributeError):
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)) == 0:
            return version.value or None
    return None


def why_not_open(port: int) -> str | None:
    """Why this host cannot listen at a port, None if it can."""
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that was just closed is free
        try:
            tried.bind(("", port))
        except (OSError, OverflowError) as error:
            return reason_of(error)
    return None


def _versions() -> list[Finding]:
    try:
        return checks.versions(metadata.requires("fcmae") or [], version_of)
    except metadata.PackageNotFoundError:
        return [Finding("versions: not compared, since fcmae itself is not installed")]


def version_of(package: str) -> str | None:
    """The installed version, if any."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _wandb() -> Finding:
    try:
        return checks.wandb(wandb_mode(LoggerConfig()))
    except UsageError as error:
        return checks.wandb(None, str(error))
