"""Models from configs and from checkpoints."""

from pathlib import Path

import torch
from timm.models.convnext import ConvNeXt
from torch import nn

from fcmae.config import ClassifierConfig, FinetuneConfig, PretrainConfig, RunConfig, from_dict
from fcmae.engines import available_engines
from fcmae.errors import CheckpointError, UsageError
from fcmae.models import FCMAE, create_backbone
from fcmae.randomness import Stream, seed_globals
from fcmae.training import checkpoint
from fcmae.training.checkpoint import State

SCHEMAS: dict[str, type[RunConfig]] = {"pretrain": PretrainConfig, "finetune": FinetuneConfig}


def build_fcmae(cfg: PretrainConfig) -> FCMAE:
    """The pretraining model with its initial weights, a function of the seed. Raises UsageError."""
    seed_globals(cfg.seed, Stream.INIT)
    model = cfg.model
    try:
        fcmae = FCMAE(
            model.backbone,
            in_chans=cfg.data.in_chans,
            mask_ratio=model.mask_ratio,
            mask_patch_size=model.mask_patch_size,
            norm_pix_loss=model.norm_pix_loss,
            decoder_embed_dim=model.decoder_embed_dim,
            decoder_depth=model.decoder_depth,
            engine=cfg.engine.name,
            grn_scope=cfg.engine.grn_scope,
            init=model.init,
            recompute_stages=cfg.engine.recompute_stages,
            backbone_kwargs=model.backbone_kwargs(),
        )
        fcmae.len_keep(*cfg.data.size)
    except (ValueError, ImportError) as error:
        raise UsageError(str(error)) from error
    return fcmae


def build_classifier(cfg: ClassifierConfig, in_chans: int, num_classes: int, seed: int) -> ConvNeXt:
    """The dense classifier with its initial weights, a function of the seed. Raises UsageError."""
    seed_globals(seed, Stream.INIT)
    try:
        model = create_backbone(
            cfg.backbone,
            in_chans=in_chans,
            num_classes=num_classes,
            drop_path_rate=cfg.drop_path_rate,
            head_init_scale=cfg.head_init_scale,
            **cfg.backbone_kwargs(),
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    return model


def config_of(state: State, path: Path) -> RunConfig:
    """The typed config that a checkpoint was trained with."""
    schema = SCHEMAS.get(state.get("task", ""))
    if schema is None:
        raise CheckpointError(f"{path} is of the task {state.get('task')!r}; known are {', '.join(SCHEMAS)}")
    return from_dict(schema, state["config"])


def load_state(model: nn.Module, weights: dict[str, torch.Tensor], path: Path, except_prefix: str = "\0") -> None:
    """Loads weights strictly, but for names that start with ``except_prefix``.

    Raises CheckpointError naming the keys that are missing, left over or of another shape.
    """
    own = {name: value for name, value in model.state_dict().items() if not name.startswith(except_prefix)}
    weights = {name: value for name, value in weights.items() if not name.startswith(except_prefix)}
    wrong = {
        "missing": sorted(own.keys() - weights.keys()),
        "unexpected": sorted(weights.keys() - own.keys()),
        "of another shape": [
            f"{name} {list(weights[name].shape)} for {list(own[name].shape)}"
            for name in sorted(own.keys() & weights.keys())
            if own[name].shape != weights[name].shape
        ],
    }
    if any(wrong.values()):
        reasons = "; ".join(f"{what}: {_some(names)}" for what, names in wrong.items() if names)
        raise CheckpointError(f"the weights in {path} do not fit the model ({reasons})")
    model.load_state_dict(weights, strict=False)


def _some(names: list[str]) -> str:
    """The first of many."""
    left = len(names) - 3
    return ", ".join(names[:3]) + (f" and {left} more" if left > 0 else "")


def backbone_weights(state: State) -> dict[str, torch.Tensor]:
    """The encoder's weights in a checkpoint of either task, as timm names them. Densifying is dropping the decoder."""
    prefix = "backbone."
    weights = state.get("ema") or state["model"]
    if state["task"] == "pretrain":
        return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    return weights


def load(path: str | Path, ema: bool = True) -> FCMAE | ConvNeXt:
    """Rebuilds the model of a checkpoint from that file alone.

    Args:
        path: a checkpoint file; or ``RUN``, ``RUN@best``, ``RUN@last`` or ``RUN@STEP``. Of ``RUN`` alone the best
            checkpoint is taken where one was kept, else the newest.
        ema: take the averaged weights where the run kept some.

    Returns:
        An :class:`fcmae.FCMAE` (``.backbone`` is the timm ConvNeXt) from pretraining, a timm classifier from
        fine-tuning; in evaluation mode, on the CPU.
    """
    file = checkpoint.resolve(path)
    return model_of(checkpoint.read(file), file, ema)


def model_of(state: State, path: Path, ema: bool = True) -> FCMAE | ConvNeXt:
    """The model in a checkpoint's state, in evaluation mode."""
    cfg = config_of(state, path)
    model: FCMAE | ConvNeXt
    if isinstance(cfg, PretrainConfig):
        if cfg.engine.name not in available_engines():
            cfg.engine.name = "packed"  # computes the same
        model = build_fcmae(cfg)
    else:
        assert isinstance(cfg, FinetuneConfig)
        model = build_classifier(cfg.model, cfg.data.in_chans, len(state["classes"]), cfg.seed)
    weights = (state.get("ema") if ema else None) or state["model"]
    load_state(model, weights, path)
    return model.eval()
