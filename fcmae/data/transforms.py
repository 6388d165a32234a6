"""From a uint8 image to a training or evaluation sample, by torchvision's v2 transforms and timm's augmentations.

A uint8 tensor holds raw pixels and is normalised on the device (:func:`normalize`); a float tensor already is.
"""

import functools
from collections.abc import Callable, Sequence

import torch
from timm.data.auto_augment import augment_and_mix_transform, auto_augment_transform, rand_augment_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision.transforms import v2

from fcmae.config import AugmentConfig, DataConfig
from fcmae.data.pixels import Encoded, decode
from fcmae.errors import ConfigError

Transform = Callable[[Tensor | Encoded], Tensor]
"""What makes a sample of an image, decoded or not."""

WARP_FROM = 384
"""Image size from which evaluation resizes straight to the square (ConvNeXt, arXiv 2201.03545, official code)."""


def pretrain_transform(cfg: DataConfig) -> Transform:
    """Random resized crop and flip (ConvNeXt V2, arXiv 2301.00808, appendix A.1): uint8 to uint8."""
    return v2.Compose([*_decode(cfg), _crop(cfg), v2.RandomHorizontalFlip(cfg.hflip)])


def finetune_transform(cfg: DataConfig, augment: AugmentConfig) -> Transform:
    """Random resized crop, flip, timm's auto-augmentation and random erasing: uint8 to normalised float32."""
    steps: list[Callable] = [*_decode(cfg), _crop(cfg), v2.RandomHorizontalFlip(cfg.hflip)]
    if augment.auto_augment is not None:
        steps += [v2.ToPILImage(), _auto_augment(cfg, augment.auto_augment), v2.PILToTensor()]
    steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(cfg.mean, cfg.std)]
    if augment.random_erasing > 0:
        steps += [RandomErasing(augment.random_erasing, mode="pixel", device="cpu")]
    return v2.Compose(steps)


def eval_transform(cfg: DataConfig) -> Transform:
    """Resize and centre crop below 384 px, resize to the exact size from there on: uint8 to uint8."""
    size = list(cfg.size)
    if max(size) >= WARP_FROM:
        steps = [v2.Resize(size, v2.InterpolationMode.BICUBIC, antialias=True)]
    else:
        short = [int(side / cfg.crop_pct) for side in size]
        steps = [v2.Resize(min(short) if size[0] == size[1] else short, v2.InterpolationMode.BICUBIC, antialias=True)]
        steps += [v2.CenterCrop(size)]
    return v2.Compose([*_decode(cfg), *steps])


def normalize(imgs: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Raw uint8 ``[..., C, H, W]`` to normalised float32; a float tensor is returned as it is."""
    if imgs.dtype != torch.uint8:
        return imgs
    shift, scale = _channel_constants(tuple(mean), tuple(std), imgs.device)
    return (imgs.float() - 255 * shift) / (255 * scale)


def denormalize(imgs: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """The inverse of :func:`normalize`: pixels in 0..1, clipped."""
    shift, scale = _channel_constants(tuple(mean), tuple(std), imgs.device)
    return (imgs * scale + shift).clamp(0, 1)


@functools.lru_cache(maxsize=8)
def _channel_constants(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and deviation ``[C, 1, 1]``, copied to the device once: each copy would make the host wait for it."""
    with torch.inference_mode(False):  # else those first made for an evaluation could not be used in training
        return torch.tensor(mean, device=device).view(-1, 1, 1), torch.tensor(std, device=device).view(-1, 1, 1)


def _decode(cfg: DataConfig) -> list[Callable]:
    steps: list[Callable] = [functools.partial(decode, in_chans=cfg.in_chans)]
    return [*steps, v2.Pad(cfg.pad)] if cfg.pad else steps


def _crop(cfg: DataConfig) -> Callable:
    return v2.RandomResizedCrop(
        list(cfg.size),
        scale=(cfg.crop_scale[0], cfg.crop_scale[1]),
        ratio=(cfg.crop_ratio[0], cfg.crop_ratio[1]),
        interpolation=v2.InterpolationMode.BICUBIC,
        antialias=True,
    )


def _auto_augment(cfg: DataConfig, policy: str) -> Callable:
    if cfg.in_chans != 3:
        raise ConfigError(f"augment.auto_augment is {policy!r}; allowed with data.in_chans={cfg.in_chans} is null")
    fill = tuple(round(255 * m) for m in cfg.mean)
    params = {"translate_const": int(min(cfg.size) * 0.45), "img_mean": fill}
    kind = policy.split("-")[0]
    makers = {"rand": rand_augment_transform, "augmix": augment_and_mix_transform}
    try:
        return makers.get(kind, auto_augment_transform)(policy, params)
    except (AssertionError, KeyError, ValueError) as error:
        raise ConfigError(
            f"augment.auto_augment is {policy!r}; allowed is a policy of timm, e.g. rand-m9-mstd0.5-inc1"
        ) from error
