"""The compilers that torch.compile and Triton use."""

import os
import shlex
import shutil
import sys
import sysconfig
from collections.abc import Callable, Mapping
from pathlib import Path

from fcmae.errors import UsageError

Which = Callable[[str], str | None]


def c_compiler(environment: Mapping[str, str] = os.environ, which: Which = shutil.which) -> str | None:
    """The C compiler that Triton uses on a GPU: CC, else gcc, else clang; None without one."""
    given = environment.get("CC")
    return _program(given, which) if given else which("gcc") or which("clang")


def cxx_compiler(environment: Mapping[str, str] = os.environ, which: Which = shutil.which) -> str | None:
    """The C++ compiler that torch.compile uses on a CPU: CXX, else g++ (clang++ on a Mac); None without one."""
    return _program(environment.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++"), which)


def _program(command: str, which: Which) -> str | None:
    words = shlex.split(command)
    return which(words[0]) if words else None


HAS_C_COMPILER = c_compiler() is not None
"""Without one Triton runs no kernel, and plain torch is used."""


def python_header() -> Path:
    """The path of Python.h, which compiled code includes."""
    scheme = sysconfig.get_default_scheme()
    # Debian's own scheme names a folder that does not exist.
    return Path(sysconfig.get_paths("posix_prefix" if scheme == "posix_local" else scheme)["include"], "Python.h")


def missing(
    device: str,
    environment: Mapping[str, str] = os.environ,
    which: Which = shutil.which,
    header: Path | None = None,
) -> str | None:
    """What torch.compile lacks on a type of device and what to install; None if nothing."""
    if device == "cuda" and c_compiler(environment, which) is None:
        return "no C compiler was found (CC, gcc or clang); install gcc"
    if device != "cuda" and cxx_compiler(environment, which) is None:
        return "no C++ compiler was found (CXX or g++); install g++"
    header = header or python_header()
    return None if header.is_file() else f"{header} is missing; install Python's headers (python3-dev on Debian)"


def check(key: str, wanted: bool, device: str) -> None:
    """Raises UsageError if ``key`` asks for torch.compile and something that it needs is missing."""
    lacks = missing(device) if wanted else None
    if lacks is not None:
        raise UsageError(f"{key}: torch.compile cannot run: {lacks}, or set {key}=false")
