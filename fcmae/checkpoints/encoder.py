"""``encoder.safetensors``: a pretrained backbone alone, under timm's names, with what it takes to build it again.

The metadata has ``backbone``, timm's name, and ``fcmae``, a JSON object: ``model`` and ``data`` with the keys of these
groups that describe network and images, ``step`` and ``versions``. Version 0.1.0 wrote ``backbone`` only.
"""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from fcmae.checkpoints.torch_file import open_safetensors
from fcmae.config import BackboneConfig, DataConfig, check_plain, from_dict
from fcmae.config.unset import UNSET
from fcmae.errors import CheckpointError
from fcmae.files import replacing
from fcmae.version import versions

ENCODER_FILE = "encoder.safetensors"
SUFFIX = ".safetensors"
TASK = "encoder"
"""What the state that :func:`read` gives is of."""
KEYS = {"model": UNSET["model"], "data": (*UNSET["data"], "pad", "crop_pct")}
PLAIN = {"dtype": "uint", "normalize": "dataset", "low": None, "high": None, "nodata": None}
"""What all images were before these keys came."""
MOST_JSON = 2**16
"""Characters."""

State = dict[str, Any]


def backbone_weights(state: State) -> dict[str, Tensor]:
    """The encoder's weights in a checkpoint of either task, as timm names them. Densifying is dropping the decoder."""
    prefix = "backbone."
    weights = state.get("ema") or state["model"]
    if any(name.startswith(prefix) for name in weights):
        return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    return weights


def write(path: Path, state: State) -> None:
    """Writes the backbone of a pretraining state, averaged if there is an average. Raises OSError."""
    config, step = state["config"], state["step"]
    kept = {group: {name: config[group][name] for name in names} for group, names in KEYS.items()}
    said = json.dumps({**kept, "step": step, "versions": versions()})
    tensors = {name: value.detach().cpu().contiguous() for name, value in backbone_weights(state).items()}
    with replacing(path) as file:
        file.write(save(tensors, {"backbone": config["model"]["backbone"], "fcmae": said}))


def read(path: Path, weights: bool = True) -> State:
    """An encoder file as a checkpoint's state of the task ``encoder``.

    ``config`` has the groups ``model`` and ``data``; ``unknown`` names the keys of ``data`` that the file does not say.

    Args:
        weights: read them; otherwise the weights of ``model`` are on torch's meta device.

    Raises CheckpointError naming the file.
    """
    try:
        with open_safetensors(path) as file:
            metadata = file.metadata() or {}
            names = list(file.keys())
            shapes = {name: file.get_slice(name).get_shape() for name in names}
            if weights:
                tensors = {name: file.get_tensor(name) for name in names}
            else:
                tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    except FileNotFoundError as error:
        raise CheckpointError(f"no checkpoint {path}") from error
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error}") from error
    if "backbone" not in metadata:
        raise CheckpointError(f"{path} is not an encoder file of fcmae: its metadata has no backbone")
    network = {"backbone": metadata["backbone"], **_network(path, shapes)}
    in_chans = network.pop("in_chans")
    state = {"task": TASK, "model": tensors, "ema": None, "imported_from": path.name}
    if "fcmae" not in metadata:
        unknown = [name for name in UNSET["data"] if name not in ("in_chans", *PLAIN)]
        network |= {"strides": None, "timm": None}  # version 0.1.0 had timm's only
        return {**state, "config": {"model": network, "data": {"in_chans": in_chans}}, "unknown": unknown}
    said = _said(path, metadata["fcmae"])
    config, step = {group: said[group] for group in KEYS}, said["step"]
    for name, value in network.items():
        if name == "stem_stride" and config["model"]["strides"] is not None:
            continue  # the first of the strides instead
        if config["model"][name] not in (value, *([None] if name in ("depths", "dims", "strides") else [])):
            raise CheckpointError(f"{path} says model.{name}={config['model'][name]}; its weights have {value}")
    if config["data"]["in_chans"] != in_chans:
        raise CheckpointError(f"{path} says data.in_chans={config['data']['in_chans']}; its weights have {in_chans}")
    return {**state, "config": config, "step": step, "versions": said["versions"]}


def is_encoder(path: Path) -> bool:
    """Whether a .safetensors file has the metadata of an encoder file."""
    try:
        with open_safetensors(path) as file:
            return "backbone" in (file.metadata() or {})
    except (OSError, SafetensorError, ValueError):
        return True  # reading it says why


def _said(path: Path, text: str) -> dict[str, Any]:
    """The JSON of the metadata, checked. Raises CheckpointError if :func:`write` would not have written it."""
    try:
        said = json.loads(text if len(text) <= MOST_JSON else "")
        check_plain(said)
        said["model"] = {"strides": None, "timm": None, **said["model"]}  # which earlier versions lack
        said["data"] = {**PLAIN, **said["data"]}
        if any(set(said[group]) != set(names) for group, names in KEYS.items()) or type(said["step"]) is not int:
            raise ValueError("unknown keys")
        if any(not isinstance(value, str) for value in said["versions"].values()):
            raise ValueError("versions")
        schemas: dict[str, type[Any]] = {"model": BackboneConfig, "data": DataConfig}
        for group, schema in schemas.items():
            typed = dataclasses.asdict(from_dict(schema, said[group], prefix=group))
            said[group] = {name: typed[name] for name in KEYS[group]}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        why = "; ".join(str(error).split("\n"))  # a mistake each
        raise CheckpointError(f"{path} has metadata that this version of fcmae did not write: {why}") from error
    return said


def _network(path: Path, shapes: dict[str, list[int]]) -> dict[str, Any]:
    """Structure and channels, by the shapes of the weights. Raises CheckpointError."""
    try:
        _, in_chans, stride, _ = shapes["stem.0.weight"]
        stages = len({name.split(".")[1] for name in shapes if name.startswith("stages.")})
        dims = [shapes[f"stages.{stage}.blocks.0.conv_dw.weight"][0] for stage in range(stages)]
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path} does not hold the weights of a timm ConvNeXt: {error} is missing") from error
    blocks = {
        match.groups() for match in (re.match(r"stages\.(\d+)\.blocks\.(\d+)\.", name) for name in shapes) if match
    }
    depths = [sum(stage == str(number) for stage, _ in blocks) for number in range(stages)]
    strides = [shapes.get(f"stages.{number}.downsample.1.weight", [1])[-1] for number in range(stages)]
    strides[0] *= stride
    return {"depths": depths, "dims": dims, "stem_stride": stride, "strides": strides, "in_chans": in_chans}
