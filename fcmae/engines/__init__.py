"""Engines: ways of running a backbone's weights over the visible patches of an image. They own no parameters."""

import contextlib
from collections.abc import Collection
from typing import Protocol

from timm.models.convnext import ConvNeXt
from torch import Tensor

from fcmae.engines.compiled import region
from fcmae.engines.convnext import check_backbone, check_no_drop_path, total_stride
from fcmae.engines.masked import masked
from fcmae.engines.minkowski import load as load_minkowski
from fcmae.engines.minkowski import minkowski
from fcmae.engines.packed import packed

GRN_SCOPES = ("image", "batch")


class Engine(Protocol):
    """Runs a backbone over visible patches; every engine computes the same function.

    Args:
        backbone: a timm ConvNeXt that passed :func:`check_backbone`; its weights are used in place. In training it must
            not drop paths (ValueError). What its ``set_grad_checkpointing`` says is added to ``recompute_stages``.
        imgs: ``[N, C, H, W]``, sides multiples of ``patch_size``.
        mask: bool ``[N, L]``, True = masked, ``keep`` visible patches in every row.
        keep: V, visible patches per image.
        patch_size: pixels per side of a mask patch, a multiple of the backbone's total stride.
        grn_scope: GRN's norm over the visible sites of an ``image`` or of the whole ``batch`` (the official code).
        compiled: by torch.compile, region by region (:mod:`fcmae.engines.compiled`), but for what is an operation of
            our own anyway (:mod:`fcmae.engines.fused`).
        recompute_stages: stages, counted from 1, whose blocks keep no activations and run again in the backward pass.
        all_stages: return the features of every stage, not only of the last one.

    Returns:
        ``[N, V, s, s, D]`` per stage, s = patch_size / stride of the stage's sites; the last one after ``norm_pre``.
    """

    def __call__(
        self,
        backbone: ConvNeXt,
        imgs: Tensor,
        mask: Tensor,
        *,
        keep: int,
        patch_size: int,
        grn_scope: str = "image",
        compiled: bool = False,
        recompute_stages: Collection[int] = (),
        all_stages: bool = False,
    ) -> list[Tensor]: ...


ENGINES: dict[str, Engine] = {"packed": packed, "masked": masked, "minkowski": minkowski}

HOST_BOUND = ("minkowski",)
"""Engines whose work depends on values the host reads, so that no CUDA graph can record it."""


def get_engine(name: str, device: str = "cpu") -> Engine:
    """The engine of that name.

    Raises ValueError for an unknown name; ImportError, saying how to install it, for an engine that does not run here
    on that type of device.
    """
    if name not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}; got {name!r}")
    if name == "minkowski":
        load_minkowski(device)
    return ENGINES[name]


def available_engines(device: str = "cpu") -> dict[str, Engine]:
    """The engines that run here on that type of device, in the order of :data:`ENGINES`."""
    available = {}
    for name in ENGINES:
        with contextlib.suppress(ImportError):
            available[name] = get_engine(name, device)
    return available


__all__ = [
    "ENGINES",
    "GRN_SCOPES",
    "HOST_BOUND",
    "Engine",
    "available_engines",
    "check_backbone",
    "check_no_drop_path",
    "get_engine",
    "region",
    "total_stride",
]
