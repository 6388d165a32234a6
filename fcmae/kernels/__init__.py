"""The one layer of a ConvNeXt that looks across patches, as a torch operation on packed patches."""

from fcmae.kernels.depthwise import Neighbors, gather_patches, neighbors, packed_depthwise, scatter_patches

__all__ = ["Neighbors", "gather_patches", "neighbors", "packed_depthwise", "scatter_patches"]
