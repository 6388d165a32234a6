"""The encoder of VisCy's ``FullyConvolutionalMAE`` (package viscy-models), which has a ConvNeXt V2 of its own.

A directory with ``model.safetensors``, the state dict of its ``encoder``, and ``config.json``, the network's arguments.
Three things differ from timm's ConvNeXt:

- the stem is two convolutions, one over a stack of planes and one for a single plane. Our channels are its channels and
  planes, the plane fastest: channel c and plane z are our channel ``c * planes + z``;
- depthwise convolutions have no bias;
- the LayerNorms of the stem and the blocks have eps 1e-5, ours 1e-6. ``LayerNorm(s * x)`` with eps ``s**2 * eps`` is
  ``LayerNorm(x)`` with eps, so the convolution before such a norm is multiplied by the square root of 10.
"""

import importlib.metadata
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fcmae.config import ClassifierConfig, FinetuneConfig, from_dict
from fcmae.errors import UsageError, WeightsError
from fcmae.interchange import preprocessing
from fcmae.interchange.network import Check, Given, Imported, Network, Structure, empty_classifier, instead
from fcmae.interchange.weights import StateDict, as_float32, read, read_json, translate, without_head_norm, write_folder

SCALE = (1e-5 / 1e-6) ** 0.5
STEM = "stem.conv.weight"
"""Stands for the two convolutions of the stem, ``[D, C * planes, k, k]``."""
PREFIXES = ("model.encoder.", "encoder.", "")
"""Of the encoder in a checkpoint of Lightning's, in a network's state dict, and in its own."""

# (ours, theirs); the first match wins
_NAMES = (
    (r"stem\.0\.", "stem.conv."),
    (r"stem\.1\.", "stem.norm."),
    (r"\.conv_dw\.", ".dwconv."),
    (r"(blocks\.\d+)\.norm\.", r"\1.layernorm."),
)
_SCALED = re.compile(r"stem\.0\.|.*\.conv_dw\.")
"""Our convolutions before a norm with another eps."""


def _name(ours: str) -> str:
    for pattern, theirs in _NAMES:
        ours = re.sub(pattern, theirs, ours)
    return ours


def export(network: Network, folder: Path, planes: int = 1) -> None:
    """Writes the directory. Raises WeightsError if VisCy has no such network.

    Args:
        planes: how many of our channels are the planes of one of VisCy's.
    """
    structure = Structure.of(network.model, depthwise_bias=False)
    _check(network, structure, planes)
    weights = {}
    for name, value in without_head_norm(network.weights).items():
        if name.endswith("conv_dw.bias"):
            continue
        scaled = value * SCALE if _SCALED.match(name) else value
        weights[_name(name)] = scaled.flatten(1) if re.search(r"mlp\.fc\d\.weight", name) else scaled
    stem, bias = weights.pop(STEM), weights.pop("stem.conv.bias", torch.zeros(structure.dims[0]))
    conv3d = stem.unflatten(1, (-1, planes))
    # Of one plane, 2D images take the other convolution; as if all planes were equal.
    kinds = {"conv3d": conv3d, "conv2d": conv3d.sum(2)}
    for kind, kernel in kinds.items():
        weights |= {f"stem.{kind}.weight": kernel, f"stem.{kind}.bias": bias.clone()}
    for number, width in enumerate(structure.dims[1:], start=1):
        weights.setdefault(f"stages.{number}.downsample.1.bias", torch.zeros(width))
    side = structure.strides[0]
    arguments = {
        "in_channels": structure.in_chans // planes,
        "encoder_blocks": list(structure.depths),
        "dims": list(structure.dims),
        "stem_kernel_size": [planes, side, side],
        "in_stack_depth": planes,
    }
    data = network.cfg.data
    mean, std = preprocessing.mean_and_std(data)
    config = {"arguments": arguments, "mean": mean, "std": std, "image_size": list(data.size)}
    weights = {name: value.contiguous() for name, value in weights.items()}
    write_folder(folder, weights, {"config.json": {**config, "fcmae": preprocessing.extra(data)}})


def _check(network: Network, structure: Structure, planes: int) -> None:
    path, side = network.path, structure.strides[0]
    if network.classes:
        raise WeightsError(f"{path} holds a classifier, which VisCy does not have: export the pretraining run")
    if structure.version != 2:
        raise WeightsError(f"{path} holds a ConvNeXt V1; VisCy's encoder is a V2")
    if structure.stem_stride != side or set(structure.strides[1:]) != {2}:
        raise WeightsError(
            f"{path} has strides {list(structure.strides)} with a stem of {structure.stem_stride}; VisCy has strides k "
            f"of the stem, then 2 each, such as model.strides=[2,2,2,2]: {instead(network.model)}"
        )
    if planes < 1 or structure.in_chans % planes:
        raise UsageError(f"--planes must divide the {structure.in_chans} channels of {path}; got {planes}")
    if any(value.any() for name, value in network.weights.items() if name.endswith("conv_dw.bias")):
        raise WeightsError(
            f"{path} has biases in its depthwise convolutions; VisCy's have none: pretrain with "
            "model.timm.conv_bias=false"
        )


def check(network: Network, folder: Path) -> Check:
    """Loads ``folder`` strictly with viscy_models, where that is installed, and compares the last features."""
    try:
        from viscy_models import FullyConvolutionalMAE
    except ImportError:
        return Check("viscy-models is not installed: pip install viscy-models", None)
    arguments = read_json(folder / "config.json")["arguments"]
    encoder = FullyConvolutionalMAE(out_channels=1, **arguments).encoder.eval()
    encoder.load_state_dict(read(folder / "model.safetensors"), strict=True)
    with torch.inference_mode():
        imgs = network.fixed_input().unflatten(1, (-1, arguments["in_stack_depth"]))
        features, _ = encoder(imgs)
    version = importlib.metadata.version("viscy-models")
    return network.compared(f"viscy-models {version}", {"features": features[-1]})


def load(path: Path, given: Given) -> Imported:
    """A directory of ours, or a file with a state dict of the encoder or of a network that has it. Raises WeightsError.

    The stem is that for a stack of planes, if the stack has several.
    """
    config: dict[str, Any] = read_json(path / "config.json") if path.is_dir() else {}
    weights = _encoder(path / "model.safetensors" if path.is_dir() else path)
    conv3d, conv2d = weights.pop("stem.conv3d.weight"), weights.pop("stem.conv2d.weight")
    if len(conv3d) != len(conv2d):
        raise WeightsError(
            f"{path} has a stem that cuts the stack into {len(conv2d) // len(conv3d)} parts; only one whole can be read"
        )
    kind = "conv3d" if conv3d.shape[2] > 1 else "conv2d"
    biases = {name: weights.pop(f"stem.{name}.bias") for name in ("conv3d", "conv2d")}
    weights |= {STEM: conv3d.flatten(1, 2) if kind == "conv3d" else conv2d, "stem.conv.bias": biases[kind]}
    structure = _structure(weights)
    known: dict[str, Any] = {name: config[name] for name in ("mean", "std", "image_size") if name in config}
    cfg = FinetuneConfig(
        data=given.data(structure.in_chans, {**known, **preprocessing.read_extra(config)}),
        model=from_dict(ClassifierConfig, structure.backbone_config(), prefix="model"),
    )
    like = empty_classifier(cfg, weights, path)
    names = {name: _name(name) for name in like if not name.startswith("head.") and "conv_dw.bias" not in name}
    ours = translate(weights, like, names, "VisCy", _same_values)
    for name in ours:
        if name.endswith("conv_dw.bias"):
            ours[name] = torch.zeros_like(ours[name])
        elif _SCALED.match(name):
            ours[name] = ours[name] / SCALE
    notes = ["VisCy's depthwise convolutions have no bias; here they have one of 0, which training changes"]
    if kind == "conv3d":
        notes.append(f"the stem for stacks of {conv3d.shape[2]} planes was taken, not the one for single planes")
    return Imported(cfg, ours, [], notes)


def _same_values(value: Tensor, like: Tensor) -> Tensor:
    """timm's small models have 1 x 1 convolutions for linear layers."""
    return value.view(like.shape) if value.numel() == like.numel() else value


def _encoder(path: Path) -> StateDict:
    """The encoder's weights in a file. Raises WeightsError."""
    content = read(path)
    content = content.get("state_dict", content)
    for prefix in PREFIXES:
        if f"{prefix}stem.conv3d.weight" in content:
            inside = {name: value for name, value in content.items() if name.startswith(prefix)}
            return as_float32({name.removeprefix(prefix): value for name, value in inside.items()}, path)
    raise WeightsError(f"{path} has no stem.conv3d.weight: it is not an encoder of VisCy's FullyConvolutionalMAE")


def _structure(weights: StateDict) -> Structure:
    depths: list[int] = []
    while any(name.startswith(f"stages.{len(depths)}.blocks.") for name in weights):
        inside = [
            name for name in weights if re.fullmatch(rf"stages\.{len(depths)}\.blocks\.\d+\.dwconv\.weight", name)
        ]
        depths.append(len(inside))
    side = weights[STEM].shape[-1]
    return Structure(
        version=2,
        in_chans=weights[STEM].shape[1],
        stem_stride=side,
        strides=(side, *[2] * (len(depths) - 1)),
        depths=tuple(depths),
        dims=tuple(len(weights[f"stages.{stage}.blocks.0.dwconv.weight"]) for stage in range(len(depths))),
        num_classes=0,
    )
