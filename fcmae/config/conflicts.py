"""Checks of values that must fit each other, before data is read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fcmae.config.checks import check, mistake
from fcmae.config.few_labels import RECIPES
from fcmae.config.model import TIMM_TOTAL_STRIDE, TOTAL
from fcmae.grid import grid_size, len_keep
from fcmae.precision import FLOAT8, PRECISIONS

if TYPE_CHECKING:
    from fcmae.config.commands import FinetuneConfig, PretrainConfig, RunConfig
    from fcmae.config.model import FCMAEConfig

DETECT = "fcmae.tasks.objectives.Detect"


def _detects(cfg: RunConfig) -> bool:
    return (getattr(cfg, "objective", None) or {}).get("_target_") == DETECT


def graph_obstacles(cfg: RunConfig, device: str) -> list[str]:
    """What in a config prevents a CUDA graph.

    Args:
        device: ``cuda`` or another type; ``auto`` = not known yet.
    """
    obstacles = {
        "a CPU": device not in ("cuda", "auto"),
        "objective=detect": _detects(cfg),  # how many regions there are depends on the images
        "precision=fp16": cfg.precision == "fp16",  # the scale of the loss would be recorded
    }
    return [name for name, present in obstacles.items() if present]


def check_cuda_graph(cfg: RunConfig, obstacles: list[str]) -> bool:
    """Whether steps are replayed from a CUDA graph. A mistake where that was asked for and cannot be."""
    asked = cfg.trainer.cuda_graph
    if asked and obstacles:
        mistake(f"trainer.cuda_graph must be false or null with {' and '.join(obstacles)}; got True")
    return not obstacles if asked is None else asked and not obstacles


def check_pretraining(cfg: PretrainConfig) -> None:
    """Patches against image, batch against crops, CUDA graph."""
    check("data.sampling", cfg.data.sampling, cfg.data.sampling == "uniform", "uniform in pretraining")
    check("data.scale_jitter", cfg.data.scale_jitter, cfg.data.scale_jitter is None, "null in pretraining")
    check("optim.layer_decay", cfg.optim.layer_decay, cfg.optim.layer_decay is None, "null in pretraining")
    check_cuda_graph(cfg, graph_obstacles(cfg, cfg.trainer.device))
    engine = cfg.engine.name
    check("engine.name", engine, cfg.precision != FLOAT8 or engine == "packed", f"packed with precision={FLOAT8}")
    batch, crops = cfg.optim.global_batch_size, cfg.data.crops_per_image
    ok = crops < 1 or batch % crops == 0
    check("optim.global_batch_size", batch, ok, f"a multiple of data.crops_per_image ({crops})")
    _check_micro_batch(cfg, crops, f"data.crops_per_image={crops}")
    for name in ("target_path", "val_target_path", "target_column", "num_images"):
        value = getattr(cfg.data, name)
        check(f"data.{name}", value, value is None, "null in pretraining")
    decoder = cfg.data.decode_on
    check(
        "data.decode_on", decoder, decoder == "cpu" or cfg.loader.on_error == "raise", "cpu with loader.on_error=skip"
    )
    unaware = cfg.data.nodata is None and cfg.data.fit == "crop" and not _has_extra(cfg)
    expected = "[] with data.nodata, with data.fit=pad, and with channels that only targets get (data.channels)"
    check("data.transforms", cfg.data.transforms, unaware or not cfg.data.transforms, expected)
    stem, strides = cfg.model.stem_stride, cfg.model.strides
    if stem not in TIMM_TOTAL_STRIDE if strides is None else cfg.model.total_stride not in TOTAL:
        return  # noted already
    stride = cfg.model.total_stride
    _check_pred_patch_size(cfg.model)
    patch = cfg.model.mask_patch_size or stride
    if patch < 1:
        return
    given = "stem_stride" if cfg.model.strides is None else "strides"
    allowed = f"a multiple of {stride}, the total stride with model.{given}={getattr(cfg.model, given)}"
    if check("model.mask_patch_size", patch, patch % stride == 0, allowed):
        try:
            rows, columns = grid_size(*cfg.data.size, patch)
        except ValueError as error:
            mistake(f"data.image_size: {error}")
            return
        if 0 < cfg.model.mask_ratio < 1:
            try:
                len_keep(rows * columns, cfg.model.mask_ratio)
            except ValueError as error:
                mistake(f"model.{error}")


def _check_pred_patch_size(model: FCMAEConfig) -> None:
    size, first = model.pred_patch_size or model.total_stride, model.first_stride
    allowed = f"a divisor of {model.total_stride}, the total stride"
    if model.decoder == "unet":
        allowed += f", and a multiple of {first}, the stride of the first stage, with model.decoder=unet"
    ok = size > 0 and model.total_stride % size == 0 and (model.decoder != "unet" or size % first == 0)
    check("model.pred_patch_size", size, ok, allowed)


def check_finetuning(cfg: FinetuneConfig) -> None:
    """Values that only pretraining can use."""
    expected = f"{', '.join(PRECISIONS[:-1])} or {PRECISIONS[-1]} in fine-tuning"
    check("precision", cfg.precision, cfg.precision != FLOAT8, expected)
    check("data.crops_per_image", cfg.data.crops_per_image, cfg.data.crops_per_image == 1, "1 in fine-tuning")
    check("data.decode_on", cfg.data.decode_on, cfg.data.decode_on == "cpu", "cpu in fine-tuning")
    check("data.cache", cfg.data.cache, cfg.data.cache != "gpu", "null or ram in fine-tuning")
    windows = cfg.data.windows_per_image
    check("data.windows_per_image", windows, windows == 1, "1 in fine-tuning")
    expected = "a list in fine-tuning, the channels that the network gets"
    check("data.channels", cfg.data.channels, not _has_extra(cfg), expected)
    if cfg.augment.mixup > 0 or cfg.augment.cutmix > 0:
        _check_micro_batch(cfg, 2, "augment.mixup or augment.cutmix (pairs)")
    jitter, engine = cfg.data.scale_jitter, cfg.engine.name
    check("data.scale_jitter", jitter, jitter is None or _detects(cfg), "null unless objective=detect")
    check("engine.name", engine, engine == "dense" or not _detects(cfg), "dense with objective=detect")
    check_cuda_graph(cfg, graph_obstacles(cfg, cfg.trainer.device))


def _has_extra(cfg: RunConfig) -> bool:
    """Whether there are channels that only targets get."""
    channels = cfg.data.channels
    return isinstance(channels, dict) and any(channels.get(name) for name in ("target", "classes"))


def check_auto(cfg: FinetuneConfig, classify: str) -> None:
    """What ``recipe=auto`` cannot be combined with. ``classify`` is the objective that it is for."""
    if not check("recipe", cfg.recipe, cfg.recipe in (None, *RECIPES), f"null or one of {', '.join(RECIPES)}"):
        return
    if cfg.recipe is None:
        return
    every, decay, target = cfg.trainer.eval_every_epochs, cfg.optim.ema_decay, cfg.objective.get("_target_")
    why = "with recipe=auto, which reads no validation images; run fcmae evaluate afterwards"
    check("trainer.eval_every_epochs", every, every is None, f"null {why}")
    check("optim.ema_decay", decay, decay is None, "null with recipe=auto")
    budget = cfg.trainer.budget
    check("trainer.budget", budget, budget is None, "null with recipe=auto, whose search takes a time of its own")
    check("objective._target_", target, target == classify, f"{classify} with recipe=auto")


def _check_micro_batch(cfg: RunConfig, least: int, why: str) -> None:
    micro = cfg.trainer.micro_batch_size
    if type(micro) is int and 0 < micro < least:
        mistake(f"trainer.micro_batch_size must be at least {least} with {why}; got {micro}")
