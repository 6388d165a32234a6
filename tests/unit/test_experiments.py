"""Every experiment file composes, opens with its command, and comes to the numbers that its recipe says."""

import copy
import functools
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import recipes
from fcmae.config import FinetuneConfig, KnnConfig, PretrainConfig, ProbeConfig, conf_dir
from fcmae.config import compose as compose_again
from fcmae.data.plan import BatchPlan
from fcmae.interchange.official import dense_name
from fcmae.models import create_backbone
from fcmae.models.build import build_network
from fcmae.models.objective import Objective
from fcmae.optim.adamw import param_groups
from fcmae.plugins import create
from tests.conftest import GOLDEN

FOLDER = conf_dir() / "experiment"
FILES = sorted(FOLDER.rglob("*.yaml"))
COMMAND = re.compile(r"# fcmae (pretrain|finetune|probe|knn) experiment=(\S+)")
ARITHMETIC = re.compile(r"(\d[\d,.e-]*(?: (?:\*|//?|\+) \d[\d,.e-]*)+) = ([\d,.]*\d(?:e-?\d+)?)( million)?")
IMAGES = {"in1k": 1_281_167, "in22k": 14_197_122}
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
FINETUNING_STEPS = dict(zip(SIZES, (*[750_600] * 4, 375_300, 125_100, 125_100, 62_550), strict=True))
FINETUNING_LR = dict(zip(SIZES, (*[8e-4] * 4, 3.2e-3, 2.5e-3, 2.5e-3, 5e-3), strict=True))
FINETUNED = dict(zip(SIZES, (76.7, 78.5, 80.3, 81.9, 83.0, 84.9, 85.8, 86.3), strict=True))

# ImageNet-22K, and from there to 1K; the same source. Layer decay: as on ImageNet-1K, single below Base.
IN22K: dict[str, tuple[Any, ...]] = {
    "nano": (2.5e-4, 0.05, 0.9, "single", 90, 5, 0.8, 1.0, 0.1, 0.0),
    "tiny": (2.5e-4, 0.05, 0.9, "single", 90, 5, 0.8, 1.0, 0.1, 0.0),
    "base": (2.5e-4, 0.05, 0.8, "group", 90, 5, 0.8, 1.0, 0.1, 0.1),
    "large": (2.5e-4, 0.05, 0.8, "group", 90, 5, 0.8, 1.0, 0.1, 0.1),
    "huge": (2.5e-4, 0.05, 0.8, "group", 90, 5, 0.8, 1.0, 0.1, 0.3),
}
TO_1K: dict[str, tuple[Any, ...]] = {
    "nano": (2.5e-5, 1e-8, 0.9, "single", 90, 0, 0.0, 0.0, 0.1, 0.1),
    "tiny": (2.5e-5, 1e-8, 0.9, "single", 90, 0, 0.0, 0.0, 0.1, 0.1),
    "base": (2.5e-5, 1e-8, 0.8, "group", 30, 0, 0.0, 0.0, 0.1, 0.2),
    "large": (2.5e-5, 1e-8, 0.8, "group", 30, 0, 0.0, 0.0, 0.1, 0.3),
    "huge": (2.5e-5, 1e-8, 0.85, "group", 30, 0, 0.0, 0.0, 0.1, 0.5),
}
TO_1K_PUBLISHED = {
    "nano": {224: 82.1, 384: 83.4},
    "tiny": {224: 83.9, 384: 85.1},
    "base": {224: 86.8, 384: 87.7},
    "large": {224: 87.3, 384: 88.2},
    "huge": {384: 88.7, 512: 88.9},
}


@functools.cache
def composed(command: str, *overrides: str) -> Any:
    return compose_again(command, list(overrides))


def compose(command: str, overrides: list[str]) -> Any:
    """What ``fcmae.config.compose`` returns, which takes a while, composed once."""
    return copy.deepcopy(composed(command, *overrides))


def name_of(file: Path) -> str:
    return file.relative_to(FOLDER).with_suffix("").as_posix()


def finetuning(size: str) -> FinetuneConfig:
    return compose("finetune", [f"experiment=in1k/finetune_{size}"]).settled({})


def plan_of(cfg: PretrainConfig | FinetuneConfig, ranks: int, data: str = "in1k") -> BatchPlan:
    sizes = cfg.optim.global_batch_size, cfg.trainer.micro_batch_size
    return BatchPlan.create(IMAGES[data], *sizes, ranks, cfg.seed)


def recipe_of(cfg: FinetuneConfig) -> tuple[Any, ...]:
    """What differs between sizes, in the order of FINETUNING."""
    optim, schedule, augment = cfg.optim, cfg.schedule, cfg.augment
    return (
        *(optim.blr, optim.weight_decay, optim.layer_decay, optim.layer_decay_type),
        *(schedule.epochs, schedule.warmup_epochs),
        *(augment.mixup, augment.cutmix, augment.label_smoothing, cfg.model.drop_path_rate),
    )


def published(experiment: str) -> float:
    """The result that an experiment file states."""
    match = re.search(r"# Published top-1: (\d+\.\d)", (FOLDER / f"{experiment}.yaml").read_text())
    assert match is not None
    return float(match[1])


def steps_of(cfg: PretrainConfig | FinetuneConfig, data: str = "in1k") -> tuple[int, int]:
    """Steps of warm-up and in all, as the training loop counts them."""
    per_epoch = plan_of(cfg, 1, data).steps_per_epoch
    return round(cfg.schedule.warmup_epochs * per_epoch), round(cfg.schedule.epochs * per_epoch)


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_opens_with_its_command_and_composes(file: Path) -> None:
    package, command = file.read_text().splitlines()[:2]
    assert package == "# @package _global_"
    match = COMMAND.match(command)
    assert match is not None, f"{file} does not open with `# fcmae COMMAND experiment=...`: {command}"
    assert match[2] == name_of(file)
    compose(match[1], [f"experiment={match[2]}", *(["checkpoint=RUN"] if match[1] in ("probe", "knn") else [])])


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_arithmetic_in_its_comments_is_right(file: Path) -> None:
    for sum_, result, million in ARITHMETIC.findall(file.read_text()):
        value = eval(sum_.replace(",", "")) / (1e6 if million else 1)  # digits and + * / only
        mantissa, _, exponent = result.replace(",", "").partition("e")
        last_digit = 10 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
        assert value == pytest.approx(float(result.replace(",", "")), abs=0.5001 * last_digit), sum_


def test_costs_and_the_table_are_what_the_measurements_say(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipes, "compose", compose)
    assert recipes.main(["--check"]) == 0, capsys.readouterr().out + "run python benchmarks/recipes.py"


def test_there_are_experiments() -> None:
    assert len(FILES) >= 35


@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_debug_composes(command: str) -> None:
    cfg = compose(command, ["debug=default", "data=synthetic"])
    assert (cfg.trainer.max_steps, cfg.optim.global_batch_size, cfg.trainer.compile) == (3, 8, False)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("epochs", "total"), [(800, 249_600), (1600, 499_200)])
def test_imagenet_pretraining(size: str, epochs: int, total: int) -> None:
    cfg: PretrainConfig = compose("pretrain", [f"experiment=in1k/pretrain_{epochs}ep", f"model=convnextv2_{size}"])
    model, optim, data = cfg.model, cfg.optim, cfg.data
    assert model.backbone == f"convnextv2_{size}"
    assert (model.mask_ratio, model.mask_patch_size) == (0.6, None)
    assert (model.decoder_depth, model.decoder_embed_dim) == (1, 512)
    assert (data.image_size, data.crop_scale, data.hflip) == ((224, 224), [0.2, 1.0], 0.5)
    assert (optim.betas, optim.weight_decay, optim.layer_decay, optim.clip_grad) == ([0.9, 0.95], 0.05, None, None)
    assert cfg.optim.ema_decay is None
    assert cfg.schedule.min_lr == 0
    assert optim.peak_lr == pytest.approx(2.4e-3)
    assert plan_of(cfg, 1).steps_per_epoch == 312
    assert steps_of(cfg) == (12_480, total)


@pytest.mark.parametrize("size", SIZES)
def test_imagenet_finetuning(size: str) -> None:
    cfg = finetuning(size)
    optim, augment = cfg.optim, cfg.augment
    assert recipe_of(cfg) == FINETUNING[size]
    assert published(f"in1k/finetune_{size}") == FINETUNED[size]
    assert cfg.model.backbone == f"convnextv2_{size}"
    assert cfg.model.head_init_scale * 0.02 == pytest.approx(2e-5)
    assert (augment.auto_augment, augment.random_erasing) == ("rand-m9-mstd0.5-inc1", 0.25)
    assert optim.betas == [0.9, 0.999]
    assert cfg.optim.ema_decay == 0.9999
    assert (cfg.data.image_size, cfg.data.crop_scale, cfg.data.crop_pct) == ((224, 224), [0.08, 1.0], 0.875)
    assert optim.peak_lr == pytest.approx(FINETUNING_LR[size])
    assert plan_of(cfg, 1).steps_per_epoch == 1_251
    assert steps_of(cfg) == (cfg.schedule.warmup_epochs * 1_251, FINETUNING_STEPS[size])


@pytest.mark.parametrize("size", IN22K)
def test_imagenet_22k(size: str) -> None:
    cfg: FinetuneConfig = compose("finetune", [f"experiment=in22k/finetune_{size}"]).settled({})
    assert recipe_of(cfg) == IN22K[size]
    assert (cfg.model.backbone, cfg.data.image_size) == (f"convnextv2_{size}", (224, 224))
    assert (cfg.augment.auto_augment, cfg.augment.random_erasing) == ("rand-m9-mstd0.5-inc1", 0.25)
    assert cfg.model.head_init_scale * 0.02 == pytest.approx(2e-5)
    assert cfg.optim.ema_decay is None
    assert cfg.optim.peak_lr == pytest.approx(4e-3)
    assert steps_of(cfg, "in22k") == (17_330, 311_940)


@pytest.mark.parametrize(("size", "pixels"), [(size, px) for size, of_px in TO_1K_PUBLISHED.items() for px in of_px])
def test_imagenet_22k_to_1k(size: str, pixels: int) -> None:
    name = f"in22k/to_1k_{size}_{pixels}"
    cfg: FinetuneConfig = compose("finetune", [f"experiment={name}"]).settled({})
    assert recipe_of(cfg) == TO_1K[size]
    assert (cfg.model.backbone, cfg.data.image_size) == (f"convnextv2_{size}", (pixels, pixels))
    assert cfg.model.head_init_scale * 0.02 == pytest.approx(2e-5)
    assert cfg.optim.ema_decay == (None if size == "huge" else 0.9999)
    assert cfg.optim.peak_lr == pytest.approx(5e-5)
    assert steps_of(cfg) == (0, {30: 75_060, 90: 225_180}[TO_1K[size][4]])
    assert published(name) == TO_1K_PUBLISHED[size][pixels]


def test_every_published_size_of_image_has_a_file() -> None:
    files = {name_of(file) for file in FILES if re.search(r"in22k/to_1k_\w+_\d", name_of(file))}
    assert files == {f"in22k/to_1k_{size}_{px}" for size, of_px in TO_1K_PUBLISHED.items() for px in of_px}


def test_probe_is_maes_recipe() -> None:
    cfg: ProbeConfig = compose("probe", ["experiment=in1k/probe", "checkpoint=RUN"])
    assert (cfg.optimizer, cfg.epochs, cfg.warmup_epochs, cfg.train_batch_size) == ("lars", 90, 10, 16_384)
    assert (cfg.weight_decay, cfg.momentum) == (0, 0.9)
    assert 0.1 in cfg.blr


def test_knn_compares_all_images() -> None:
    cfg: KnnConfig = compose("knn", ["experiment=in1k/knn", "checkpoint=RUN"])
    assert (cfg.gallery, cfg.queries, cfg.k, cfg.temperature) == (None, None, [10, 20, 100], 0.07)


@pytest.mark.parametrize("size", ["atto", "tiny", "base"])
def test_a_budget_fits_into_a_day(size: str) -> None:
    """By what was measured on an H100: steps, timm's or else the slower ones of masked layers, and reading shards."""
    speeds = recipes.measured()
    feeds = json.loads((recipes.ROOT / "benchmarks" / "feed-h100-2026-11-25.json").read_text())["feeds"]
    read = max(row["images_per_second"] for row in feeds if row["feed"] == "shards")
    hours = 0.0
    for command, engines in (("pretrain", ["packed"]), ("finetune", ["timm", "masked"])):
        cfg = compose(command, [f"experiment=budget/{size}_{command}"])
        assert cfg.model.backbone == f"convnextv2_{size}"
        known = [
            speeds[key]
            for engine in engines
            for key in sorted(speeds)
            if key[0].startswith("H100") and key[1:] == (cfg.model.backbone, engine, 224)
        ]
        hours += steps_of(cfg)[1] * cfg.optim.global_batch_size / min(known[0], read) / 3600
    assert 16 < hours < 23.5


@pytest.mark.parametrize(
    ("command", "experiment", "batches"),
    [
        ("pretrain", "in1k/pretrain_800ep", {1: (256, 16), 8: (256, 2), 64: (64, 1)}),
        ("pretrain", "in1k/pretrain_1600ep", {1: (256, 16), 8: (256, 2), 64: (64, 1)}),
        *(("finetune", f"in1k/finetune_{size}", {1: (128, 8), 8: (128, 1), 64: (16, 1)}) for size in SIZES),
        *(("finetune", f"in22k/finetune_{size}", {1: (128, 32), 8: (128, 4), 64: (64, 1)}) for size in IN22K),
        *(
            ("finetune", f"in22k/to_1k_{size}_224", {1: (128, 4), 8: (64, 1), 64: (8, 1)})
            for size in ("nano", "tiny", "base", "large")
        ),
        *(
            ("finetune", f"in22k/to_1k_{size}_384", {1: (64, 8), 8: (64, 1), 64: (8, 1)})
            for size in ("nano", "tiny", "base", "large")
        ),
        ("finetune", "in22k/to_1k_huge_384", {1: (32, 16), 8: (32, 2), 64: (8, 1)}),
        ("finetune", "in22k/to_1k_huge_512", {1: (16, 32), 8: (16, 4), 64: (8, 1)}),
    ],
)
def test_batches_of_1_8_and_64_ranks(command: str, experiment: str, batches: dict[int, tuple[int, int]]) -> None:
    cfg = compose(command, [f"experiment={experiment}"])
    for ranks, (micro, accumulation) in batches.items():
        plan = plan_of(cfg, ranks)
        assert (plan.micro_batch_size, plan.accum_steps) == (micro, accumulation)
        assert ranks * micro * accumulation == cfg.optim.global_batch_size


def official_layers(cfg: FinetuneConfig) -> dict[str, tuple[float, float]]:
    """The factor on the learning rate and the weight decay of every parameter, by its official name."""
    with torch.device("meta"):
        model = create_backbone(cfg.model.backbone, num_classes=1000)
    return {
        dense_name(name): (group["lr_scale"], group["weight_decay"])
        for group in param_groups(model, cfg.optim)
        for name in group["names"]
    }


def golden_layers(size: str) -> dict[str, dict[str, float]]:
    return json.loads((GOLDEN / "layer_decay.json").read_text())[size]["params"]


@pytest.mark.parametrize("size", SIZES)
def test_layer_decay_is_the_official_one(size: str) -> None:
    golden, ours = golden_layers(size), official_layers(finetuning(size))
    assert ours.keys() == golden.keys()
    for name, (scale, decay) in ours.items():
        assert scale == pytest.approx(golden[name]["lr_scale"], rel=1e-6), name
        assert decay == golden[name]["weight_decay"], name


@pytest.mark.parametrize("size", IN22K)
@pytest.mark.parametrize("stage", ["finetune_{}", "to_1k_{}_384"])
def test_layer_decay_from_22k_has_the_official_layers(size: str, stage: str) -> None:
    """Another factor than on ImageNet-1K, over the same layers."""
    cfg: FinetuneConfig = compose("finetune", [f"experiment=in22k/{stage.format(size)}"]).settled({})
    golden, ours = golden_layers(size), official_layers(cfg)
    assert cfg.optim.layer_decay is not None
    for name, (scale, decay) in ours.items():
        layers = math.log(golden[name]["lr_scale"]) / math.log(FINETUNING[size][2])
        assert scale == pytest.approx(cfg.optim.layer_decay**layers, rel=1e-5), name
        assert (decay > 0) == (golden[name]["weight_decay"] > 0), name


ADE20K = {"base": ("base", 512, 52.1, 122), "large": ("large", 512, 53.7, 235), "huge": ("huge", 512, 55.0, 707),
          "huge_22k": ("huge", 640, 57.0, 707)}  # fmt: skip
"""arXiv 2301.00808, table 7: mIoU, and millions of parameters."""


@pytest.mark.parametrize("name", ADE20K)
def test_ade20k(name: str) -> None:
    size, pixels, miou, parameters = ADE20K[name]
    cfg: FinetuneConfig = compose("finetune", [f"experiment=ade20k/upernet_{name}"]).settled({})
    optim, schedule = cfg.optim, cfg.schedule
    assert (cfg.model.backbone, cfg.data.image_size) == (f"convnextv2_{size}", (pixels, pixels))
    assert (optim.betas, optim.weight_decay, optim.global_batch_size) == ([0.9, 0.999], 0.05, 16)
    assert optim.peak_lr in (1e-4, 2e-4, 3e-4)
    assert (optim.layer_decay, optim.ema_decay) == (0.9, None)
    assert (schedule.decay, schedule.min_lr, cfg.model.drop_path_rate) == ("linear", 0, 0.4)
    per_epoch = 20_210 // 16
    assert (round(schedule.epochs * per_epoch), round(schedule.warmup_epochs * per_epoch)) == (160_000, 1_500)
    assert (cfg.augment.mixup, cfg.augment.auto_augment, cfg.data.hflip) == (0, None, 0.5)
    assert (cfg.data.crop_zoom, cfg.data.fit) == ([0.5, 2.0], "pad")
    assert f"# Published mIoU: {miou}" in (FOLDER / f"ade20k/upernet_{name}.yaml").read_text()
    with torch.device("meta"):
        objective = create(cfg.objective, "objective", Objective)
        model = build_network(cfg, objective)
    assert (len(objective.classes), objective.classes[0], objective.classes[-1]) == (150, "wall", "flag")
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == parameters


COCO = {"base": (52.9, 46.6), "large": (54.4, 47.7), "huge": (55.7, 48.9)}
"""AP of boxes and masks, second-hand."""


@pytest.mark.parametrize("size", COCO)
def test_coco(size: str) -> None:
    cfg: FinetuneConfig = compose("finetune", [f"experiment=coco/mask_rcnn_{size}"]).settled({})
    optim, schedule = cfg.optim, cfg.schedule
    assert (cfg.model.backbone, cfg.data.name) == (f"convnextv2_{size}", "coco")
    assert (cfg.data.image_size, cfg.data.scale_jitter, cfg.data.hflip) == ((1024, 1024), [0.1, 2.0], 0.5)
    assert (optim.betas, optim.weight_decay, optim.global_batch_size) == ([0.9, 0.999], 0.05, 32)
    assert (optim.peak_lr, optim.layer_decay, optim.layer_decay_type, optim.ema_decay) == (1e-4, 0.95, "group", None)
    per_epoch = 118_287 // 32
    assert (schedule.epochs, round(schedule.epochs * per_epoch)) == (36, 133_056)
    assert round(schedule.warmup_epochs * per_epoch, -2) == 1_000
    assert cfg.model.drop_path_rate in (0.2, 0.3, 0.4, 0.5)  # what the paper searches
    box, mask = COCO[size]
    assert f"# Published, from pretraining by FCMAE: box AP {box}, mask AP {mask}" in (
        FOLDER / f"coco/mask_rcnn_{size}.yaml").read_text()  # fmt: skip
    with torch.device("meta"):
        objective = create(cfg.objective, "objective", Objective)
        objective.load_state_dict({"classes": [str(number) for number in range(80)], "masks": True})
        model = build_network(cfg, objective)
    backbone, head = (sum(p.numel() for p in part.parameters()) / 1e6 for part in (model.backbone, model.head))
    assert round(backbone) == {"base": 88, "large": 196, "huge": 657}[size]
    assert 19 < head < 24
