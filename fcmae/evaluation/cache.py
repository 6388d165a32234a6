"""Features on disk, for as long as everything that they follow from is what it was."""

import glob
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from fcmae.config import DataConfig
from fcmae.data.sources import Source
from fcmae.data.sources.base import innermost
from fcmae.evaluation.features import Extractor, Features
from fcmae.files import delete_remains, replacing
from fcmae.messages import say
from fcmae.opening import open_trusted, own_folder
from fcmae.urls import expand_braces

FORMAT = 2
"""Rises when the same images would give other features: 2 keeps the aspect ratio for sizes that are not square."""
IRRELEVANT = (
    *("path", "val_path", "labels_per_class", "sampling"),
    *("target_path", "val_target_path", "target_column", "window_overlap", "crop_zoom"),
    *("foreground", "windows_per_image"),
    *("crop_scale", "crop_ratio", "hflip", "vflip", "rot90", "transforms", "crops_per_image", "decode_on", "cache"),
)
"""Keys of the data config that evaluation does not read, or that the source's fingerprint speaks of better."""


@dataclass(frozen=True)
class CachedExtractor:
    """An :class:`Extractor` that keeps what it extracts in ``folder``.

    A file's name is a hash of what its features follow from: the checkpoint's checksum, which weights of it, the data
    config, the images (names, sizes, times of change) and labels, precision, layer and versions. The file also holds
    all of that in full, and is used only if it is exactly what is wanted. The first rank reads and writes.

    Args:
        identity: what the backbone is, e.g. its checkpoint's checksum.
    """

    extract: Extractor
    folder: Path
    identity: dict[str, str]

    def __call__(self, source: Source) -> Features:
        world = self.extract.world
        wanted, found = "", None
        if world.is_main:
            wanted = self._describe(source)
            found = self._read(wanted)
        features = self._share(found)
        if features is None:
            features = self.extract(source)
            if world.is_main:
                self._write(wanted, features)
        return features

    def _describe(self, source: Source) -> str:
        extract = self.extract
        data = {name: value for name, value in asdict(extract.data).items() if name not in IRRELEVANT}
        for name in ("source", "val_source"):  # its arguments may hold a password
            data[name] = hashlib.sha256(repr(data[name]).encode()).hexdigest()
        described: dict[str, Any] = {
            "format": FORMAT,
            **self.identity,
            "data": data,
            "on_error": extract.loader.on_error,
            "images": fingerprint(source, extract.data),
            "precision": extract.precision,
            "layer": [extract.layer, *(extract.stages or [])],
            "device": extract.world.device.type,
            "torch": str(torch.__version__),
            "timm": timm.__version__,
        }
        return json.dumps(described, sort_keys=True)

    def _path(self, wanted: str) -> Path:
        return self.folder / f"{hashlib.sha256(wanted.encode()).hexdigest()[:24]}.safetensors"

    def _read(self, wanted: str) -> Features | None:
        path = self._path(wanted)
        try:
            open_trusted(path).close()
        except FileNotFoundError:
            return None
        except OSError as error:
            say(f"features in {path} are not used: {error.strerror}; they are extracted again")
            return None
        try:
            with safe_open(path, "pt", device=str(self.extract.world.device)) as file:
                kept = file.metadata() or {}
                if kept.get("wanted") != wanted:
                    return None
                features = Features(file.get_tensor("values"), file.get_tensor("labels"))
            if features.values.shape != (*features.labels.shape, self.extract.width):
                raise SafetensorError("its arrays have other sizes")
            if kept.get("sha256") != _digest(features):
                raise SafetensorError("its checksum is missing or wrong")
        except (OSError, SafetensorError) as error:
            say(f"features in {path} cannot be read: {error}; they are extracted again")
            return None
        say(f"{len(features.labels)} features read from {path}")
        return features

    def _write(self, wanted: str, features: Features) -> None:
        """Whole or not at all; a full disk is no reason to stop."""
        path = self._path(wanted)
        try:
            own_folder(self.folder)
            delete_remains(path, of_all=True)  # names change with the images
            tensors = {name: value.cpu().contiguous() for name, value in features._asdict().items()}
            with replacing(path, 0o644) as file:
                file.write(save(tensors, {"wanted": wanted, "sha256": _digest(features)}))
        except (OSError, SafetensorError) as error:
            say(f"features are not kept in {path}: {error}")

    def _share(self, found: Features | None) -> Features | None:
        """What the first rank found, on every rank."""
        world = self.extract.world
        if world.size == 1:
            return found
        width = self.extract.width
        count = int(world.max(torch.tensor(-1 if found is None else len(found.labels))))
        if count < 0:
            return None
        if found is None:
            found = Features(
                torch.empty(count, width, device=world.device),
                torch.empty(count, dtype=torch.int64, device=world.device),
            )
        for tensor in found:
            dist.broadcast(tensor, 0)
        return found


def _digest(features: Features) -> str:
    digest = hashlib.sha256()
    for tensor in features:
        digest.update(tensor.cpu().contiguous().numpy().data)
    return digest.hexdigest()


def fingerprint(source: Source, data: DataConfig) -> str:
    """A hash of a source's images and labels: of their names and, where there are files, sizes and times of change.

    If samples are not files of their own, every file counts that the config names, those in folders in folders too.
    """
    digest = hashlib.sha256(f"{len(source)} {source.classes}".encode(errors="surrogateescape"))
    are_files = True
    for index in range(len(source)):
        name = source.describe(index)
        stamp = _stamp(Path(name))
        are_files = are_files and bool(stamp)
        digest.update(f"{name} {source.label(index)} {stamp}\n".encode(errors="surrogateescape"))
    for stamp in getattr(innermost(source), "stamps", []):  # of files at URLs
        digest.update(f"{stamp}\n".encode(errors="surrogateescape"))
    for file in [] if are_files else _files(source, data):
        digest.update(f"{file} {_stamp(file)}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _files(source: Source, data: DataConfig) -> Iterator[Path]:
    """What a source may read: shards, tables, what the arguments of a source of the user's name."""
    source = innermost(source)
    if hasattr(source, "metadata_files"):  # an array may have a million files of chunks
        yield from map(Path, source.metadata_files)
        return
    given = [getattr(source, "files", []), data.path, data.val_path, data.source, data.val_source]
    for text in given:
        for path in _texts(text):
            for name in [path] if os.path.exists(path) else expand_braces(path):
                for found in [name] if os.path.exists(name) else sorted(glob.glob(name)):
                    yield from _below(Path(found))


def _texts(value: Any) -> Iterator[str]:
    """The texts in lists and dicts."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)


def _below(path: Path) -> Iterator[Path]:
    """A file, or all files in a folder and its folders, each of which counts once, however links lead to it."""
    left, seen = [path], set()
    while left:
        path = left.pop()
        if not path.is_dir():
            yield path
            continue
        status = path.stat()
        if (status.st_dev, status.st_ino) not in seen:
            seen.add((status.st_dev, status.st_ino))
            left += sorted(path.iterdir(), reverse=True)


def _stamp(file: Path) -> str:
    try:
        status = os.stat(file)
    except OSError:  # not a file: the source's own name for a sample
        return ""
    return f"{status.st_size} {status.st_mtime_ns}"
