"""Labels of whole images, such as classes or numbers that come with the samples (MMEarth, arXiv 2405.02771)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fcmae.masks.patches import grid_size
from fcmae.targets.base import Seen, patches_with
from fcmae.targets.losses import OF_NUMBERS, get_loss

OF_CLASSES = ("ce", "bce")


class Labels:
    """Predicts the label of an image from the mean of the decoder's features over its patches, visible ones too.

    The linear head predicts at every patch, and the mean of its predictions is what it predicts from the mean of the
    features. Patches without a pixel that has a value are left out. Each masked patch has the error of the image, so
    the part of the loss is the mean over the images. An image without a label has the error 0.

    Args:
        loss: ``ce``, one class per image; ``bce``, one class per image or several labels of 0 to 1; ``mse``, ``l1`` or
            ``smooth_l1``, one or several numbers (:mod:`fcmae.targets.losses`).
        dim, mean, std: the number of classes or numbers, and by which mean and std each number is normalised; None =
            not. A run finds them out from its images and records them.

    Raises ValueError for another loss, or without ``dim``.
    """

    needs = ("label",)

    def __init__(
        self,
        patch_size: int,
        in_chans: int,
        loss: str = "ce",
        dim: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        self._error = get_loss(loss, (*OF_CLASSES, *OF_NUMBERS))
        if dim is None:
            raise ValueError("dim, the number of classes or numbers, is not known before the images are")
        self.patch_size, self.dim, self.loss_name = patch_size, dim, loss
        self.mean, self.std = mean, std

    def __call__(self, seen: Seen) -> tuple[Tensor, Tensor]:
        assert seen.label is not None
        wanted, valid = self._values(seen.label)
        rows, cols = grid_size(seen.imgs.shape[-2], seen.imgs.shape[-1], self.patch_size)
        of_patches = (-1, rows * cols, -1)
        wanted, valid = wanted.unsqueeze(1).expand(of_patches), valid.unsqueeze(1).expand(of_patches)
        if seen.valid is not None:
            valid = valid & patches_with(seen.valid, rows * cols).unsqueeze(-1)
        return wanted, valid

    def _values(self, label: Tensor) -> tuple[Tensor, Tensor]:
        """What to predict for the images, float32 ``[N, dim]``, and what of it is given, bool ``[N, dim]``."""
        if self.loss_name in OF_CLASSES and label.ndim == 1 and not label.is_floating_point():
            classes = torch.arange(self.dim, device=label.device)
            return (label[:, None] == classes).float(), (label >= 0)[:, None].expand(-1, self.dim)
        label = label.view(len(label), -1)
        valid = ~label.isnan() if label.is_floating_point() else label != -1
        if self.loss_name in OF_CLASSES:
            return label.float(), valid
        columns = list(label.float().unbind(dim=1))
        if self.mean is not None and self.std is not None:
            # Python numbers: a tensor of them would be copied to the device at every call.
            columns = [(c - mean) / std for c, mean, std in zip(columns, self.mean, self.std, strict=True)]
        return torch.stack(columns, dim=1), valid

    def loss(self, pred: Tensor, target: Tensor, mask: Tensor, valid: Tensor | None) -> Tensor:
        assert valid is not None
        counted = valid.any(dim=2, keepdim=True)
        count = counted.sum(dim=1, keepdim=True).clamp(min=1)
        of_image = torch.where(counted, pred, 0.0).sum(dim=1, keepdim=True) / count
        errors = self._error(of_image, target[:, :1], valid.any(dim=1, keepdim=True))
        return errors.expand(-1, pred.shape[1])

    def to_pixels(self, pred: Tensor, imgs: Tensor) -> None:
        """A label cannot be drawn."""
