"""The operations of timm's policies on a batch of images, in three Triton kernels for one operation of every image.

:mod:`fcmae.data.pixels.operations` describes them, and has them in plain torch, which launches hundreds of kernels for
a batch. Here the host makes one table of what to do, and a program reads there what its image wants. Without fused
multiplications and additions the bits are the same.
"""

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fcmae.kernels.pixels_triton import to_device

COLUMNS = tl.constexpr(8)
"""Of a row of the table, float64: the operation's code, its argument, and the six numbers of a move."""
(
    NOTHING, AUTO_CONTRAST, EQUALIZE, CONTRAST, BRIGHTNESS, INVERT, POSTERIZE, SOLARIZE, SOLARIZE_ADD, COLOR,
    SHARPNESS, MOVE,
) = (tl.constexpr(code) for code in range(12))  # fmt: skip
BLOCK, COUNTED_BLOCK = 512, 2048
"""Pixels of a program."""

CODES: dict[str, tuple[int, Callable[[float], float]]] = {
    "auto_contrast": (AUTO_CONTRAST.value, float),
    "brightness": (BRIGHTNESS.value, float),
    "color": (COLOR.value, float),
    "contrast": (CONTRAST.value, float),
    "desaturate": (COLOR.value, lambda share: min(max(1 - share, 0.0), 1.0)),
    "equalize": (EQUALIZE.value, float),
    "invert": (INVERT.value, float),
    "posterize": (POSTERIZE.value, lambda bits: 2.0 ** (8 - min(bits, 8))),
    "sharpness": (SHARPNESS.value, float),
    "solarize": (SOLARIZE.value, float),
    "solarize_add": (SOLARIZE_ADD.value, float),
}
"""Of operations that are no moves: the code, and what becomes of the argument."""
Matrices = dict[str, Callable[[float, int, int], tuple[float, ...]]]


@triton.jit
def _grey(red, green, blue):
    """Luminance as Pillow's mode L."""
    return (19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16


@triton.jit
def _blended(plain, value, factor):
    return tl.floor(tl.minimum(tl.maximum(plain + factor * (value - plain), 0.0), 255.0))


@triton.jit(do_not_specialize=["pixels"])
def _count(imgs, steps, counts, greys, pixels, BLOCK: tl.constexpr):
    """Adds to how often each value is in each channel, ``[N, 3, 256]``, or to the sum of grey, ``[N]``."""
    pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    image = tl.program_id(0).to(tl.int64)
    live = pixel < pixels
    code = tl.load(steps + COLUMNS * image).to(tl.int32)
    plane = imgs + image * 3 * pixels + pixel
    if (code == AUTO_CONTRAST) | (code == EQUALIZE):
        for channel in tl.static_range(3):
            value = tl.load(plane + channel * pixels, mask=live, other=0).to(tl.int32)
            found = tl.histogram(value, 256, mask=live)
            tl.atomic_add(counts + (image * 3 + channel) * 256 + tl.arange(0, 256), found, sem="relaxed")
    if code == CONTRAST:
        red = tl.load(plane, mask=live, other=0).to(tl.int32)
        green = tl.load(plane + pixels, mask=live, other=0).to(tl.int32)
        blue = tl.load(plane + 2 * pixels, mask=live, other=0).to(tl.int32)
        tl.atomic_add(greys + image, tl.sum(tl.where(live, _grey(red, green, blue), 0), 0).to(tl.int64), sem="relaxed")


@triton.jit(do_not_specialize=["pixels"])
def _make_tables(steps, counts, greys, tables, pixels):
    """What each value of a channel becomes: uint8 ``[N, 3, 256]``."""
    row = tl.program_id(0).to(tl.int64) * 3 + tl.program_id(1)
    image = tl.program_id(0)
    code = tl.load(steps + COLUMNS * image).to(tl.int32)
    argument = tl.load(steps + COLUMNS * image + 1)
    if (code > NOTHING) & (code < COLOR):
        level = tl.arange(0, 256)
        levels = level.to(tl.float64)
        value = levels
        if (code == AUTO_CONTRAST) | (code == EQUALIZE):
            count = tl.load(counts + row * 256 + level)
            low = tl.min(tl.where(count > 0, level, 255), 0)
            high = tl.max(tl.where(count > 0, level, 0), 0)
            if code == AUTO_CONTRAST:
                if high > low:
                    scale = tl.full((), 255.0, tl.float64) / (high - low).to(tl.float64)
                    value = levels * scale + -low.to(tl.float64) * scale
            else:
                step = (pixels - tl.sum(tl.where(level == high, count, 0), 0)) // 255
                if step > 0:
                    value = ((step // 2 + tl.cumsum(count, 0) - count) // step).to(tl.float64)
        if code == CONTRAST:
            mean = tl.floor(tl.load(greys + image).to(tl.float64) / pixels.to(tl.float64) + 0.5).to(tl.float32)
            value = _blended(mean, levels.to(tl.float32), argument.to(tl.float32)).to(tl.float64)
        if code == BRIGHTNESS:
            value = _blended(0.0, levels.to(tl.float32), argument.to(tl.float32)).to(tl.float64)
        if code == INVERT:
            value = 255 - levels
        if code == POSTERIZE:
            value = tl.floor(levels / argument) * argument
        if code == SOLARIZE:
            value = tl.where(levels < argument, levels, 255 - levels)
        if code == SOLARIZE_ADD:
            value = tl.where(level < 128, levels + argument, levels)
        value = tl.minimum(tl.maximum(value, 0.0), 255.0)
        tl.store(tables + row * 256 + level, value.to(tl.int32).to(tl.uint8))


@triton.jit
def _cubic(one, two, three, four, past):
    linear = three - one
    square = 2 * (one - two) + three - four
    cube = two - one - three + four
    return two + past * (linear + past * (square + past * cube))


@triton.jit
def _across(plane, row, col, past, height, width, live):
    """Between two pixels of a row, by four; beyond an edge its pixels repeat."""
    line = plane + tl.minimum(tl.maximum(row, 0), height - 1) * width
    one = tl.load(line + tl.minimum(tl.maximum(col - 1, 0), width - 1), mask=live, other=0).to(tl.float32)
    two = tl.load(line + tl.minimum(tl.maximum(col, 0), width - 1), mask=live, other=0).to(tl.float32)
    three = tl.load(line + tl.minimum(tl.maximum(col + 1, 0), width - 1), mask=live, other=0).to(tl.float32)
    four = tl.load(line + tl.minimum(tl.maximum(col + 2, 0), width - 1), mask=live, other=0).to(tl.float32)
    return _cubic(one, two, three, four, past)


@triton.jit
def _move(imgs, out, places, fill, pixel, live, height, width):
    """The pixel at (x, y) becomes that at (a x + b y + c, d x + e y + f), by Pillow's bicubic filter."""
    left = (pixel % width).to(tl.float64) + 0.5
    top = (pixel // width).to(tl.float64) + 0.5
    x = tl.load(places) * left + tl.load(places + 1) * top + tl.load(places + 2)
    y = tl.load(places + 3) * left + tl.load(places + 4) * top + tl.load(places + 5)
    inside = live & (x >= 0) & (x < width) & (y >= 0) & (y < height)
    x = x - 0.5
    y = y - 0.5
    col = tl.floor(x)
    row = tl.floor(y)
    past_x = (x - col).to(tl.float32)
    past_y = (y - row).to(tl.float32)
    col = tl.where(inside, col, 0.0).to(tl.int32)
    row = tl.where(inside, row, 0.0).to(tl.int32)
    for channel in tl.static_range(3):
        plane = imgs + channel * height * width
        one = _across(plane, row - 1, col, past_x, height, width, inside)
        two = _across(plane, row, col, past_x, height, width, inside)
        three = _across(plane, row + 1, col, past_x, height, width, inside)
        four = _across(plane, row + 2, col, past_x, height, width, inside)
        value = tl.minimum(tl.maximum(_cubic(one, two, three, four, past_y), 0.0), 255.0).to(tl.int32)
        value = tl.where(inside, value, tl.load(fill + channel))
        tl.store(out + channel * height * width + pixel, value.to(tl.uint8), mask=live)


@triton.jit
def _sharpen(plane, out, factor, pixel, live, height, width):
    """Away from Pillow's SMOOTH, the mean of 3 x 3 pixels, that in the middle five times; edges stay."""
    row = pixel // width
    col = pixel % width
    within = live & (row > 0) & (row < height - 1) & (col > 0) & (col < width - 1)
    middle = tl.load(plane + pixel, mask=live, other=0).to(tl.int32)
    total = 4 * middle
    for down in tl.static_range(-1, 2):
        for across in tl.static_range(-1, 2):
            total += tl.load(plane + pixel + (down * width + across), mask=within, other=0).to(tl.int32)
    smooth = tl.where(within, (2 * total + 13) // 26, middle)
    value = _blended(smooth.to(tl.float32), middle.to(tl.float32), factor)
    tl.store(out + pixel, value.to(tl.int32).to(tl.uint8), mask=live)


@triton.jit(do_not_specialize=["height", "width"])
def _change(imgs, out, steps, tables, fill, height, width, BLOCK: tl.constexpr):
    """Does with each image what the table says; ``imgs`` and ``out`` are uint8 ``[N, 3, height, width]``."""
    pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    image = tl.program_id(0).to(tl.int64)
    pixels = height * width
    live = pixel < pixels
    imgs += image * 3 * pixels
    out += image * 3 * pixels
    steps += COLUMNS * image
    code = tl.load(steps).to(tl.int32)
    factor = tl.load(steps + 1).to(tl.float32)
    if code == NOTHING:
        for channel in tl.static_range(3):
            offset = channel * pixels + pixel
            tl.store(out + offset, tl.load(imgs + offset, mask=live), mask=live)
    if (code > NOTHING) & (code < COLOR):
        for channel in tl.static_range(3):
            offset = channel * pixels + pixel
            value = tl.load(imgs + offset, mask=live, other=0).to(tl.int32)
            tl.store(out + offset, tl.load(tables + (image * 3 + channel) * 256 + value), mask=live)
    if code == COLOR:
        red = tl.load(imgs + pixel, mask=live, other=0).to(tl.int32)
        green = tl.load(imgs + pixels + pixel, mask=live, other=0).to(tl.int32)
        blue = tl.load(imgs + 2 * pixels + pixel, mask=live, other=0).to(tl.int32)
        grey = _grey(red, green, blue).to(tl.float32)
        values = (red, green, blue)
        for channel in tl.static_range(3):
            value = _blended(grey, values[channel].to(tl.float32), factor).to(tl.int32).to(tl.uint8)
            tl.store(out + channel * pixels + pixel, value, mask=live)
    if code == SHARPNESS:
        for channel in tl.static_range(3):
            _sharpen(imgs + channel * pixels, out + channel * pixels, factor, pixel, live, height, width)
    if code == MOVE:
        _move(imgs, out, steps + 2, fill, pixel, live, height, width)


def changed(
    imgs: Tensor, lists: Sequence[Sequence[tuple[str, float]]], fill: Sequence[int], matrices: Matrices
) -> Tensor:
    """Images after their operations.

    Args:
        imgs: uint8 ``[N, 3, H, W]``, contiguous.
        lists: of each image, names of timm's functions with their arguments.
        fill: the colour of what comes from outside of an image.
        matrices: of moves, from an argument, height and width to a place before the move.
    """
    count, _, height, width = imgs.shape
    table = _table(lists, height, width, matrices)
    if not len(table) or not imgs.numel():
        return imgs
    steps = to_device(table, imgs.device)
    outside = to_device(torch.tensor(fill, dtype=torch.int32), imgs.device)
    pixels, tables = height * width, imgs.new_empty(count, 3, 256)
    for layer in steps:
        counts = imgs.new_zeros(count, 3, 256, dtype=torch.int32)
        greys, out = imgs.new_zeros(count, dtype=torch.int64), torch.empty_like(imgs)
        of_counts, of_pixels = ((count, triton.cdiv(pixels, block)) for block in (COUNTED_BLOCK, BLOCK))
        _count[of_counts](imgs, layer, counts, greys, pixels, BLOCK=COUNTED_BLOCK)
        _make_tables[count, 3](layer, counts, greys, tables, pixels, enable_fp_fusion=False)
        _change[of_pixels](imgs, out, layer, tables, outside, height, width, BLOCK=BLOCK, enable_fp_fusion=False)
        imgs = out
    return imgs


def _table(lists: Sequence[Sequence[tuple[str, float]]], height: int, width: int, matrices: Matrices) -> Tensor:
    """What happens to each image in each layer: float64 ``[layers, N, COLUMNS]``."""
    table = torch.zeros(max(map(len, lists), default=0), len(lists), COLUMNS.value, dtype=torch.float64)
    rows = table.numpy()
    for image, operations in enumerate(lists):
        for layer, (name, argument) in enumerate(operations):
            if name in matrices:
                rows[layer, image] = (MOVE.value, 0.0, *matrices[name](argument, height, width))
            else:
                code, prepared = CODES[name]
                rows[layer, image, :2] = code, prepared(argument)
    return table
