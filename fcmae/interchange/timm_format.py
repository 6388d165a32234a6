"""A directory for the hub that timm reads: ``timm.create_model("local-dir:DIR", pretrained=True)``.

It holds ``model.safetensors`` and ``config.json`` with what timm calls pretrained_cfg (timm ``models/_hub.py``).
"""

from pathlib import Path
from typing import Any

import timm

from fcmae.config import ClassifierConfig, DataConfig, FinetuneConfig, from_dict
from fcmae.config.timm_arguments import TIMM_ARGUMENTS
from fcmae.data.pixels.transforms import WARP_FROM
from fcmae.engines.convnext import stem
from fcmae.errors import WeightsError
from fcmae.interchange import preprocessing
from fcmae.interchange.network import (
    Check,
    Given,
    Imported,
    Network,
    Structure,
    count_classes,
    empty_classifier,
    instead,
)
from fcmae.interchange.weights import HEAD_NORM, StateDict, read_file, read_folder, read_json, translate, write_folder
from fcmae.models.backbone import strides_of

MODEL_ARGS = {"depths", "dims", "patch_size", "in_chans", "num_classes", "drop_path_rate", *TIMM_ARGUMENTS}
"""The arguments of timm's ConvNeXt that our checkpoints can hold."""


def export(network: Network, folder: Path) -> None:
    """Writes ``model.safetensors`` and ``config.json``. Raises WeightsError if timm cannot build such a network."""
    if "timm" not in (other := instead(network.model)):
        strides = strides_of(network.model)
        raise WeightsError(f"timm cannot build a ConvNeXt with strides {strides}, which {network.path} has: {other}")
    weights = {name: value.contiguous() for name, value in network.weights.items()}
    write_folder(folder, weights, {"config.json": _config(network)})


def _config(network: Network) -> dict[str, Any]:
    num_classes = len(network.classes)
    config: dict[str, Any] = {
        "architecture": network.backbone_config.backbone,
        "num_classes": num_classes,
        "num_features": network.model.num_features,
        "global_pool": "avg",
    }
    if network.classes:
        config["label_names"] = network.classes
    args = {"in_chans": network.model.in_chans, **network.backbone_config.backbone_kwargs()}
    if args.pop("strides", None):
        args["patch_size"] = stem(network.model)[0].stride[0]
    data = network.cfg.data
    config |= {"model_args": args, "pretrained_cfg": _pretrained_cfg(data, num_classes)}
    return {**config, "fcmae": preprocessing.extra(data)}


def _pretrained_cfg(data: DataConfig, num_classes: int) -> dict[str, Any]:
    """The data config in timm's words; "squash" is the resize to the exact size from 384 px on."""
    warp = max(data.size) >= WARP_FROM
    return {
        "input_size": [data.in_chans, *data.size],
        "fixed_input_size": False,
        "interpolation": "bicubic",
        "crop_pct": 1.0 if warp else data.crop_pct,
        "crop_mode": "squash" if warp else "center",
        **dict(zip(("mean", "std"), preprocessing.mean_and_std(data), strict=True)),
        "num_classes": num_classes,
        # timm before 1.0.31 takes this layer's weights for those of 3 channels, and replaces others by random ones.
        "first_conv": "stem.0" if data.in_chans == 3 else None,
        "classifier": "head.fc",
    }


def check(network: Network, folder: Path) -> Check:
    """Loads ``folder`` with timm and compares its outputs with ours."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    return network.compared(f"timm {timm.__version__}", network.outputs(network.fixed_input(), model))


def load(path: Path, given: Given) -> Imported:
    """A directory of timm's, ours or one downloaded from the hub, or a file of weights. Raises WeightsError.

    A file's architecture is that of a ``config.json`` of timm beside it, or else follows from the tensors.
    """
    folder = path.parent if path.is_file() else path
    weights = read_file(path) if path.is_file() else read_folder(folder)
    config = _config_of_tensors(weights, path) if path.is_file() and not _has_config(folder) else _read_config(folder)
    pretrained = config.get("pretrained_cfg", {})
    args = config.get("model_args") or {}
    unknown = sorted(args.keys() - MODEL_ARGS)
    if unknown:
        raise WeightsError(
            f"{folder}/config.json has model_args {', '.join(unknown)}; known are {', '.join(MODEL_ARGS)}"
        )
    num_classes = count_classes(weights)
    in_chans = args.get("in_chans", pretrained.get("input_size", [3])[0])
    model = {"depths": args.get("depths"), "dims": args.get("dims"), "stem_stride": args.get("patch_size", 4)}
    model["timm"] = {name: args[name] for name in TIMM_ARGUMENTS if name in args} or None
    cfg = FinetuneConfig(
        data=given.data(in_chans, {**_data(pretrained), **preprocessing.read_extra(config)}),
        model=from_dict(ClassifierConfig, {"backbone": config["architecture"].split(".")[0], **model}, "model_args"),
    )
    like = empty_classifier(cfg, weights, folder)
    headless = num_classes == 0 and not HEAD_NORM.keys() & weights.keys()
    names = {name: name for name in like if not (headless and name in HEAD_NORM)}
    known = config.get("label_names") or pretrained.get("label_names")
    classes = given.names(num_classes, known if num_classes else [])
    return Imported(cfg, translate(weights, like, names, "timm"), classes, _notes(pretrained, cfg.data))


def is_timm(path: Path) -> bool:
    """Whether a file of weights has timm's names. Raises WeightsError if it cannot be read."""
    return "stem.0.weight" in read_file(path)


def _has_config(folder: Path) -> bool:
    return (folder / "config.json").is_file() and "architecture" in read_json(folder / "config.json")


def _config_of_tensors(weights: StateDict, path: Path) -> dict[str, Any]:
    """What a config.json of timm would say about the architecture. Raises WeightsError."""
    if "downsample_layers.0.0.weight" in weights or "mask_token" in weights:
        raise WeightsError(f"{path} has the names of the official code; import it with --from official")
    first = [weights.get(f"stages.{stage}.blocks.0.conv_dw.weight") for stage in range(4)]
    if "stem.0.weight" not in weights or any(weight is None for weight in first):
        raise WeightsError(
            f"{path} does not hold a ConvNeXt of timm, whose names begin with stem.0 and stages.0.blocks.0"
        )
    structure = Structure(
        version=2 if any(".mlp.grn." in name for name in weights) else 1,
        in_chans=weights["stem.0.weight"].shape[1],
        stem_stride=weights["stem.0.weight"].shape[-1],
        strides=(min(4, weights["stem.0.weight"].shape[-1] ** 2), 2, 2, 2),
        depths=tuple(
            sum(name.startswith(f"stages.{stage}.") and name.endswith(".conv_dw.weight") for name in weights)
            for stage in range(4)
        ),
        dims=tuple(len(weight) for weight in first if weight is not None),
        num_classes=count_classes(weights),
    )
    args = structure.backbone_config()
    names = {"stem_stride": "patch_size", "depths": "depths", "dims": "dims"}
    model_args = {theirs: args[ours] for ours, theirs in names.items() if ours in args}
    return {"architecture": args["backbone"], "model_args": {"in_chans": structure.in_chans, **model_args}}


def _read_config(folder: Path) -> dict[str, Any]:
    config = read_json(folder / "config.json")
    if "architecture" not in config:
        raise WeightsError(f"{folder}/config.json has no architecture; it is not a directory of timm's")
    return config


def _data(pretrained: dict[str, Any]) -> dict[str, Any]:
    """timm's pretrained_cfg as values of a DataConfig."""
    values: dict[str, Any] = {name: _list(pretrained[name]) for name in ("mean", "std") if name in pretrained}
    if "input_size" in pretrained:
        values["image_size"] = list(pretrained["input_size"][1:])
    if "crop_pct" in pretrained:
        values["crop_pct"] = pretrained["crop_pct"]
    return values


def _notes(pretrained: dict[str, Any], data: DataConfig) -> list[str]:
    """How timm's evaluation of these weights differs from ours."""
    ours = _pretrained_cfg(data, 0)
    theirs = {name: pretrained.get(name) or ours[name] for name in ("crop_mode", "interpolation")}
    return [
        f"timm evaluates these weights with {name}={value}; here it is {ours[name]}, so accuracies may differ"
        for name, value in theirs.items()
        if value != ours[name]
    ]


def _list(values: Any) -> list | None:
    return None if values is None else list(values)
