"""The commands as Python functions: ``fcmae.pretrain(data="photos", out="runs/photos")`` and the others.

They take the keys of the command line as keyword arguments, check them in the same way, and raise
:class:`fcmae.errors.FCMAEError` with the messages of the command line.
"""

import contextlib
import html
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fcmae import interrupt, ranks
from fcmae.errors import ConfigError, UsageError
from fcmae.files import read_metrics
from fcmae.imports import load as load_function
from fcmae.messages import print_rank0
from fcmae.sweep import logged

if TYPE_CHECKING:
    from timm.models.convnext import ConvNeXt

    from fcmae.models import FCMAE
    from fcmae.models.headed import Headed

Data = Any
"""Images: a path, a list of paths, a dict of keys of group ``data``, or an index-able dataset of PyTorch."""
INITIAL = "initial.safetensors"
"""In a run's folder: the weights of a network that was given as a module."""
NOTEBOOK_PICTURES = 400_000
"""Bytes of all pictures of a run that a notebook shows."""


@dataclass(frozen=True)
class Run:
    """A run that is done. ``path`` is its folder; a Run can stand wherever a path of a run can."""

    path: Path
    checkpoint: Path
    """The last checkpoint."""

    @property
    def metrics(self) -> dict[str, float]:
        """The last value of each metric."""
        return logged(self.path)

    @property
    def history(self) -> list[dict[str, float]]:
        """The lines of ``metrics.jsonl``, each with its ``step``."""
        return list(read_metrics(self.path / "metrics.jsonl"))

    def load(self, **options: Any) -> "FCMAE | ConvNeXt | Headed":
        """The network of the best checkpoint, else of the last one; options are those of :func:`fcmae.load`."""
        return load_function("fcmae.models.build:load")(self.path, **options)

    def __fspath__(self) -> str:
        return str(self.path)

    def _repr_html_(self) -> str:
        """The report of the run, which notebooks show."""
        content = load_function("fcmae.report.read:read_run")(self.path, self.path.name, NOTEBOOK_PICTURES)
        page = html.escape(load_function("fcmae.report.page:render")([content]))
        return f'<iframe srcdoc="{page}" style="width:100%;height:640px;border:0"></iframe>'


def pretrain(
    data: Data = None,
    out: str | os.PathLike[str] | None = None,
    model: Any = None,
    *,
    val_data: Data = None,
    overrides: Sequence[str] = (),
    **keys: Any,
) -> Run:
    """Pretrains as ``fcmae pretrain`` does, or continues what ``out`` holds.

    Ctrl-C, also a notebook's stop button, saves and raises :class:`fcmae.errors.Interrupted`; the same call resumes.

    Args:
        data: training images: a path or several, a dict of keys of group ``data``, or a dataset: an object with
            ``__len__`` and ``__getitem__`` whose samples are images (PIL, tensors ``[C, H, W]``, arrays), tuples
            (image, label) or dicts. Sample i must always be the same: augmentation belongs to ``data.transforms``.
        out: the folder of the run.
        model: a name such as ``convnextv2_atto``, a dict of keys of group ``model``, or a timm ConvNeXt, from whose
            weights the run starts.
        val_data: held-out images, in the same way.
        overrides: overrides as on the command line, such as ``experiment=in1k/pretrain_1600ep`` or ``optim.lr=1e-3``.
        keys: groups and keys by name: ``optim={"lr": 1e-3}, seed=1``.

    Raises FCMAEError.
    """
    return _train("pretrain", data, out, model, val_data, overrides, keys)


def finetune(
    data: Data = None,
    out: str | os.PathLike[str] | None = None,
    model: Any = None,
    *,
    init_from: str | os.PathLike[str] | None = None,
    val_data: Data = None,
    overrides: Sequence[str] = (),
    **keys: Any,
) -> Run:
    """Fine-tunes as ``fcmae finetune`` does, or continues what ``out`` holds.

    Args:
        data: labelled training images, as for :func:`pretrain`: a folder with a subfolder per class, or a dataset of
            (image, label).
        init_from: the run or checkpoint to start from.

    Other arguments are those of :func:`pretrain`. Raises FCMAEError.
    """
    if init_from is not None:
        keys["init_from"] = init_from
    return _train("finetune", data, out, model, val_data, overrides, keys)


def study(
    init_from: str | os.PathLike[str] | None = None,
    data: Data = None,
    val_data: Data = None,
    out: str | os.PathLike[str] | None = None,
    *,
    overrides: Sequence[str] = (),
    **keys: Any,
) -> dict[str, Any]:
    """What pretraining brings by the number of labels, as ``fcmae study`` measures it, or continues in ``out``.

    Args:
        init_from: the pretraining run that is studied.
        data, val_data: labelled training and validation images, in the ways of :func:`finetune`.
        out: the folder of the study.
        overrides, keys: as for :func:`pretrain`: ``labels=[10, 100, "all"], seeds=3``.

    Returns:
        What ``study.json`` holds (docs/learning.md).

    Raises FCMAEError; Interrupted: the same call continues.
    """
    if init_from is not None:
        keys["init_from"] = init_from
    return json.loads(_train("study", data, out, None, val_data, overrides, keys).checkpoint.read_text())


def evaluate(
    checkpoint: str | os.PathLike[str], data: Data = None, *, overrides: Sequence[str] = (), **keys: Any
) -> dict[str, Any] | None:
    """Metrics of a fine-tuned network, as ``fcmae evaluate`` prints them; None on ranks other than the first.

    Args:
        data: validation images, given as in :func:`pretrain`; None = the run's.
        overrides, keys: as for :func:`pretrain`.

    Raises FCMAEError.
    """
    return _measure("evaluate", checkpoint, None, data, overrides, keys)


def knn(
    checkpoint: str | os.PathLike[str],
    data: Data = None,
    *,
    train_data: Data = None,
    overrides: Sequence[str] = (),
    **keys: Any,
) -> dict[str, Any] | None:
    """k-NN accuracy of frozen features, as ``fcmae knn``: of ``data`` by their neighbours in ``train_data``.

    Other arguments, result and errors are those of :func:`evaluate`.
    """
    return _measure("knn", checkpoint, train_data, data, overrides, keys)


def probe(
    checkpoint: str | os.PathLike[str],
    data: Data = None,
    *,
    train_data: Data = None,
    overrides: Sequence[str] = (),
    **keys: Any,
) -> dict[str, Any] | None:
    """Accuracy of linear classifiers on frozen features, as ``fcmae probe``. Arguments are those of :func:`knn`."""
    return _measure("probe", checkpoint, train_data, data, overrides, keys)


def _train(
    command: str, data: Data, out: Any, model: Any, val_data: Data, overrides: Sequence[str], keys: dict[str, Any]
) -> Run:
    if out is None:
        raise UsageError('out must be the folder of the run, such as out="runs/photos"')
    folder = Path(out).expanduser()
    with contextlib.ExitStack() as stack:
        given = [*stack.enter_context(_images(data, "data", "path"))]
        given += stack.enter_context(_images(val_data, "val_data", "val_path"))
        given += [*_network(command, model, folder), *as_overrides(keys)]
        cfg = _compose(command, [*overrides, *given], folder)
        if command != "pretrain" or _looks_at_labels(cfg):
            load_function("fcmae.data.sources.dataset:need_labels")()
        stack.enter_context(interrupt.recorded(lambda line: print_rank0(f"fcmae.{command}: {line}")))
        module = "fcmae.studies.run" if command == "study" else "fcmae.training.run"
        return Run(folder, load_function(f"{module}:{command}")(cfg, folder))


def _measure(
    command: str, checkpoint: Any, train_data: Data, data: Data, overrides: Sequence[str], keys: dict[str, Any]
) -> dict[str, Any] | None:
    with contextlib.ExitStack() as stack:
        given = [*stack.enter_context(_images(train_data, "train_data", "path"))]
        given += stack.enter_context(_images(data, "data", "val_path"))
        given += as_overrides({"checkpoint": checkpoint, **keys})
        cfg = _compose(command, [*overrides, *given], Path())
        load_function("fcmae.data.sources.dataset:need_labels")()
        return load_function(f"fcmae.evaluation.run:{command}")(cfg)


def _looks_at_labels(cfg: Any) -> bool:
    """Whether pretraining needs to know the labels of all images."""
    targets = [given["_target_"] for given in cfg.target.values()]
    return cfg.monitor.knn_every_epochs or cfg.monitor.probe_every_epochs or "fcmae.targets.Labels" in targets


def _compose(command: str, overrides: list[str], folder: Path) -> Any:
    from fcmae.config import compose

    for override in overrides:
        if override.startswith(("hydra.", "hydra/", "-")):
            raise ConfigError(f"{override} is for the command line only; out=FOLDER is the folder of a run")
    check_places = load_function("fcmae.hydra_run:check_places")
    return compose(command, overrides, lambda cfg: check_places(cfg, folder))


@contextlib.contextmanager
def _images(data: Data, argument: str, key: str) -> Iterator[list[str]]:
    """In this block the overrides for an argument that says which images."""
    several = isinstance(data, (list, tuple)) and all(isinstance(part, (str, os.PathLike)) for part in data)
    if data is None:
        yield []
    elif isinstance(data, Mapping):
        yield as_overrides({"data": data})
    elif isinstance(data, (str, os.PathLike)) or (several and len(data)):
        yield as_overrides({f"data.{key}": data})
    else:
        registered = load_function("fcmae.data.sources.dataset:registered")
        with registered(data, argument) as source:
            yield as_overrides({f"data.{key.replace('path', 'source')}": source})


def _network(command: str, model: Any, folder: Path) -> list[str]:
    """Overrides for the network. Writes the weights of a module into the run's folder."""
    if model is None:
        return []
    if isinstance(model, Mapping):
        return as_overrides({"model": model})
    if isinstance(model, str):
        from fcmae.config import conf_dir

        return [f"model={model}"] if (conf_dir() / "model" / f"{model}.yaml").is_file() else [f"model.backbone={model}"]
    if not isinstance(model, load_function("timm.models.convnext:ConvNeXt")):
        raise UsageError(f"model must be a name, a dict or a timm ConvNeXt; got a {type(model).__name__}")
    file = folder / INITIAL
    save_backbone = load_function("fcmae.interchange.save:save_backbone")
    begins = ranks.detect().rank == 0 and not any(folder.glob("checkpoints/step_*.pt"))
    if begins:
        folder.mkdir(parents=True, exist_ok=True)
    network = save_backbone(model, file if begins else None)
    return as_overrides({"init_from": file, **({"model": network} if command == "pretrain" else {})})


def as_overrides(keys: Mapping[str, Any]) -> list[str]:
    """Overrides as Hydra takes them: ``{"optim": {"lr": 1e-3}, "seed": 1}`` gives ``optim.lr=0.001`` and ``seed=1``.

    A group may also be a string, the name of one of its files.
    """
    found = []
    for key, value in keys.items():
        grouped = isinstance(value, Mapping) and "." not in key
        pairs = {f"{key}.{name}": part for name, part in value.items()} if grouped else {key: value}
        found += [f"{name}={_written(part)}" for name, part in pairs.items()]
    return found


def _written(value: Any) -> str:
    """A value in Hydra's grammar."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (str, os.PathLike)):
        text = os.path.expanduser(os.fspath(value)).replace("\\", "\\\\").replace("'", "\\'")
        return f"'{text}'"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{name}:{_written(part)}" for name, part in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(_written, value)) + "]"
    return str(value)
