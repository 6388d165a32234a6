"""timm's policies of auto-augmentation: as it does them, or as the list of operations that it would do."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

from PIL import Image
from timm.data import auto_augment as timm_policies
from timm.data.auto_augment import AugmentOp, AugMixAugment, AutoAugment, RandAugment
from timm.data.transforms import str_to_pil_interp

from fcmae.config import DataConfig
from fcmae.data.pixels.operations import GROUPS, Operation
from fcmae.errors import ConfigError

Policy = RandAugment | AutoAugment | AugMixAugment


def create_policy(cfg: DataConfig, name: str) -> Policy:
    """A policy of timm, for Pillow's images. Raises ConfigError for pixels that are no photos, and an unknown name."""
    photos = {"in_chans": 3, "bit_depth": 8, "dtype": "uint"}
    other = [f"data.{key}={getattr(cfg, key)}" for key, value in photos.items() if getattr(cfg, key) != value]
    other += ["data.normalize=image"] * (cfg.normalize == "image")
    if other:
        raise ConfigError(f"augment.auto_augment must be null with {other[0]}; got {name!r}")
    # The parameters of timm's create_transform, with the official recipe's interpolation: by default timm draws
    # bilinear or bicubic each time.
    params: dict[str, Any] = {
        "translate_const": int(min(cfg.size) * 0.45),
        "img_mean": fill_of(cfg),
        "interpolation": str_to_pil_interp("bicubic"),
    }
    kind = name.split("-")[0]
    if kind == "augmix":
        params["translate_pct"] = 0.3
    makers = {"rand": timm_policies.rand_augment_transform, "augmix": timm_policies.augment_and_mix_transform}
    try:
        policy = makers.get(kind, timm_policies.auto_augment_transform)(name, params)
    except (AssertionError, KeyError, ValueError) as error:
        raise ConfigError(
            f"augment.auto_augment must be a policy of timm, such as rand-m9-mstd0.5-inc1; got {name!r}"
        ) from error
    for operation in _operations(policy):
        if operation.aug_fn is timm_policies.posterize:
            operation.aug_fn = _posterize
    return policy


def recorded(policy: Policy, name: str) -> Callable[[tuple], tuple[Operation, ...]]:
    """A policy that draws the same numbers as before, but lists operations instead of doing them.

    Called with an empty tuple. Raises ConfigError naming an operation that :mod:`fcmae.data.pixels.operations` lacks.
    """
    whole = "AugMix" if isinstance(policy, AugMixAugment) else None
    for operation in _operations(policy):
        kind = operation.aug_fn.__name__.removeprefix("_")
        if whole or kind not in GROUPS:
            raise ConfigError(f"augment.on must be cpu with augment.auto_augment={name}: {whole or operation.name}")
        operation.aug_fn = functools.partial(_record, kind)  # type: ignore[assignment]
    return policy


def _record(kind: str, listed: tuple[Operation, ...], argument: float = 0, **how: Any) -> tuple[Operation, ...]:
    return *listed, (kind, argument)


def fill_of(cfg: DataConfig) -> tuple[int, ...]:
    """The colour of what operations take from outside of an image: the mean."""
    return tuple(min(255, round(255 * mean)) for mean in cfg.mean)


def _operations(policy: Policy) -> Iterator[AugmentOp]:
    """All operations that a policy draws from."""
    groups = policy.policy if isinstance(policy, AutoAugment) else [policy.ops]
    for group in groups:
        yield from group


def _posterize(image: Image.Image, bits: int, **how: Any) -> Image.Image:
    """timm's, where 0 bits leave black: Pillow 13 refuses what earlier ones did so."""
    return timm_policies.posterize(image, bits, **how) if bits > 0 else image.point([0] * 256 * len(image.getbands()))
