"""Compiling kernels ahead, for a GPU that is not here: whatever becomes of a kernel, nobody waits for ever."""

import functools
import json
import os
import re
import stat
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._inductor.runtime import cache_dir_utils
from triton.runtime import cache

from fcmae.kernels import caches, precompile
from fcmae.kernels.target import Target
from tests.conftest import run_python

H100 = {"target": ["cuda", 90, 32], "gpu": Target(132, True, True)}
LAST = iter(range(99, 0, -1))


@pytest.fixture(autouse=True)
def gpu(monkeypatch, tmp_path):
    """A device of its own for each test: what was started is remembered."""
    number = next(LAST)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: number)
    monkeypatch.setattr(precompile, "_gpu", lambda: H100)
    monkeypatch.setattr(precompile, "_cuda", lambda shape, device: None)
    # as a user starts: torch.compile decides where Triton's cache is
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", "")
    monkeypatch.delenv("TRITON_CACHE_DIR")


def shape(sites):
    return precompile.DepthwiseShape((2, 2), 2, sites, 8, 3, "bfloat16")


def compiled(tmp_path):
    """How many variants there are of each kernel."""
    names = [file.stem for file in tmp_path.rglob("*.cubin")]
    return {name: names.count(name) for name in names}


LAUNCH = """
import torch
from triton.backends.compiler import GPUTarget
from fcmae.kernels.triton_compiler import compile_only
from fcmae.kernels import depthwise_launch, neighbors
from fcmae.kernels.float8_triton import Float8, zero_largest
from fcmae.kernels.grn_triton import launch_backward, launch_forward
from fcmae.kernels.norm_triton import layer_norm_backward, layer_norm_forward
from fcmae.kernels.residual_triton import add_and_sum, residual, scale_and_sum
from fcmae.kernels.sums_triton import add_up
from fcmae.kernels.target import Target, pretend

compile_only(GPUTarget("cuda", 90, 32))
pretend(Target(132, True, True))
where = neighbors(torch.stack([torch.randperm(4)[:2].sort().values for _ in range(7)]), 2, 2)
x, weight, bias = torch.randn(7, 2, 2, 2, 8).bfloat16(), torch.randn(8, 1, 3, 3), torch.randn(8)
depthwise_launch.forward(x, weight, bias, where.slots, where.cells)
depthwise_launch.input_grad(x, weight, where.slots, where.cells)
taps = depthwise_launch.partial_weight_grad(x, x, 3, where.slots, where.cells)
h, parameter = torch.randn(7, 8, 32).bfloat16(), torch.randn(32)
for largest in (None, zero_largest(7, h.device)[5, 2]):
    launch_forward(h, parameter, parameter, parameter, 1e-6, largest)
    launch_backward(h, h, parameter, parameter, torch.rand(7, 32), torch.rand(7), 1e-6, largest)
layer_norm_forward(h, parameter, parameter, 1e-6)
layer_norm_backward(h, h, parameter, torch.rand(56), torch.rand(56))
for factor in (None, torch.rand(7).bfloat16()):
    residual(h, h, parameter, factor)
scale_and_sum(h, torch.rand(7).bfloat16())
add_up([add_and_sum(h, h)[1], torch.rand(3, 2, 8)], taps, 3)
add_up([], taps, 3)
for weight in (torch.randn(96, 32).bfloat16(), torch.randn(32, 96).bfloat16()):
    layer = Float8.of(weight, *zero_largest(1, weight.device))
    layer.scale_grad(torch.randn(56, len(weight)).bfloat16())
"""
"""What a step launches on 7 images, on a GPU that only compiles."""


@pytest.mark.slow
def test_every_kernel_of_a_shape_is_compiled_and_serves_a_batch(tmp_path, monkeypatch):
    """What is compiled for one image is all that a launch on a batch needs.

    Nothing is imported from the current folder, nor from folders that the environment names, but those that this
    process imports from.
    """
    pytest.importorskip("triton")
    hostile = tmp_path / "hostile"
    hostile.mkdir()
    for name in ("torch", "triton", "json", "fcmae"):
        (hostile / f"{name}.py").write_text("import pathlib; pathlib.Path(__file__).with_name('touched').touch()")
    monkeypatch.chdir(hostile)
    monkeypatch.setenv("PYTHONPATH", str(hostile))
    monkeypatch.setattr(sys, "path", ["", str(hostile), *sys.path])
    others = precompile.GeluGrnShape(8, 32, "bfloat16"), precompile.NormShape(32, "bfloat16")
    others += precompile.ResidualShape(32, "bfloat16", drops=True), precompile.SumsShape(3)
    others += precompile.Float8Shape("bfloat16"), precompile.GeluGrnShape(8, 32, "bfloat16", float8=True)
    precompile.start([shape(2), shape(1), *others, shape(2)])
    precompile.wait()
    assert not (hostile / "touched").exists()
    assert compiled(tmp_path) == {
        "forward_kernel": 2,
        "weight_grad_kernel": 2,
        "taps_kernel": 2,  # with a bias and, for the input gradient, without
        "forward_held": 2,  # with largest values and without
        "backward_held": 2,
        "layer_norm_kernel": 1,
        "layer_norm_backward_kernel": 1,
        "residual_kernel": 2,  # with factors and without
        "add_and_sum_kernel": 2,
        "add_up_kernel": 1,
        "largest_kernel": 1,
        "scale_kernel": 1,
    }
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "triton" / "0")
    ahead = sorted(tmp_path.rglob("*.cubin"))
    run_python(tmp_path, "-c", LAUNCH)
    assert sorted(tmp_path.rglob("*.cubin")) == ahead


def test_no_byte_of_float8_goes_to_shared_memory(tmp_path):
    """The assembler of CUDA 12.9, which Triton uses, would mix it up with its neighbour."""
    pytest.importorskip("triton")
    precompile.start([precompile.Float8Shape("bfloat16")])
    precompile.wait()
    (code,) = tmp_path.rglob("scale_kernel.ptx")
    assert "cvt.rn.satfinite.e4m3x2.f32" in code.read_text()
    assert not re.search(r"shared\S*\.b8", code.read_text())


@pytest.mark.slow
def test_beside_kernels_in_cuda_only_the_others_are_compiled(tmp_path):
    precompile.start(
        [
            precompile.SumsShape(3),
            precompile.GeluGrnBackwardShape(8, 32, "bfloat16"),
            precompile.NormForwardShape(32, "bfloat16"),
        ]
    )
    precompile.wait()
    assert compiled(tmp_path) == {"add_up_kernel": 1, "backward_held": 1, "layer_norm_kernel": 1}


def test_where_cuda_takes_all_no_compiler_starts(monkeypatch):
    begun = []
    monkeypatch.setattr(precompile, "_cuda", lambda shape, device: (None, lambda: begun.append(shape)))
    monkeypatch.setattr(precompile, "_compile", lambda *_: begun.append("Triton"))
    precompile.start([shape(2)])
    precompile.wait()
    assert begun == [shape(2)]


@pytest.mark.slow
def test_kernels_that_cannot_be_compiled_are_left_to_the_launch(monkeypatch, tmp_path):
    """Each shape is tried once."""
    monkeypatch.setattr(precompile, "_gpu", lambda: {**H100, "target": ["cuda", "no number", 32]})
    precompile.start([shape(2), shape(4)])
    precompile.wait()
    assert not compiled(tmp_path)
    monkeypatch.setattr(precompile, "Thread", None)
    precompile.start([shape(2)])  # nothing new


@pytest.mark.parametrize("program", [["/nowhere"], [sys.executable, "-c", ""]], ids=["does not start", "ends at once"])
def test_without_a_compiler_nobody_waits(monkeypatch, program):
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda _, **kwargs: popen(program, **kwargs))
    precompile.start([shape(sites) for sites in (1, 2, 4, 8)])
    precompile.wait()


def test_ranks_and_later_runs_find_what_was_compiled(monkeypatch, tmp_path):
    """But for other shapes; and a compiler that failed is tried again."""
    pytest.importorskip("triton")
    popen, exit_codes, started = subprocess.Popen, [1, 0, 0], []

    def compiler(_, **kwargs):
        started.append(exit_codes[len(started)])
        program = f"import sys, time; sys.stdin.readline(); time.sleep(0.5); sys.exit({started[-1]})"
        return popen([sys.executable, "-c", program], **kwargs)

    def start_ranks(shapes):
        for number in range(3):
            monkeypatch.setattr(torch.cuda, "current_device", lambda rank=number: rank)
            precompile.start(shapes)
        precompile.wait()
        precompile._started.clear()

    monkeypatch.setattr(subprocess, "Popen", compiler)
    start_ranks([shape(1)])
    assert started == [1, 0]
    start_ranks([shape(1)])
    assert started == [1, 0]
    start_ranks([shape(1), shape(2)])
    assert started == [1, 0, 0]


def test_compiled_code_is_kept_where_nobody_else_writes(tmp_path, monkeypatch):
    """What lies there is run."""
    monkeypatch.setattr(cache_dir_utils, "default_cache_dir", lambda: str(tmp_path / "usual"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def chosen(given=None):
        if given is None:
            monkeypatch.delenv(caches.VARIABLE)
        else:
            monkeypatch.setenv(caches.VARIABLE, str(given))
        caches.use_private_cache()
        return os.environ[caches.VARIABLE]

    assert chosen() == chosen(tmp_path / "usual") == str(tmp_path / "usual")
    assert stat.S_IMODE((tmp_path / "usual").stat().st_mode) == 0o700
    assert chosen("/chosen") == "/chosen"
    (tmp_path / "usual").chmod(0o777)
    ours = chosen()
    assert ours == str(tmp_path / f"fcmae-{os.getuid()}-inductor")
    os.rmdir(ours)
    os.symlink(tmp_path, ours)
    random = chosen()
    assert random not in (ours, str(tmp_path / "usual"))
    assert stat.S_IMODE(os.stat(random).st_mode) == 0o700


@pytest.mark.parametrize("what", ["lock", "done"])
def test_a_planted_link_is_not_written_through(what, tmp_path, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(subprocess, "Popen", functools.partial(_ends_well, subprocess.Popen))
    order = '{"order": 1}'
    done = tmp_path / f"fcmae-{precompile._digest(order)}"
    planted = done.with_suffix(".lock") if what == "lock" else done
    for target in ("precious", "new"):
        (tmp_path / "precious").write_text("text")
        planted.symlink_to(tmp_path / target)
        precompile._compile(order, tmp_path)
        planted.unlink(missing_ok=True)
        assert (tmp_path / "precious").read_text() == "text"
        assert not (tmp_path / "new").exists()


def _ends_well(popen, _, **kwargs):
    return popen([sys.executable, "-c", "import sys; sys.stdin.readline()"], **kwargs)


def test_threads_wait_together(monkeypatch):
    """As the one that computes gradients and the one that does all else."""
    popen = subprocess.Popen
    slow = [sys.executable, "-c", "import sys, time; sys.stdin.readline(); time.sleep(0.5)"]
    monkeypatch.setattr(subprocess, "Popen", lambda _, **kwargs: popen(slow, **kwargs))
    precompile.start([shape(1)])
    with ThreadPoolExecutor(4) as pool:
        for waiting in [pool.submit(precompile.wait) for _ in range(4)]:
            waiting.result()
    assert not precompile._compiling


@pytest.mark.slow
def test_the_compiler_ends_with_the_process_that_started_it():
    pytest.importorskip("triton")
    program = """
import os, time
from fcmae.kernels import triton_compiler as compiler
compiler.KERNELS["GeluGrnShape"] = {"endless": lambda *shape: print(os.getpid(), flush=True) or time.sleep(600)}
compiler.main()
"""
    order = {**H100, "shapes": [("GeluGrnShape", [])]}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", program], text=True, **pipes) as process:
        print(json.dumps(order), file=process.stdin, flush=True)
        worker = int(process.stdout.readline())
        process.stdin.close()
        assert process.wait(60) == 0
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)


def test_nobody_waits_for_a_thread_that_does_not_run_yet(monkeypatch):
    """Another thread, which waits already, cannot join it."""
    waited = []

    class Started(precompile.Thread):
        def start(self):
            waited.append(precompile.wait())
            super().start()

    monkeypatch.setattr(precompile, "Thread", Started)
    monkeypatch.setattr(precompile, "_compile", lambda *args: None)
    monkeypatch.setattr(precompile, "_cuda", lambda shape, device: (shape, lambda: None))
    precompile.start([shape(2)])
    precompile.wait()
    assert len(waited) == 2


def test_triton_is_hashed_beside_everything_else(monkeypatch, capfd):
    for error in (None, OSError("torn")):
        called = threading.Event()

        def key(error=error, called=called):
            called.set()
            if error is not None:
                raise error

        monkeypatch.setattr(cache, "triton_key", key)
        precompile.hash_triton()
        for thread in threading.enumerate():
            if thread.name == "triton_key":
                thread.join()
        assert called.is_set()
    assert capfd.readouterr() == ("", "")
