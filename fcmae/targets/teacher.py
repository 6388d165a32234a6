"""Features of a frozen network (deep features in MaskFeat, arXiv 2112.09133, section 3.2)."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fcmae.targets.base import Seen
from fcmae.targets.losses import get_loss

LOSSES = ("cosine", "smooth_l1", "mse")


class Teacher:
    """Predicts what a frozen network computes at each patch, normalised to mean 0 and variance 1 over its D channels
    (layer normalisation without parameters; data2vec, arXiv 2202.03555, section 3.3).

    :func:`fcmae.tasks.teachers.load_teachers` reads the network, which is no part of the model: not among its
    parameters, its weights in checkpoints, or their average.

    Args:
        name: timm's name of the network. ``checkpoint`` is a file of its weights; without it timm downloads them.
        run: instead of ``name``: a run or whatever else ``init_from`` takes; its backbone is the teacher.
        channels: the channels of the images that the teacher gets, such as [3, 2, 1]; None = all.
        loss: ``cosine``, ``smooth_l1`` or ``mse`` (:mod:`fcmae.targets.losses`).
        dim, sha256: D and the checksum of the weights, which a run finds out and records.

    Raises ValueError for another loss, or without ``dim``.
    """

    compiles = False
    """Whether ``torch.compile`` may compile it; the whole network would take minutes."""

    def __init__(
        self,
        patch_size: int,
        in_chans: int,
        name: str | None = None,
        checkpoint: str | None = None,
        run: str | None = None,
        channels: Sequence[int] | None = None,
        loss: str = "cosine",
        dim: int | None = None,
        sha256: str | None = None,
    ) -> None:
        self._error = get_loss(loss, LOSSES)
        if dim is None:
            raise ValueError("dim is not known before the teacher is read, as fcmae pretrain does")
        self.patch_size, self.dim, self.sha256 = patch_size, dim, sha256
        self.network: nn.Module | None = None
        """Normalised images ``[N, C, H, W]`` to feature maps ``[N, D, h, w]``, in evaluation mode."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Teacher":
        return copy.copy(self)  # a copy of the model for an average shares the network

    @torch.no_grad()
    def __call__(self, seen: Seen) -> tuple[Tensor, None]:
        """Raises ValueError without a network, as of a model that was loaded from a checkpoint."""
        if self.network is None:
            raise ValueError("a Teacher has no network here; fcmae pretrain reads it")
        imgs = seen.imgs.float()
        if next(self.network.parameters()).device != imgs.device:
            self.network.to(imgs.device).to(memory_format=torch.channels_last)
        maps = self.network(imgs.contiguous(memory_format=torch.channels_last)).float()
        grid = (imgs.shape[-2] // self.patch_size, imgs.shape[-1] // self.patch_size)
        if maps.shape[-2] >= grid[0] and maps.shape[-1] >= grid[1]:
            maps = F.adaptive_avg_pool2d(maps, grid)
        else:
            maps = F.interpolate(maps, grid, mode="bilinear")
        return F.layer_norm(maps.flatten(2).transpose(1, 2), (self.dim,)), None

    def loss(self, pred: Tensor, target: Tensor, mask: Tensor, valid: Tensor | None) -> Tensor:
        return self._error(pred, target, valid)

    def to_pixels(self, pred: Tensor, imgs: Tensor) -> None:
        """Features cannot be drawn."""
