"""Weights of other libraries as the state of a checkpoint, for ``init_from``.

``timm:NAME`` is downloaded by timm. A directory with a ``config.json`` is timm's or Transformers'; a file has the names
of the official code or of timm.
"""

import contextlib
import dataclasses
import difflib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
from timm.models.convnext import ConvNeXt

from fcmae.checkpoints import checkpoint
from fcmae.checkpoints.checkpoint import State
from fcmae.checkpoints.encoder import TASK
from fcmae.config import PretrainConfig, to_dict
from fcmae.config.unset import UNSET
from fcmae.errors import WeightsError
from fcmae.interchange import official, timm_format, transformers_format
from fcmae.interchange.network import Given, Imported
from fcmae.interchange.weights import explained, read_json
from fcmae.messages import print_once

HUB = "timm:"
OFFICIAL_LICENSE = "cc-by-nc-4.0"
"""Of the weights that the authors of ConvNeXt V2 publish."""


def is_foreign(name: str) -> bool:
    """Whether ``name`` is weights of another library, rather than a run, a checkpoint or an encoder file of ours."""
    path = Path(name)
    if name.startswith(HUB):
        return True
    if path.is_dir():
        return (path / "config.json").is_file()
    return path.is_file() and not checkpoint.is_ours(path)


def read_foreign(name: str) -> State:
    """The state of a checkpoint, of the task ``encoder``, or ``pretrain`` for a file that has a decoder too.

    ``config`` has the keys of the groups ``model`` and ``data`` that the files tell; ``origin`` says where the weights
    come from and, if known, their licence.

    Raises WeightsError.
    """
    origin = {"weights": name, "license": None}
    if name.startswith(HUB):
        return _from_hub(name.removeprefix(HUB), origin)
    path = Path(name)
    with explained(path, "the weights of a ConvNeXt"):
        imported, library = _load(path)
    if library == "official":
        origin["license"] = OFFICIAL_LICENSE
    return _state(imported, library, origin)


def _load(path: Path) -> tuple[Imported, str]:
    given = Given(any_channels=True)
    if path.is_dir():
        config = read_json(path / "config.json")
        if "architecture" in config:
            return timm_format.load(path, given), "timm"
        return transformers_format.load(path, given), "transformers"
    if timm_format.is_timm(path):
        return timm_format.load(path, given), "timm"
    return official.load(path, given), "official"


def _state(imported: Imported, library: str, origin: dict[str, Any]) -> State:
    cfg = imported.cfg
    state: State = {"model": imported.weights, "ema": None, "imported_from": library, "origin": origin}
    if isinstance(cfg, PretrainConfig):
        return {**state, "task": "pretrain", "config": to_dict(cfg)}
    backbone = {key: value for key, value in dataclasses.asdict(cfg.model).items() if key in UNSET["model"]}
    data = {key: value for key, value in dataclasses.asdict(cfg.data).items() if key in UNSET["data"]}
    weights = {key: value for key, value in imported.weights.items() if not key.startswith("head.fc.")}
    return {**state, "task": TASK, "model": weights, "config": {"model": backbone, "data": data}}


def _from_hub(name: str, origin: dict[str, Any]) -> State:
    """Pretrained weights that timm downloads, or finds in its cache."""
    known = timm.list_pretrained("convnext*")
    if name not in known:
        close = difflib.get_close_matches(name, known, n=4)
        hint = f"did you mean {' or '.join(HUB + other for other in close)}?" if close else "see timm.list_pretrained()"
        raise WeightsError(f"{HUB}{name} is not a pretrained ConvNeXt known to timm {timm.__version__}; {hint}")
    model = _pretrained(name)
    config: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]  # a Module, says mypy
    origin["license"] = config.get("license")
    data = {"in_chans": 3, "bit_depth": 8, "mean": list(config["mean"]), "std": list(config["std"])}
    data["image_size"] = tuple(config["input_size"][1:])
    backbone = {**dict.fromkeys(UNSET["model"]), "backbone": name.split(".")[0], "stem_stride": 4}
    return {
        "task": TASK,
        "model": model.state_dict(),
        "ema": None,
        "config": {"model": backbone, "data": data},
        "imported_from": "timm",
        "origin": origin,
    }


def _pretrained(name: str) -> ConvNeXt:
    try:
        with downloading(name):
            model = timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # of a failed download the libraries raise all sorts
        raise WeightsError(
            f"{HUB}{name} cannot be downloaded ({reason(error)}); without a network, give a file or directory of it"
        ) from error
    assert isinstance(model, ConvNeXt)
    return model


@contextlib.contextmanager
def downloading(name: str) -> Iterator[None]:
    """A line says that timm downloads a network in this block; huggingface_hub does not say each time that it tries."""
    print_once(f"timm downloads {name}, unless it is in the cache")
    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    hub.setLevel(logging.ERROR)
    try:
        yield
    finally:
        hub.setLevel(level)


def reason(error: Exception) -> str:
    """The first sentence of an error."""
    return f"{type(error).__name__}: {error}".splitlines()[0].split(". ")[0]
