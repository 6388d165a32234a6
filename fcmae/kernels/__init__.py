"""The one layer of a ConvNeXt that looks across patches, as a torch operation on packed patches."""

from fcmae.kernels.depthwise import Neighbors, neighbors, packed_depthwise

__all__ = ["Neighbors", "neighbors", "packed_depthwise"]
