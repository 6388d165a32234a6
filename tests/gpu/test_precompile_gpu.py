"""Kernels compiled ahead, by other processes, are the ones that a network launches."""

import os
from pathlib import Path

import pytest
import torch

import fcmae
from tests.conftest import run_python

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

STEP = """
import torch
from fcmae.kernels import precompile
from fcmae.models import FCMAE
import fcmae.engines.packed as packed

if {ahead}:
    start = precompile.start
    precompile.start = lambda shapes: [wait() for wait in start(shapes)] and exit()
model = FCMAE("convnextv2_atto", backbone_kwargs={{"depths": [1, 1, 1, 1]}}).cuda()
model.compile()
with torch.autocast("cuda", torch.bfloat16):
    model(torch.randn(4, 3, 224, 224, device="cuda")).loss.backward()
"""


def kernels(cache: Path) -> set[str]:
    """Our kernels in a cache of Triton."""
    ours = ("_forward_kernel", "_weight_grad_kernel", "_forward", "_backward", "_add_partial_kernel")
    return {str(file) for file in cache.rglob("*.cubin") if file.stem in ours}


def test_nothing_is_compiled_again(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    root = str(Path(fcmae.__file__).parents[1])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]))
    run_python(tmp_path, "-c", STEP.format(ahead=True))
    ahead = kernels(tmp_path)
    assert len(ahead) >= 16
    run_python(tmp_path, "-c", STEP.format(ahead=False))
    assert kernels(tmp_path) == ahead
