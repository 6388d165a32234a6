"""The processes that compile kernels ahead: whatever becomes of a kernel, nobody waits for ever."""

import subprocess
import sys
import threading

import pytest
import torch

from fcmae.kernels import precompile


def test_kernels_that_cannot_be_compiled_are_left_to_the_launch(monkeypatch):
    """Here for want of a GPU. Each shape is tried once, and the processes end."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 99)
    shapes = [precompile.BlockShape((2, 2), 2, sites, 8, 7, None, "bfloat16") for sites in (2, 4)]
    ready = precompile.start(shapes)
    assert len(ready) == 2
    for wait in ready:
        wait()
    for thread in threading.enumerate():
        if thread.name == "precompile":
            thread.join(60)
            assert not thread.is_alive()
    monkeypatch.setattr(precompile, "Thread", None)
    assert len(precompile.start(shapes[:1])) == 1  # nothing new, no thread


@pytest.mark.parametrize("program", [["/nowhere"], [sys.executable, "-c", ""]], ids=["does not start", "ends at once"])
def test_without_a_process_nobody_waits(monkeypatch, program):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 98)
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda _, **kwargs: popen(program, **kwargs))
    shapes = [precompile.BlockShape((2, 2), 2, sites, len(program), 7, None, "bfloat16") for sites in (1, 2, 4, 8)]
    for wait in precompile.start(shapes):
        wait()
