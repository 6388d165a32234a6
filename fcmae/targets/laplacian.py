"""The Laplacian of the image, which keeps edges and drops brightness and slow changes of it."""

import torch.nn.functional as F
from torch import Tensor

from fcmae.targets.base import Seen
from fcmae.targets.hog import have_neighbours
from fcmae.targets.pixels import Pixels


class Laplacian(Pixels):
    """Predicts the Laplacian of each channel at the pixels of a patch.

    Takes the arguments of :class:`Pixels`. Pictures show it as an image whose flat areas have the mean colour.
    """

    def __call__(self, seen: Seen) -> tuple[Tensor, Tensor | None]:
        """Valid are the pixels that have a value, as do their neighbours."""
        valid = None if seen.valid is None else seen.valid & have_neighbours(seen.valid)
        return super().__call__(seen._replace(imgs=laplacian(seen.imgs), valid=valid))

    def to_pixels(self, pred: Tensor, imgs: Tensor) -> Tensor:
        return super().to_pixels(pred, laplacian(imgs))


def laplacian(imgs: Tensor) -> Tensor:
    """The sum of the four neighbours of a pixel less 4 times the pixel, ``[N, C, H, W]`` float32.

    Outside of the image lie the pixels at its border again.
    """
    x = F.pad(imgs.float(), (1, 1, 1, 1), mode="replicate")
    rows, cols = slice(1, -1), slice(1, -1)
    return x[..., :-2, cols] + x[..., 2:, cols] + x[..., rows, :-2] + x[..., rows, 2:] - 4 * x[..., rows, cols]
