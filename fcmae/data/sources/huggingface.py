"""Data sets of the Hugging Face library ``datasets``: Parquet and Arrow files, saved data sets, or names on the hub."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fcmae.data.pixels.decode import Encoded, read_file
from fcmae.data.remote.access import Access
from fcmae.data.remote.objects import RemoteFile
from fcmae.data.sources.base import Sample, class_names, relative_names
from fcmae.data.sources.heads import LENGTH, empty_classes, head_of, unreadable
from fcmae.errors import ConfigError, FCMAEError, ImageError, UsageError, counted, shown
from fcmae.messages import print_once_rank0
from fcmae.opening import is_inside


class HuggingFace:
    """The images of one split, whose bytes that library does not decode.

    Args:
        path: a folder with Parquet or Arrow files or with what ``save_to_disk`` wrote, or a name on the hub. Images
            that rows give as paths must lie in that folder, or in the library's cache.
        split: its name, or an expression of ``datasets`` such as ``train[:90%]``.
        image_column: None = the only column of the type Image.
        label_column: a ClassLabel, integers, or strings, the names of the classes; None = the only ClassLabel. Without
            such a column, or if it has empty or negative values, there are no labels.
        config_name: the configuration ("subset") of the data set.
        revision: of a data set on the hub: a branch, tag or commit.
        access: how Parquet files at a URL are read.

    Raises UsageError if the package or the data set is missing, or the choice of a column is ambiguous.
    """

    def __init__(
        self,
        path: str,
        split: str,
        image_column: str | None = None,
        label_column: str | None = None,
        config_name: str | None = None,
        revision: str | None = None,
        access: Access | None = None,
    ) -> None:
        try:
            import datasets
        except ImportError as error:
            raise ConfigError("data.name=hf needs the package datasets: pip install 'fcmae[hf]'") from error
        self.path, self.split, self.folders = path, split, _folders(path)
        self.stamps: list[str] = []
        """What changes with files at URLs."""
        rows = self._download(access) if access else _load(path, split, config_name, revision)
        rows = rows.with_format(None)  # a saved one may show some columns only, as another library's arrays
        with _explained(path, split):
            rows.data.validate(full=True)  # reading would follow wrong offsets out of the file
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
        told = unreadable(len(self), self._head, self.describe)
        told += "" if self.classes is None else empty_classes([self.labels], self.classes)
        if told:
            print_once_rank0(f"{path}, split {split}: {counted(len(self), 'image')}{told}")

    def _download(self, access: Access) -> Any:
        """The rows of Parquet files at a URL, from their copies in the cache."""
        import datasets

        name = self.split.partition("[")[0]
        found = access.find(self.path, ".parquet")
        files = [file for file in found if isinstance(file, RemoteFile)]
        if len(files) < len(found):
            raise UsageError(f"{self.path}: data.name=hf reads URLs and no commands")
        words = {file: set(re.split(r"[^a-z]+", file.url.rpartition("/")[2].lower())) for file in files}
        if any(words[file] & {"train", "validation", "val", "test", name} for file in files):
            files = [file for file in files if name in words[file]]
        if not files:
            raise UsageError(f"{self.path} has no file that is named after the split {name}")
        self.stamps = [file.stamp for file in files]
        copies = list(access.copy([*files], access.copied))
        if None in copies:
            size = sum(file.size for file in files)
            raise UsageError(f"{self.path} has {size:,} bytes, which loader.cache_size must hold with data.name=hf")
        data_files = {name: [str(copy) for copy in copies]}
        with _explained(self.path, self.split):
            return datasets.load_dataset("parquet", data_files=data_files, split=self.split)

    def _read_labels(self, rows: Any, column: str) -> None:
        kind = str(getattr(rows.features[column], "dtype", None))
        if not kind.startswith(("int", "uint", "string", "large_string")):
            raise ConfigError(f"data.label_column is {column!r}, of {kind}; it must be a column of integers or strings")
        values = rows.select_columns([column]).with_format("arrow")[:][column]
        if values.null_count:
            empty = int(np.argmax(values.is_null().to_numpy()))
            self.unlabelled = f"the column {column} is empty at row {empty}"
            return
        if "string" in kind:
            names, labels = np.unique(np.asarray(values.to_pylist(), dtype=object), return_inverse=True)
            self.classes = names.tolist()
        else:
            labels = values.to_numpy()
            self.classes, problem = self._numbered(labels, getattr(rows.features[column], "names", None))
            self.unlabelled = f"the column {column} has {problem}"
        self.labels = labels.astype(np.int32)

    def _numbered(self, labels: np.ndarray, names: list[str] | None) -> tuple[list[str] | None, str]:
        """The names of the classes, or None and what is wrong with the labels."""
        least, most = int(labels.min(initial=0)), int(labels.max(initial=0))
        if least < 0:
            return None, f"{least}, at row {labels.argmin()}"
        names = names or class_names(most, len(labels))
        if names is None or most >= len(names):
            count = f"{len(labels)} rows" if names is None else f"{len(names)} classes"
            return None, f"{most}, at row {labels.argmax()}, but there are {count}"
        return names, ""

    @property
    def files(self) -> list[str]:
        """The Arrow files that the library made of the data set."""
        return [file["filename"] for file in self.rows.cache_files]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        data, path = self._stored(index)
        image = read_file(path) if data is None else Encoded(data, self.describe(index))
        return Sample(image, self.label(index))

    def _stored(self, index: int) -> tuple[bytes | None, str]:
        """The bytes of an image, or None and the path of its file. Raises ImageError."""
        name = self.describe(index)
        image = self.rows[index][self.image_column] or {}
        if image.get("bytes") is not None:
            return image["bytes"], ""
        if image.get("path") is None:
            raise ImageError(name, "it has neither bytes nor a path")
        return None, self._inside(image["path"], name)

    def _head(self, index: int) -> bytes:
        data, path = self._stored(index)
        return head_of(path) if data is None else data[:LENGTH]

    def _inside(self, path: str, name: str) -> str:
        """The path of an image, which must lie in the folder of the data set. Raises ImageError."""
        for start in (self.folders[0], os.curdir):  # the library itself writes paths from the current folder
            real = os.path.realpath(os.path.join(start, path))
            if any(is_inside(real, folder) for folder in self.folders) and os.path.exists(real):
                return real
        raise ImageError(name, f"its path {shown(path)} is missing, or outside of the folder of the data set")

    def label(self, index: int) -> int | None:
        return int(self.labels[index]) if self.classes is not None else None

    def describe(self, index: int) -> str:
        return f"{self.path}:{self.split}[{index}]"

    def listing_parts(self) -> Iterator[bytes | np.ndarray]:
        """The library's own fingerprint also changes with the place and the age of the files."""
        from pyarrow import compute

        images, order = self.rows.data.column(self.image_column), self.rows._indices
        chosen = slice(None) if order is None else order.column(0).to_numpy()
        sizes = compute.binary_length(compute.struct_field(images, "bytes"))  # reads offsets only
        yield sizes.fill_null(-1).to_numpy()[chosen].astype(np.int64)
        paths = compute.struct_field(images, "path").fill_null("").to_numpy()[chosen].tolist()
        shared = os.path.commonprefix(list(filter(None, paths)))  # noqa: RUF071  # of characters, up to a "/"
        yield relative_names(paths, shared.rpartition("/")[0])
        if self.classes is not None:
            yield self.labels


@contextlib.contextmanager
def _explained(path: str, split: str) -> Iterator[None]:
    """In this block any error is a UsageError: of damaged files the library raises all sorts."""
    try:
        yield
    except (FCMAEError, MemoryError):
        raise
    except Exception as error:  # also a missing file, also no network
        known = isinstance(error, (OSError, ValueError)) or type(error).__module__.startswith("datasets.")
        why = "" if known else f"its files are damaged ({type(error).__name__}) "
        reason = why + " ".join(str(error).split())
        raise UsageError(f"cannot load the data set {path}, split {split}: {reason}") from error


def _load(path: str, split: str, config_name: str | None, revision: str | None) -> Any:
    """The rows of a split. Raises UsageError."""
    import datasets

    folder = Path(path)
    if folder.is_file():
        raise UsageError(f"{path} must be a folder with Parquet or Arrow files, or a name on the hub; it is a file")
    with _explained(path, split):
        if not (folder / "state.json").is_file() and not (folder / "dataset_dict.json").is_file():
            builder = datasets.load_dataset_builder(path, config_name, revision=revision)
            if folder.is_dir():
                _check_files(folder, builder.config.data_files or {})
            return datasets.load_dataset(path, config_name, split=split, revision=revision)
        saved = datasets.load_from_disk(path)
        parts = [saved] if isinstance(saved, datasets.Dataset) else saved.values()
        _check_files(folder, {"": [file["filename"] for part in parts for file in part.cache_files]})
    splits = {str(saved.split or "train"): saved} if isinstance(saved, datasets.Dataset) else saved
    if split not in splits:
        raise UsageError(f"cannot load the data set {path}, split {split}: it has {', '.join(map(str, splits))}")
    return splits[split]


def _check_files(folder: Path, files: dict[str, list[str]]) -> None:
    """Raises UsageError if a local data set names files outside of its folder."""
    real = os.path.realpath(folder)
    for file in (str(file) for some in files.values() for file in some):
        if "://" in file or not is_inside(os.path.realpath(file), real):
            raise UsageError(f"{folder} names the file {shown(file)}, which is outside of it")


def _folders(path: str) -> list[str]:
    """The folders that may have the files of a data set."""
    if Path(path).is_dir():
        return [os.path.realpath(path)]
    import datasets
    from huggingface_hub.constants import HF_HUB_CACHE

    return [os.path.realpath(folder) for folder in (HF_HUB_CACHE, datasets.config.HF_DATASETS_CACHE)]


def _column(key: str, given: str | None, features: Any, kind: type) -> str | None:
    """The given column, else the only one of a kind, else None. Raises ConfigError if there are several."""
    if given is not None and given not in features:
        raise ConfigError(f"{key} must be one of {', '.join(features)}; got {given!r}")
    if given is not None:
        return given
    found = [name for name, feature in features.items() if isinstance(feature, kind)]
    if len(found) > 1:
        raise ConfigError(f"{key} must be one of {', '.join(found)}; it is not set")
    return found[0] if found else None
