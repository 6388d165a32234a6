"""Bit-identical results of the same run on a GPU, too (``trainer.deterministic``)."""

import os

import torch


def only_deterministic_algorithms() -> None:
    """Settings of torch, cuBLAS, cuDNN and torch.compile for the rest of the process. Call before CUDA is initialised.

    What has no deterministic algorithm raises a RuntimeError that names it.
    """
    # cuBLAS may otherwise pick another workspace, and with it another order of summation, stream by stream.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # Filling memory that is overwritten at once costs time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False  # it may choose another algorithm each time
    from torch._inductor import config as inductor

    if hasattr(inductor, "deterministic"):
        inductor.deterministic = True  # no autotuning of the block sizes of reductions
