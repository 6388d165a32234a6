"""The model card ``README.md`` of an export: data, recipe, steps, metrics, licence, how to load it, versions."""

import contextlib
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from fcmae.checkpoints.checkpoint import run_of
from fcmae.config import DataConfig, FinetuneConfig, OptimConfig, PretrainConfig, RunConfig
from fcmae.data.pixels.transforms import WARP_FROM
from fcmae.files import defined
from fcmae.interchange import preprocessing
from fcmae.interchange.network import Check, Network
from fcmae.models.build import is_classifier
from fcmae.opening import open_regular
from fcmae.version import __version__

LIBRARY_NAMES = {**{name: name for name in ("timm", "transformers", "onnx")}, "official": "pytorch", "viscy": "pytorch"}
CURVES = ("loss", "top1", "top5", "ema_top1", "ema_top5")
"""The metrics of metrics.jsonl that a card reports."""
LONGEST_LINE, MAX_METRICS = 2**16, 2**28
"""Bytes of a line of metrics.jsonl, and of all that are read."""


def write(network: Network, folder: Path, to: str, check: Check, license_name: str | None) -> None:
    """Writes ``folder/README.md``. ``license_name`` goes into the field that the hub reads, ``unknown`` if None."""
    license_name = license_name or _license(network)
    sections = [
        _front_matter(network, to, license_name or "unknown"),
        _title(network),
        _table("Network", _network(network)),
        _table("Data", _data(network.cfg.data)),
        _table("Recipe", _recipe(network)),
        _metrics(network.path, network.state["step"]),
        f"## How to load it\n\n```python\n{_how_to_load(network, to)}\n```",
        _input(network.cfg.data, to),
        _table("Versions", {**_versions(network), "export": f"{to}, {check}"}),
        f"## Licence\n\n{license_name or 'Not stated. `fcmae export --license TEXT` fills this in.'}",
    ]
    (folder / "README.md").write_text("\n\n".join(section for section in sections if section) + "\n")


def _license(network: Network) -> str | None:
    """The licence of the weights that training began with, where it is known."""
    origin = network.state.get("origin")
    known = origin.get("license") if isinstance(origin, dict) else None
    return _text(known) if isinstance(known, str) else None


def _front_matter(network: Network, to: str, license_name: str) -> str:
    """The metadata the hub reads (its documentation, "Model Cards")."""
    pipeline = "image-classification" if network.classes else "image-feature-extraction"
    tags = ["fcmae", "convnext", *(["timm"] if to == "timm" else [])]
    fields = {"license": license_name, "library_name": LIBRARY_NAMES[to], "pipeline_tag": pipeline, "tags": tags}
    return "---\n" + "\n".join(f"{name}: {json.dumps(value)}" for name, value in fields.items()) + "\n---"


def _title(network: Network) -> str:
    what = f"classifier of {len(network.classes)} classes" if network.classes else "pretrained backbone"
    method = "masked autoencoding (FCMAE, ConvNeXt V2, arXiv 2301.00808)"
    how = f"Pretrained by {method} with" if isinstance(network.cfg, PretrainConfig) else "Exported by"
    return f"# {network.backbone_config.backbone}, {what}\n\n{how} fcmae {__version__}."


LONGEST = 100
"""Characters of a name in a card."""
_UNSEEN = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]+")
_MARKUP = re.compile(r"[&<>|`*\[\]\\!~$@#{}]|:(?=//)|(?<=www)\.|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", re.IGNORECASE)


def _text(value: Any) -> Any:
    """Text of a checkpoint's, such as the name of a class, that is only text in Markdown and HTML."""
    if not isinstance(value, str):
        return value
    shown = _UNSEEN.sub(" ", value[:LONGEST]) + ("..." if len(value) > LONGEST else "")
    return _MARKUP.sub(lambda match: f"&#{ord(match[0])};", shown)


def _table(title: str, rows: dict[str, Any]) -> str:
    lines = [f"| {name} | {value} |" for name, value in rows.items() if value is not None]
    return "\n".join([f"## {title}", "", "| | |", "|---|---|", *lines])


def _network(network: Network) -> dict[str, Any]:
    model = network.backbone_config
    return {
        "timm model": model.backbone,
        "parameters": f"{sum(value.numel() for value in network.weights.values()):,}",
        "channels": network.model.in_chans,
        "depths": model.depths,
        "dims": model.dims,
        "strides": model.strides,
        "arguments of timm": model.timm and ", ".join(f"{name}={value}" for name, value in model.timm.items()),
        "stem stride": None if model.strides else model.stem_stride,
        "classes": ", ".join(map(_text, network.classes[:20])) + (", ..." if len(network.classes) > 20 else "") or None,
    }


def _data(data: DataConfig) -> dict[str, Any]:
    """The data without where they were on the machine that trained."""
    return {
        "source": data.name,
        "size (height, width)": f"{data.size[0]}, {data.size[1]}",
        "channels": data.in_chans,
        "bits per channel": data.bit_depth if data.dtype == "uint" else "float32 in the images' own units",
        "normalisation": None if data.normalize == "dataset" else _normalisation(data),
        "mean": data.mean or (None if data.normalize == "image" else "normalised by the source"),
        "std": data.std or (None if data.normalize == "image" else "normalised by the source"),
        "padding": data.pad or None,
        "evaluation crop": data.crop_pct if max(data.size) < WARP_FROM else "none, both sides are resized",
        "labelled images per class": data.labels_per_class,
    }


def _normalisation(data: DataConfig) -> str:
    if data.normalize == "image":
        return "each image by the mean and standard deviation of its channels"
    return f"clipped to {data.low} ... {data.high}, which become -1 and 1" if data.clips else "none"


def _recipe(network: Network) -> dict[str, Any]:
    if "imported_from" in network.state:
        return {"weights imported from": f"{_text(network.state['imported_from'])}; trained elsewhere"}
    cfg: RunConfig = network.cfg
    optim: OptimConfig = cfg.optim
    return {
        "task": network.state["task"],
        "initial weights": _initial_weights(network),
        "steps": network.state["step"],
        "epochs of the schedule": cfg.schedule.epochs,
        "global batch size": optim.global_batch_size,
        "peak learning rate": f"{optim.peak_lr:g}",
        "weight decay": optim.weight_decay,
        "layer decay": optim.layer_decay,
        "precision": cfg.precision,
        "seed": cfg.seed,
        **_task_recipe(cfg),
    }


def _initial_weights(network: Network) -> str:
    origin = network.state.get("origin")
    if isinstance(origin, dict) and isinstance(origin.get("weights"), str):
        name = origin["weights"]
        return _text(name if name.startswith("timm:") else Path(name).name)
    return "pretrained" if getattr(network.cfg, "init_from", None) else "random"


def _task_recipe(cfg: RunConfig) -> dict[str, Any]:
    """What only one of the tasks has."""
    if isinstance(cfg, PretrainConfig):
        targets = {name: _text(given["_target_"]) for name, given in cfg.target.items()}
        return {
            "mask ratio": cfg.model.mask_ratio,
            "mask": _text(cfg.mask["_target_"]),
            "targets": ", ".join(f"{_text(name)} ({target})" for name, target in targets.items()),
        }
    assert isinstance(cfg, FinetuneConfig)
    return {
        "objective": None if is_classifier(cfg) else f"{_text(cfg.objective['_target_'])}, whose head is not exported",
        "drop path": cfg.model.drop_path_rate,
        "EMA decay": cfg.optim.ema_decay,
        **{
            name.replace("_", " "): _text(value) or None
            for name, value in dataclasses.asdict(cfg.augment).items()
            if name != "on"
        },
    }


def _metrics(checkpoint: Path, step: int) -> str:
    """The last value of each metric up to the checkpoint's step in the run's metrics.jsonl, if that lies beside it."""
    run = run_of(checkpoint)
    if run is None:
        return ""
    last: dict[str, str] = {}
    with contextlib.suppress(OSError), open_regular(run / "metrics.jsonl", links=False) as lines:
        while (line := lines.readline(LONGEST_LINE)) and lines.tell() <= MAX_METRICS:
            with contextlib.suppress(ValueError, RecursionError):  # cut off, or not of a run
                last |= _numbers(json.loads(line), step)
    return _table("Metrics", last) if last else ""


def _numbers(values: Any, last_step: int) -> dict[str, str]:
    if not isinstance(values, dict) or type(values.get("step")) is not int or values["step"] > last_step:
        return {}
    values = defined(values)
    known = {name: values[name] for name in CURVES if type(values.get(name)) in (int, float)}
    return {name: f"{value:.4g} (step {values['step']})" for name, value in known.items()}


def _versions(network: Network) -> dict[str, str]:
    return {f"trained with {_text(name)}": _text(version) for name, version in network.state["versions"].items()}


def _input(data: DataConfig, to: str) -> str:
    """How to make the network's input, if the other library has no transform that does it."""
    if not data.mean and data.normalize != "image":
        return "## Input\n\nfloat32, normalised by the source that it was trained with; not 0 to 1."
    reason = preprocessing.shortcoming(data, to)
    if not reason and to in preprocessing.LIBRARIES:
        return ""
    return "\n\n".join(filter(None, ["## Input", reason, f"```python\n{preprocessing.steps(data)}\n```"]))


def _how_to_load(network: Network, to: str) -> str:
    """Python code, with DIR for the directory or its name on the hub."""
    exact = not preprocessing.shortcoming(network.cfg.data, to)
    if to == "onnx":
        return 'import onnxruntime\n\nsession = onnxruntime.InferenceSession("DIR/model.onnx")'
    if to == "timm":
        lines = [
            "import timm\n",
            'model = timm.create_model("local-dir:DIR", pretrained=True).eval()  # from the hub: "hf-hub:OWNER/NAME"',
        ]
        if exact:
            kind = "RGB" if network.model.in_chans == 3 else "L"
            config = "timm.data.resolve_model_data_config(model)"
            lines.append(f'transform = timm.data.create_transform(**{config})  # of Image.open(FILE).convert("{kind}")')
        return "\n".join(lines)
    if to == "transformers":
        kind = "AutoModelForImageClassification" if network.classes else "AutoModel"
        lines = [f"from transformers import AutoImageProcessor, {kind}\n"]
        lines += ['processor = AutoImageProcessor.from_pretrained("DIR")'] if exact else []
        return "\n".join([*lines, f'model = {kind}.from_pretrained("DIR").eval()'])
    if to == "viscy":
        return (
            "import json\n\n"
            "from safetensors.torch import load_file\n"
            "from viscy_models import FullyConvolutionalMAE\n\n"
            'arguments = json.load(open("DIR/config.json"))["arguments"]\n'
            "model = FullyConvolutionalMAE(out_channels=1, **arguments)\n"
            'model.encoder.load_state_dict(load_file("DIR/model.safetensors"))'
        )
    return (
        "import torch\n\n"
        'weights = torch.load("DIR/FILE", weights_only=True)["model"]  # for the official ConvNeXt V2 code\n'
        "# fcmae import DIR/FILE --from official --out checkpoint.pt"
    )
