"""Compiling the kernels of a network side by side, before its first step needs them.

A kernel of Triton takes seconds to compile at its first launch, and a network needs a dozen. Another program,
:mod:`fcmae.kernels.triton_compiler`, compiles them in as many processes as there are cores, into Triton's cache on
disk, while this process traces and compiles everything else. On an H200 machine of 16 cores a step of Base starts after
58 s from empty caches with it, and after 109 s without. A file in the cache marks a network whose kernels are compiled.
On a machine with several ranks one of them starts the compiler. Kernels in CUDA C++ are compiled by threads.
"""

import contextlib
import functools
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fcmae.kernels import depthwise_cuda, grn_cuda, norm_cuda
from fcmae.kernels.caches import use_private_cache
from fcmae.kernels.target import target
from fcmae.opening import create, open_to_change


class DepthwiseShape(NamedTuple):
    """What the kernels of a packed depthwise convolution are specialised for."""

    grid: tuple[int, int]
    """Rows and columns of patches in an image; ``keep`` patches are visible."""
    keep: int
    sites: int
    """Per side of a patch."""
    channels: int
    kernel: int
    dtype: str
    """The activations' type, as torch names it: ``bfloat16``."""


class GeluGrnShape(NamedTuple):
    """What the kernels of GELU and GRN are specialised for."""

    sites: int
    """Per image."""
    channels: int
    dtype: str
    float8: bool = False
    """Whether they find the largest values of what they write, for products in float8."""


class NormShape(NamedTuple):
    """What the kernels of a layer normalisation are specialised for."""

    channels: int
    dtype: str


class NormForwardShape(NamedTuple):
    """:class:`NormShape` where the backward pass is not Triton's."""

    channels: int
    dtype: str


class ResidualShape(NamedTuple):
    """What the kernels of residual sums are specialised for."""

    channels: int
    dtype: str
    drops: bool
    """Whether paths are dropped, so that images have factors."""


class SumsShape(NamedTuple):
    """What the kernel that adds up partial sums is specialised for."""

    kernel: int


class Float8Shape(NamedTuple):
    """What the kernels of linear layers in float8 are specialised for."""

    dtype: str


class GeluGrnBackwardShape(NamedTuple):
    """:class:`GeluGrnShape` where the forward pass is not Triton's."""

    sites: int
    channels: int
    dtype: str
    float8: bool = False


class Move(NamedTuple):
    """How the sites of N maps are laid out for a convolution whose kernel equals its stride.

    Maps are kept in square tiles: ``[N, V, S, S, C]``. The sites of a kernel come one after another, row by row, and
    make one site of the tiles of the result. Sites beyond the last whole kernel are left out.
    """

    height: int
    """Sites of a map."""
    width: int
    before: int
    """Sites per side of a tile of the map."""
    after: int
    """Sites per side of a tile of the result."""
    stride: int

    @property
    def sites(self) -> int:
        """Sites per map of the result."""
        return (self.height // self.stride) * (self.width // self.stride)

    def constants(self) -> dict[str, int]:
        return dict(zip(("HEIGHT", "WIDTH_OF_MAP", "BEFORE", "AFTER", "STRIDE"), self, strict=True))


class MovingNormShape(NamedTuple):
    """What the kernels of a layer normalisation before a convolution are specialised for."""

    channels: int
    dtype: str
    height: int
    """This and the rest are a :class:`Move`."""
    width: int
    before: int
    after: int
    stride: int


class StemShape(NamedTuple):
    """What the kernels of a stem are specialised for."""

    image: tuple[int, int, int]
    """Channels, height and width."""
    pixels: str
    """The images' type."""
    stride: int
    channels: int
    side: int
    """Sites per side of a tile."""
    dtype: str


class PatchErrorShape(NamedTuple):
    """What the kernels of the error of normalised pixels are specialised for."""

    image: tuple[int, int, int]
    """Channels, height and width."""
    pixels: str
    patch_size: int
    dtype: str
    """The prediction's type."""


Shape = (
    DepthwiseShape
    | GeluGrnShape
    | NormShape
    | NormForwardShape
    | ResidualShape
    | SumsShape
    | Float8Shape
    | GeluGrnBackwardShape
    | MovingNormShape
    | StemShape
    | PatchErrorShape
)

_started: set[tuple[Shape, int]] = set()
"""Shapes and devices."""
_also: list[Shape] = []
_compiling: list[Thread] = []


def dtype_of(x: Tensor) -> str:
    """The type of the activations computed from ``x``, as a shape names it."""
    autocast = torch.is_autocast_enabled(x.device.type)
    return name_of(torch.get_autocast_dtype(x.device.type) if autocast else x.dtype)


def name_of(dtype: torch.dtype) -> str:
    """A type as a shape names it."""
    return str(dtype).removeprefix("torch.")


def also(shapes: Iterable[Shape]) -> None:
    """Adds to what the next :func:`start` compiles, so that one program does it."""
    _also.extend(shapes)


def hash_triton() -> None:
    """Starts to hash Triton's 500 MB, a part of the name of every kernel in its cache, which takes 0.4 s.

    Otherwise the first launch does, and the device waits for it.
    """
    with contextlib.suppress(ImportError):  # private to Triton
        from triton.runtime.cache import triton_key

        Thread(target=_quietly, args=(triton_key,), daemon=True, name="triton_key").start()


def _quietly(function: Callable[[], object]) -> None:
    with contextlib.suppress(Exception):  # the first launch says why
        function()


def start(shapes: Iterable[Shape]) -> None:
    """Starts compiling the kernels of every shape that is new to this process.

    A kernel that cannot be compiled this way is compiled, or fails, at its launch.
    """
    device = torch.cuda.current_device()
    new = [shape for shape in dict.fromkeys([*shapes, *_also]) if (shape, device) not in _started]
    _also.clear()
    if new:
        _started.update((shape, device) for shape in new)
        left = [shape for given in new if (shape := _without_cuda(given, torch.device("cuda", device)))]
        if left:
            order = json.dumps({**_gpu(), "shapes": [(type(shape).__name__, shape) for shape in left]})
            _run(Thread(target=_compile, args=(order, _cache()), daemon=True, name="precompile"))


def _run(thread: Thread) -> None:
    """Starts a thread that :func:`wait` waits for; another thread may wait already, and only for one that runs."""
    thread.start()
    _compiling.append(thread)


def _without_cuda(shape: Shape, device: torch.device) -> Shape | None:
    """What Triton has to compile of a shape, if anything; a thread has begun to compile the kernels in CUDA C++."""
    found = _cuda(shape, device)
    if found is None:
        return shape
    left, compile_cuda = found
    _run(Thread(target=compile_cuda, daemon=True, name="nvrtc"))
    return left


def _cuda(shape: Shape, device: torch.device) -> tuple[Shape | None, Callable[[], object]] | None:
    """The shape of what is left to Triton, and what compiles a shape's kernels in CUDA C++; None if there are none."""
    if isinstance(shape, DepthwiseShape):
        table = shape.grid[0] + 2 * depthwise_cuda.HALO, shape.grid[1] + 2 * depthwise_cuda.HALO
        patches = device, getattr(torch, shape.dtype), shape.keep, shape.sites, shape.channels
        if depthwise_cuda.takes(*patches, shape.kernel, table):
            return None, functools.partial(depthwise_cuda.launcher_for, *patches, table)
    elif isinstance(shape, GeluGrnShape):
        images = device, getattr(torch, shape.dtype), shape.sites, shape.channels
        if grn_cuda.takes(*images):
            return GeluGrnBackwardShape(*shape), functools.partial(grn_cuda.launcher, *images)
    elif isinstance(shape, NormShape):
        rows = device, getattr(torch, shape.dtype), shape.channels
        if norm_cuda.takes(*rows):
            return NormForwardShape(*shape), functools.partial(norm_cuda.launcher, *rows)
    return None


def wait() -> None:
    """Waits until the compilers are done. Call it before a kernel is launched."""
    while _compiling:
        with contextlib.suppress(IndexError, ValueError):  # another thread waited too
            thread = _compiling[0]
            thread.join()
            _compiling.remove(thread)


def _gpu() -> dict[str, Any]:
    """A description of the current device for the compiler, which does not open it."""
    from triton.runtime import driver

    found = driver.active.get_current_target()
    return {"target": [found.backend, found.arch, found.warp_size], "gpu": target(torch.empty(0, device="cuda"))}


def _cache() -> Path:
    """Triton's cache folder, set for this process, the compiler, and the machine's other ranks.

    Otherwise torch.compile sets one per GPU at its first use.
    """
    from triton import knobs

    use_private_cache()
    with contextlib.suppress(ImportError):  # private to torch; without it kernels are compiled twice
        from torch._inductor.runtime.cache_dir_utils import triton_cache_dir

        os.environ.setdefault("TRITON_CACHE_DIR", triton_cache_dir(0))
    return Path(knobs.cache.dir)


def _compile(order: str, cache: Path) -> None:
    """Runs the compiler to its end, unless all is compiled. It ends with this process, because its input does."""
    done = cache / f"fcmae-{_digest(order)}"
    start_compiler = functools.partial(subprocess.Popen, _program(), text=True, stdin=subprocess.PIPE)
    # Without such locks, or a place for them, launches compile.
    with contextlib.suppress(ImportError, OSError), _locked(done.with_suffix(".lock")):
        if done.exists():
            return
        with start_compiler(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as compiler:
            print(order, file=compiler.stdin, flush=True)
            compiler.wait()
        if compiler.returncode == 0:
            create(done, 0o600).close()


def _program() -> list[str]:
    """The command that starts the compiler with the libraries of this process.

    ``python -m`` would import from the current folder. ``-I`` excludes it, and the environment's folders, which are
    passed as arguments instead.
    """
    import triton

    loaded = [str(Path(str(file)).parents[1]) for file in (torch.__file__, triton.__file__, Path(__file__).parent)]
    folders = [folder for folder in sys.path if folder and os.path.abspath(folder) != os.getcwd()]
    code = "import sys; sys.path[:] = sys.argv[1:]; from fcmae.kernels import triton_compiler; triton_compiler.main()"
    return [sys.executable, "-I", "-c", code, *dict.fromkeys([*loaded, *folders])]


def _digest(order: str) -> str:
    """A digest of what the results depend on: the order, the kernels, and Triton."""
    import triton

    digest = hashlib.sha256(f"{triton.__version__} {order}".encode())
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """One process of this machine at a time runs the block."""
    import fcntl

    file.parent.mkdir(parents=True, exist_ok=True)
    with open_to_change(file, 0o600) as opened:
        fcntl.flock(opened, fcntl.LOCK_EX)
        yield
