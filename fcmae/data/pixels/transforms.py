"""Transforms of images into samples, by torchvision's v2 transforms and timm's augmentations.

Tensors hold raw pixels, which :func:`normalize` normalises on the device; float tensors are normalised already, but
with ``data.dtype=float32``.
"""

import functools
from collections.abc import Callable, Sequence

import torch
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision.transforms import v2

from fcmae.config import AugmentConfig, DataConfig
from fcmae.config.channels import Layout
from fcmae.data.pixels.augmented import Draw, Drawn
from fcmae.data.pixels.crops import Box, RandomCrop, Uniform, middle, pick, resize
from fcmae.data.pixels.decode import Encoded, LazyImage, PixelFormat, open_image
from fcmae.data.pixels.extra import Extra
from fcmae.data.pixels.formats import MAX_PIXELS
from fcmae.data.pixels.fused import fused
from fcmae.data.pixels.nodata import NoData, middle_of
from fcmae.data.pixels.own_scale import OwnScale
from fcmae.data.pixels.policies import create_policy
from fcmae.errors import ConfigError

Transform = Callable[[Tensor | Encoded | LazyImage], Tensor | Drawn]
"""Makes a sample of an image, decoded or not."""

WARP_FROM = 384
"""Image size from which evaluation resizes to the exact size (official code of ConvNeXt, arXiv 2201.03545)."""


def pretrain_transform(cfg: DataConfig, max_pixels: int = MAX_PIXELS, channels: bool = False) -> RandomCrop:
    """Random resized crop and flip (ConvNeXt V2, arXiv 2301.00808, appendix A.1): raw pixels.

    Args:
        channels: with the channels that only targets get.
    """
    return RandomCrop(cfg, max_pixels, channels)


def finetune_transform(cfg: DataConfig, augment: AugmentConfig, max_pixels: int = MAX_PIXELS) -> Transform:
    """Random resized crop and flip, ``data.transforms``, auto-augmentation, random erasing: normalised float32.

    With augment.on=gpu all but crop, flip and ``data.transforms`` are left to the device.
    """
    steps: list[Callable] = [RandomCrop(cfg, max_pixels), Extra(cfg.transforms)]
    if augment.on == "gpu":
        return v2.Compose([*steps, Draw(cfg, augment, functools.partial(normalized, cfg=cfg))])
    if augment.auto_augment is not None:
        steps += [v2.ToPILImage(), create_policy(cfg, augment.auto_augment), v2.PILToTensor()]
    steps += [functools.partial(normalized, cfg=cfg)]
    if augment.random_erasing > 0:
        steps += [RandomErasing(augment.random_erasing, mode="pixel", device="cpu")]
    return v2.Compose(steps)


def eval_transform(cfg: DataConfig, max_pixels: int = MAX_PIXELS) -> Transform:
    """Resize and centre crop below 384 px, else resize to the exact size: raw pixels. data.fit=pad: the middle alone.
    With data.normalize=image, normalised float32.

    Below 384 px the aspect ratio is kept: the image just covers ``image_size / crop_pct``, as timm's
    ``create_transform(crop_mode="center")``.
    """
    if cfg.fit == "pad" or cfg.nodata is not None:
        # Reads no more of an array, and fills no pixel that is resized from some without a value, as in training.
        return CentreCrop(cfg, max_pixels)
    size = list(cfg.size)
    steps: list[Callable] = [v2.Pad(cfg.pad)] if cfg.pad else []
    if max(size) >= WARP_FROM:
        return WholeImage(cfg, max_pixels, [*steps, functools.partial(resize, size=size)])
    height, width = (int(side / cfg.crop_pct) for side in size)
    covering = functools.partial(_resize_to_cover, height=height, width=width)
    return WholeImage(cfg, max_pixels, [*steps, covering, v2.CenterCrop(size)])


class WholeImage:
    """Whole images: raw pixels ``[C, H, W]``, or float32 normalised with data.normalize=image, after some ``steps``."""

    def __init__(self, cfg: DataConfig, max_pixels: int = MAX_PIXELS, steps: Sequence[Callable] = ()) -> None:
        self.format = PixelFormat.of(cfg, max_pixels)
        self.channels = cfg.layout.input
        self.no_data = NoData.of(cfg)
        self.by_image = cfg.normalize == "image"
        self.steps = list(steps)

    def __call__(self, image: Tensor | Encoded | LazyImage) -> Tensor:
        pixels = pick(open_image(image, self.format).pixels(1), self.channels)
        scale = OwnScale.of(pixels, self.no_data) if self.by_image else None
        no_data = self.no_data if scale is None else scale.filling(self.no_data)
        if no_data is not None:
            pixels = no_data.replaced(pixels)
        for step in self.steps:
            pixels = step(pixels)
        return pixels if scale is None else scale.apply(pixels)


class CentreCrop(RandomCrop):
    """The part of an image that :func:`eval_transform` shows, where a RandomCrop is expected; it draws nothing."""

    def __init__(self, cfg: DataConfig, max_pixels: int = MAX_PIXELS, channels: bool = False) -> None:
        super().__init__(cfg, max_pixels, channels)
        self.crop_pct = cfg.crop_pct
        self.foreground = None

    def box(self, size: tuple[int, int], uniform: Uniform) -> Box:
        height, width = self.size
        if self.at_own_size:
            return Box(*middle_of(size, self.size), flip=False)
        if max(self.size) >= WARP_FROM:
            return Box(0, 0, *size, flip=False)
        scale = self.crop_pct * min(size[0] / height, size[1] / width)
        rows, cols = max(1, round(scale * height)), max(1, round(scale * width))
        return Box((size[0] - rows) // 2, (size[1] - cols) // 2, rows, cols, flip=False)


def _resize_to_cover(pixels: Tensor, height: int, width: int) -> Tensor:
    """``[C, H, W]`` to the smallest size of the same aspect ratio that covers ``height`` x ``width``.

    Of a very long image only the middle is resized, which has the centre crop.
    """
    pixels = middle(pixels, height, width)
    if height == width:
        return resize(pixels, [height])  # rounds the long side down, as torchvision and timm do for squares
    rows, cols = pixels.shape[-2:]
    ratio = min(rows / height, cols / width)
    return resize(pixels, [round(rows / ratio), round(cols / ratio)])


def normalized(imgs: Tensor, cfg: DataConfig) -> Tensor:
    """Raw ``[..., C, H, W]`` to float32 as ``cfg.normalize`` says; with ``image``, its transforms have done it."""
    values = normalize(imgs, cfg.mean, cfg.std, cfg.dtype)
    return values.clamp_(-1, 1) if cfg.clips and values is not imgs else values


def normalize(imgs: Tensor, mean: Sequence[float], std: Sequence[float], dtype: str = "uint") -> Tensor:
    """Raw ``[..., C, H, W]`` to normalised float32, contiguous.

    A float tensor is returned as it is, unless ``dtype``, the config's, is float32 and there is a ``mean``, which is
    then in the tensor's units. White, 1.0 before the normalisation of integers, is 255 of uint8 and 65535 of uint16.
    Raises ConfigError for integers without ``mean``.
    """
    if imgs.dtype.is_floating_point and (dtype == "uint" or not mean):
        return imgs
    if not mean:
        kind = str(imgs.dtype).removeprefix("torch.")
        raise ConfigError(f"data.mean and data.std are not set, but pixels are {kind}, not float32; give both")
    white = 1 if imgs.dtype.is_floating_point else torch.iinfo(imgs.dtype).max
    shift, scale = _channel_constants(tuple(mean), tuple(std), imgs.device)
    if imgs.dtype in (torch.uint8, torch.uint16, torch.float32) and (kernels := fused(imgs)) is not None:
        return kernels.normalized(imgs, white * shift, white * scale)
    values = imgs.to(torch.float32, memory_format=torch.contiguous_format)
    # In place, but not in the caller's tensor: on a CPU new memory takes longer than the arithmetic.
    values = values - white * shift if values is imgs else values.sub_(white * shift)
    return values.div_(white * scale)


def normalize_channels(channels: Tensor, layout: Layout, bit_depth: int, dtype: str = "uint") -> Tensor:
    """Raw ``[N, K, H, W]`` that only targets get to float32: classes to their numbers, others by their mean and std."""
    stored = 1 / (2**bit_depth - 1) if dtype == "uint" else 1.0
    classes = len(layout.classes)
    return normalize(channels, [*layout.mean, *[0.0] * classes], [*layout.std, *[stored] * classes], dtype)


def denormalize(imgs: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """The inverse of :func:`normalize`, not clipped: black is 0, white is 1. Returns ``imgs`` without ``mean``."""
    if not mean:
        return imgs
    shift, scale = _channel_constants(tuple(mean), tuple(std), imgs.device)
    return imgs * scale + shift


@functools.lru_cache(maxsize=8)
def _channel_constants(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and deviation ``[C, 1, 1]``, copied to the device once: the host waits for each copy."""
    with torch.inference_mode(False):  # otherwise training could not use those first made for an evaluation
        return torch.tensor(mean, device=device).view(-1, 1, 1), torch.tensor(std, device=device).view(-1, 1, 1)
