"""The commands ``evaluate``, ``knn`` and ``reconstruct`` as functions."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from timm.models.convnext import ConvNeXt

from fcmae.config import DataConfig, EvaluateConfig, KnnConfig, check
from fcmae.data.pixels import read_file
from fcmae.data.sources import ImageFolder, require_labels, val_source
from fcmae.data.transforms import eval_transform, normalize
from fcmae.errors import CheckpointError
from fcmae.evaluation.classify import accuracy
from fcmae.evaluation.knn import knn_accuracy
from fcmae.evaluation.reconstruct import reconstruction_picture
from fcmae.masking import grid_size, random_mask
from fcmae.models import FCMAE
from fcmae.training import checkpoint, distributed
from fcmae.training.build import config_of, model_of
from fcmae.training.distributed import World


def _load(path: str, ema: bool = True) -> tuple[FCMAE | ConvNeXt, DataConfig]:
    file = checkpoint.resolve(path)
    state = checkpoint.read(file)
    return model_of(state, file, ema), config_of(state, file).data


def evaluate(cfg: EvaluateConfig) -> dict[str, float]:
    """Top-1 and top-5 of a fine-tuned checkpoint, with its averaged weights too where it kept some."""
    file = checkpoint.resolve(cfg.checkpoint)
    state = checkpoint.read(file)
    data = cfg.merge_data(config_of(state, file).data)
    world = distributed.connect(cfg.device)
    try:
        result: dict[str, float] = {}
        for prefix, ema in (("", False), ("ema_", True)) if state.get("ema") else (("", False),):
            model = model_of(state, file, ema)
            if isinstance(model, FCMAE):
                raise CheckpointError(
                    f"{file} is of the task 'pretrain' and has no classifier; fine-tune it, or use knn"
                )
            source = val_source(data)
            if require_labels(source, "data.val_path") != state["classes"]:
                raise CheckpointError(f"the classes of data.val_path differ from those {file} was trained with")
            metrics = accuracy(model.to(world.device), source, data, cfg.batch_size, cfg.precision, world)
            result |= {f"{prefix}{name}" if name != "images" else name: value for name, value in metrics.items()}
        return result
    finally:
        distributed.disconnect()


def knn(cfg: KnnConfig) -> dict[str, float]:
    """k-NN accuracy of a checkpoint's backbone."""
    model, own = _load(cfg.checkpoint)
    backbone = model.backbone if isinstance(model, FCMAE) else model
    device = distributed.pick_device(cfg.device)
    accuracy_percent = knn_accuracy(
        backbone.to(device),
        cfg.merge_data(own),
        k=cfg.k,
        temperature=cfg.temperature,
        gallery=cfg.gallery,
        batch_size=cfg.batch_size,
        precision=cfg.precision,
        world=World(0, 1, 0, 1, device),
    )
    return {"knn": accuracy_percent, "k": cfg.k}


def reconstruct(path: str, images: Sequence[str], max_images: int, mask_ratio: float | None, seed: int) -> Image.Image:
    """A picture of the reconstructions of image files, or of the images in folders, by a pretraining checkpoint."""
    model, data = _load(path)
    if not isinstance(model, FCMAE):
        raise CheckpointError(f"{path} is of the task 'finetune' and has no decoder; give a pretraining checkpoint")
    if mask_ratio is not None:
        check("--mask-ratio", mask_ratio, 0 <= mask_ratio < 1, "a number in [0, 1)")
        model.mask_ratio = mask_ratio
    check("--max-images", max_images, max_images > 0, "a positive integer")
    files = [file for image in images for file in _files(image, max_images)]
    transform = eval_transform(dataclasses.replace(data, crop_pct=1.0))
    raw = torch.stack([transform(read_file(file)) for file in files[:max_images]])
    imgs = normalize(raw, data.mean, data.std)
    rows, cols = grid_size(*data.size, model.mask_patch_size)
    noise = torch.rand(len(imgs), rows * cols, generator=torch.Generator().manual_seed(seed))
    return reconstruction_picture(model, imgs, data, random_mask(noise, model.len_keep(*data.size)))


def _files(image: str, count: int) -> list[str]:
    """The path itself, or of a folder the first images in it."""
    if not Path(image).is_dir():
        return [image]
    folder = ImageFolder(image)
    return [folder.describe(index) for index in range(min(count, len(folder)))]
