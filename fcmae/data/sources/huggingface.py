"""Data sets of the Hugging Face library ``datasets``: Parquet and Arrow files, saved data sets, or names on the hub."""

from pathlib import Path
from typing import Any

import numpy as np

from fcmae.data.pixels import Encoded, read_file
from fcmae.data.sources.base import Sample
from fcmae.errors import ConfigError, ImageError, UsageError


class HuggingFace:
    """The images of one split; their files' bytes, not decoded by that library.

    Args:
        path: a folder with Parquet or Arrow files or with what ``save_to_disk`` wrote, or a name on the hub.
        split: its name, or an expression of ``datasets`` such as ``train[:90%]``.
        image_column: None = the only column of the type Image.
        label_column: of the type ClassLabel or of integers; None = the only ClassLabel. Without one, or where it has
            values below 0 (not known), there are no labels.

    Raises UsageError if the package or the data set is missing, or which column is meant is not clear.
    """

    def __init__(self, path: str, split: str, image_column: str | None = None, label_column: str | None = None) -> None:
        try:
            import datasets
        except ImportError as error:
            raise ConfigError("data.name=hf needs the package datasets: pip install 'fcmae[hf]'") from error
        self.path, self.split = path, split
        rows = _load(path, split)
        column = _column("data.image_column", image_column, rows.features, datasets.Image)
        if column is None:
            columns = ", ".join(rows.features)
            raise UsageError(f"{path} has no column of type Image; data.image_column may name one of {columns}")
        self.image_column = column
        self.classes: list[str] | None = None
        self.unlabelled = f"no column is a ClassLabel; data.label_column may name one of {', '.join(rows.features)}"
        labels = _column("data.label_column", label_column, rows.features, datasets.ClassLabel)
        if labels is not None:
            self._read_labels(rows, labels)
        self.rows = rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))

    def _read_labels(self, rows: Any, column: str) -> None:
        kind = getattr(rows.features[column], "dtype", None)
        if not str(kind).startswith(("int", "uint")):
            raise ConfigError(f"data.label_column is {column!r}, of {kind}; allowed is a column of integers")
        self.labels = rows.select_columns([column]).with_format("numpy")[:][column].astype(np.int32)
        self.unlabelled = f"the column {column} has {self.labels.min(initial=0)}, at row {self.labels.argmin()}"
        if self.labels.min(initial=0) >= 0:
            count = int(self.labels.max(initial=0)) + 1
            self.classes = getattr(rows.features[column], "names", None) or [str(label) for label in range(count)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        name = self.describe(index)
        image = self.rows[index][self.image_column]
        if image is None:
            raise ImageError(name, "the column is empty there")
        encoded = read_file(image["path"]) if image["bytes"] is None else Encoded(image["bytes"], name)
        return Sample(encoded, self.label(index))

    def label(self, index: int) -> int | None:
        return int(self.labels[index]) if self.classes is not None else None

    def describe(self, index: int) -> str:
        return f"{self.path}:{self.split}[{index}]"


def _load(path: str, split: str) -> Any:
    """The rows of a split. Raises UsageError."""
    import datasets

    folder = Path(path)
    if folder.is_file():
        raise UsageError(f"{path} is a file; allowed is a folder with Parquet or Arrow files, or a name on the hub")
    try:
        if not (folder / "state.json").is_file() and not (folder / "dataset_dict.json").is_file():
            return datasets.load_dataset(path, split=split)
        saved = datasets.load_from_disk(path)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:  # also a missing file, also no network
        reason = " ".join(str(error).split())
        raise UsageError(f"cannot load the data set {path}, split {split}: {reason}") from error
    splits = {str(saved.split or "train"): saved} if isinstance(saved, datasets.Dataset) else saved
    if split not in splits:
        raise UsageError(f"cannot load the data set {path}, split {split}: it has {', '.join(map(str, splits))}")
    return splits[split]


def _column(key: str, given: str | None, features: Any, kind: type) -> str | None:
    """The column asked for, else the only one of a kind, else None. Raises ConfigError if it is not clear which."""
    if given is not None and given not in features:
        raise ConfigError(f"{key} is {given!r}; allowed is one of {', '.join(features)}")
    if given is not None:
        return given
    found = [name for name, feature in features.items() if isinstance(feature, kind)]
    if len(found) > 1:
        raise ConfigError(f"{key} is not set; allowed is one of {', '.join(found)}")
    return found[0] if found else None
