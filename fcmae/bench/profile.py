"""Where the GPU's time of a training step goes, by kind of kernel."""

import re
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

KINDS = {
    "depthwise": r"^((forward|weight_grad|taps)_kernel|packed_\w+)$",
    "GELU + GRN": r"^(_forward|_backward|forward_held|backward_held|gelu_grn_\w+)$",
    "scaling to float8": r"^(largest|scale)_kernel$",
    "copies and fills": r"^Mem(set|cpy)|CopyFunctor",
    "optimizer": r"multi_tensor_apply|Fused(Adam|Optimizer)",
    "dense convolution": r"cudnn|conv|[dw]grad|fprop|nchwToNhwc",
    "matrix products": r"nvjet|gemm|cutlass|cublas",
}
"""Kinds of kernels by their names, the first that matches; whatever is left is element-wise work, norms and sums."""
REST = "element-wise, norms, sums"


def profile_step(step: Callable[[], None], steps: int = 3) -> dict[str, float]:
    """Milliseconds per step of every kind of kernel, the longest first. ``step`` launches its kernels one by one.

    Kernels that replays of a CUDA graph launch are not told apart, so the step must not be one.
    """
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    total = dict.fromkeys([*KINDS, REST], 0.0)
    for event in profiler.key_averages():
        total[_kind(event.key)] += event.self_device_time_total / 1e3 / steps
    return dict(sorted(total.items(), key=lambda item: -item[1]))


def _kind(kernel: str) -> str:
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, kernel)), REST)
