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

if {ahead}:
    start = precompile.start
    precompile.start = lambda shapes: (start(shapes), precompile.wait(), exit())
model = FCMAE("convnextv2_atto", depths=(1, 1, 1, 1), decoder_embed_dim=128).cuda()
model.compile()
with torch.autocast("cuda", torch.bfloat16):
    loss = model(torch.randn(4, 3, 224, 224, device="cuda")).loss
loss.backward()
"""
"""A step of pretraining; with ``ahead`` no more than its kernels."""


def kernels(cache: Path) -> set[str]:
    """Our kernels in a cache of Triton."""
    ours = ("forward_kernel", "weight_grad_kernel", "_forward", "_backward", "add_up_kernel", "forward_held",
            "backward_held", "layer_norm_kernel", "layer_norm_backward_kernel", "residual_kernel",
            "add_and_sum_kernel", "sum_rows_kernel", "patch_rows_kernel", "patch_error_kernel",
            "patch_error_grad_kernel")  # fmt: skip
    return {str(file) for file in cache.rglob("*.cubin") if file.stem in ours}


def test_nothing_is_compiled_again(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    root = str(Path(fcmae.__file__).parents[1])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]))
    run_python(tmp_path, "-c", STEP.format(ahead=True))
    ahead = kernels(tmp_path)
    assert len(ahead) >= 24
    run_python(tmp_path, "-c", STEP.format(ahead=False))
    assert kernels(tmp_path) == ahead
