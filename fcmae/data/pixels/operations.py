"""The operations of timm's policies on batches of uint8 images, on any device, with an argument per image.

Results are those of Pillow to the bit, but for shears, translations and rotations, whose bicubic filter has float32
here and float64 there: a pixel in some ten thousands differs by one level. Nothing depends on the rest of a batch.
"""

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fcmae.data.pixels.fused import fused

CHUNK = 2**25
"""Values that an operation reads at once; each takes about 20 bytes of memory."""

Operation = tuple[str, float]
"""The name of timm's function, and its argument; 0 without one."""
Change = Callable[[Tensor, Sequence[Operation], Sequence[int]], Tensor]
"""Images, the operation of each, sorted by name, and the colour outside, to changed images."""


class Group(NamedTuple):
    """Operations that are done together."""

    change: Change
    reads: int
    """Values that a result is made of."""


def apply_operations(imgs: Tensor, lists: Sequence[Sequence[Operation]], fill: Sequence[int]) -> Tensor:
    """Applies to each image its operations in their order.

    Args:
        imgs: uint8 ``[N, 3, H, W]``, contiguous; may be changed.
        lists: of each image.
        fill: the colour of what comes from outside of an image.
    """
    if (kernels := fused(imgs)) is not None:
        return kernels.changed(imgs, lists, fill, MATRICES)
    for layer in range(max(map(len, lists), default=0)):
        groups: dict[Group, list[tuple[int, str, float]]] = defaultdict(list)
        for index, operations in enumerate(lists):
            if layer < len(operations):
                name, argument = operations[layer]
                groups[GROUPS[name]].append((index, name, argument))
        for (change, reads), members in groups.items():
            step = max(1, CHUNK // (reads * imgs[0].numel()))
            for start in range(0, len(members), step):
                part = sorted(members[start : start + step], key=lambda member: member[1])
                chosen = torch.tensor([member[0] for member in part]).to(imgs.device, non_blocking=True)
                imgs.index_copy_(0, chosen, change(imgs[chosen], [member[1:] for member in part], fill))
    return imgs


def _runs(operations: Sequence[Operation], device: torch.device) -> list[tuple[str, slice, Tensor]]:
    """Of sorted operations: each name, its images, and their arguments float64 ``[n, 1, 1]``."""
    names = [name for name, _ in operations]
    arguments = torch.tensor([argument for _, argument in operations], dtype=torch.float64)
    moved = arguments.to(device, non_blocking=True)[:, None, None]
    runs = []
    for name in dict.fromkeys(names):
        images = slice(names.index(name), names.index(name) + names.count(name))
        runs.append((name, images, moved[images]))
    return runs


def _by_table(imgs: Tensor, operations: Sequence[Operation], fill: Sequence[int]) -> Tensor:
    """What changes each value of a channel alike: a table of 256 values per image and channel."""
    levels = torch.arange(256, dtype=torch.float64, device=imgs.device)
    tables = [
        TABLES[name](imgs[images], levels, argument).expand(-1, imgs.shape[1], -1)
        for name, images, argument in _runs(operations, imgs.device)
    ]
    table = torch.cat(tables).clamp(0, 255).to(torch.uint8)
    return table.gather(2, imgs.flatten(2).long()).view_as(imgs)


def _auto_contrast(imgs: Tensor, levels: Tensor, argument: Tensor) -> Tensor:
    low, high = (end.double() for end in imgs.flatten(2).aminmax(dim=2, keepdim=True))
    scale = torch.full_like(high, 255.0) / (high - low)  # a number would be multiplied by the reciprocal
    return torch.where(high > low, (levels * scale + -low * scale).trunc(), levels)


def _equalize(imgs: Tensor, levels: Tensor, argument: Tensor) -> Tensor:
    values = imgs.flatten(2).long()
    counts = torch.zeros(*values.shape[:2], 256, dtype=torch.int64, device=imgs.device)
    counts.scatter_add_(2, values, torch.ones_like(values))
    of_last = counts.gather(2, values.amax(dim=2, keepdim=True))
    step = (values.shape[2] - of_last) // 255
    below = step // 2 + counts.cumsum(dim=2) - counts
    return torch.where(step > 0, (below // step.clamp(min=1)).double(), levels)


def _contrast(imgs: Tensor, levels: Tensor, argument: Tensor) -> Tensor:
    mean = _grey(imgs).sum(dim=(2, 3), dtype=torch.int64).double() / imgs[0, 0].numel()
    return _blended((mean + 0.5).floor()[:, :, None].float(), levels.float(), argument)


def _posterize(imgs: Tensor, levels: Tensor, bits: Tensor) -> Tensor:
    step = 2.0 ** (8 - bits.clamp(max=8))
    return (levels / step).floor() * step


def _blended(plain: Tensor, value: Tensor, factor: Tensor) -> Tensor:
    """``value`` moved away from ``plain`` or towards it, by Pillow's arithmetic: float32, rounded down."""
    return (plain + factor.float() * (value - plain)).clamp(0, 255).floor()


TABLES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "auto_contrast": _auto_contrast,
    "brightness": lambda imgs, levels, factor: _blended(torch.zeros_like(factor).float(), levels.float(), factor),
    "contrast": _contrast,
    "equalize": _equalize,
    "invert": lambda imgs, levels, argument: (255 - levels).expand(len(imgs), 1, -1),
    "posterize": _posterize,
    "solarize": lambda imgs, levels, least: torch.where(levels < least, levels, 255 - levels),
    "solarize_add": lambda imgs, levels, added: torch.where(levels < 128, levels + added, levels),
}
"""From images ``[n, 3, H, W]``, the 256 values, and arguments ``[n, 1, 1]`` to tables ``[n, 1 or 3, 256]``."""


def _by_blending(imgs: Tensor, operations: Sequence[Operation], fill: Sequence[int]) -> Tensor:
    """Blends of an image with its grey or smooth version."""
    parts = []
    for name, images, factor in _runs(operations, imgs.device):
        some, factor = imgs[images], factor[:, None]
        plain = _smooth(some) if name == "sharpness" else _grey(some)
        factor = (1 - factor).clamp(0, 1) if name == "desaturate" else factor
        parts.append(_blended(plain.float(), some.float(), factor).to(torch.uint8))
    return torch.cat(parts)


def _grey(imgs: Tensor) -> Tensor:
    """Luminance as Pillow's mode L: int32 ``[n, 1, H, W]``."""
    red, green, blue = imgs.int().unbind(1)
    return ((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16)[:, None]


def _smooth(imgs: Tensor) -> Tensor:
    """Pillow's SMOOTH: the mean of 3 x 3 pixels, that in the middle five times; edges as they are. int32."""
    smooth = imgs.int()
    rows = smooth[..., :-2, :] + smooth[..., 1:-1, :] + smooth[..., 2:, :]
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * smooth[..., 1:-1, 1:-1]
    smooth[..., 1:-1, 1:-1] = (2 * total + 13) // 26
    return smooth


def _by_moving(imgs: Tensor, operations: Sequence[Operation], fill: Sequence[int], axes: str) -> Tensor:
    """Moves of pixels along x, y, or both: ``xy``."""
    height, width = imgs.shape[-2:]
    made = [MATRICES[name](argument, height, width) for name, argument in operations]
    places = torch.tensor(made, dtype=torch.float64).to(imgs.device, non_blocking=True)
    outside = torch.tensor(fill, dtype=torch.int32).to(imgs.device, non_blocking=True)
    return _moved(imgs, places, outside, axes)


def _moved(imgs: Tensor, places: Tensor, fill: Tensor, axes: str) -> Tensor:
    """Images whose pixel at (x, y) is that at (a x + b y + c, d x + e y + f) before, by Pillow's bicubic filter.

    Args:
        places: a to f of each image, float64 ``[n, 6]``.
        fill: the colour of what comes from outside, int32 ``[3]``.
        axes: along which pixels move: ``x``, ``y`` or ``xy``.
    """
    height, width = imgs.shape[-2:]
    a, b, c, d, e, f = places[:, :, None, None].unbind(1)
    x, y = (torch.arange(side, dtype=torch.float64, device=imgs.device) + 0.5 for side in (width, height))
    x, y = a * x + b * y[:, None] + c, d * x + e * y[:, None] + f
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    cols, across = _taps(x, width, "x" in axes)
    rows, down = _taps(y, height, "y" in axes)
    read = (rows[:, :, None] * width + cols[:, None]).flatten(1)  # [n, rows * cols * H * W]
    found = imgs.flatten(2).gather(2, read[:, None].expand(-1, imgs.shape[1], -1)).float()
    found = found.view(*imgs.shape[:2], rows.shape[1], cols.shape[1], height, width)
    found = _cubic(_cubic(found, 3, across[:, None, None]), 2, down[:, None])
    return torch.where(inside[:, None], found.clamp(0, 255).to(torch.uint8), fill[:, None, None].to(torch.uint8))


def _taps(place: Tensor, side: int, moves: bool) -> tuple[Tensor, Tensor]:
    """Pixels that places ``[n, H, W]`` on an axis are read from: four about each, int64 ``[n, 4, H, W]``, or one where
    nothing moves; and how far each place is past the second of four."""
    place = place - 0.5
    first = place.floor()
    taps = torch.arange(-1, 3, device=place.device) if moves else torch.zeros(1, dtype=torch.int64, device=place.device)
    return (first.long()[:, None] + taps[:, None, None]).clamp(0, side - 1), (place - first).float()


def _cubic(values: Tensor, dim: int, past: Tensor) -> Tensor:
    """Between the second and third of four values along ``dim``, by Pillow's polynomial (a = -1); of one, that one."""
    if values.shape[dim] == 1:
        return values.squeeze(dim)
    one, two, three, four = values.unbind(dim)
    linear, square, cube = three - one, 2 * (one - two) + three - four, two - one - three + four
    return two + past * (linear + past * (square + past * cube))


def _rotated(degrees: float, height: int, width: int) -> tuple[float, ...]:
    angle = -math.radians(degrees % 360.0)
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
    x, y = width / 2, height / 2
    return cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y


MATRICES: dict[str, Callable[[float, int, int], tuple[float, ...]]] = {
    "rotate": _rotated,
    "shear_x": lambda factor, height, width: (1, factor, 0, 0, 1, 0),
    "shear_y": lambda factor, height, width: (1, 0, 0, factor, 1, 0),
    "translate_x_abs": lambda pixels, height, width: (1, 0, pixels, 0, 1, 0),
    "translate_x_rel": lambda share, height, width: (1, 0, share * width, 0, 1, 0),
    "translate_y_abs": lambda pixels, height, width: (1, 0, 0, 0, 1, pixels),
    "translate_y_rel": lambda share, height, width: (1, 0, 0, 0, 1, share * height),
}
"""From an argument, height and width to a place before the move: (a x + b y + c, d x + e y + f)."""
_tables, _blends = Group(_by_table, 1), Group(_by_blending, 1)
_along_x, _along_y = (Group(functools.partial(_by_moving, axes=axis), 4) for axis in "xy")
GROUPS: dict[str, Group] = {
    **dict.fromkeys(TABLES, _tables),
    **dict.fromkeys(("color", "desaturate", "sharpness"), _blends),
    **dict.fromkeys(("shear_x", "translate_x_abs", "translate_x_rel"), _along_x),
    **dict.fromkeys(("shear_y", "translate_y_abs", "translate_y_rel"), _along_y),
    "rotate": Group(functools.partial(_by_moving, axes="xy"), 16),
}
"""What does an operation, for all images that have one of its group."""
