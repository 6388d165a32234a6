"""The pixels of the image (ConvNeXt V2, arXiv 2301.00808, section 3.1)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fcmae.masks.patches import patchify, unpatchify
from fcmae.targets.base import Seen
from fcmae.targets.losses import OF_NUMBERS, get_loss

NORMS = ("patch", "channel", "none")
EPS = 1e-6


class Pixels:
    """Predicts the P = patch_size**2 * in_chans pixels of a patch.

    Args:
        norm: what the pixels are normalised over: ``patch``, all P values (MAE, arXiv 2111.06377, section 3; unbiased
            variance and eps inside the square root, as the official code); ``channel``, the pixels of each channel of
            the patch; ``none``.
        loss: ``mse``, ``l1`` or ``smooth_l1`` (:mod:`fcmae.targets.losses`).

    Raises ValueError for another norm or loss.
    """

    def __init__(self, patch_size: int, in_chans: int, norm: str = "patch", loss: str = "mse") -> None:
        if norm not in NORMS:
            raise ValueError(f"norm must be one of {', '.join(NORMS)}; got {norm!r}")
        self.patch_size = patch_size
        self.dim = patch_size**2 * in_chans
        self.norm = norm
        self.loss_name = loss
        self._error = get_loss(loss, OF_NUMBERS)

    def __call__(self, seen: Seen) -> tuple[Tensor, None]:
        imgs = seen.imgs
        target = patchify(imgs, self.patch_size).float()
        if self.norm == "patch":
            # Layer normalisation is one pass over memory, where torch.var_mean alone takes ten times as long on a CPU.
            # It divides by the biased variance, which is the unbiased one times (P - 1) / P.
            size = self.dim
            target = F.layer_norm(target, (size,), eps=EPS * (size - 1) / size) * ((size - 1) / size) ** 0.5
        elif self.norm == "channel":
            mean, std = self._statistics(imgs)
            target = (target - mean) / std
        return target, None

    def loss(self, pred: Tensor, target: Tensor, mask: Tensor, valid: Tensor | None) -> Tensor:
        return self._error(pred, target, valid)

    def to_pixels(self, pred: Tensor, imgs: Tensor) -> Tensor:
        """A normalised prediction has no brightness and contrast; each patch takes those of the image."""
        if self.norm != "none":
            mean, std = self._statistics(imgs)
            pred = pred * std + mean
        return unpatchify(pred, self.patch_size, *imgs.shape[-2:])

    def _statistics(self, imgs: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of every patch ``[N, L, 1]``, or of every channel of it, repeated: ``[N, L, P]``."""
        patches = patchify(imgs, self.patch_size).float()
        if self.norm == "channel":
            patches = patches.unflatten(-1, (self.patch_size**2, -1))
        var, mean = torch.var_mean(patches, dim=2, keepdim=True)
        std = (var + EPS).sqrt()
        if self.norm == "channel":
            return mean.expand_as(patches).flatten(2), std.expand_as(patches).flatten(2)
        return mean, std
