"""Channels of the images that the encoder does not see."""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fcmae.masks.patches import patchify, unpatchify
from fcmae.targets.base import Seen
from fcmae.targets.losses import bce, ce, get_loss
from fcmae.targets.pixels import check_norm, normalized

NAMES = ("mse", "l1", "smooth_l1", "bce", "ce")


class Channels:
    """Predicts channels of ``data.channels.target`` or ``data.channels.classes``: numbers, or a class per pixel.

    Args:
        channels: which ones, as positions in ``target`` followed by ``classes``.
        loss: ``mse``, ``l1`` or ``smooth_l1`` for numbers; ``bce`` for numbers from 0 to 1; ``ce`` for one channel of
            class numbers, of which there are ``classes``; another number has no class.
        norm: what numbers are normalised over, as :class:`fcmae.targets.Pixels` says; ``none`` with bce and ce.
        cell: pixels per side of a square whose mean is predicted, or whose shares of each class; 1 = every pixel.

    Raises ValueError for arguments that do not fit.
    """

    needs = ("channels",)

    def __init__(
        self,
        patch_size: int,
        in_chans: int,
        channels: int | Sequence[int] = 0,
        loss: str = "mse",
        norm: str = "none",
        classes: int | None = None,
        cell: int = 1,
    ) -> None:
        self.channels = [channels] if isinstance(channels, int) else list(channels)
        self.error = get_loss(loss, NAMES)
        self.norm, self.classes, self.cell = norm, classes, cell
        if not self.channels or any(type(channel) is not int or channel < 0 for channel in self.channels):
            raise ValueError(f"channels must be positions in data.channels, 0 or more; got {channels!r}")
        if not (type(classes) is int and classes > 1 if loss == "ce" else classes is None):
            raise ValueError(f"classes must be a number from 2 on with loss=ce, and null otherwise; got {classes!r}")
        if loss == "ce" and len(self.channels) > 1:
            raise ValueError(f"channels must be one with loss=ce; got {self.channels}")
        if loss in ("bce", "ce") and norm != "none":
            raise ValueError(f"norm must be none with loss={loss}; got {norm!r}")
        if type(cell) is not int or cell < 1 or patch_size % cell:
            raise ValueError(f"cell must divide the patch of {patch_size} px; got {cell!r}")
        if classes is not None:
            self.error = partial(ce, classes=classes)
        self.side = patch_size // cell
        """Cells per side of a patch."""
        self.per_pixel = classes or len(self.channels)
        self.dim = self.side**2 * self.per_pixel
        check_norm(norm)

    def __call__(self, seen: Seen) -> tuple[Tensor, Tensor | None]:
        assert seen.channels is not None
        values = self._mine(seen.channels).float()
        valid = None if seen.channels_valid is None else self._mine(seen.channels_valid)
        if self.classes is not None:
            numbers = torch.arange(self.classes, device=values.device).view(-1, 1, 1)
            values, known = (values.round() == numbers).float(), (values.round() >= 0) & (values.round() < self.classes)
            valid = (known if valid is None else known & valid).expand_as(values)
        if self.cell > 1:
            values, valid = self._cells(values, valid)
        wanted = patchify(values, self.side)
        valid = None if valid is None else patchify(valid, self.side)
        return normalized(wanted, valid, self.norm, self.side**2), valid

    def _mine(self, channels: Tensor) -> Tensor:
        # An index from the host would be copied to the device in every step.
        return torch.cat([channels[:, channel : channel + 1] for channel in self.channels], dim=1)

    def _cells(self, values: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The mean over the valid pixels of each cell, and whether there is one."""
        if valid is None:
            return F.avg_pool2d(values, self.cell), None
        share = F.avg_pool2d(valid.float(), self.cell)
        total = F.avg_pool2d(torch.where(valid, values, 0.0), self.cell)
        return total / torch.where(share > 0, share, 1.0), share > 0

    def loss(self, pred: Tensor, target: Tensor, mask: Tensor, valid: Tensor | None) -> Tensor:
        return self.error(pred, target, valid)

    def to_pixels(self, pred: Tensor, imgs: Tensor) -> Tensor | None:
        """The channels ``[N, K, H, W]``, normalised; of classes the likeliest, from 0 to 1. None with bce."""
        if self.error is bce:
            return None
        maps = unpatchify(pred, self.side, *(side // self.cell for side in imgs.shape[-2:]))
        if self.classes is not None:
            maps = maps.argmax(dim=1, keepdim=True).float() / (self.classes - 1)
        return maps.repeat_interleave(self.cell, dim=2).repeat_interleave(self.cell, dim=3)
