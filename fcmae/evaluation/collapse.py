"""Signs of feature collapse: images whose features are alike, and channels that answer to no image.

ConvNeXt V2 (arXiv 2301.00808, section 4) saw dead channels in the widened layer of each block when a ConvNeXt V1 is
pretrained by masking, which GRN is there to prevent.
"""

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from timm.layers.grn import GlobalResponseNorm
from torch import Tensor, nn

from fcmae.distributed import World

DEAD = 0.01
"""A channel is dead if its norm over the sites is below this share of the mean over channels, for every image."""


def effective_rank(features: Tensor) -> float:
    """How many directions the features ``[n, D]`` fill evenly: from 1 to ``min(n, D)``.

    The exponential of the entropy of the normalised singular values (Roy and Vetterli 2007, "The effective rank: a
    measure of effective dimensionality", section 2). The mean is not taken off, so equal features have rank 1.
    """
    values = torch.linalg.svdvals(features.double())
    shares = values / values.sum().clamp(min=torch.finfo(values.dtype).tiny)
    return (-torch.xlogy(shares, shares).sum()).exp().item()


def mean_cosine(features: Tensor) -> float:
    """The mean cosine of the angle between two different rows of ``[n, D]``; n >= 2."""
    units = F.normalize(features.double(), dim=1)
    count = len(units)
    return ((units.sum(0).square().sum() - units.square().sum()) / (count * (count - 1))).item()


class Channels:
    """The largest norm of each GRN channel over images, relative to the mean over the channels of its layer."""

    def __init__(self, backbone: nn.Module, device: torch.device) -> None:
        self.layers = [module for module in backbone.modules() if isinstance(module, GlobalResponseNorm)]
        self.largest = [torch.zeros(layer.weight.shape, device=device) for layer in self.layers]

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """In this block the norms are taken of what timm's layers see."""
        with contextlib.ExitStack() as stack:
            for layer, largest in zip(self.layers, self.largest, strict=True):

                def see(layer: GlobalResponseNorm, inputs: tuple[Tensor], largest: Tensor = largest) -> None:
                    sites = tuple(dim for dim in (1, 2, 3) if dim != layer.channel_dim % 4)
                    norm = torch.linalg.vector_norm(inputs[0], dim=sites, dtype=torch.float32)
                    torch.maximum(largest, (norm / (norm.mean(1, keepdim=True) + layer.eps)).amax(0), out=largest)

                stack.callback(layer.register_forward_pre_hook(see).remove)
            yield

    def dead(self, world: World) -> float | None:
        """The share of the channels of all layers whose norm is below :data:`DEAD` for all images of all ranks.

        None without GRN (V1).
        """
        if not self.layers:
            return None
        return (world.max(torch.cat(self.largest)) < DEAD).float().mean().item()
