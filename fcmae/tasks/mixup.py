"""Mixup and CutMix whose draws belong to a pair of samples of the global batch, not to a micro-batch."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


class Mixup:
    """Mixup (arXiv 1710.09412) and CutMix (arXiv 1905.04899) of neighbours: samples 2i and 2i + 1 of a global batch.

    Each pair is mixed as timm's ``Mixup(mode="pair")`` does it: by one of the two at equal odds if both are wanted.

    Args:
        mixup, cutmix: alpha of the Beta(alpha, alpha) that the share of a sample is drawn from; 0 = never.
        num_classes: K.
        size: height and width of an image.
    """

    def __init__(self, mixup: float, cutmix: float, num_classes: int, size: tuple[int, int]) -> None:
        self.mixup = mixup
        self.cutmix = cutmix
        self.num_classes = num_classes
        self.size = size

    def draw(self, rng: np.random.Generator, pairs: int) -> Tensor:
        """Share of the sample itself, then top, bottom, left and right of what is cut: float32 ``[pairs, 5]``."""
        cut = rng.random(pairs) < (0.5 if self.mixup and self.cutmix else float(self.cutmix > 0))
        mixed, left = (rng.beta(alpha or 1, alpha or 1, pairs) for alpha in (self.mixup, self.cutmix))
        edges = []
        for side in self.size:
            length = (side * np.sqrt(1 - left)).astype(int)
            middle = rng.integers(side, size=pairs)
            edges += [(middle - length // 2).clip(0, side), (middle + (length + 1) // 2).clip(0, side)]
        top, bottom, first, last = (np.where(cut, edge, 0) for edge in edges)
        share = np.where(cut, 1 - (bottom - top) * (last - first) / (self.size[0] * self.size[1]), mixed)
        return torch.from_numpy(np.stack([share, top, bottom, first, last], axis=1)).float()

    def __call__(self, imgs: Tensor, labels: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
        """Mixes a batch.

        Args:
            imgs: ``[N, C, H, W]``, N even.
            labels: int64 ``[N]``.
            drawn: ``[N, 5]``, rows of :meth:`draw`, the same for both of a pair.

        Returns:
            The images, and targets ``[N, K]``.
        """
        share, top, bottom, left, right = drawn.to(imgs.dtype).view(-1, 5, 1, 1, 1).unbind(1)
        rows = torch.arange(imgs.shape[-2], device=imgs.device)[:, None]
        cols = torch.arange(imgs.shape[-1], device=imgs.device)
        inside = (rows >= top) & (rows < bottom) & (cols >= left) & (cols < right)
        own = torch.where(bottom > top, ~inside, share)  # [N, 1, H, W]: CutMix leaves all of a pixel or nothing
        targets = F.one_hot(labels, self.num_classes).to(imgs.dtype)
        share = share.view(-1, 1)
        return imgs * own + _other(imgs) * (1 - own), targets * share + _other(targets) * (1 - share)


def _other(samples: Tensor) -> Tensor:
    """The samples of pairs in the other order."""
    return samples.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
