"""Checks that the folders and files that a config names exist."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fcmae.config.checks import as_list, mistake
from fcmae.config.commands import RANDOM, CheckpointConfig, FeaturesConfig, PretrainConfig, RunConfig, StudyConfig
from fcmae.config.data import DataConfig
from fcmae.config.prepare import PrepareConfig
from fcmae.errors import UsageError
from fcmae.files import check_checkpoint, check_output
from fcmae.urls import check_url, is_remote, is_url

WHAT = {
    "array": "the array of {} images, data.{}=FILE.npy, or a Zarr or HDF5 store",
    "imagefolder": "the folder of {} images, data.{}=FOLDER",
    "webdataset": "the tar files of {} images, data.{}=FOLDER, or a pattern",
    "table": "the table of {} images, data.{}=FILE.csv",
    "coco": "the folder of {} images, data.{}=FOLDER",
    "hf": "the data set of {} images, data.{}=FOLDER, or its name on the hub",
}
KINDS = {
    ".tar": "webdataset",
    **dict.fromkeys((".csv", ".tsv", ".txt", ".parquet"), "table"),
    **dict.fromkeys((".npy", ".h5", ".hdf5"), "array"),
}
"""Sources of other files than a folder of images, by ending."""
ZARR = ("zarr.json", ".zarray", ".zgroup")
"""Files of a Zarr array or group."""


def not_set(name: str, key: str) -> str:
    """The error where images are needed and ``data.KEY`` is not set."""
    return f"data.{key} is not set; give {WHAT[name].format('training' if key == 'path' else 'validation', key)}"


def maps_not_set(key: str) -> str:
    """The error where target maps are needed and ``data.KEY`` is not set."""
    images = key.replace("target_path", "path")
    return f"data.{key} is not set; give the folder of the target maps of data.{images}, data.{key}=FOLDER"


def check_places(cfg: Any, run_dir: Path) -> None:
    """A mistake for every folder or file of a config that is missing, and every output that cannot be written.

    Args:
        run_dir: if it has a checkpoint, ``init_from`` is not needed any more.
    """
    if isinstance(cfg, RunConfig) and cfg.init_from and not any((run_dir / "checkpoints").glob("step_*.pt")):
        _check_checkpoint("init_from", cfg.init_from)
    if isinstance(cfg, CheckpointConfig):
        if cfg.checkpoint and not (cfg.checkpoint == RANDOM and isinstance(cfg, FeaturesConfig)):
            _check_checkpoint("checkpoint", cfg.checkpoint)
        labels = getattr(cfg, "labels", None)
        if labels is not None and not os.path.isfile(labels):
            mistake(f"labels: no file {labels}")
        check_outputs(cfg)
    if isinstance(cfg, (RunConfig, PrepareConfig)):
        for key in _needed(cfg):
            _check_images(cfg.data, key)
            if key == "val_path":
                _check_val_maps(cfg.data)
        for key in ("target_path", "val_target_path"):
            _check_folders(key, getattr(cfg.data, key))
        for key in ("annotations", "val_annotations"):
            file = getattr(cfg.data, key)
            if file is not None and not os.path.isfile(file):
                mistake(f"data.{key}: no file {file}")


def _needed(cfg: RunConfig | PrepareConfig) -> Iterator[str]:
    if isinstance(cfg, PrepareConfig):
        yield "path" if cfg.split == "train" or _is_in_path(cfg.data) else "val_path"
        return
    yield "path"
    if isinstance(cfg, PretrainConfig):
        labelled = (cfg.monitor.knn_every_epochs, cfg.monitor.probe_every_epochs)
        validates = cfg.measures_val_loss or any(every is not None for every in labelled)
    else:
        validates = cfg.trainer.eval_every_epochs is not None
    # Without it another message is more helpful, but a study would give it after its first measurement has begun.
    if (isinstance(cfg, StudyConfig) and not _is_in_path(cfg.data)) or (validates and cfg.data.val_path is not None):
        yield "val_path"


def _is_in_path(data: DataConfig) -> bool:
    """Whether ``data.path`` has the validation images, too."""
    return data.name in ("table", "coco") and data.val_path is None


def _check_images(data: DataConfig, key: str) -> None:
    path = getattr(data, key)
    own = data.source is not None or data.val_source is not None
    if own or data.name not in ("imagefolder", "webdataset", "table", "coco"):
        return
    if path is None:
        mistake(not_set(data.name, key))
        return
    if data.name in ("imagefolder", "coco"):
        _check_folders(key, path)
        return
    for one in as_list(path):
        if data.name == "webdataset" and is_remote(one):
            _check_url(key, one)
        elif data.name == "table" and not os.path.isfile(one):
            mistake(f"data.{key}: no file {one}")
        elif not os.path.exists(one) and not any(sign in one for sign in "{*?["):
            mistake(f"data.{key}: {one} is neither a tar file nor a folder or pattern of tar files")


def _check_val_maps(data: DataConfig) -> None:
    """A mistake where the validation images would be compared with the maps of the training images."""
    in_folders = data.name == "imagefolder" and data.val_source is None and data.target_path is not None
    if in_folders and getattr(data, data.val_maps_key) is None:
        mistake(maps_not_set(data.val_maps_key))


def _check_url(key: str, url: str) -> None:
    try:
        if is_url(url):
            check_url(url)
    except UsageError as error:
        mistake(f"data.{key}: {error}")


def _check_folders(key: str, path: str | list[str] | None) -> None:
    for one in as_list(path):
        if one is not None and not os.path.isdir(one):
            mistake(f"data.{key}: {one} is not a folder{_hint(key, one)}")
        elif one is not None and key in ("path", "val_path") and _is_zarr(one):
            mistake(f"data.{key}: {one} is a Zarr array or group; it needs data=array")


def _is_zarr(folder: str) -> bool:
    return any(os.path.exists(os.path.join(folder, name)) for name in ZARR)


def _hint(key: str, path: str) -> str:
    name = KINDS.get(os.path.splitext(path)[1].lower()) if key in ("path", "val_path") else None
    if name:
        return f"; such files need data={name}"
    if os.path.exists(path):
        return "; it is a file: give its folder"
    return "" if os.path.isabs(path) else f"; relative paths start in {os.getcwd()}"


def _check_checkpoint(key: str, path: str) -> None:
    try:
        check_checkpoint(path)
    except UsageError as error:
        mistake(f"{key}: {error}")


def check_outputs(cfg: CheckpointConfig) -> None:
    """A mistake for each output that cannot be written, is also an input, or is named twice; makes their folders."""
    used = [cfg.checkpoint, *(path for path in (getattr(cfg, "labels", None),) if path is not None)]
    report: str | None = getattr(cfg, "report", None)
    files: dict[str, str | None] = {key: getattr(cfg, key, None) for key in ("out", "per_class", "confusion")}
    if report is not None and report != "run":
        files["report"] = metrics = os.path.join(report, "metrics.json")
        if os.path.isdir(report) and os.listdir(report) and not os.path.isfile(metrics):
            mistake(
                f"report must be a new folder, or one with an older report (metrics.json); {report!r} has other files"
            )
    for key, path in files.items():
        if path is not None:
            try:
                check_output(key, path, used, json=key in ("out", "report"))
            except UsageError as error:
                mistake(str(error))
            used.append(path)
