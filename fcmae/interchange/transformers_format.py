"""A directory that Transformers reads with ``from_pretrained``: ConvNextV2 classes, of a V1 the ConvNext classes.

It is written without Transformers: ``config.json``, ``model.safetensors``, ``preprocessor_config.json``. Names and
values follow ``models/convnextv2`` of Transformers 4 and 5, which agree. TensorFlow's classes, in Transformers 4, read
the same files.
"""

import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fcmae.config import ClassifierConfig, DataConfig, FinetuneConfig, from_dict
from fcmae.data.pixels.transforms import WARP_FROM
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
from fcmae.interchange.weights import StateDict, read_folder, read_json, renamed, translate, write_folder

MODEL_TYPES = {1: "convnext", 2: "convnextv2"}
DINOV3 = "dinov3_convnext"
"""Read, not written: a V1 under other names."""
CLASSES = {1: "ConvNext", 2: "ConvNextV2"}
EPS = 1e-6
"""Of the final norm, which Transformers takes from the config. The other norms have the same, fixed in its code."""
BICUBIC = 3  # Pillow's number

# (ours, theirs) for the names within a backbone; the first match wins.
_NAMES = (
    (r"stem\.0\.", r"embeddings.patch_embeddings."),
    (r"stem\.1\.", r"embeddings.layernorm."),
    (r"stages\.(\d+)\.downsample\.(\d)\.", r"encoder.stages.\1.downsampling_layer.\2."),
    (r"stages\.(\d+)\.blocks\.(\d+)\.conv_dw\.", r"encoder.stages.\1.layers.\2.dwconv."),
    (r"stages\.(\d+)\.blocks\.(\d+)\.norm\.", r"encoder.stages.\1.layers.\2.layernorm."),
    (r"stages\.(\d+)\.blocks\.(\d+)\.mlp\.fc(\d)\.", r"encoder.stages.\1.layers.\2.pwconv\3."),
    (r"stages\.(\d+)\.blocks\.(\d+)\.mlp\.grn\.", r"encoder.stages.\1.layers.\2.grn."),
    (r"stages\.(\d+)\.blocks\.(\d+)\.gamma$", r"encoder.stages.\1.layers.\2.layer_scale_parameter"),
    (r"head\.norm\.", r"layernorm."),
)


def names(ours: StateDict, version: int) -> dict[str, str]:
    """Our names of a backbone's or a classifier's parameters to theirs."""
    prefix = f"{MODEL_TYPES[version]}." if "head.fc.weight" in ours else ""
    return {name: _name(name, prefix) for name in ours}


def _name(name: str, prefix: str) -> str:
    if name.startswith("head.fc."):
        return name.replace("head.fc.", "classifier.")
    return prefix + renamed(name, _NAMES, "that Transformers has")


def to_transformers(ours: StateDict, version: int) -> StateDict:
    """A timm ConvNeXt's state dict under their names and in their shapes."""
    return {theirs: _to_their_value(name, ours[name]) for name, theirs in names(ours, version).items()}


def _to_their_value(name: str, value: Tensor) -> Tensor:
    """GRN's parameters are ``[1, 1, 1, C]`` there; timm's small models have 1 x 1 convolutions for linear layers."""
    if ".grn." in name:
        return value.view(1, 1, 1, -1)
    return (value.flatten(1) if re.search(r"mlp\.fc\d\.weight", name) else value).contiguous()


def export(network: Network, folder: Path) -> None:
    """Writes the directory. Raises WeightsError if Transformers has no such network."""
    structure = Structure.of(network.model)
    if not structure.is_timms:
        raise WeightsError(
            f"{network.path} has strides {list(structure.strides)}; Transformers has a stem of 1 or 4, then 2, 2, 2: "
            f"{instead(network.model)}"
        )
    if structure.stem_stride == 2:
        raise WeightsError(
            f"{network.path} has stem stride 2, after which timm downsamples before the first stage too; Transformers "
            f"has no layer there: {instead(network.model)}"
        )
    weights = to_transformers(network.weights, structure.version)
    processor = preprocessor_config(network.cfg.data)
    write_folder(folder, weights, {"config.json": config(structure, network), "preprocessor_config.json": processor})


def config(structure: Structure, network: Network) -> dict[str, Any]:
    """``config.json``; ``timm_model`` is ours, what the weights come back as."""
    data = network.cfg.data
    values: dict[str, Any] = {
        "architectures": [CLASSES[structure.version] + ("ForImageClassification" if network.classes else "Model")],
        "model_type": MODEL_TYPES[structure.version],
        "num_channels": structure.in_chans,
        "patch_size": structure.stem_stride,
        "num_stages": 4,
        "hidden_sizes": list(structure.dims),
        "depths": list(structure.depths),
        "hidden_act": "gelu",
        "initializer_range": 0.02,
        "layer_norm_eps": EPS,
        "drop_path_rate": 0.0,
        "image_size": data.size[0] if data.size[0] == data.size[1] else list(data.size),
        "torch_dtype": "float32",
        "timm_model": network.backbone_config.backbone,
        "fcmae": preprocessing.extra(data),
    }
    if structure.version == 1:
        values["layer_scale_init_value"] = 1e-6
    if network.classes:
        values["id2label"] = {str(index): name for index, name in enumerate(network.classes)}
        values["label2id"] = {name: index for index, name in enumerate(network.classes)}
    return values


def preprocessor_config(data: DataConfig) -> dict[str, Any]:
    """``preprocessor_config.json``: preprocessing as in :func:`fcmae.data.pixels.transforms.eval_transform`.

    ConvNextImageProcessor crops as we do, squares only. For other sizes CLIPImageProcessor resizes both sides to a size
    and crops the centre: the same for images of the aspect ratio of ``image_size``. None of them pads (``data.pad``).
    """
    values: dict[str, Any] = {
        "do_resize": True,
        "resample": BICUBIC,
        "do_rescale": True,
        "rescale_factor": 1 / (2**data.bit_depth - 1) if data.dtype == "uint" else 1,
        "do_normalize": True,
        **dict(zip(("image_mean", "image_std"), preprocessing.mean_and_std(data), strict=True)),
    }
    height, width = data.size
    if height == width:
        square = {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": height}}
        return {**square, "crop_pct": data.crop_pct, **values}
    crop_pct = 1.0 if max(data.size) >= WARP_FROM else data.crop_pct
    return {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"height": int(height / crop_pct), "width": int(width / crop_pct)},
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "do_convert_rgb": data.in_chans == 3,
        **values,
    }


def check(network: Network, folder: Path) -> Check:
    """Loads ``folder`` with Transformers and compares feature map, pooled features and logits with ours."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import transformers
    except ImportError:
        return Check("Transformers is not installed: pip install 'fcmae[transformers]'", None)
    kind = "AutoModelForImageClassification" if network.classes else "AutoModel"
    model, info = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True)
    if any(info.values()):
        raise WeightsError(f"Transformers reports of {folder}: {info}")
    with torch.inference_mode():
        out = model.eval()(network.fixed_input(), output_hidden_states=True)
    head = {"logits": out.logits} if network.classes else {"pooled": out.pooler_output}
    return network.compared(f"transformers {transformers.__version__}", {"features": out.hidden_states[-1], **head})


def load(folder: Path, given: Given) -> Imported:
    """A directory of Transformers', ours or one downloaded from the hub. Raises WeightsError."""
    content = read_json(folder / "config.json")
    rename = _without_dinov3 if content.get("model_type") == DINOV3 else _modern_name
    weights = {rename(name): value for name, value in read_folder(folder).items()}
    structure = _structure(content, folder, count_classes(weights))
    processor = folder / "preprocessor_config.json"
    known = _data(read_json(processor)) if processor.is_file() else {}
    known |= preprocessing.read_extra(content)
    cfg = FinetuneConfig(
        data=given.data(structure.in_chans, known),
        model=from_dict(ClassifierConfig, structure.backbone_config(content.get("timm_model")), prefix="model"),
    )
    like = empty_classifier(cfg, weights, folder)
    ours = translate(weights, like, names(like, structure.version), "Transformers")
    id2label = content.get("id2label", {}) if structure.num_classes else {}
    labels = [id2label[index] for index in sorted(id2label, key=int)]
    eps = content.get("layer_norm_eps", 1e-12)
    notes = [] if eps == EPS else [f"the final norm has eps {eps:g} in these files and {EPS:g} here"]
    return Imported(cfg, ours, given.names(structure.num_classes, labels), notes)


def _modern_name(name: str) -> str:
    """GRN's parameters were called gamma and beta in files of Transformers before 4.30."""
    return name.replace(".grn.gamma", ".grn.weight").replace(".grn.beta", ".grn.bias")


# (DINOv3's, ConvNext's) names; models/dinov3_convnext of Transformers 4.56 and later
_DINOV3 = (
    (r"^(?:model\.)?stages\.0\.downsample_layers\.0\.", "embeddings.patch_embeddings."),
    (r"^(?:model\.)?stages\.0\.downsample_layers\.1\.", "embeddings.layernorm."),
    (r"^(?:model\.)?stages\.(\d+)\.downsample_layers\.", r"encoder.stages.\1.downsampling_layer."),
    (r"^(?:model\.)?stages\.(\d+)\.layers\.(\d+)\.", r"encoder.stages.\1.layers.\2."),
    (r"\.gamma$", ".layer_scale_parameter"),
    (r"\.depthwise_conv\.", ".dwconv."),
    (r"\.pointwise_conv(\d)\.", r".pwconv\1."),
    (r"layer_norm\.", "layernorm."),
)


def _without_dinov3(name: str) -> str:
    """The ConvNext name of a parameter of DINOv3's ConvNeXt."""
    for theirs, ours in _DINOV3:
        name = re.sub(theirs, ours, name)
    return name


def _structure(content: dict[str, Any], folder: Path, num_classes: int) -> Structure:
    versions = {**{model_type: version for version, model_type in MODEL_TYPES.items()}, DINOV3: 1}
    model_type, act = content.get("model_type"), content.get("hidden_act", "gelu")
    if model_type not in versions or act != "gelu":
        raise WeightsError(
            f"{folder}/config.json has model_type {model_type!r} and hidden_act {act!r}; must be "
            f"{' or '.join(versions)} with gelu"
        )
    patch_size = content.get("patch_size", 4)
    sides = set(patch_size) if isinstance(patch_size, list) else {patch_size}
    if len(sides) != 1 or not sides <= {1, 4}:
        raise WeightsError(f"{folder}/config.json has patch_size {patch_size}; must be 1 or 4, the stems of timm")
    return Structure(
        version=versions[model_type],
        in_chans=content.get("num_channels", 3),
        stem_stride=max(sides),
        strides=(max(sides), 2, 2, 2),
        depths=tuple(content.get("depths", (3, 3, 9, 3))),
        dims=tuple(content.get("hidden_sizes", (96, 192, 384, 768))),
        num_classes=num_classes,
    )


def _data(processor: dict[str, Any]) -> dict[str, Any]:
    """A ``preprocessor_config.json`` as values of a DataConfig."""
    values = {"mean": processor.get("image_mean"), "std": processor.get("image_std")}
    resized = _sides(processor.get("size"))
    cropped = _sides(processor.get("crop_size")) if processor.get("do_center_crop", True) else None
    values["image_size"] = cropped or resized
    if cropped and resized and 0 < min(cropped) <= min(resized):
        values["crop_pct"] = min(cropped) / min(resized)
    values["crop_pct"] = processor.get("crop_pct") or values.get("crop_pct")
    return {name: value for name, value in values.items() if value is not None}


def _sides(size: Any) -> list[int] | None:
    """Height and width of a processor's size: a number, ``{"shortest_edge": N}``, or ``{"height": N, "width": N}``."""
    if isinstance(size, int):
        return [size, size]
    if not isinstance(size, dict):
        return None
    sides = [size.get(name, size.get("shortest_edge")) for name in ("height", "width")]
    whole = [side for side in sides if type(side) is int]
    return whole if len(whole) == 2 else None
