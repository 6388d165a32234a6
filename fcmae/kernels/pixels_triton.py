"""Raw pixels to normalised ones, and erased rectangles, in a Triton kernel each that touches memory once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
"""Pixels of a program."""


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A copy of a small tensor, for which the host does not wait."""
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


@triton.jit(do_not_specialize=["pixels"])
def _normalize(imgs, out, shift, scale, pixels, C: tl.constexpr, BLOCK: tl.constexpr):
    pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    plane = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(0) % C
    value = tl.load(imgs + plane * pixels + pixel, mask=pixel < pixels, other=0).to(tl.float32)
    value = tl.div_rn(value - tl.load(shift + channel), tl.load(scale + channel))
    tl.store(out + plane * pixels + pixel, value, mask=pixel < pixels)


def normalized(imgs: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """``(imgs - shift) / scale`` in float32: ``[..., C, H, W]`` with float32 constants ``[C, 1, 1]``, contiguous."""
    imgs = imgs.contiguous()
    out = torch.empty_like(imgs, dtype=torch.float32)
    channels, pixels = imgs.shape[-3], imgs.shape[-2] * imgs.shape[-1]
    if out.numel():
        grid = (out.numel() // pixels, triton.cdiv(pixels, BLOCK))
        _normalize[grid](imgs, out, shift, scale, pixels, C=channels, BLOCK=BLOCK)
    return out


@triton.jit
def _mix(x):
    """:func:`fcmae.randomness._mix` of unsigned words of 32 bits."""
    x = (x ^ (x >> 16)) * 0x21F0AAAD
    x = (x ^ (x >> 15)) * 0x735A2D97
    return x ^ (x >> 15)


@triton.jit(do_not_specialize=["height", "width"])
def _erase(imgs, table, normal, height, width, C: tl.constexpr, BLOCK: tl.constexpr):
    table += 6 * tl.program_id(0)
    image = tl.load(table)
    top = tl.load(table + 1).to(tl.int32)
    left = tl.load(table + 2).to(tl.int32)
    rows = tl.load(table + 3).to(tl.int32)
    cols = tl.load(table + 4).to(tl.int32)
    key = tl.load(table + 5)
    within = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = within < rows * cols
    place = (top + within // cols) * width + left + within % cols
    low = (key & 0xFFFFFFFF).to(tl.uint32)
    high = (key >> 32).to(tl.uint32)
    for channel in tl.static_range(C):
        number = _mix(_mix(low ^ _mix((place * C + channel).to(tl.uint32))) ^ high) >> 16
        value = tl.load(normal + number, mask=live)
        tl.store(imgs + (image * C + channel) * height * width + place, value, mask=live)


def erase(imgs: Tensor, table: Tensor, normal: Tensor) -> None:
    """Replaces rectangles of float32 ``[N, C, H, W]`` by noise, in place.

    Args:
        table: image, top, left, height, width and key of each rectangle, int64 ``[n, 6]``, on the CPU; n > 0.
        normal: the 65,536 values that noise has, float32, on the device.
    """
    _, channels, height, width = imgs.shape
    largest = int((table[:, 3] * table[:, 4]).max())
    grid = (len(table), triton.cdiv(largest, BLOCK))
    _erase[grid](imgs, to_device(table, imgs.device), normal, height, width, C=channels, BLOCK=BLOCK)
