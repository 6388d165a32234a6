"""Decoded images that lie on the device, and crops of them there (``data.cache=gpu``).

Workers draw boxes and masks as for images in memory; only these numbers travel. The crops of a batch are two products
of matrices, the weights of torch's antialiased bicubic filter. For uint8, weights and results are rounded as torch does
on a CPU; a pixel in some thousands differs by one level.
"""

import itertools
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fcmae.data.decoded import GIB, DecodedImages, check_fits
from fcmae.data.pixels.crops import Box
from fcmae.data.sources.base import Relabelled
from fcmae.messages import print_rank0
from fcmae.precision import full_precision, no_autocast

CHUNK = 2**28
"""Bytes of float32 pixels that are resized at once."""
TABLE = 2**26
"""Bytes that the filter's weights for all sides may take; those of larger images are computed for each batch."""
_numbers = itertools.count()


class Resident:
    """The images of a source on the device, moved there when the first batch is.

    Args:
        channels: those that crops have; None = all.
        size: height and width of a crop.
        pad: zeros on each side of an image; boxes are in the padded one.
    """

    def __init__(self, images: DecodedImages, channels: list[int] | None, size: tuple[int, int], pad: int = 0) -> None:
        self.images, self.size, self.pad = images, size, pad
        self.channels = list(range(images.channels)) if channels is None else channels
        self.largest = int(images.sizes.max()) + 2 * pad
        """Pixels of the longest side, with what is padded."""
        self.number = next(_numbers)
        self._on: dict[torch.device, tuple[Tensor, Tensor, Tensor, Tensor]] = {}
        self._tables: dict[tuple[torch.device, int], Tensor] = {}
        _residents[self.number] = self

    def on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All values in a row; the first value of each image, its height and width ``[N, 2]``; the crops' channels.

        Copied once: the host waits for each copy, and with it for the steps before.

        Raises UsageError if they do not fit.
        """
        if device not in self._on:
            images = self.images
            if device.type == "cuda":
                check_fits(images.bytes, torch.cuda.mem_get_info(device)[0], len(images), "gpu", f"memory of {device}")
                print_rank0(f"data.cache=gpu: {len(images):,} images, {images.bytes / GIB:.2f} GiB on each GPU")
            values = torch.from_numpy(images.memory[: images.bytes]).view(images.dtype)
            first = torch.from_numpy(images.offsets) // images.dtype.itemsize
            sizes = torch.from_numpy(images.sizes.astype("int64"))
            channels = torch.tensor(self.channels, device=device)
            self._on[device] = values.to(device), first.to(device), sizes.to(device), channels
        return self._on[device]

    def crops(self, index: Tensor, boxes: Tensor, device: torch.device) -> Tensor:
        """Crops ``[N, C, *size]``.

        Args:
            index: the images, int64 ``[N]``, in host memory like ``boxes``.
            boxes: int64 ``[N, 7]``: :class:`~fcmae.data.pixels.crops.Box`.
        """
        values, first, sizes, channels = self.on(device)
        rows, cols = (int(side) for side in boxes[:, 2:4].amax(0))
        weights = 8 * (rows * self.size[0] + cols * self.size[1])
        step = max(1, CHUNK // (4 * len(self.channels) * rows * max(cols, self.size[1]) + weights))
        moved_index, moved = index.to(device, non_blocking=True), boxes.to(device, non_blocking=True)
        parts = []
        # Whatever precision training has, these products are exact enough.
        with no_autocast(device), full_precision(device):
            for start in range(0, len(index), step):
                of, box = moved_index[start : start + step], moved[start : start + step]
                window = self._windows(values, first[of], sizes[of], box, (rows, cols), channels)
                parts.append(self._resized(window, box))
        crops = torch.cat(parts) if len(parts) > 1 else parts[0]
        plain = crops.view(torch.int16) if crops.dtype == torch.uint16 else crops  # which torch cannot index everywhere
        for turns in filter(None, boxes[:, 6].unique().tolist()):
            chosen = (boxes[:, 6] == turns).nonzero()[:, 0].to(device, non_blocking=True)
            plain[chosen] = plain[chosen].rot90(turns, (2, 3))
        return crops

    def _weights(self, sides: Tensor, size: int, most: int, mirrored: Tensor) -> Tensor:
        """See :func:`filter_weights`; looked up where the weights for all sides have room."""
        rounded, largest = self.images.dtype == torch.uint8, self.largest
        if 8 * size * largest**2 > TABLE:
            return filter_weights(sides, size, most, mirrored, rounded)
        key = sides.device, size
        if key not in self._tables:
            every = torch.arange(2 * largest, device=sides.device)
            self._tables[key] = filter_weights(every // 2 + 1, size, largest, every % 2, rounded)
        return self._tables[key][2 * (sides - 1) + mirrored, :, :most]

    def _resized(self, window: Tensor, box: Tensor) -> Tensor:
        """Windows ``[N, C, rows, cols]`` resized and mirrored as their boxes say."""
        kind, (count, channels, rows, cols), size = window.dtype, window.shape, self.size
        across = self._weights(box[:, 3], size[1], cols, box[:, 4])
        down = self._weights(box[:, 2], size[0], rows, box[:, 5])
        wide = torch.bmm(window.float().flatten(1, 2), across.transpose(1, 2)).unflatten(1, (channels, rows))
        if kind == torch.uint8:
            wide = wide.add_(0.5).floor_().clamp_(0, 255)
        out = torch.bmm(down, wide.transpose(1, 2).reshape(count, rows, -1))
        if kind == torch.uint8:
            out = out.add_(0.5).clamp_(0, 255).to(kind)  # which rounds down
        elif not kind.is_floating_point:
            out = out.round_().clamp_(0, torch.iinfo(kind).max).to(kind)
        return out.unflatten(2, (channels, size[1])).transpose(1, 2).contiguous()

    def size_of(self, index: int) -> tuple[int, int]:
        """Height and width of an image with what is padded."""
        height, width = self.images.size(index)
        return height + 2 * self.pad, width + 2 * self.pad

    def _windows(
        self, values: Tensor, first: Tensor, sizes: Tensor, box: Tensor, most: tuple[int, int], channels: Tensor
    ) -> Tensor:
        """Boxes cut out of images that lie in a row: ``[N, C, rows, cols]``, with other values beyond a box's end."""
        at = []
        for axis, count in enumerate(most):
            start, side = box[:, axis, None], box[:, axis + 2, None]
            at.append(start - self.pad + torch.arange(count, device=box.device).minimum(side - 1))
        inside = None
        if self.pad:
            ends = sizes[:, :, None].unbind(1)
            rows, cols = ((place >= 0) & (place < end) for place, end in zip(at, ends, strict=True))
            inside = (rows[:, :, None] & cols[:, None, :])[:, None]
            at = [place.clamp(min=0).minimum(end - 1) for place, end in zip(at, ends, strict=True)]
        place = at[0][:, :, None] * sizes[:, 1, None, None] + at[1][:, None, :]
        found = (first[:, None, None] + self.images.channels * place)[:, None] + channels[:, None, None]
        plain = values.view(torch.int16) if values.dtype == torch.uint16 else values  # torch indexes it everywhere
        window = plain[found] if inside is None else torch.where(inside, plain[found], 0)
        return window.view(values.dtype)


def innermost(source: Any) -> DecodedImages:
    """The decoded images in a source, which may be wrapped for its labels only."""
    while not isinstance(source, DecodedImages):
        assert isinstance(source, Relabelled), source
        source = source.source
    return source


_residents: weakref.WeakValueDictionary[int, Resident] = weakref.WeakValueDictionary()
"""Of this process, by their numbers."""


class Window(NamedTuple):
    """An image on the device, and the boxes of its samples."""

    resident: int
    image: int
    boxes: list[Box]


class PackedWindows(NamedTuple):
    """The images of a batch, which :meth:`to` cuts on the device."""

    resident: int
    images: Tensor
    """Their numbers, int64 ``[N]``."""
    boxes: Tensor
    """int64 ``[N, 7]``."""

    def to(self, device: torch.device, non_blocking: bool = False) -> Tensor:
        """Crops ``[N, C, H, W]`` on the device."""
        return _residents[self.resident].crops(self.images, self.boxes, device)


def pack_windows(windows: Sequence[Window]) -> PackedWindows:
    """A batch of windows, at least one."""
    images = [window.image for window in windows for _ in window.boxes]
    boxes = [box[:7] for window in windows for box in window.boxes]
    return PackedWindows(windows[0].resident, torch.tensor(images), torch.tensor(boxes))


def filter_weights(sides: Tensor, size: int, most: int, mirrored: Tensor, rounded: bool = False) -> Tensor:
    """Weights of torch's antialiased bicubic filter: float32 ``[N, size, most]``, rows that sum to 1.

    Args:
        sides: the pixels that are resized to ``size``, int64 ``[N]``, at most ``most``.
        mirrored: whether the result is, ``[N]``.
        rounded: to 16 bits, as torch does for uint8 on a CPU.
    """
    exact = torch.float64 if rounded else torch.float32
    scale = (sides.to(exact) / size)[:, None, None]
    wide = scale.clamp(min=1)
    place = torch.arange(size, device=sides.device)[None, :, None].to(exact)
    place = torch.where(mirrored.bool()[:, None, None], size - 1 - place, place)
    centre = scale * (place + 0.5)
    least = (centre - 2 * wide + 0.5).floor().clamp(min=0)
    end = torch.minimum((centre + 2 * wide + 0.5).floor(), sides[:, None, None].to(exact))
    # Only these many weights of a row are not 0; computing them for all pixels took most of a crop's time.
    taps = int(4 * max(1, most / size)) + 2
    source = least + torch.arange(taps, device=sides.device)
    weights = torch.where(source < end, _cubic((source - centre + 0.5) / wide), 0.0)
    weights = weights / weights.sum(dim=2, keepdim=True)
    if rounded:
        unit = (32767.5 / weights.amax(dim=(1, 2), keepdim=True)).log2().floor().clamp(max=22).exp2()
        weights = (weights * unit).round() / unit
    result = torch.zeros(len(sides), size, most + taps, device=sides.device)
    return result.scatter_(2, source.long(), weights.float())[:, :, :most]


def _cubic(x: Tensor, a: float = -0.5) -> Tensor:
    """Keys' filter, whose ``a`` is -0.5 where torch antialiases."""
    x = x.abs()
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
