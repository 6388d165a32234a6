"""What a run begins with: the weights of ``init_from``, and the values of the keys that the user leaves unset."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from timm.models.convnext import ConvNeXt
from torch import Tensor

from fcmae.checkpoints import checkpoint, encoder
from fcmae.checkpoints.checkpoint import State
from fcmae.config import CLASSIFY, FinetuneConfig, PretrainConfig, RunConfig
from fcmae.config.checks import as_list
from fcmae.config.commands import INIT_CHANNELS
from fcmae.config.unset import UNSET
from fcmae.engines.convnext import stem
from fcmae.errors import CheckpointError, ConfigError
from fcmae.interchange.foreign import is_foreign, read_foreign
from fcmae.models import FCMAE
from fcmae.models.build import check_backbone_size, known_of, load_state, unsaid
from fcmae.models.dense_head import DenseHead
from fcmae.models.detector import Detector
from fcmae.models.headed import Headed, backbone_of
from fcmae.models.unet import UNet

Values = dict[str, dict[str, Any]]
"""Group: key: value."""
STRIDES = ("model.stem_stride", "model.strides")
TIMM = "model.timm"
NETWORK = ("model.backbone", "model.depths", "model.dims", TIMM, *STRIDES)
SCALE = ("data.dtype", "data.normalize", "data.low", "data.high", "data.mean", "data.std")
FIXED = (*NETWORK, "data.in_chans", *SCALE)
"""Keys that must be those of ``init_from``; others may differ from it. With ``init_channels``, and for weights of other
libraries, only the network is."""


@dataclass(frozen=True)
class Start:
    """What a run begins with, the same on all ranks."""

    path: str | None = None
    """The weights that are loaded; None for random weights, or where the run's own state is loaded."""
    known: Values = field(default_factory=dict)
    """What the checkpoint says of network and images; of the run's own where there is one."""
    notes: list[str] = field(default_factory=list)
    """What the user should know about the checkpoint, a line each."""
    fixed: tuple[str, ...] = FIXED
    """Keys that must be as in ``known``."""
    origin: dict[str, Any] | None = None
    """``weights`` and ``license`` of another library's weights, which the run or those before it began with."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint records of it."""
        return {} if self.origin is None else {"origin": self.origin}


def find_start(cfg: RunConfig, run_dir: Path | None = None) -> Start:
    """Where ``cfg`` begins: the run's own checkpoint, for which ``init_from`` is not looked at, else ``init_from``.

    Reads no weights. Raises CheckpointError.
    """
    own = checkpoint.CheckpointDir(run_dir).paths() if run_dir is not None and cfg.trainer.resume else []
    for path in reversed(own):
        with contextlib.suppress(CheckpointError):
            state = checkpoint.header(path)
            return Start(known=_unset(known_of(state, path)), origin=state.get("origin"))
    if own or cfg.init_from is None:
        return Start()  # none of its own can be read: resuming says so
    name, state = read_initial(cfg.init_from, header=True)
    path, origin = Path(name), state.get("origin")
    known = known_of(state, path)
    check_backbone_size(known, state["model"], path)
    foreign = "imported_from" in state and origin is not None
    notes = [f"init_from: {name}" if foreign else f"init_from: {checkpoint.describe(path, state)}"]
    if origin is not None:
        told = origin["license"] or "not stated in these files; look it up before you publish results"
        notes.append(f"licence of {origin['weights']}: {told}")
    if (
        state.get("classes") is not None
        and (state["config"].get("objective") or {}).get("_target_", CLASSIFY) == CLASSIFY
    ):
        notes.append(f"{path} is a classifier of {len(state['classes'])} classes; its head is not used")
    for key in ("pad", "fit") if isinstance(cfg, FinetuneConfig) else ("pad", "nodata", "fit"):
        ours, theirs = getattr(cfg.data, key), known["data"].get(key, getattr(cfg.data, key))
        if ours != theirs:
            notes.append(f"data.{key} is {ours}; {path} was trained with {theirs}")
    if unsaid(state):
        notes.append(f"{path} does not say {', '.join(unsaid(state))}")
    in_chans = known["data"]["in_chans"]
    fixed = NETWORK if foreign or cfg.init_channels != "strict" else FIXED
    if cfg.init_channels == "strict" and cfg.data.in_chans not in (None, in_chans):
        raise ConfigError(
            f"data.in_chans is {cfg.data.in_chans}; {name} has {in_chans}. To adapt the stem, give "
            f"init_channels={'|'.join(INIT_CHANNELS[1:])}"
        )
    return Start(name, _unset(known), notes, fixed, origin)


def read_initial(init_from: str, header: bool = False) -> tuple[str, State]:
    """The full name and the state of ``init_from``; of one of our checkpoints the header alone, if that is enough."""
    if is_foreign(init_from):
        return init_from, read_foreign(init_from)
    path = checkpoint.resolve(init_from)
    # mmap: the optimizer's moments stay on the disk
    return str(path), checkpoint.header(path) if header else checkpoint.read(path, mmap=True)


def _unset(known: Values) -> Values:
    """Of the keys that may be unset, those that are known."""
    return {
        group: {name: known[group][name] for name in names if name in known[group]} for group, names in UNSET.items()
    }


def settle(cfg: FinetuneConfig, start: Start) -> tuple[FinetuneConfig, list[str]]:
    """``cfg`` with a value for every key, and what the user should know, a line each.

    Raises ConfigError naming the keys that contradict ``init_from``.
    """
    if start.path is None:
        return cfg.settled(start.known), []
    taken: list[str] = []
    wrong: list[str] = []
    others: list[str] = []
    nodata = start.known["data"].get("nodata")
    if nodata is not None and cfg.data.nodata is None and not _may_lack_values(cfg.data, start.known["data"]):
        start = replace(start, known={**start.known, "data": {**start.known["data"], "nodata": None}})
        others.append(f"data.nodata is null; {start.path} was trained with {_plain(nodata)}")
    contradiction = _other_strides(cfg.model.stem_stride, cfg.model.strides, start)
    wrong += [contradiction] if contradiction else []
    for group, values in start.known.items():
        for name, theirs in values.items():
            key, ours = f"{group}.{name}", getattr(getattr(cfg, group), name)
            if key in STRIDES and ours is not None:
                continue  # compared by what they mean, above
            if ours is None:
                taken += [f"{key}={_plain(theirs)}"] if theirs is not None else []
            elif (theirs is not None or key == TIMM) and ours != theirs:
                fixed = key in start.fixed
                has = "has" if fixed else "was trained with"
                (wrong if fixed else others).append(f"{key} is {_plain(ours)}; {start.path} {has} {_plain(theirs)}")
    if wrong:
        raise ConfigError("; ".join(wrong))
    return cfg.settled(start.known), [
        *start.notes,
        *([f"taken from init_from: {' '.join(taken)}"] if taken else []),
        *others,
    ]


def _may_lack_values(data: Any, known: dict[str, Any]) -> bool:
    """Whether ``data.nodata`` of ``init_from`` means the same for these images, and none of their keys excludes it."""
    same = all(getattr(data, key) in (None, known.get(key)) for key in ("in_chans", "bit_depth", "dtype"))
    return same and data.name != "coco" and not data.pad and "gpu" not in (data.cache, data.decode_on)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def check_network(cfg: PretrainConfig, start: Start) -> None:
    """Raises ConfigError naming the keys of ``model`` that contradict ``init_from``."""
    if start.path is None:
        return
    contradiction = _other_strides(cfg.model.stem_stride, cfg.model.strides, start)
    wrong = [contradiction] if contradiction else []
    for name, theirs in start.known["model"].items():
        ours = getattr(cfg.model, name)
        if f"model.{name}" == TIMM:
            ours, theirs = ours or {}, theirs or {}
        if (
            f"model.{name}" not in STRIDES
            and theirs is not None
            and ours is not None
            and as_list(ours) != as_list(theirs)
        ):
            wrong.append(f"model.{name} is {_plain(ours)}; {start.path} has {_plain(theirs)}")
    if wrong:
        raise ConfigError("; ".join(wrong))


def _other_strides(stem_stride: int | None, strides: Sequence[int] | None, start: Start) -> str | None:
    """What contradicts the strides of ``init_from``; None if nothing does, or both entries are unset."""
    known = start.known["model"]
    if "stem_stride" not in known or (stem_stride is None and strides is None):
        return None
    theirs = _strides(known["stem_stride"], known.get("strides"))
    ours = _strides(known["stem_stride"] if stem_stride is None else stem_stride, strides)
    return None if ours == theirs else f"{ours}; {start.path} has {theirs}"


def _strides(stem_stride: int, strides: Sequence[int] | None) -> str:
    """The entry of the config that sets the strides; the same for a network that both entries can describe."""
    if strides is not None and list(strides) in ([1, 2, 2, 2], [4, 2, 2, 2]):
        stem_stride, strides = strides[0], None
    return f"model.stem_stride={stem_stride}" if strides is None else f"model.strides={list(strides)}"


def load_initial(
    model: FCMAE | ConvNeXt | Headed, init_from: str, init_channels: str, init_decoder: bool = True
) -> str:
    """Loads the backbone of ``init_from`` strictly, and into an FCMAE what fits of its decoder.

    A head for fine-tuning keeps its initial weights, but for a U-Net or a detector if ``init_decoder``. Returns a line
    that says what was loaded. Raises CheckpointError naming the keys of the backbone that do not fit.
    """
    name, state = read_initial(init_from)
    weights = encoder.backbone_weights(state)
    backbone = backbone_of(model)
    initial = stem(backbone)[0].weight.detach()
    said = f"loaded the backbone of {name}"
    theirs = weights.get("stem.0.weight")
    if theirs is not None and theirs.shape[1] != initial.shape[1] and init_channels != "strict":
        weights = {**weights, "stem.0.weight": adapt_stem(theirs, initial, init_channels)}
        said += f", its stem adapted from {theirs.shape[1]} to {initial.shape[1]} channels ({init_channels})"
    load_state(backbone, weights, Path(name), except_prefix="head.fc.")
    if isinstance(model, FCMAE) and state["task"] == "pretrain":
        own = {name: value for name, value in model.state_dict().items() if name.startswith("decoder.")}
        given = state.get("ema") or state["model"]
        fits = {name: given[name] for name, value in own.items() if name in given and given[name].shape == value.shape}
        model.load_state_dict(fits, strict=False)
        said += f" and {len(fits)} of {len(own)} tensors of its decoder"
    elif isinstance(model, FCMAE):
        said += "; the decoder is new"
    elif isinstance(model, Headed) and isinstance(model.head, DenseHead):
        said += _load_unet(model.head.unet, state) if init_decoder else "; the U-Net is new (init_decoder=false)"
    elif isinstance(model, Headed) and isinstance(model.head, Detector) and init_decoder:
        said += _load_detector(model.head, state)
    elif isinstance(model, Headed):
        said += "; the head is new"
    return said


def _load_detector(head: Detector, state: State) -> str:
    """Loads what fits of another detector: for other classes, all but the last layers. Returns what was done."""
    given, own = state.get("ema") or state["model"], head.state_dict()
    weights = {name: given[f"head.{name}"] for name in own if f"head.{name}" in given}
    fits = {name: value for name, value in weights.items() if value.shape == own[name].shape}
    head.load_state_dict(fits, strict=False)
    return f" and {len(fits)} of {len(own)} tensors of its detector" if fits else "; the head is new"


def _load_unet(unet: UNet, state: State) -> str:
    """Loads the U-Net of a pretraining decoder or of a head, if it has the same shapes. Returns what was done."""
    prefix = "decoder.unet." if state["task"] == "pretrain" else "head.unet."
    given = state.get("ema") or state["model"]
    weights = {name.removeprefix(prefix): value for name, value in given.items() if name.startswith(prefix)}
    if not weights:
        return "; the U-Net is new"
    own = unet.state_dict()
    if {name: value.shape for name, value in weights.items()} != {name: value.shape for name, value in own.items()}:
        width = len(weights.get("norm.weight", ()))
        return f"; the U-Net is new, because init_from has one of another width (objective.width={width} would take it)"
    unet.load_state_dict(weights)
    return " and its U-Net"


def adapt_stem(weight: Tensor, new: Tensor, how: str) -> Tensor:
    """The stem's weight ``[D, C, k, k]`` for the channels of ``new``, an initial weight of the stem.

    Args:
        how: ``repeat``: channel i takes the weights of channel i modulo C; ``mean``: each takes their mean; both scaled
            by C over the new number of channels, so that the sum keeps its magnitude, as timm does. ``new``: ``new``.
    """
    channels, wanted = weight.shape[1], new.shape[1]
    if how == "new":
        return new
    if how == "mean":
        weight = weight.mean(dim=1, keepdim=True) * channels
        return weight.expand(-1, wanted, -1, -1) / wanted
    return weight[:, torch.arange(wanted) % channels] * (channels / wanted)
