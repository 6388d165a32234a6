"""JPEGs that the training process decodes on the GPU, by nvJPEG through torchvision (``data.decode_on=gpu``).

Workers read the files and draw the boxes; the bytes become pixels when the batch is moved to the device. nvJPEG's
pixels differ a little from libjpeg's, so the key belongs to the recipe.
"""

import sys
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from fcmae.data.pixels import jpeg
from fcmae.data.pixels.bands import segments
from fcmae.data.pixels.crops import Box, cut
from fcmae.data.pixels.decode import Encoded, LazyImage, decode

CHANNELS = 3
CHECKED = sys.maxsize
"""Pixels that a file may have: the worker that read it knows loader.max_pixels."""


class Undecoded(NamedTuple):
    """A colour JPEG, the boxes of its samples, and the height and width of a sample."""

    image: Encoded
    boxes: list[Box]
    size: tuple[int, int]


class PackedImages(NamedTuple):
    """The images of a batch on their way to the device, where :meth:`to` decodes them."""

    data: Tensor
    """The bytes of all undecoded files, uint8."""
    lengths: list[int]
    """Bytes of each file."""
    names: list[str]
    """The path of each file, for messages."""
    boxes: Tensor
    """int64 ``[files, k, 7]``: :class:`~fcmae.data.pixels.crops.Box`."""
    decoded: Tensor
    """Crops ``[n, C, H, W]`` of other images, which the workers decoded."""
    order: Tensor
    """int64 ``[N]``: the index of each sample in the crops of the files followed by ``decoded``."""
    size: tuple[int, int]

    def to(self, device: torch.device, non_blocking: bool = False) -> Tensor:
        """uint8 ``[N, C, H, W]`` on the device. Raises ImageError naming the file."""
        files = decode_all(self.data.split(self.lengths), self.names, device)
        crops = [
            cut(pixels, Box(*box), self.size)
            for pixels, boxes in zip(files, self.boxes.tolist(), strict=True)
            for box in boxes
        ]
        together = torch.cat([torch.stack(crops), self.decoded.to(device, non_blocking=non_blocking)])
        return together[self.order.to(device, non_blocking=non_blocking)]


def is_for_device(image: Encoded, opened: LazyImage) -> bool:
    """Whether a file is an ordinary, upright JPEG."""
    return opened.reducible and jpeg.orientation(image.data, segments(image.data)) == 1


def pack(images: Sequence[Undecoded | list[Tensor]]) -> PackedImages:
    """A batch of files, at least one, and of lists of decoded crops."""
    files = [image for image in images if isinstance(image, Undecoded)]
    others = [crop for image in images if not isinstance(image, Undecoded) for crop in image]
    crops = len(files[0].boxes)
    positions = {True: iter(range(len(files))), False: iter(range(len(files), len(images)))}
    first = torch.tensor([next(positions[isinstance(image, Undecoded)]) for image in images]) * crops
    size = files[0].size
    return PackedImages(
        data=torch.frombuffer(bytearray().join(file.image.data for file in files), dtype=torch.uint8),
        lengths=[len(file.image.data) for file in files],
        names=[file.image.name for file in files],
        boxes=torch.tensor([[box[:7] for box in file.boxes] for file in files]),
        decoded=torch.stack(others) if others else torch.empty(0, CHANNELS, *size, dtype=torch.uint8),
        order=(first[:, None] + torch.arange(crops)).flatten(),
        size=size,
    )


def decode_all(files: Sequence[Tensor], names: Sequence[str], device: torch.device) -> list[Tensor]:
    """Each file as uint8 ``[3, H, W]`` on the device. Files that nvJPEG refuses are decoded on the CPU.

    Raises ImageError naming the file.
    """
    if device.type == "cuda":
        try:
            return _decode_on_gpu(list(files), device)
        except RuntimeError:
            if len(files) > 1:  # one of them is refused: try each alone
                pairs = zip(files, names, strict=True)
                return [pixels for file, name in pairs for pixels in decode_all([file], [name], device)]
    pairs = zip(files, names, strict=True)
    return [
        decode(Encoded(file.numpy().tobytes(), name), CHANNELS, max_pixels=CHECKED).to(device) for file, name in pairs
    ]


def _decode_on_gpu(files: list[Tensor], device: torch.device) -> list[Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision 0.29 deprecates its decoders
        return decode_jpeg(files, ImageReadMode.RGB, device)
