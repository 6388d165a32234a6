"""State dicts of the official ConvNeXt V2 code (facebookresearch/ConvNeXt-V2) to and from ours.

The official code has two layouts of the encoder: ``sparse``, the pretraining checkpoint made of MinkowskiEngine
layers, and ``dense``, the published ``*_fcmae.pt`` files and classifiers. Both hold what a timm ConvNeXt holds.
"""

import re
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.convnext import checkpoint_filter_fn
from torch import Tensor

from fcmae.config import (
    ClassifierConfig,
    DataConfig,
    FCMAEConfig,
    FinetuneConfig,
    PretrainConfig,
    check_plain,
    from_dict,
    portable,
    to_dict,
    upgraded,
)
from fcmae.errors import WeightsError
from fcmae.interchange.network import Check, Given, Imported, Network, Structure, empty_classifier, empty_fcmae, instead
from fcmae.interchange.weights import (
    HEAD_NORM,
    StateDict,
    as_float32,
    read,
    renamed,
    same_values,
    translate,
    without_head_norm,
)
from fcmae.models import FCMAE
from fcmae.models.decoder import LightDecoder

STEM_STRIDE = 4
STRIDES = (4, 2, 2, 2)
"""The only one that the official code has."""

# (ours, official) for the names within a backbone; the first match wins.
_NAMES = (
    (r"stem\.(\d)\.", r"downsample_layers.0.\1."),
    (r"stages\.(\d+)\.downsample\.(\d)\.", r"downsample_layers.\1.\2."),
    (r"stages\.(\d+)\.blocks\.(\d+)\.conv_dw\.", r"stages.\1.\2.dwconv."),
    (r"stages\.(\d+)\.blocks\.(\d+)\.mlp\.fc(\d)\.", r"stages.\1.\2.pwconv\3."),
    (r"stages\.(\d+)\.blocks\.(\d+)\.mlp\.grn\.weight", r"stages.\1.\2.grn.gamma"),
    (r"stages\.(\d+)\.blocks\.(\d+)\.mlp\.grn\.bias", r"stages.\1.\2.grn.beta"),
    (r"stages\.(\d+)\.blocks\.(\d+)\.", r"stages.\1.\2."),
    (r"head\.norm\.", r"norm."),
    (r"head\.fc\.", r"head."),
)


def dense_name(name: str) -> str:
    """The official dense name of a backbone parameter, ``stem.0.weight`` to ``downsample_layers.0.0.weight``."""
    return renamed(name, _NAMES, "of a ConvNeXt backbone")


def sparse_name(name: str) -> str:
    """The official sparse name of a backbone parameter, without the prefix ``encoder.``."""
    dense = dense_name(name)
    if dense.startswith("downsample_layers.0"):
        return dense  # the stem is an ordinary convolution there too
    dense = re.sub(r"(pwconv\d)\.", r"\1.linear.", dense)
    dense = re.sub(r"(stages\.\d+\.\d+\.norm|downsample_layers\.\d+\.0)\.", r"\1.ln.", dense)
    return re.sub(r"(dwconv|downsample_layers\.\d+\.1)\.weight", r"\1.kernel", dense)


def _decoder_name(name: str) -> str:
    """The official name of a parameter of our decoder."""
    if name.startswith("blocks."):
        _, index, rest = name.split(".", 2)
        return dense_name(f"stages.0.blocks.{index}.{rest}").replace("stages.0.", "decoder.", 1)
    return name


def _from_official_value(official: Tensor, like: Tensor) -> Tensor:
    """An official tensor in the shape of ours.

    MinkowskiEngine stores kernels as [k * k, (in,) out] with the x offset fastest-varying last: viewed as
    [k, k, in, out] they are indexed [ix, iy].
    """
    if like.ndim == 4 and official.ndim in (2, 3) and official.shape[0] == like.shape[2] * like.shape[3]:
        k = like.shape[-1]
        # depthwise [k*k, C] has one input channel for each output
        kernel = official.view(k, k, 1, -1) if official.ndim == 2 else official.view(k, k, *official.shape[1:])
        return kernel.permute(3, 2, 1, 0).contiguous()
    return same_values(official, like)


def _to_official_value(name: str, value: Tensor) -> Tensor:
    """Our tensor in the shape of the official pretraining checkpoint, ``name`` being its name there."""
    if name.endswith(".kernel"):
        kernel = value.permute(3, 2, 1, 0)  # [ix, iy, in, out]
        flat = kernel.reshape(-1, *kernel.shape[2:])
        return (flat[:, 0] if "dwconv" in name else flat).contiguous()
    if name.startswith("encoder.") and (".grn." in name or re.search(r"(dwconv|layers\.[1-9]\d*\.1)\.bias", name)):
        return value.view(1, -1)
    if ".grn." in name:
        return value.view(1, 1, 1, -1)
    if name == "mask_token":
        return value.view(1, -1, 1, 1)
    if name in ("proj.weight", "pred.weight"):
        return value[:, :, None, None]
    if "pwconv" in name and name.endswith("weight"):
        return value.flatten(1)  # timm's small models have 1 x 1 convolutions here
    return value


def pretraining_names(ours: StateDict) -> dict[str, str]:
    """Our FCMAE parameter names to the official pretraining checkpoint's.

    The backbone's head and learned weights of targets are not in it.
    """
    names = {}
    for name in ours:
        if name.startswith(("backbone.head.", "log_var_")):
            continue
        part, rest = name.split(".", 1)
        names[name] = f"encoder.{sparse_name(rest)}" if part == "backbone" else _decoder_name(rest)
    return names


def from_pretraining(official: StateDict, like: StateDict) -> StateDict:
    """An official pretraining state dict (sparse layout) as one of ours.

    Args:
        official: ``encoder.*``, ``decoder.*``, ``proj.*``, ``mask_token``, ``pred.*``.
        like: the state dict of the FCMAE to load into; gives names, shapes and the head, which is kept.

    Raises WeightsError, a ValueError, naming the keys that are missing, left over, or of another shape.
    """
    return translate(official, like, pretraining_names(like), "official", _from_official_value)


def to_pretraining(ours: StateDict) -> StateDict:
    """The inverse of :func:`from_pretraining`."""
    return {theirs: _to_official_value(theirs, ours[name]) for name, theirs in pretraining_names(ours).items()}


def from_classifier(official: StateDict, like: StateDict) -> StateDict:
    """An official dense classifier, or ``*_fcmae.pt`` if it has no head, as a timm ConvNeXt's state dict.

    ``*_fcmae.pt`` has no final norm; a ``like`` without classifier keeps its own then.

    Raises WeightsError, a ValueError, naming the keys that are missing, left over, or of another shape.
    """
    headless = "head.fc.weight" not in like and "norm.weight" not in official
    names = {name: dense_name(name) for name in like if not (headless and name in HEAD_NORM)}
    return translate(official, like, names, "official", _from_official_value)


def to_classifier(ours: StateDict) -> StateDict:
    """A timm ConvNeXt's state dict in the official dense layout; without a classifier that of ``*_fcmae.pt``.

    Raises WeightsError for a backbone whose final norm was trained, which ``*_fcmae.pt`` cannot hold.
    """
    if "head.fc.weight" not in ours:
        ours = without_head_norm(ours)
    return {dense_name(name): _to_official_value(dense_name(name), value) for name, value in ours.items()}


def sparse_file(network: Network) -> str:
    """The name the official scripts give a pretraining checkpoint."""
    return f"checkpoint-{network.state['step']}.pth"


def dense_file(network: Network) -> str:
    """The name of a dense file, as the published ones are called."""
    return f"{network.backbone_config.backbone}_{'ft' if network.classes else 'fcmae'}.pt"


def export(network: Network, folder: Path) -> None:
    """Writes the dense file and, of a pretraining checkpoint of a V2, the sparse one with the decoder.

    Each is a torch file ``{"model": state dict, "fcmae": what else our checkpoint says}``.

    Raises WeightsError if the official code has no such network.
    """
    structure = Structure.of(network.model)
    if structure.stem_stride != STEM_STRIDE or structure.strides != STRIDES:
        has = f"stem stride {structure.stem_stride}" if structure.is_timms else f"strides {list(structure.strides)}"
        raise WeightsError(
            f"the official code has strides {list(STRIDES)} only; {network.path} has {has}: {instead(network.model)}"
        )
    ours = _description(network)
    torch.save({"model": to_classifier(network.weights), "fcmae": ours}, folder / dense_file(network))
    if network.fcmae is not None and structure.version == 2 and _is_official(network.fcmae):
        sparse = to_pretraining(network.fcmae.state_dict())
        torch.save({"model": sparse, "fcmae": ours}, folder / sparse_file(network))


def _is_official(fcmae: FCMAE) -> bool:
    """Whether the official code has this decoder."""
    light = isinstance(fcmae.decoder, LightDecoder) and fcmae.decoder.split == 1
    return light and list(fcmae.targets) == ["pixels"]


def _description(network: Network) -> dict[str, Any]:
    """What an official file cannot say, in plain values: task, portable config, class names."""
    return {"task": network.state["task"], "config": portable(to_dict(network.cfg)), "classes": network.classes}


def check(network: Network, folder: Path) -> Check:
    """Loads the dense file by timm's reader of official files and compares outputs; reads the sparse file back."""
    model = timm.create_model(
        network.backbone_config.backbone,
        num_classes=len(network.classes),
        in_chans=network.model.in_chans,
        **network.backbone_config.backbone_kwargs(),
    ).eval()
    weights = checkpoint_filter_fn(read(folder / dense_file(network)), model)
    absent = set() if network.classes else set(HEAD_NORM)
    translate(weights, model.state_dict(), {name: name for name in model.state_dict() if name not in absent}, "timm")
    model.load_state_dict(weights, strict=False)
    _check_sparse(network, folder / sparse_file(network))
    reader = f"timm {timm.__version__}'s reader of official files"
    return network.compared(reader, network.outputs(network.fixed_input(), model))


def _check_sparse(network: Network, file: Path) -> None:
    if network.fcmae is None or not file.exists():
        return
    ours = network.fcmae.state_dict()
    back = from_pretraining(as_float32(read(file)["model"], file), ours)
    assert all(torch.equal(back[name], value) for name, value in ours.items())


def load(path: Path, given: Given) -> Imported:
    """An official file: sparse pretraining checkpoint, ``*_fcmae.pt`` or classifier. Raises WeightsError."""
    content = read(path)
    weights = as_float32(content.get("model", content), path)
    description = content.get("fcmae") or {}
    check_plain(description)
    if "mask_token" in weights:
        return _load_sparse(weights, description, given, path)
    structure = _structure(weights)
    cfg = FinetuneConfig(data=_data(structure, description, given), model=_classifier_config(structure, description))
    converted = from_classifier(weights, empty_classifier(cfg, weights, path))
    classes = given.names(structure.num_classes, description.get("classes"))
    return Imported(cfg, converted, classes)


def _load_sparse(weights: StateDict, description: dict[str, Any], given: Given, path: Path) -> Imported:
    structure = _structure(weights, "encoder.", "kernel")
    if description:
        cfg = from_dict(PretrainConfig, portable(upgraded(description["config"])))
    else:
        decoder: dict[str, Any] = {
            "decoder_depth": _count(weights, r"decoder\.(\d+)\."),
            "decoder_embed_dim": _get(weights, "proj.weight").shape[0],
        }
        model = FCMAEConfig(**structure.backbone_config(), **decoder, grn_scope="batch")
        cfg = PretrainConfig(data=given.data(structure.in_chans), model=model)
    return Imported(cfg, from_pretraining(weights, empty_fcmae(cfg, weights, path)))


def _classifier_config(structure: Structure, description: dict[str, Any]) -> ClassifierConfig:
    """Group ``model``: from the tensors, with the timm model named that was exported."""
    name = description["config"]["model"]["backbone"] if description else None
    return ClassifierConfig(**structure.backbone_config(name))


def _data(structure: Structure, description: dict[str, Any], given: Given) -> DataConfig:
    """Group ``data``: what was exported, else what the user gave."""
    if not description:
        return given.data(structure.in_chans)
    return given.data(structure.in_chans, portable(upgraded(description["config"]))["data"])


def _structure(weights: StateDict, prefix: str = "", kernel: str = "weight") -> Structure:
    """The structure, from the tensors of the dense or sparse layout. Raises WeightsError naming a key that is missing.

    Args:
        prefix: of the encoder's keys.
        kernel: what the depthwise convolution's is called, ``weight`` ``[C, 1, 7, 7]`` or ``kernel`` ``[49, C]``.
    """
    stem_weight = _get(weights, f"{prefix}downsample_layers.0.0.weight")
    if stem_weight.shape[2:] != (STEM_STRIDE, STEM_STRIDE):
        raise WeightsError(f"{prefix}downsample_layers.0.0.weight must be [C, C, 4, 4]; got {list(stem_weight.shape)}")
    depthwise = [_get(weights, f"{prefix}stages.{stage}.0.dwconv.{kernel}") for stage in range(4)]
    return Structure(
        version=2 if any(".grn." in name for name in weights) else 1,
        in_chans=stem_weight.shape[1],
        stem_stride=STEM_STRIDE,
        strides=STRIDES,
        depths=tuple(_count(weights, rf"{prefix}stages\.{stage}\.(\d+)\.") for stage in range(4)),
        dims=tuple(weight.shape[1 if kernel == "kernel" else 0] for weight in depthwise),
        num_classes=len(weights.get("head.weight", ())),
    )


def _get(weights: StateDict, name: str) -> Tensor:
    if name not in weights:
        hint = "; it has the names of timm: import it with --from timm" if "stem.0.weight" in weights else ""
        raise WeightsError(f"not weights of an official ConvNeXt: missing {name}{hint}")
    return weights[name]


def _count(weights: StateDict, pattern: str) -> int:
    """How many different numbers the group in ``pattern`` matches in the keys."""
    return len({match[1] for match in (re.match(pattern, name) for name in weights) if match})
