"""The reconstruction target and loss of FCMAE as pure tensor functions (ConvNeXt V2, arXiv 2301.00808, section 3.1)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fcmae.masks.patches import patchify


def patch_target(imgs: Tensor, patch_size: int, norm_pix: bool = True, eps: float = 1e-6) -> Tensor:
    """The pixels to predict, float32 ``[N, L, P]``.

    With ``norm_pix`` every patch is normalised over its P = patch_size**2 * C values (MAE, arXiv 2111.06377,
    section 3; unbiased variance and eps inside the square root, as the official code).
    """
    target = patchify(imgs, patch_size).float()
    if norm_pix:
        # Layer normalisation is one pass over memory, where torch.var_mean alone takes ten times as long on a CPU. It
        # divides by the biased variance, which is the unbiased one times (P - 1) / P.
        size = target.shape[-1]
        target = F.layer_norm(target, (size,), eps=eps * (size - 1) / size) * ((size - 1) / size) ** 0.5
    return target


def masked_pixel_loss(pred: Tensor, target: Tensor, mask: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean squared error over a masked patch's pixels, then over the masked patches of the batch.

    Args:
        pred, target: ``[N, L, P]``.
        mask: bool ``[N, L]``, True = masked.
        weight: ``[N]``, a factor on the error of each image.

    Returns:
        A float32 scalar; 0 if nothing is masked.
    """
    per_patch = (pred.float() - target.float()).square().mean(dim=-1)
    # Selecting instead of multiplying keeps a non-finite prediction of a visible patch out of the loss.
    errors = torch.where(mask, per_patch, 0.0)
    if weight is not None:
        errors = errors * weight[:, None]
    return errors.sum() / mask.sum().clamp(min=1)
