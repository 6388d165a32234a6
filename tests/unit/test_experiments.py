"""Every experiment file composes, opens with its command, and comes to the numbers that its recipe says."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fcmae.config import FinetuneConfig, PretrainConfig, compose, conf_dir
from fcmae.data.loader import BatchPlan
from fcmae.interchange.official import dense_name
from fcmae.models import create_backbone
from fcmae.training.optim import param_groups
from tests.conftest import GOLDEN

FOLDER = conf_dir() / "experiment"
FILES = sorted(FOLDER.rglob("*.yaml"))
COMMAND = re.compile(r"# fcmae (pretrain|finetune) experiment=(\S+)")
IMAGES = 1_281_167
SIZES = ("atto", "femto", "pico", "nano", "tiny", "base", "large", "huge")

# ConvNeXt V2, arXiv 2301.00808, appendix A.1, one column a size; blr as in the official commands.
FINETUNING: dict[str, tuple[Any, ...]] = {
    # blr, weight decay, layer decay, type, epochs, warm-up, mixup, cutmix, smoothing, drop path
    "atto": (2e-4, 0.3, 0.9, "single", 600, 0, 0.0, 0.0, 0.2, 0.1),
    "femto": (2e-4, 0.05, 0.9, "single", 600, 0, 0.3, 0.3, 0.2, 0.0),
    "pico": (2e-4, 0.3, 0.9, "single", 600, 0, 0.3, 0.3, 0.2, 0.0),
    "nano": (2e-4, 0.3, 0.9, "single", 600, 0, 0.5, 0.5, 0.2, 0.1),
    "tiny": (8e-4, 0.05, 0.9, "single", 300, 40, 0.8, 1.0, 0.1, 0.2),
    "base": (6.25e-4, 0.05, 0.6, "group", 100, 20, 0.8, 1.0, 0.1, 0.1),
    "large": (6.25e-4, 0.05, 0.6, "group", 100, 20, 0.8, 1.0, 0.1, 0.2),
    "huge": (1.25e-3, 0.05, 0.75, "group", 50, 10, 0.8, 1.0, 0.1, 0.3),
}
FINETUNING_STEPS = {
    "atto": 750_600,
    "femto": 750_600,
    "pico": 750_600,
    "nano": 750_600,
    "tiny": 375_300,
    "base": 125_100,
    "large": 125_100,
    "huge": 62_550,
}
FINETUNING_LR = {
    "atto": 8e-4,
    "femto": 8e-4,
    "pico": 8e-4,
    "nano": 8e-4,
    "tiny": 3.2e-3,
    "base": 2.5e-3,
    "large": 2.5e-3,
    "huge": 5e-3,
}


def name_of(file: Path) -> str:
    return file.relative_to(FOLDER).with_suffix("").as_posix()


def finetuning(size: str) -> FinetuneConfig:
    return compose("finetune", [f"experiment=in1k/finetune_{size}"])


def plan_of(cfg: PretrainConfig | FinetuneConfig, ranks: int) -> BatchPlan:
    trainer = cfg.trainer
    return BatchPlan.create(IMAGES, trainer.global_batch_size, trainer.micro_batch_size, ranks, cfg.seed)


def steps_of(cfg: PretrainConfig | FinetuneConfig) -> tuple[int, int]:
    """Steps of warm-up and in all, as the training loop counts them."""
    per_epoch = plan_of(cfg, 1).steps_per_epoch
    return round(cfg.schedule.warmup_epochs * per_epoch), round(cfg.schedule.epochs * per_epoch)


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_opens_with_its_command_and_composes(file: Path) -> None:
    package, command = file.read_text().splitlines()[:2]
    assert package == "# @package _global_"
    match = COMMAND.match(command)
    assert match is not None, f"{file} does not open with `# fcmae pretrain|finetune experiment=...`: {command}"
    assert match[2] == name_of(file)
    compose(match[1], [f"experiment={match[2]}"])


def test_there_are_experiments() -> None:
    assert len(FILES) >= 11


@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_debug_composes(command: str) -> None:
    cfg = compose(command, ["debug=default", "data=synthetic"])
    assert (cfg.trainer.max_steps, cfg.trainer.global_batch_size, cfg.trainer.compile) == (3, 8, False)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("epochs", "total"), [(800, 249_600), (1600, 499_200)])
def test_imagenet_pretraining(size: str, epochs: int, total: int) -> None:
    cfg: PretrainConfig = compose("pretrain", [f"experiment=in1k/pretrain_{epochs}ep", f"model=convnextv2_{size}"])
    model, optim, data = cfg.model, cfg.optim, cfg.data
    assert model.backbone == f"convnextv2_{size}"
    assert (model.mask_ratio, model.mask_patch_size, model.norm_pix_loss) == (0.6, None, True)
    assert (model.decoder_depth, model.decoder_embed_dim) == (1, 512)
    assert (data.image_size, data.crop_scale, data.hflip) == ((224, 224), [0.2, 1.0], 0.5)
    assert (optim.betas, optim.weight_decay, optim.layer_decay, optim.clip_grad) == ([0.9, 0.95], 0.05, None, None)
    assert cfg.trainer.ema_decay is None
    assert cfg.schedule.min_lr == 0
    assert optim.peak_lr(cfg.trainer.global_batch_size) == pytest.approx(2.4e-3)
    assert plan_of(cfg, 1).steps_per_epoch == 312
    assert steps_of(cfg) == (12_480, total)


@pytest.mark.parametrize("size", SIZES)
def test_imagenet_finetuning(size: str) -> None:
    cfg = finetuning(size)
    optim, schedule, augment = cfg.optim, cfg.schedule, cfg.augment
    recipe = (
        *(optim.blr, optim.weight_decay, optim.layer_decay, optim.layer_decay_type),
        *(schedule.epochs, schedule.warmup_epochs),
        *(augment.mixup, augment.cutmix, augment.label_smoothing, cfg.model.drop_path_rate),
    )
    assert recipe == FINETUNING[size]
    assert cfg.model.backbone == f"convnextv2_{size}"
    assert cfg.model.head_init_scale * 0.02 == pytest.approx(2e-5)
    assert (augment.auto_augment, augment.random_erasing) == ("rand-m9-mstd0.5-inc1", 0.25)
    assert optim.betas == [0.9, 0.999]
    assert cfg.trainer.ema_decay == 0.9999
    assert (cfg.data.image_size, cfg.data.crop_scale, cfg.data.crop_pct) == ((224, 224), [0.08, 1.0], 0.875)
    assert optim.peak_lr(cfg.trainer.global_batch_size) == pytest.approx(FINETUNING_LR[size])
    assert plan_of(cfg, 1).steps_per_epoch == 1_251
    assert steps_of(cfg) == (schedule.warmup_epochs * 1_251, FINETUNING_STEPS[size])


@pytest.mark.parametrize(
    ("command", "experiment", "batches"),
    [
        ("pretrain", "in1k/pretrain_800ep", {1: (256, 16), 8: (256, 2), 64: (64, 1)}),
        ("pretrain", "in1k/pretrain_1600ep", {1: (256, 16), 8: (256, 2), 64: (64, 1)}),
        *(("finetune", f"in1k/finetune_{size}", {1: (128, 8), 8: (128, 1), 64: (16, 1)}) for size in SIZES),
    ],
)
def test_batches_of_1_8_and_64_ranks(command: str, experiment: str, batches: dict[int, tuple[int, int]]) -> None:
    cfg = compose(command, [f"experiment={experiment}"])
    for ranks, (micro, accumulation) in batches.items():
        plan = plan_of(cfg, ranks)
        assert (plan.micro_batch_size, plan.accum_steps) == (micro, accumulation)
        assert ranks * micro * accumulation == cfg.trainer.global_batch_size


@pytest.mark.parametrize("size", SIZES)
def test_layer_decay_is_the_official_one(size: str) -> None:
    golden = json.loads((GOLDEN / "layer_decay.json").read_text())[size]["params"]
    cfg = finetuning(size)
    with torch.device("meta"):
        model = create_backbone(cfg.model.backbone, num_classes=1000)
    ours = {
        dense_name(name): (group["lr_scale"], group["weight_decay"])
        for group in param_groups(model, cfg.optim)
        for name in group["names"]
    }
    assert ours.keys() == golden.keys()
    for name, (scale, decay) in ours.items():
        assert scale == pytest.approx(golden[name]["lr_scale"], rel=1e-6), name
        assert decay == golden[name]["weight_decay"], name
