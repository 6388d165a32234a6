"""The pixels of the image (ConvNeXt V2, arXiv 2301.00808, section 3.1)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fcmae.kernels.norm import HAS_TRITON
from fcmae.masks.patches import patchify, unpatchify
from fcmae.targets.base import Seen
from fcmae.targets.losses import OF_NUMBERS, get_loss

NORMS = ("patch", "channel", "none")
EPS = 1e-6


def check_norm(norm: str) -> None:
    """Raises ValueError unless it is one of :data:`NORMS`."""
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}; got {norm!r}")


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
        check_norm(norm)
        self.patch_size = patch_size
        self.dim = patch_size**2 * in_chans
        self.norm = norm
        self.loss_name = loss
        self._error = get_loss(loss, OF_NUMBERS)

    def __call__(self, seen: Seen) -> tuple[Tensor, Tensor | None]:
        target, valid = patchify(seen.imgs, self.patch_size).float(), None
        if seen.valid is not None:
            valid = patchify(seen.valid.expand_as(seen.imgs), self.patch_size)
        return normalized(target, valid, self.norm, self.patch_size**2), valid

    def loss(self, pred: Tensor, target: Tensor, mask: Tensor, valid: Tensor | None) -> Tensor:
        return self._error(pred, target, valid)

    @property
    def is_one_operation(self) -> bool:
        """Whether a kernel may compute target and error. A class derived from this one may change them."""
        plain = type(self) is Pixels and self.norm == "patch" and self.loss_name == "mse"
        return HAS_TRITON and plain and self.dim > 1

    def has_errors(self, seen: Seen, pred: Tensor) -> bool:
        """Whether :meth:`errors` takes these: predictions in 16 bits on a GPU, of whole images without a gradient."""
        return (
            self.is_one_operation
            and seen.valid is None
            and type(pred) is Tensor  # not one without values
            and pred.is_cuda
            and pred.element_size() == 2
            and not seen.imgs.requires_grad
            and seen.imgs.dtype != torch.float64
        )

    def errors(self, seen: Seen, pred: Tensor, mask: Tensor) -> Tensor:
        """The error of each masked patch, float32 ``[N, L]``, without a target in memory; 0 for visible ones."""
        from fcmae.kernels.patch_error_triton import patch_errors  # needs Triton

        return patch_errors(pred, seen.imgs, mask, self.patch_size, EPS)

    def to_pixels(self, pred: Tensor, imgs: Tensor) -> Tensor:
        """A normalised prediction has no brightness and contrast; each patch takes the image's."""
        if self.norm != "none":
            mean, std = statistics(patchify(imgs, self.patch_size).float(), None, self.norm, self.patch_size**2)
            pred = pred * std + mean
        return unpatchify(pred, self.patch_size, *imgs.shape[-2:])


def normalized(patches: Tensor, valid: Tensor | None, norm: str, pixels: int) -> Tensor:
    """Patches ``[N, L, P]``, float32, normalised over what ``norm`` says, one of :data:`NORMS`.

    Args:
        valid: bool ``[N, L, P]``: which values count; the others become finite numbers without a meaning. None = all.
        pixels: of each of the P / pixels channels.
    """
    if norm == "none":
        return patches
    size = patches.shape[-1]
    if norm == "patch" and valid is None:
        # Layer normalisation is one pass over memory, where torch.var_mean alone takes ten times as long on a CPU.
        # It divides by the biased variance, which is the unbiased one times (P - 1) / P.
        return F.layer_norm(patches, (size,), eps=EPS * (size - 1) / size) * ((size - 1) / size) ** 0.5
    mean, std = statistics(patches, valid, norm, pixels)
    return (patches - mean) / std


def statistics(patches: Tensor, valid: Tensor | None, norm: str, pixels: int) -> tuple[Tensor, Tensor]:
    """Mean and deviation of every patch ``[N, L, 1]``, or of every channel of it, repeated: ``[N, L, P]``."""
    whole = patches
    if norm == "channel":
        patches = patches.unflatten(-1, (pixels, -1))
        valid = None if valid is None else valid.unflatten(-1, (pixels, -1))
    if valid is None:
        var, mean = torch.var_mean(patches, dim=2, keepdim=True)
    else:
        count = valid.sum(dim=2, keepdim=True)
        mean = torch.where(valid, patches, 0.0).sum(dim=2, keepdim=True) / count.clamp(min=1)
        squares = torch.where(valid, patches - mean, 0.0).square().sum(dim=2, keepdim=True)
        var = squares / (count - 1).clamp(min=1)
    std = (var + EPS).sqrt()
    if norm == "channel":
        return mean.expand_as(patches).reshape_as(whole), std.expand_as(patches).reshape_as(whole)
    return mean, std
