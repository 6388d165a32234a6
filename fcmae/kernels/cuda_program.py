"""Kernels in CUDA C++ (the folder ``cuda``) for NVIDIA's GPUs, where Triton cannot say what the GPU should do.

NVRTC, which comes with torch, compiles a kernel in a second when a shape is first met. The machine code is kept in the
private folder of compiled code. Where a kernel cannot be compiled Triton's takes its place.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fcmae.files import replacing
from fcmae.kernels.caches import VARIABLE, use_private_cache
from fcmae.opening import open_trusted

try:
    from cuda.bindings import driver, nvrtc
except ImportError:  # an older torch, or one for another kind of GPU
    driver = nvrtc = None

SOURCES = Path(__file__).parent / "cuda"
RESERVED = 1024
PORTABLE_CLUSTER = 8
"""Blocks of a cluster that every GPU with clusters can run at the same time."""
ALIGNMENT = 16
"""Bytes that a kernel copies at once: where every tensor must begin."""


class Kernel(NamedTuple):
    """How a kernel is launched."""

    name: str
    threads: int
    """Of a block."""
    shared: int
    """Bytes of shared memory of a block."""
    cluster: int = 1
    """Blocks that run at the same time."""


class Program:
    """The kernels of a source file, compiled for one GPU and one set of constants."""

    def __init__(self, code: bytes, device: torch.device) -> None:
        self.device = device
        self._context = _call(driver.cuDevicePrimaryCtxRetain, _call(driver.cuDeviceGet, device.index))
        self._functions: dict[str, Any] = {}
        with self._made_current():
            self._module = _call(driver.cuModuleLoadData, code)

    @contextlib.contextmanager
    def _made_current(self) -> Iterator[None]:
        """In the device's context: a thread of autograd may have none yet, or another device may be the current one."""
        if int(_call(driver.cuCtxGetCurrent)) == int(self._context):
            yield
            return
        _call(driver.cuCtxPushCurrent, self._context)
        try:
            yield
        finally:
            _call(driver.cuCtxPopCurrent)

    def prepare(self, kernel: Kernel) -> None:
        """Makes a kernel ready to be launched. Raises RuntimeError if the GPU cannot run it."""
        with self._made_current():
            self._prepare(*kernel)

    def _prepare(self, name: str, threads: int, shared: int, cluster: int) -> None:
        function = _call(driver.cuModuleGetFunction, self._module, name.encode())
        kind = driver.CUfunction_attribute
        _call(driver.cuFuncSetAttribute, function, kind.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared)
        self._functions[name] = function, threads, shared
        if cluster == 1:
            return
        if cluster > PORTABLE_CLUSTER:
            _call(driver.cuFuncSetAttribute, function, kind.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1)
        size = driver.CUlaunchAttribute()
        size.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        size.value.clusterDim.x, size.value.clusterDim.y, size.value.clusterDim.z = cluster, 1, 1
        launch = driver.CUlaunchConfig()
        launch.gridDimX, launch.gridDimY, launch.gridDimZ = cluster, 1, 1
        launch.blockDimX, launch.blockDimY, launch.blockDimZ = threads, 1, 1
        launch.sharedMemBytes, launch.attrs, launch.numAttrs = shared, [size], 1
        if not _call(driver.cuOccupancyMaxActiveClusters, function, launch):
            raise RuntimeError(f"no room for {cluster} blocks at the same time")

    def launch(self, kernel: str, grid: tuple[int, int], *args: Tensor | int | None) -> None:
        """Launches a kernel on torch's current stream of the device."""
        function, threads, shared = self._functions[kernel]
        args = tuple(_aligned(arg) if isinstance(arg, Tensor) else arg for arg in args)
        values = tuple(arg.data_ptr() if isinstance(arg, Tensor) else arg or 0 for arg in args)
        types = tuple(ctypes.c_int if isinstance(arg, int) else ctypes.c_void_p for arg in args)
        stream = torch.cuda.current_stream(self.device).cuda_stream
        with self._made_current():
            _call(driver.cuLaunchKernel, function, *grid, 1, threads, 1, 1, shared, stream, (values, types), 0)


def _aligned(x: Tensor) -> Tensor:
    """A copy of a view that begins within ``ALIGNMENT`` bytes, as nothing does that a kernel writes."""
    return x.clone() if x.data_ptr() % ALIGNMENT else x


def is_possible(device: torch.device, capability: tuple[int, int] = (8, 0)) -> bool:
    """Whether a device is a GPU of NVIDIA of that compute capability and NVRTC is there."""
    return (
        driver is not None
        and torch.version.hip is None
        and device.type == "cuda"
        and torch.cuda.get_device_capability(device) >= capability
    )


def shared_memory(device: torch.device) -> int:
    """Bytes of a multiprocessor. A block takes ``RESERVED`` more than it asks for."""
    return torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor


@functools.cache
def program(
    file: str, device: torch.device, constants: tuple[tuple[str, int | str], ...], kernels: tuple[Kernel, ...]
) -> Program | None:
    """The kernels of ``file`` with the constants of the preprocessor; None, with a warning, if they cannot run.

    Args:
        device: a GPU, with its index.
    """
    major, minor = torch.cuda.get_device_capability(device)
    options = (f"--gpu-architecture=sm_{major}{minor}", "--std=c++17", "--use_fast_math")
    try:
        code = _machine_code(source(file), (*options, *(f"-D{name}={value}" for name, value in constants)))
        found = Program(code, device)
        for kernel in kernels:
            found.prepare(kernel)
    except RuntimeError as error:
        warnings.warn(f"{file} cannot run here, Triton's kernels do: {error}", stacklevel=2)
        return None
    return found


def source(file: str) -> str:
    """A source file after what the kernels use of the GPU."""
    return "".join((SOURCES / name).read_text() for name in ("device.cuh", file))


def _machine_code(text: str, options: tuple[str, ...]) -> bytes:
    """From the folder of compiled code, else compiled.

    The driver reads machine code without knowing its length, so a damaged file would crash this process: each begins
    with a digest of the rest.
    """
    version = _call(nvrtc.nvrtcVersion)
    use_private_cache()
    key = hashlib.sha256(repr((text, options, version)).encode()).hexdigest()
    kept = Path(os.environ[VARIABLE]) / f"fcmae-{key}.cuda"
    with contextlib.suppress(OSError), open_trusted(kept) as file:
        digest, code = file.read(hashlib.sha256().digest_size), file.read()
        if digest == hashlib.sha256(code).digest():
            return code
    code = compile_source(text, options)
    with contextlib.suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        with replacing(kept, 0o600) as file:
            file.write(hashlib.sha256(code).digest() + code)
    return code


def compile_source(text: str, options: tuple[str, ...]) -> bytes:
    """The machine code. Raises RuntimeError with the compiler's words."""
    compiled = _call(nvrtc.nvrtcCreateProgram, text.encode(), b"kernel.cu", 0, [], [])
    try:
        try:
            _call(nvrtc.nvrtcCompileProgram, compiled, len(options), [option.encode() for option in options])
        except RuntimeError as error:
            log = bytes(1 + _call(nvrtc.nvrtcGetProgramLogSize, compiled))
            _call(nvrtc.nvrtcGetProgramLog, compiled, log)
            raise RuntimeError(log.decode().strip("\0\n ")) from error
        code = b" " * _call(nvrtc.nvrtcGetCUBINSize, compiled)
        _call(nvrtc.nvrtcGetCUBIN, compiled, code)
    finally:
        nvrtc.nvrtcDestroyProgram(compiled)
    return code


def _call(function: Any, *args: Any) -> Any:
    """The result of a function of CUDA. Raises RuntimeError if it says that it failed."""
    status, *results = function(*args)
    if int(status):
        raise RuntimeError(f"{function.__name__} failed: {status.name}")
    return results[0] if len(results) == 1 else tuple(results)
