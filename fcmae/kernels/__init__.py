"""Torch operations on packed patches: linear layers, what looks across patches, and what looks at all sites."""

from fcmae.kernels.depthwise import (
    Neighbors,
    gather_patches,
    neighbors,
    packed_depthwise,
    scatter_patches,
)
from fcmae.kernels.grn import gelu_grn, grn
from fcmae.kernels.linear import linear, linear_mixed
from fcmae.kernels.norm import layer_norm

__all__ = [
    "Neighbors",
    "gather_patches",
    "gelu_grn",
    "grn",
    "layer_norm",
    "linear",
    "linear_mixed",
    "neighbors",
    "packed_depthwise",
    "scatter_patches",
]
