"""Checkpoints with random weights, for the tests of exports and imports."""

import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data.transforms import ResizeKeepRatio, str_to_interp_mode

from fcmae.checkpoints import checkpoint
from fcmae.config import ClassifierConfig, DataConfig, FCMAEConfig, FinetuneConfig, PretrainConfig, to_dict
from fcmae.models.build import build_classifier, build_fcmae
from fcmae.version import versions

TINY: dict[str, Any] = {"depths": [1, 2, 1, 1], "dims": [8, 12, 16, 24]}
CLASSES = ["ant", "bee", "cat"]


def random_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The model's weights plus noise, so that no two layers and no norm are at initial values, but for its head's."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: value if "backbone.head." in name else value + 0.1 * torch.randn(value.shape, generator=generator)
        for name, value in model.state_dict().items()
    }


def data_config(in_chans: int = 3, image_size: Any = 64, **values: Any) -> DataConfig:
    """A data config whose mean and standard deviation differ by channel."""
    mean = [0.4 + 0.02 * channel for channel in range(in_chans)]
    std = [0.2 + 0.01 * channel for channel in range(in_chans)]
    return DataConfig(in_chans=in_chans, image_size=image_size, mean=mean, std=std, **values)


def timms_transform(*, interpolation: str, **kwargs: Any) -> Callable:
    """timm's create_transform; before timm 1.0.31 its resize to a size that is no square drops ``interpolation``."""
    transform = timm.data.create_transform(interpolation=interpolation, **kwargs)
    for step in transform.transforms:
        if isinstance(step, ResizeKeepRatio):
            step.interpolation = str_to_interp_mode(interpolation)
    return transform


def pretrained(path: Path, data: DataConfig | None = None, **model: Any) -> dict[str, torch.Tensor]:
    """Writes a pretraining checkpoint to ``path`` and returns its weights."""
    config = FCMAEConfig(**{**TINY, "decoder_embed_dim": 16, **model})
    cfg = PretrainConfig(data=data or data_config(), model=config)
    weights = random_weights(build_fcmae(cfg))
    _write(path, {"task": "pretrain", "config": to_dict(cfg), "step": 7, "model": weights, "ema": None})
    return weights


def finetuned(path: Path, data: DataConfig | None = None, **model: Any) -> dict[str, torch.Tensor]:
    """Writes a classifier's checkpoint to ``path`` and returns its weights."""
    cfg = FinetuneConfig(data=data or data_config(), model=ClassifierConfig(**{**TINY, **model}))
    weights = random_weights(build_classifier(cfg.model, cfg.data.in_chans, len(CLASSES), cfg.seed))
    state = {"task": "finetune", "config": to_dict(cfg), "step": 7, "model": weights, "ema": None, "classes": CLASSES}
    _write(path, state)
    return weights


def _write(path: Path, state: dict[str, Any]) -> None:
    checkpoint.write_atomically(path, {"format": checkpoint.FORMAT, "versions": versions(), **state})


def backbone_of(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The backbone's weights in those of a pretraining model."""
    return {name.removeprefix("backbone."): value for name, value in weights.items() if name.startswith("backbone.")}


def weights_in(path: Path) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint."""
    return checkpoint.read(path)["model"]


Change = Callable[[dict[str, Any]], object]


def classifier(folder: Path, change: Change = lambda state: None) -> Path:
    """A classifier's checkpoint in a run's folder, whose state was changed as nothing checks it."""
    path = folder / "run" / "checkpoints" / "step_00000007.pt"
    path.parent.mkdir(parents=True)
    finetuned(path)
    state = torch.load(path, weights_only=True)
    change(state)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return sealed(path, buffer.getvalue())


def sealed(path: Path, archive: bytes) -> Path:
    """A checkpoint of any archive: whoever makes one can make its checksum."""
    path.write_bytes(archive + checkpoint.MAGIC + hashlib.sha256(archive).digest())
    return path
