"""Models from configs and from checkpoints."""

import dataclasses
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from timm.models.convnext import ConvNeXt
from torch import nn
from torch.overrides import TorchFunctionMode

from fcmae.checkpoints import checkpoint
from fcmae.checkpoints.checkpoint import State
from fcmae.checkpoints.encoder import TASK, backbone_weights
from fcmae.config import (
    CLASSIFY,
    BackboneConfig,
    ClassifierConfig,
    FCMAEConfig,
    FinetuneConfig,
    PretrainConfig,
    RunConfig,
    from_dict,
)
from fcmae.engines import available_engines
from fcmae.errors import CheckpointError, ConfigError, UsageError, first_of, reason_of
from fcmae.models import FCMAE, create_backbone
from fcmae.models.backbone import stage_shapes
from fcmae.models.fcmae import LOG_VAR, init_official
from fcmae.models.headed import Headed, backbone_of
from fcmae.models.objective import BoxObjective, DenseObjective, Objective
from fcmae.plugins import create, is_ours, named_by
from fcmae.randomness import Stream, seed_globals
from fcmae.targets import create_target

Network = TypeVar("Network", bound=nn.Module)
MAX_BLOCKS = 1000
"""ConvNeXt V2 Huge has 36."""
MARGIN = 2**20
"""Weights that a network may have beyond twice those of the file that it comes from."""
SCHEMAS: dict[str, type[RunConfig]] = {"pretrain": PretrainConfig, "finetune": FinetuneConfig, TASK: PretrainConfig}


def build_fcmae(cfg: PretrainConfig) -> FCMAE:
    """The pretraining model with its initial weights, a function of the seed. Raises UsageError."""
    seed_globals(cfg.seed, Stream.INIT)
    targets = {name: partial(create_target, given, f"target.{name}") for name, given in cfg.target.items()}
    of_backbone = {field.name for field in dataclasses.fields(BackboneConfig)}
    own = {name: value for name, value in vars(cfg.model).items() if name not in {*of_backbone, "init"}}
    try:
        fcmae = FCMAE(
            cfg.model.backbone,
            targets=targets,
            engine=cfg.engine.name,
            in_chans=cfg.data.in_chans,
            **own,
            **cfg.model.backbone_kwargs(),
        )
        if cfg.model.init == "official":
            init_official(fcmae)
        fcmae.recompute_stages = cfg.engine.recompute_stages
        fcmae.target_weights = {name: given["weight"] for name, given in cfg.target.items()}
        fcmae.len_keep(*cfg.data.size)
    except UsageError:
        raise
    except (ValueError, ImportError) as error:
        raise UsageError(str(error)) from error
    return fcmae


def build_classifier(cfg: ClassifierConfig, in_chans: int, num_classes: int, seed: int) -> ConvNeXt:
    """The dense classifier with its initial weights, a function of the seed. Raises UsageError."""
    seed_globals(seed, Stream.INIT)
    scale = {"drop_path_rate": cfg.drop_path_rate, "head_init_scale": cfg.head_init_scale}
    return _create(cfg, in_chans, num_classes=num_classes, **scale)


def _create(cfg: BackboneConfig, in_chans: int, **more: Any) -> ConvNeXt:
    """The timm ConvNeXt of a config. Raises UsageError."""
    try:
        return create_backbone(cfg.backbone, in_chans=in_chans, **cfg.backbone_kwargs(), **more)
    except ValueError as error:
        raise UsageError(str(error)) from error


def build_network(cfg: FinetuneConfig, objective: Objective) -> ConvNeXt | Headed:
    """The network of fine-tuning with its initial weights, a function of the seed. Raises UsageError."""
    backbone = build_classifier(cfg.model, cfg.data.in_chans, objective.outputs or 0, cfg.seed)
    if objective.outputs is not None:
        return backbone
    if isinstance(objective, DenseObjective | BoxObjective):
        head: Any = objective.decoder(*stage_shapes(backbone))
    else:
        head = objective.head(stage_shapes(backbone)[0])
    if not isinstance(head, nn.Module):
        raise ConfigError(
            f"objective: {cfg.objective['_target_']}.head must return a torch.nn.Module; got {type(head).__name__}"
        )
    return Headed(backbone, head)


def objective_of(state: State, cfg: FinetuneConfig) -> Objective:
    """The objective of a fine-tuning checkpoint, with what it learned. Raises ConfigError."""
    objective: Objective
    try:
        objective = create(cfg.objective, "objective", Objective)
    except ConfigError:
        if not is_ours(cfg.objective):
            raise
        # Earlier versions took values of ``best`` that are refused now, and a network that is trained does without.
        others = {key: value for key, value in cfg.objective.items() if key != "best"}
        objective = create(others, "objective", Objective)
    objective.load_state_dict({**(state.get("objective") or {}), "classes": state.get("classes") or []})
    return objective


def config_of(state: State, path: Path, allow: Collection[str] = ()) -> RunConfig:
    """The typed config that a checkpoint was trained with. Classes that it names are marked, so that none is called.

    Args:
        allow: classes of masks, targets and objectives that may be called.

    Raises CheckpointError, ConfigError.
    """
    schema = SCHEMAS.get(state.get("task", ""))
    if schema is None:
        raise CheckpointError(f"{path} is of the task {state.get('task')!r}; known are {', '.join(SCHEMAS)}")
    lacking = [name for name in ("config", "model") if state.get(name) is None]
    if lacking:
        raise CheckpointError(f"{path} has no {lacking[0]}")
    if state.get("unknown"):
        raise CheckpointError(
            f"{path} was written by version 0.1.0 and does not say {', '.join(unsaid(state))}; give its run or a "
            "checkpoint instead"
        )
    cfg = from_dict(schema, state["config"])
    if cfg.data.dtype is None:  # unset, in fine-tuning: earlier versions had pixels of 8 or 16 bits only
        cfg.data.dtype = "uint"
    if cfg.data.normalize is None:  # likewise
        cfg.data.normalize = "dataset"
    for name in ("source", "val_source"):
        given = getattr(cfg.data, name)
        if given is not None:
            setattr(cfg.data, name, named_by(path, given))
    cfg.data.transforms = [named_by(path, given) for given in cfg.data.transforms]
    if isinstance(cfg, PretrainConfig):
        cfg.mask = named_by(path, cfg.mask, allow)
        cfg.target = {name: named_by(path, given, allow) for name, given in cfg.target.items()}
    if isinstance(cfg, FinetuneConfig):
        cfg.objective = named_by(path, cfg.objective, allow)
    return cfg


_INITIAL_VALUES = frozenset({torch.Tensor.clamp_, torch.Tensor.erfinv_, torch.Tensor.uniform_})


class _WithoutValues(TorchFunctionMode):
    """Skips the drawing of initial values, which takes long on ``meta`` too: most of all ``clamp_``, 2 ms each.

    timm before 1.0.22 reads the values of a ``linspace`` while it builds a network; that one is on the CPU.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _INITIAL_VALUES and args[0].is_meta:
            return args[0]
        return func(*args, **{**(kwargs or {}), **({"device": "cpu"} if func is torch.linspace else {})})


def on_meta(build: Callable[[], Network], cfg: BackboneConfig, path: Path) -> Network:
    """The network of a config that comes from a file, without memory for its weights.

    Args:
        build: builds the network.
        cfg: its group ``model``.

    Raises CheckpointError.
    """
    blocks = sum(cfg.depths or []) + (cfg.decoder_depth if isinstance(cfg, FCMAEConfig) else 0)
    if blocks > MAX_BLOCKS:
        raise CheckpointError(f"{path} has a config of {blocks} blocks; at most {MAX_BLOCKS} are built")
    try:
        with torch.device("meta"), _WithoutValues():
            return build()
    except ConfigError:
        raise
    except UsageError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (RuntimeError, OverflowError, TypeError) as error:
        raise CheckpointError(f"{path} has a config of no network: {reason_of(error)}") from error


def check_size(
    build: Callable[[], nn.Module], cfg: BackboneConfig, weights: Mapping[str, torch.Tensor], path: Path
) -> None:
    """Raises CheckpointError if the network of a config that comes from a file is larger than the weights beside it.

    Call it before the network is built, which might take any memory. For the arguments see :func:`on_meta`.
    """
    needed = sum(parameter.numel() for parameter in on_meta(build, cfg, path).parameters())
    present = sum(value.numel() for value in weights.values())
    if needed > 2 * present + MARGIN:
        raise CheckpointError(f"{path} has {present:,} weights; the network of its config needs {needed:,}")


def check_backbone_size(known: dict[str, dict[str, Any]], weights: Mapping[str, torch.Tensor], path: Path) -> None:
    """:func:`check_size` for the backbone that :func:`known_of` describes."""
    names = [field.name for field in dataclasses.fields(BackboneConfig)]
    model = BackboneConfig(**{name: known["model"][name] for name in names})
    check_size(partial(_create, model, known["data"]["in_chans"]), model, weights, path)


def unsaid(state: State) -> list[str]:
    """The keys of the data config that an old encoder file does not say."""
    return [f"data.{name}" for name in state.get("unknown", [])]


def known_of(state: State, path: Path) -> dict[str, dict[str, Any]]:
    """What a checkpoint says of the groups ``model`` and ``data``. An old encoder file does not say all keys."""
    if state.get("task") == TASK:
        return state["config"]
    cfg = config_of(state, path)
    assert isinstance(cfg, PretrainConfig | FinetuneConfig)
    return {"model": dataclasses.asdict(cfg.model), "data": dataclasses.asdict(cfg.data)}


def load_state(
    model: nn.Module, weights: dict[str, torch.Tensor], path: Path, except_prefix: str = "\0", assign: bool = False
) -> None:
    """Loads weights strictly, but for names that start with ``except_prefix``; with ``assign`` the tensors themselves.

    Raises CheckpointError naming the keys that are missing, left over or of another shape.
    """
    weights = {name: value for name, value in weights.items() if not name.startswith(except_prefix)}
    reasons = mismatch(model, weights, except_prefix)
    if reasons:
        raise CheckpointError(f"the weights in {path} do not fit the model ({reasons})")
    model.load_state_dict(weights, strict=False, assign=assign)


def mismatch(model: nn.Module, weights: dict[str, torch.Tensor], except_prefix: str = "\0") -> str:
    """Which weights are missing, left over or of another shape, but for the model's of a prefix; empty if none are."""
    own = {name: value for name, value in model.state_dict().items() if not name.startswith(except_prefix)}
    wrong = {
        "missing": sorted(own.keys() - weights.keys()),
        "unexpected": sorted(weights.keys() - own.keys()),
        "of another shape": [
            f"{name} {list(weights[name].shape)} for {list(own[name].shape)}"
            for name in sorted(own.keys() & weights.keys())
            if own[name].shape != weights[name].shape
        ],
    }
    return "; ".join(f"{what}: {first_of(names)}" for what, names in wrong.items() if names)


def with_loss_weights(weights: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Saved weights without targets' learned weights that are fixed in ``model``, and with its own that were fixed."""
    own = {name: value for name, value in model.state_dict().items() if name.startswith(LOG_VAR)}
    return own | {name: value for name, value in weights.items() if name in own or not name.startswith(LOG_VAR)}


def load(path: str | os.PathLike[str], ema: bool = True, allow: Collection[str] = ()) -> FCMAE | ConvNeXt | Headed:
    """Rebuilds the model of a checkpoint from that file alone.

    Args:
        path: a checkpoint file; or ``RUN``, ``RUN@best``, ``RUN@last`` or ``RUN@STEP``. Of ``RUN`` alone the best
            checkpoint is taken where one was kept, else the newest.
        ema: take the averaged weights where the run kept some.
        allow: classes, as ``_target_`` names them, that may be called although only the checkpoint names them.

    Returns:
        An :class:`fcmae.FCMAE` (``.backbone`` is the timm ConvNeXt) from pretraining, a timm classifier from
        fine-tuning (with an objective that has a head of its own: ``.backbone`` and ``.head``), a timm backbone from an
        encoder file; in evaluation mode, on the CPU.
    """
    file = checkpoint.resolve(path)
    return model_of(checkpoint.read(file), file, ema, allow)


def model_of(state: State, path: Path, ema: bool = True, allow: Collection[str] = ()) -> FCMAE | ConvNeXt | Headed:
    """The model in a checkpoint's state, in evaluation mode."""
    if state.get("task") == TASK:
        return _encoder_of(state, path)
    cfg = config_of(state, path, allow)
    assert isinstance(cfg, PretrainConfig | FinetuneConfig)
    if isinstance(cfg, PretrainConfig) and cfg.engine.name not in available_engines():
        cfg.engine.name = "packed"  # computes the same
    weights = (state.get("ema") if ema else None) or state["model"]
    model: FCMAE | ConvNeXt | Headed
    if isinstance(cfg, PretrainConfig):
        check_size(partial(build_fcmae, cfg), cfg.model, weights, path)
        model = build_fcmae(cfg)
    else:
        objective = objective_of(state, cfg)
        whole = partial(build_network, cfg, objective)
        backbone = partial(_create, cfg.model, cfg.data.in_chans, num_classes=objective.outputs or 0)
        check_size(
            whole if isinstance(objective, DenseObjective | BoxObjective) else backbone, cfg.model, weights, path
        )
        model = build_network(cfg, objective)
    load_state(model, weights, path)
    return model.eval()


def networks_of(
    state: State, path: Path, allow: Collection[str], device: torch.device
) -> Iterator[tuple[str, FCMAE | ConvNeXt | Headed]]:
    """The model, and with the prefix ``ema_`` that with averaged weights where the run kept some, on a device."""
    yield "", model_of(state, path, False, allow).to(device)
    if state.get("ema"):
        yield "ema_", model_of(state, path, True, allow).to(device)


def encoder_of(state: State, path: Path, ema: bool = True) -> ConvNeXt:
    """The backbone in a checkpoint of any task, as a timm classifier where it is one, in evaluation mode.

    Calls no class that the checkpoint names.
    """
    if state.get("task") == TASK:
        return _encoder_of(state, path)
    cfg = config_of(state, path)
    assert isinstance(cfg, PretrainConfig | FinetuneConfig)
    if isinstance(cfg, FinetuneConfig) and is_classifier(cfg):
        return backbone_of(model_of(state, path, ema))
    weights = backbone_weights(state if ema else {**state, "ema": None})
    weights = {name: value.clone() for name, value in weights.items() if not name.startswith("head.fc.")}
    return _backbone(cfg.model, cfg.data.in_chans, weights, path)


def is_classifier(cfg: FinetuneConfig) -> bool:
    """Whether the network is a timm classifier of one class per image."""
    return cfg.objective["_target_"] == CLASSIFY and cfg.objective.get("layer", "pooled") == "pooled"


def random_encoder(cfg: BackboneConfig, in_chans: int, seed: int) -> State:
    """Random weights as the state of an encoder file: those that pretraining begins with by this seed.

    Raises UsageError for an unknown network.
    """
    seed_globals(seed, Stream.INIT)
    weights = _create(cfg, in_chans).state_dict()
    config = {"model": dataclasses.asdict(cfg), "data": {"in_chans": in_chans}}
    return {"task": TASK, "config": config, "model": weights, "ema": None}


def _encoder_of(state: State, path: Path) -> ConvNeXt:
    """The backbone of an encoder file, in evaluation mode."""
    cfg = BackboneConfig(**state["config"]["model"])
    weights = {name: value.float() for name, value in state["model"].items()}
    return _backbone(cfg, state["config"]["data"]["in_chans"], weights, path)


def _backbone(cfg: BackboneConfig, in_chans: int, weights: dict[str, torch.Tensor], path: Path) -> ConvNeXt:
    """A backbone that consists of ``weights`` themselves, so that it takes no more memory, whatever the config says."""
    model = on_meta(partial(_create, cfg, in_chans), cfg, path)
    load_state(model, weights, path, assign=True)
    return model.eval()
