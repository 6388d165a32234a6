"""Reads the frozen networks whose features :class:`fcmae.targets.Teacher` predicts."""

import contextlib
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from fcmae.config import DataConfig, PretrainConfig
from fcmae.config.checks import as_list
from fcmae.errors import ConfigError, FCMAEError
from fcmae.interchange.foreign import downloading, reason
from fcmae.interchange.weights import read
from fcmae.models import FCMAE
from fcmae.models.build import encoder_of, load_state
from fcmae.targets import Teacher
from fcmae.tasks.initial import read_initial

TEACHER = "fcmae.targets.Teacher"


class Features(nn.Module):
    """The last feature map of a frozen network, for images that are normalised as ``data`` says.

    Args:
        mean, std: by which the network's own images are normalised, one per channel; None = as those of ``data``.
        channels: those of the images that it gets; None = all.
    """

    def __init__(
        self,
        network: nn.Module,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
        data: DataConfig,
        channels: Sequence[int] | None,
    ) -> None:
        super().__init__()
        self.network = network.requires_grad_(False)
        chosen = list(range(data.in_chans)) if channels is None else list(channels)
        scale, shift = torch.ones(len(chosen)), torch.zeros(len(chosen))
        if mean is not None and std is not None:
            ours = torch.tensor([list(data.mean), list(data.std)], dtype=torch.float64)[:, chosen]
            theirs = torch.tensor([list(mean), list(std)], dtype=torch.float64)
            scale, shift = ours[1] / theirs[1], (ours[0] - theirs[0]) / theirs[1]
        self.scale: Tensor
        self.shift: Tensor
        self.chosen: Tensor
        self.register_buffer("scale", scale.float().view(-1, 1, 1))
        self.register_buffer("shift", shift.float().view(-1, 1, 1))
        self.register_buffer("chosen", torch.tensor(chosen))
        self.eval()

    def forward(self, imgs: Tensor) -> Tensor:
        """``[N, C, H, W]`` to ``[N, D, h, w]``."""
        x = imgs.index_select(1, self.chosen) * self.scale + self.shift
        run: Any = self.network.forward_intermediates  # every network of timm that has feature maps
        return run(x, indices=1, output_fmt="NCHW", intermediates_only=True)[0]


@dataclass(frozen=True)
class _Read:
    """A network, and the normalisation of its images."""

    network: nn.Module
    in_chans: int
    mean: Sequence[float] | None
    std: Sequence[float] | None
    said: str
    """What it is, for the user."""
    dtype: str = "uint"
    """As ``data.dtype``, which says in what units ``mean`` and ``std`` are."""


def load_teachers(cfg: PretrainConfig) -> tuple[dict[str, Features], list[str]]:
    """The networks by the name of the target, and a line about each. Sets their ``dim`` and ``sha256`` in ``cfg``.

    Raises ConfigError naming the key.
    """
    found: dict[str, Features] = {}
    notes = []
    for name, given in cfg.target.items():
        if given["_target_"] != TEACHER:
            continue
        key = f"target.{name}"
        teacher = _read(key, given)
        features = _features(key, teacher, given.get("channels"), cfg.data)
        size = _try(key, features, cfg.data)
        settled = {"dim": size[1], "sha256": digest(teacher.network.state_dict())}
        cfg.target[name] = {**given, **settled}
        found[name] = features
        notes.append(f"{key}: {teacher.said}, {size[1]} features at {size[2]} x {size[3]} places")
    return found, notes


def attach(model: FCMAE, teachers: Mapping[str, Features]) -> None:
    """Gives each teacher of a model its network."""
    for name, features in teachers.items():
        target = model.targets[name]
        assert isinstance(target, Teacher)
        target.network = features


def _read(key: str, given: Mapping[str, Any]) -> _Read:
    name, checkpoint, run = (given.get(part) for part in ("name", "checkpoint", "run"))
    if (name is None) == (run is None) or (run is not None and checkpoint is not None):
        raise ConfigError(
            f"{key} must have either name, a network of timm, and perhaps checkpoint, a file of its weights, or run, "
            f"a run of fcmae; got name={name}, checkpoint={checkpoint}, run={run}"
        )
    return _of_timm(key, str(name), checkpoint) if run is None else _of_run(key, str(run))


def _of_run(key: str, run: str) -> _Read:
    try:
        path, state = read_initial(run)
        network = encoder_of(state, Path(path))
    except FCMAEError as error:
        raise ConfigError(f"{key}.run: {error}") from error
    known, origin = state["config"].get("data", {}), state.get("origin") or {}
    said = _said(path, origin.get("license"))
    return _Read(network, network.in_chans, known.get("mean"), known.get("std"), said, known.get("dtype", "uint"))


def _said(what: str, licence: str | None) -> str:
    return f"{what}, licence {licence}" if licence else what


def _of_timm(key: str, name: str, checkpoint: str | None) -> _Read:
    if not timm.is_model(name):
        raise ConfigError(
            f"{key}.name must be a network of timm {timm.__version__}, see timm.list_models(); got {name!r}"
        )
    try:
        with downloading(name) if checkpoint is None else contextlib.nullcontext():
            network = create_network(name, pretrained=checkpoint is None)
    except Exception as error:  # of a failed download, or an argument that a network does not take, all sorts
        raise ConfigError(
            f"{key}.name: timm cannot create {name} ({reason(error)}); without a network, give a file of its weights "
            f"as {key}.checkpoint"
        ) from error
    config: Any = network.pretrained_cfg
    if checkpoint is not None:
        try:
            _load(network, Path(checkpoint), config.get("classifier"))
        except FCMAEError as error:
            raise ConfigError(f"{key}.checkpoint: {error}") from error
    said = _said(name, config.get("license")) if checkpoint is None else f"{name} of {checkpoint}"
    return _Read(network, config["input_size"][0], config["mean"], config["std"], said)


def create_network(name: str, pretrained: bool) -> nn.Module:
    """A network of timm without its classifier, which takes images of any size if it can be told to."""
    described = timm.models.get_pretrained_cfg(name, allow_unregistered=False)
    options: dict[str, Any] = {"dynamic_img_size": True} if described and described.fixed_input_size else {}
    return timm.create_model(name, pretrained=pretrained, num_classes=0, **options)


def _load(network: nn.Module, path: Path, classifier: str | Sequence[str] | None) -> None:
    """Loads a file's weights strictly, but for those of the classifier. Raises WeightsError, CheckpointError."""
    content = read(path)
    weights = next((content[key] for key in ("state_dict", "model") if isinstance(content.get(key), dict)), content)
    heads = tuple(f"{head}." for head in as_list(classifier or []))
    kept = {name: value for name, value in weights.items() if isinstance(value, Tensor) and not name.startswith(heads)}
    load_state(network, kept, path)


def _features(key: str, teacher: _Read, channels: Any, data: DataConfig) -> Features:
    """Raises ConfigError unless the network takes so many channels."""
    if channels is not None:
        ok = isinstance(channels, (list, tuple)) and all(type(c) is int and 0 <= c < data.in_chans for c in channels)
        if not ok:
            limit = f"from 0 to {data.in_chans - 1} (data.in_chans={data.in_chans})"
            raise ConfigError(f"{key}.channels must be a list of channels {limit}; got {channels}")
    in_chans, got = teacher.in_chans, data.in_chans if channels is None else len(channels)
    if got != in_chans:
        what = f"data.in_chans={got}" if channels is None else f"{key}.channels={list(channels)}"
        raise ConfigError(
            f"{key}: {teacher.said} takes {in_chans} channels; got {what}. Give the images' channels that it gets, one "
            f"for each of its own, such as {key}.channels={[min(c, data.in_chans - 1) for c in range(in_chans)]}"
        )
    # Values in other units, or normalised by the source, are for the teacher what they are for the encoder.
    same_units = bool(teacher.mean) and bool(data.mean) and teacher.dtype == data.dtype
    mean, std = (teacher.mean, teacher.std) if same_units else (None, None)
    return Features(teacher.network, mean, std, data, channels)


@torch.no_grad()
def _try(key: str, features: Features, data: DataConfig) -> tuple[int, ...]:
    """The shape of its feature map for one image of the run. Raises ConfigError if it cannot make one."""
    try:
        maps = features(torch.zeros(1, data.in_chans, *data.size))
    except Exception as error:  # what networks raise for other sizes, or without feature maps
        size = "x".join(map(str, data.size))
        raise ConfigError(
            f"{key}: the teacher gives no feature map for images of {size} px ({reason(error)})"
        ) from error
    if maps.ndim != 4:
        raise ConfigError(f"{key}: the teacher must give a feature map [N, D, h, w]; got {list(maps.shape)}")
    return tuple(maps.shape)


def digest(weights: Mapping[str, Tensor]) -> str:
    """The SHA-256 of weights, whatever file they were in, in hexadecimal."""
    hashed = hashlib.sha256()
    for name, value in sorted(weights.items()):
        hashed.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        hashed.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return hashed.hexdigest()
