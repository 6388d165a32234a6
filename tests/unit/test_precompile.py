"""Compiling kernels ahead, for a GPU that is not here: whatever becomes of a kernel, nobody waits for ever."""

import json
import os
import subprocess
import sys
import threading

import pytest
import torch

from fcmae.kernels import precompile
from fcmae.kernels.target import Target

H100 = {"target": ["cuda", 90, 32], "gpu": Target(132, True)}
LAST = iter(range(99, 0, -1))


@pytest.fixture(autouse=True)
def gpu(monkeypatch, tmp_path):
    """A device of its own for each test: what was started is remembered."""
    number = next(LAST)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: number)
    monkeypatch.setattr(precompile, "_gpu", lambda: H100)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))


def shape(sites, hidden=32):
    return precompile.BlockShape((2, 2), 2, sites, 8, 3, hidden, "bfloat16")


def compiled(tmp_path):
    """How many variants there are of each kernel."""
    names = [file.stem for file in tmp_path.rglob("*.cubin")]
    return {name: names.count(name) for name in names}


def test_every_kernel_of_a_shape_is_compiled(tmp_path):
    pytest.importorskip("triton")
    for ready in precompile.start([shape(2), shape(1, hidden=None), shape(2)]):
        ready()
    assert compiled(tmp_path) == {
        "forward_kernel": 2,
        "weight_grad_kernel": 2,
        "add_partial_kernel": 1,
        "taps_kernel": 2,  # with a bias and, for the input gradient, without
        "_forward": 1,
        "_backward": 1,
    }


def test_kernels_that_cannot_be_compiled_are_left_to_the_launch(monkeypatch, tmp_path):
    """Each shape is tried once, and the compiler ends."""
    monkeypatch.setattr(precompile, "_gpu", lambda: {**H100, "target": ["cuda", "no number", 32]})
    shapes = [shape(2), shape(4)]
    ready = precompile.start(shapes)
    assert len(ready) == 2
    for wait in ready:
        wait()
    assert not compiled(tmp_path)
    for thread in threading.enumerate():
        if thread.name == "precompile":
            thread.join(60)
            assert not thread.is_alive()
    monkeypatch.setattr(precompile, "Thread", None)
    assert len(precompile.start(shapes[:1])) == 1  # nothing new, no thread


@pytest.mark.parametrize("program", [["/nowhere"], [sys.executable, "-c", ""]], ids=["does not start", "ends at once"])
def test_without_a_compiler_nobody_waits(monkeypatch, program):
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda _, **kwargs: popen(program, **kwargs))
    for wait in precompile.start([shape(sites) for sites in (1, 2, 4, 8)]):
        wait()


def test_the_compiler_ends_with_the_process_that_started_it():
    pytest.importorskip("triton")
    program = """
import os, time
from fcmae.kernels import compiler
compiler.KERNELS["endless"] = lambda shape: print(os.getpid(), flush=True) or time.sleep(600)
compiler.main()
"""
    order = {**H100, "processes": 1, "tasks": [("endless", shape(1))]}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", program], text=True, **pipes) as process:
        print(json.dumps(order), file=process.stdin, flush=True)
        worker = int(process.stdout.readline())
        process.stdin.close()
        assert process.wait(60) == 0
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)
