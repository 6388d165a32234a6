"""Instance masks as COCO's JSON has them: polygons and run lengths."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_align

from fcmae.imports import needed

SIDE = 56
"""Cells per side of a mask inside its box: twice those of Mask R-CNN's prediction."""
POINTS = 3
"""Fewest of a polygon."""
MAX_LENGTH = 2.0**22
"""Of the boundary of an object in pixels: rasterising takes memory in proportion."""


def coco_mask() -> Any:
    """The module ``pycocotools.mask``. Raises UsageError where it is not installed."""
    with needed("objective=detect needs pycocotools: pip install 'fcmae[detect]'"):
        from pycocotools import mask
    return mask


def problem_of(segment: Any, size: tuple[int, int], runs: bool = True) -> str:
    """What is wrong with the mask of an object; empty if nothing is.

    Args:
        segment: what JSON has: a list of polygons ``[x, y, x, y, ...]``, or ``{"size": [h, w], "counts": ...}``.
        size: the image's height and width.
        runs: check compressed run lengths, too, which takes long for many.
    """
    if isinstance(segment, dict):
        given = segment.get("size")
        if given != list(size):
            return f"its run lengths are of {_by(given)} pixels, the image has {size[1]}x{size[0]}"
        counts = segment.get("counts")
        if not isinstance(counts, (list, str)):
            return "its counts must be a list or a text"
        try:
            if runs or isinstance(counts, list):
                _runs(counts, size)
        except ValueError as error:
            return str(error)
        return ""
    if not isinstance(segment, list) or not segment:
        return f"its segmentation must be polygons or run lengths; got {type(segment).__name__}"
    length = 0.0
    for polygon in segment:
        if not isinstance(polygon, list) or len(polygon) < 2 * POINTS or len(polygon) % 2:
            return f"a polygon must be a list of {POINTS} or more x, y"
        try:
            points = np.asarray(polygon, dtype=np.float64)
        except (TypeError, ValueError, OverflowError):
            return "a polygon must have numbers only"
        # Far outside, rasterising would take any memory.
        if points.ndim != 1 or not (np.abs(points) <= 2 * max(size)).all():
            return "a polygon lies outside of the image"
        length += np.abs(np.diff(points.reshape(-1, 2), axis=0)).sum()
    return "" if length <= MAX_LENGTH else "its polygons have too many points"


def is_outside(segment: Any, size: tuple[int, int], box: Sequence[float], margin: float) -> bool:
    """Whether a mask is empty, or no part of it is in its box (left, top, right, bottom).

    Args:
        segment: as :func:`problem_of` accepts it, with ``size``. Of a part, only its bounds are looked at.
        margin: pixels by which the box is enlarged.
    """
    if isinstance(segment, dict):
        lengths, height = _runs(segment["counts"], size), size[0]
        ends = lengths.cumsum()
        first, last = (ends - lengths)[1::2], ends[1::2] - 1
        first, last = first[first <= last], last[first <= last]
        one = first // height == last // height  # column
        top, bottom = np.where(one, first % height, 0), np.where(one, last % height + 1, height)
        bounds = np.stack([first // height, top, last // height + 1, bottom], axis=1)
    else:
        points = [np.asarray(polygon, dtype=np.float64).reshape(-1, 2) for polygon in segment]
        bounds = np.stack([np.concatenate([each.min(axis=0), each.max(axis=0)]) for each in points])
    inside = (bounds[:, :2] < np.add(box[2:], margin)) & (bounds[:, 2:] > np.subtract(box[:2], margin))
    return not inside.all(axis=1).any()


def _by(size: Any) -> str:
    ok = isinstance(size, list) and len(size) == 2 and all(type(side) is int for side in size)
    return f"{size[1]}x{size[0]}" if ok else "unknown"


def _runs(counts: Any, size: tuple[int, int]) -> np.ndarray:
    """The lengths of runs of 0 and 1 in turn, column by column. Raises ValueError if they do not fill the image."""
    lengths = counts if isinstance(counts, list) else _decompressed(counts)
    ok = all(type(length) is int and 0 <= length <= size[0] * size[1] for length in lengths)
    if not ok or sum(lengths) != size[0] * size[1]:
        raise ValueError(f"its run lengths do not fill an image of {size[1]}x{size[0]} pixels")
    return np.asarray(lengths, dtype=np.int64)


def _decompressed(text: str) -> list[int]:
    """COCO's compressed text: five bits per character, lowest first; from the third on, differences to two before."""
    lengths: list[int] = []
    value = shift = 0
    for character in text:
        code = ord(character) - 48
        if not 0 <= code < 64 or shift > 60:
            raise ValueError("its counts are not compressed run lengths")
        value |= (code & 0x1F) << shift
        shift += 5
        if not code & 0x20:
            value -= (code & 0x10) << (shift - 4)
            lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
            value = shift = 0
    if shift:
        raise ValueError("its counts are cut off")
    return lengths


def mask_of(segment: Any, size: tuple[int, int]) -> Tensor:
    """The mask of an object in its image, uint8 0 or 1 ``[H, W]``. Raises ValueError for one that is wrong."""
    problem = problem_of(segment, size, runs=False)
    if problem:
        raise ValueError(problem)
    counts = segment["counts"] if isinstance(segment, dict) else _rasterised(segment, size)
    lengths = _runs(counts, size)  # not by pycocotools, which reads too few as anything
    values = np.repeat(np.arange(len(lengths)) % 2 == 1, lengths)
    return torch.from_numpy(values).view(size[1], size[0]).T.to(torch.uint8)


def _rasterised(polygons: list[list[float]], size: tuple[int, int]) -> str:
    """Compressed run lengths of the union of polygons."""
    module = coco_mask()
    return module.merge(module.frPyObjects(polygons, *size))["counts"].decode()


def boxed_mask(mask: Tensor, box: Sequence[float]) -> Tensor:
    """The part of a mask ``[H, W]`` in a box (left, top, right, bottom), averaged over cells: uint8 ``[SIDE, SIDE]``.

    255 = the whole cell belongs to the object.
    """
    left, top = max(0, int(box[0]) - 1), max(0, int(box[1]) - 1)
    part = mask[top : int(box[3]) + 2, left : int(box[2]) + 2].float()[None, None]
    corners = torch.tensor([[0, box[0] - left, box[1] - top, box[2] - left, box[3] - top]])
    return (255 * roi_align(part, corners, SIDE, aligned=True)[0, 0]).round().to(torch.uint8)


def pasted(mask: Tensor, box: Sequence[float], size: tuple[int, int]) -> Tensor:
    """Which pixels of an image belong to an object: the probabilities ``[m, m]`` in its box, above one half.

    Returns:
        uint8 0 or 1 ``[H, W]``, on the CPU.
    """
    height, width = size
    out = torch.zeros(height, width, dtype=torch.uint8)
    rows, cols = (
        torch.arange(side)[max(0, int(first)) : int(last) + 1]
        for first, last, side in ((box[1], box[3], height), (box[0], box[2], width))
    )
    if not len(rows) or not len(cols):
        return out
    # The centres of pixels in the frame of the box, -1 to 1.
    y, x = (
        2 * (places + 0.5 - first) / max(last - first, 1e-6) - 1
        for places, first, last in ((rows, box[1], box[3]), (cols, box[0], box[2]))
    )
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=2)
    found = F.grid_sample(mask.float().cpu()[None, None], grid[None], align_corners=False)[0, 0] > 0.5
    out[int(rows[0]) : int(rows[-1]) + 1, int(cols[0]) : int(cols[-1]) + 1] = found
    return out


def encoded(mask: Tensor) -> dict[str, Any]:
    """COCO's compressed run lengths of a mask ``[H, W]``, as JSON has them."""
    found = coco_mask().encode(np.asfortranarray(mask.numpy()))
    return {"size": list(mask.shape), "counts": found["counts"].decode()}
