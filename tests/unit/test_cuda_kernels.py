"""The kernels in CUDA C++ on a CPU, where every thread of a block is a thread, against plain torch; and that NVRTC
compiles them. tests/gpu/test_depthwise_gpu.py and test_grn_gpu.py run them on a GPU."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fcmae.kernels import cuda_program, depthwise_cuda, grn_cuda, norm_cuda
from fcmae.kernels.depthwise import neighbors, packed_depthwise
from fcmae.kernels.grn import gelu_grn_torch
from fcmae.kernels.target import Target
from tests.conftest import relative_error

ON_CPU = Path(__file__).with_name("cuda_on_cpu.hpp")
TOLERANCE = {torch.bfloat16: 3e-3, torch.float16: 4e-4}
ARGUMENTS = 14

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


class OnCPU:
    """A :class:`.cuda_program.Program` on a CPU."""

    def __init__(self, library: ctypes.CDLL, kernels: tuple[cuda_program.Kernel, ...]) -> None:
        self.library = library
        self.kernels = {kernel.name: kernel for kernel in kernels}

    def launch(self, kernel: str, grid: tuple[int, int], *args: torch.Tensor | int | None) -> None:
        _, threads, shared, _ = self.kernels[kernel]
        values = [arg.data_ptr() if isinstance(arg, torch.Tensor) else arg or 0 for arg in args]
        array = (ctypes.c_longlong * ARGUMENTS)(*values)
        self.library.launch(ctypes.cast(getattr(self.library, kernel), ctypes.c_void_p), *grid, threads, shared, array)


@pytest.fixture
def on_cpu(monkeypatch, tmp_path):
    """Programs are compiled for the CPU."""

    def program(file, device, constants, kernels):
        source = tmp_path / f"{len(list(tmp_path.iterdir()))}.cpp"
        source.write_text(ON_CPU.read_text() + (cuda_program.SOURCES / file).read_text())
        defined = [f"-D{name}={value}" for name, value in constants]
        library = source.with_suffix(".so")
        subprocess.run(
            ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", "-w", "-o", library, source, "-lpthread", *defined],
            check=True,
        )
        return OnCPU(ctypes.CDLL(str(library)), kernels)

    monkeypatch.setattr(cuda_program, "program", program)
    monkeypatch.setattr(cuda_program, "shared_memory", lambda device: 2**20)


@needs_compiler
@pytest.mark.parametrize(
    ("s", "c", "keep", "n", "dtype"), [(2, 72, 7, 3, torch.bfloat16), (1, 64, 9, 2, torch.float16)]
)
def test_depthwise_equals_torch(on_cpu, s, c, keep, n, dtype):
    torch.manual_seed(0)
    index = torch.stack([torch.randperm(20)[:keep].sort().values for _ in range(n)])
    where = neighbors(index, 4, 5)
    tables = where.slots, where.cells
    x, grad, skip = (torch.randn(n, keep, s, s, c).to(dtype) for _ in range(3))
    weight, bias = torch.randn(c, 1, 7, 7), torch.randn(c)
    launcher = depthwise_cuda.Launcher(x.device, dtype, keep, s, c, tuple(where.slots.shape[1:]))
    launcher.processors = 1

    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
    expected = packed_depthwise(*leaves, where)
    of_x, of_weight, of_bias = torch.autograd.grad(expected, leaves, grad.double())

    assert relative_error(launcher.forward(x, weight, bias, *tables), expected.detach()) < TOLERANCE[dtype]
    assert relative_error(launcher.input_grad(grad, weight, *tables), of_x) < TOLERANCE[dtype]
    dx, sums = launcher.input_grad_and_skip(grad, weight, *tables, skip)
    assert relative_error(dx, of_x + skip.double()) < TOLERANCE[dtype]
    assert relative_error(sums.sum(0), skip.double().sum((0, 1, 2, 3))) < 1e-6
    total = launcher.weight_grad(x, grad, *tables).sum(0)
    assert relative_error(total[:-1].t(), of_weight.flatten(1)) < 1e-6
    assert relative_error(total[-1], of_bias) < 1e-6


@needs_compiler
def test_gelu_grn_equals_torch(on_cpu, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(grn_cuda, "_threads", lambda sites, channels: 64)
    n, sites, width = 2, 9, 256
    x = (2 * torch.randn(n, sites, width)).bfloat16()
    input_bias, weight, bias = (torch.randn(width) for _ in range(3))
    launcher = grn_cuda.Launcher(x.device, x.dtype, sites, width, cluster=4, eps=1e-6)
    y, norms, means = launcher.forward(x, input_bias, weight, bias)
    expected = gelu_grn_torch(x.double(), input_bias.double(), weight.double(), bias.double(), 1e-6)
    assert relative_error(y, expected) < TOLERANCE[x.dtype]
    exact = torch.nn.functional.gelu(x.double() + input_bias).square().sum(1).sqrt()
    assert relative_error(norms, exact) < 1e-4
    assert relative_error(means, exact.mean(1)) < 1e-4
    for channel in (*range(100, 104), None):
        x[-1, -1, channel or 0] = float("nan") if channel is None else 1000
        largest = torch.zeros(1, dtype=torch.int32)
        y, *_ = launcher.forward(x, input_bias, weight, bias, largest)
        expected = y.float().abs().max()[None]
        torch.testing.assert_close(largest.view(torch.float32), expected, rtol=0, atol=0, equal_nan=True)
        x[-1, -1] = 0


@needs_compiler
@pytest.mark.parametrize(("rows", "channels"), [(37, 96), (20, 1408)])
def test_layer_norm_equals_torch(on_cpu, monkeypatch, rows, channels):
    torch.manual_seed(0)
    monkeypatch.setattr(norm_cuda, "WARPS", 2)
    monkeypatch.setattr(norm_cuda, "target", lambda x: Target(1, True, True))
    x, dy = torch.randn(rows, channels).bfloat16(), torch.randn(rows, channels).bfloat16()
    leaves = [t.double().requires_grad_() for t in (x, torch.randn(channels), torch.randn(channels))]
    expected = torch.autograd.grad(torch.layer_norm(leaves[0], (channels,), *leaves[1:], eps=1e-6), leaves, dy.double())
    scales = (x.float().var(1, unbiased=False) + 1e-6).rsqrt()
    launcher = norm_cuda.Launcher(x.device, x.dtype, channels)
    dx, partial = launcher.backward(dy, x, leaves[1].detach().float(), x.float().mean(1), scales)
    assert relative_error(dx, expected[0]) < TOLERANCE[x.dtype]
    assert relative_error(partial.sum(0), torch.stack(expected[1:])) < 1e-6


@pytest.mark.skipif(cuda_program.nvrtc is None, reason="needs cuda.bindings")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_nvrtc_compiles(architecture):
    sources = {
        "depthwise.cu": "-DC=512 -DV=19 -DS=2 -DHEIGHT=13 -DWIDTH=13 -DWARPS=3 -DBLOCKS=4 -DALWAYS=1",
        "layer_norm.cu": "-DC=512 -DWARPS=4 -DBLOCKS=4",
        "gelu_grn.cu": "-DR=76 -DD=2048 -DCH=256 -DTHREADS=128 -DBLOCKS=4 -DEPS=1e-6f",
    }
    for file, constants in sources.items():
        if architecture == "sm_80" and file == "gelu_grn.cu":
            continue
        try:
            code = cuda_program.compile_source(
                cuda_program.source(file), (f"--gpu-architecture={architecture}", "-DBF16=1", *constants.split())
            )
        except RuntimeError as error:
            if "libnvrtc" in str(error):
                pytest.skip(str(error))
            raise
        assert code.startswith(b"\x7fELF")


@pytest.mark.skipif(cuda_program.nvrtc is None, reason="needs cuda.bindings")
def test_what_nvrtc_says_is_told():
    with pytest.raises(RuntimeError, match="expected a"):
        cuda_program.compile_source("int", ("--gpu-architecture=sm_90",))


class Driver:
    """The part of CUDA's driver that loads and launches; its calls, each in the context that was current."""

    CUfunction_attribute = SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8)

    def __init__(self, current=0):
        self.contexts, self.calls, self.launched = [current], [], []

    def __getattr__(self, name):
        def call(*args):
            self.calls.append((name, self.contexts[-1]))
            return 0, 7

        return call

    def cuDevicePrimaryCtxRetain(self, device):
        return 0, 5

    def cuCtxGetCurrent(self):
        return 0, self.contexts[-1]

    def cuCtxPushCurrent(self, context):
        self.contexts.append(context)
        return (0,)

    def cuCtxPopCurrent(self):
        return 0, self.contexts.pop()

    def cuLaunchKernel(self, function, *args):
        self.calls.append(("cuLaunchKernel", self.contexts[-1]))
        self.launched = args[-2][0]
        return (0,)


@pytest.mark.parametrize("current", [0, 3, 5], ids=["none", "another device's", "its own"])
def test_a_program_is_loaded_and_launched_in_its_devices_context(current, monkeypatch):
    """A thread of autograd may have none, and a tensor need not be on the current device."""
    driver, asked = Driver(current), []
    monkeypatch.setattr(cuda_program, "driver", driver)
    stream = SimpleNamespace(cuda_stream=0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: asked.append(device) or stream)
    device = torch.device("cuda", 1)
    program = cuda_program.Program(b"", device)
    program.prepare(cuda_program.Kernel("k", 32, 0))
    whole = torch.arange(9.0)
    program.launch("k", (1, 1), whole, 3, None)
    assert driver.launched == (whole.data_ptr(), 3, 0)
    assert asked == [device]
    names = {name: context for name, context in driver.calls if name != "cuDeviceGet"}
    assert set(names) == {"cuModuleLoadData", "cuModuleGetFunction", "cuFuncSetAttribute", "cuLaunchKernel"}
    assert set(names.values()) == {5}
    assert driver.contexts == [current]


def test_a_view_that_begins_anywhere_is_copied():
    whole = torch.arange(9.0)
    view = cuda_program._aligned(whole[1:])
    assert view.data_ptr() % cuda_program.ALIGNMENT == 0
    assert torch.equal(view, whole[1:])
    assert cuda_program._aligned(whole) is whole


def test_kept_code_is_used_unless_it_was_damaged(monkeypatch, tmp_path):
    """The driver would read beyond the end of a file that was cut."""
    folder = tmp_path / "of the user's choice"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))
    monkeypatch.setattr(cuda_program, "nvrtc", SimpleNamespace(nvrtcVersion=lambda: (0, 13, 0)))
    compiled = []
    monkeypatch.setattr(cuda_program, "compile_source", lambda *args: compiled.append(args) or b"machine code")

    def compiles():
        compiled.clear()
        assert cuda_program._machine_code("text", ("-O",)) == b"machine code"
        return len(compiled)

    assert (compiles(), compiles()) == (1, 0)
    (kept,) = folder.iterdir()
    whole = kept.read_bytes()
    for damaged in (b"", whole[:20], whole[:-1], whole[:-1] + b"?"):
        kept.write_bytes(damaged)
        assert (compiles(), compiles()) == (1, 0)
    kept.chmod(0o666)
    assert compiles() == 1
    kept.unlink()
    os.mkfifo(kept)
    assert compiles() == 1
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file" / "folder"))
    (tmp_path / "file").touch()
    assert (compiles(), compiles()) == (1, 1)


def test_more_images_than_a_launch_has_rows_are_left_to_triton(monkeypatch):
    grn_triton = pytest.importorskip("fcmae.kernels.grn_triton")
    weight = torch.ones(8)
    cuda = SimpleNamespace(forward=lambda *args: "CUDA")
    monkeypatch.setattr(grn_cuda, "MOST_IMAGES", 2)
    monkeypatch.setattr(grn_cuda, "launcher", lambda *shape: cuda)
    monkeypatch.setattr(grn_triton, "_plan", lambda *args: pytest.fail("Triton"))
    assert grn_triton.launch_forward(torch.ones(2, 3, 8), None, weight, weight, 1e-6) == "CUDA"
    with pytest.raises(pytest.fail.Exception, match="Triton"):
        grn_triton.launch_forward(torch.ones(3, 3, 8), None, weight, weight, 1e-6)


H200, RTX_5090, A100 = ((9, 0), 228), ((12, 0), 100), ((8, 0), 164)
"""Compute capability, and KiB of shared memory."""


def pretend(monkeypatch, capability, kib):
    monkeypatch.setattr(cuda_program, "is_possible", lambda device, least=(8, 0): capability >= least)
    monkeypatch.setattr(cuda_program, "shared_memory", lambda device: kib * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)


def test_images_go_to_the_clusters_that_a_gpu_can_run(monkeypatch):
    shapes = [(19, 4096), (76, 2048), (304, 1024), (1216, 512), (3136, 512), (76, 160)]
    for gpu, expected in ((H200, [8, 8, 16, 16, 0, 0]), (RTX_5090, [8, 8, 8, 0, 0, 0]), (A100, [0] * 6)):
        pretend(monkeypatch, *gpu)
        assert [grn_cuda.takes(torch.device("cuda", 0), torch.bfloat16, *shape) for shape in shapes] == expected


def test_small_patches_are_taken_where_enough_warps_have_room(monkeypatch):
    for gpu, most in ((H200, 256), (A100, 192)):
        pretend(monkeypatch, *gpu)
        depthwise_cuda.takes.cache_clear()
        found = [224, 256, 288, 320] if gpu == H200 else [160, 192, 224]
        for size in found:
            grid = size // 32
            keep = grid**2 - int(0.6 * grid**2)
            shape = (torch.bfloat16, keep, 2, 512, 7, (grid + 6, grid + 6))
            assert depthwise_cuda.takes(torch.device("cuda", 0), *shape) == (size <= most), (gpu, size)
    depthwise_cuda.takes.cache_clear()
