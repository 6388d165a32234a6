"""The checks of a machine: functions of facts that return what they found and, if it is a problem, what to do."""

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement

from fcmae.ranks import port_of

GIB = 2**30
BATCH = 256
"""Assumed images of 224 px per micro-batch."""
IMAGE_BYTES = 3 * 224 * 224
DISK_BYTES = 5 * GIB
"""Three checkpoints of ConvNeXt V2-Base with optimizer and averaged weights take 4.5 GiB."""
TORCHRUN_PORT = 29400
"""The port at which the nodes of launch/torchrun.sh meet by default."""


class Finding(NamedTuple):
    """A line of the report."""

    what: str
    to_do: str = ""
    """Empty if there is nothing to do."""

    def __str__(self) -> str:
        return f"warn {self.what}: {self.to_do}" if self.to_do else f"ok   {self.what}"


def compilers(c: str | None, cxx: str | None, header: Path | None) -> Finding:
    """The C and C++ compilers, and Python.h, None where missing."""
    found = {"C": c, "C++": cxx, "Python.h": header}
    missing = [name for name, path in found.items() if path is None]
    if missing:
        what = f"compilers for torch.compile and Triton: no {', no '.join(missing)}"
        return Finding(what, "install gcc, g++ and python3-dev, or set trainer.compile=false")
    return Finding(f"compilers: {c}, {cxx}, {header}")


def gpu_precision(name: str, capability: tuple[int, int]) -> Finding:
    """Whether a GPU supports bf16 and float8."""
    float8 = "float8" if capability >= (9, 0) else "no float8"  # as precision=fp8 needs it
    if capability < (8, 0):
        return Finding(f"{name}: no bf16, {float8}", "precision=auto takes fp16; do not set bf16")
    return Finding(f"{name}: bf16, {float8}")


def architecture(name: str, capability: tuple[int, int], built_for: Sequence[str]) -> Finding:
    """Whether torch has code for a GPU: binary (``sm_90``), or to be compiled for it (``compute_90``)."""
    kinds = [match for arch in built_for if (match := re.fullmatch(r"(sm|compute)_(\d+)(\d)([a-z]?)", arch))]
    for kind, major, minor, exact in (match.groups() for match in kinds):
        version = int(major), int(minor)
        binary = version[0] == capability[0] and version <= capability and (not exact or version == capability)
        if binary or (kind == "compute" and version <= capability and not exact):
            return Finding(f"{name}: torch has code for sm_{capability[0]}{capability[1]}")
    have = ", ".join(built_for) or "no GPU"
    what = f"{name}: torch was built for {have}, not sm_{capability[0]}{capability[1]}"
    return Finding(what, "install a torch that supports this GPU (https://pytorch.org/get-started)")


def driver(built: str | None, supports: int | None, has_gpu: bool) -> Finding:
    """Whether the NVIDIA driver suits torch.

    Args:
        built: torch's version of CUDA, such as ``13.0``; None for a build without CUDA.
        supports: the newest version that the driver supports, such as 12040 for 12.4; None without a driver.
        has_gpu: whether the system shows an NVIDIA GPU.
    """
    if built is None:
        to_do = "install a torch with CUDA (https://pytorch.org/get-started)" if has_gpu else ""
        return Finding(
            "driver: torch was built without CUDA" + (", but there is an NVIDIA GPU" if has_gpu else ""), to_do
        )
    if supports is None:
        to_do = "install the NVIDIA driver; in a container, start it with --gpus all" if has_gpu else ""
        return Finding(f"driver: no NVIDIA driver{', but there is a GPU' if has_gpu else ''}", to_do)
    version = f"{supports // 1000}.{supports % 1000 // 10}"
    if supports // 1000 < int(built.split(".")[0]):
        to_do = f"update the driver, or install a torch for CUDA {supports // 1000}"
        return Finding(f"driver: supports CUDA {version}, torch was built for {built}", to_do)
    return Finding(f"driver: supports CUDA {version}, torch was built for {built}")


def cpu(flags: Collection[str], capability: str, bf16_time: float) -> Finding:
    """The instructions of the processor.

    Args:
        flags: the names in /proc/cpuinfo; empty if unknown.
        capability: the instructions of torch's kernels, such as ``AVX2``.
        bf16_time: the time of a step in bf16 divided by its time in float32.
    """
    avx512 = "AVX-512" if "avx512f" in flags else "no AVX-512"
    bf16 = [name for name in ("amx_bf16", "avx512_bf16", "bf16") if name in flags]
    known = f"{avx512}, {' and '.join(bf16) or 'no bf16 instructions'}, " if flags else ""
    speed = f"precision=auto takes float32; bf16 would take {bf16_time:.2g} times as long"
    what = f"CPU: {known}torch uses {capability}; {speed}"
    if capability in ("DEFAULT", "NO AVX"):
        return Finding(what, "torch runs without vector instructions; use a processor with AVX2")
    return Finding(what)


def shared_memory(size: int, free: int, workers: int, ranks: int, prefetch: int) -> Finding:
    """Whether /dev/shm can hold the batches of all ranks' loaders (docs/data_speed.md)."""
    need = ranks * workers * (prefetch + 2) * BATCH * IMAGE_BYTES
    what = f"shared memory: {free / GIB:.2f} of {size / GIB:.2f} GiB free in /dev/shm"
    most = f"{ranks} x {workers} loader processes with micro-batches of {BATCH} images at 224 px"
    if free < need:
        to_do = f"{most} need {need / GIB:.2f}; start the container with --shm-size, or lower loader.workers"
        return Finding(what, to_do)
    return Finding(f"{what}; {most} need {need / GIB:.2f}")


def ports(environment: Mapping[str, str]) -> list[int]:
    """The ports at which several ranks would meet on this host, by the launcher's environment."""
    if "MASTER_PORT" in environment:
        return [int(environment["MASTER_PORT"])]
    if "SLURM_JOB_ID" in environment:
        return [port_of(int(environment["SLURM_JOB_ID"]), int(environment.get("SLURM_STEP_ID", "0")))]
    return [TORCHRUN_PORT]


def rendezvous(tried: Mapping[int, str | None]) -> Iterable[Finding]:
    """Whether ports can be opened; ``tried`` has the reasons of those that cannot."""
    for port, reason in tried.items():
        if reason is None:
            yield Finding(f"rendezvous: port {port} is free")
        else:
            yield Finding(f"rendezvous: port {port} cannot be opened ({reason})", "set MASTER_PORT to another")


def versions(required: Sequence[str], installed: Callable[[str], str | None]) -> list[Finding]:
    """Compares installed packages with the declared requirements, without extras.

    Args:
        required: such as ``timm>=1.0.20``.
        installed: the version of a package, or None.
    """
    needed = [Requirement(text) for text in required]
    needed = [need for need in needed if need.marker is None or need.marker.evaluate({"extra": ""})]
    wrong = []
    for need in needed:
        version = installed(need.name)
        if version is None or not need.specifier.contains(version, prereleases=True):
            what = f"{need.name} {version} is installed" if version else f"{need.name} is not installed"
            wrong.append(Finding(f"versions: {what}", f"pip install '{need}'"))
    return wrong or [Finding(f"versions: the {len(needed)} packages that fcmae needs are as declared")]


def wandb(mode: str | None, problem: str = "") -> Finding:
    """The mode of ``logger.wandb=auto``: ``online``, ``offline``, ``disabled``, or None with a problem."""
    if mode is None:
        return Finding(f"wandb: {problem}", "or set logger.wandb=offline")
    what = {"online": "logs in and is online", "offline": "offline (not logged in, or WANDB_MODE)", "disabled": "off"}
    return Finding(f"wandb: {what.get(mode, mode)}")


def disk(folder: Path, free: int) -> Finding:
    """Whether the current folder has space for a run."""
    what = f"disk: {free / GIB:.1f} GiB free in {folder}"
    to_do = f"a run of ConvNeXt V2-Base needs {DISK_BYTES / GIB:.0f}; set hydra.run.dir to a folder on another disk"
    return Finding(what, to_do if free < DISK_BYTES else "")
