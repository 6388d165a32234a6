"""Torch operations on packed patches: the one layer that looks across patches, and the one that looks at all sites."""

from fcmae.kernels.depthwise import Neighbors, gather_patches, neighbors, packed_depthwise, scatter_patches
from fcmae.kernels.grn import gelu_grn, grn

__all__ = ["Neighbors", "gather_patches", "gelu_grn", "grn", "neighbors", "packed_depthwise", "scatter_patches"]
