"""Images with a file for each that holds a target map: a class or numbers per pixel."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from fcmae.config import DataConfig, LoaderConfig
from fcmae.config.checks import as_list
from fcmae.config.places import maps_not_set
from fcmae.data.pixels.decode import Encoded, read_file
from fcmae.data.sources.base import Sample, Source, Wrapper
from fcmae.data.sources.create import train_source, val_source
from fcmae.data.sources.imagefolder import ImageFolder
from fcmae.data.sources.listing import Listing, list_folder
from fcmae.data.sources.own import Own
from fcmae.data.sources.table import TableImages
from fcmae.errors import ConfigError, ImageError, UsageError, shown


class Mapped(Wrapper):
    """Another source, whose labels are the undecoded files of target maps. There are no classes of images."""

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        self.classes = None
        self.missing: list[int] = []

    def __getitem__(self, index: int) -> Sample:
        return self.source[index]._replace(label=read_file(self.target_path(index)))

    def label(self, index: int) -> None:
        return None

    def target_path(self, index: int) -> str:
        """The file of the map of sample ``index``."""
        raise NotImplementedError


class InTable(Mapped):
    """Maps that a column of a table names."""

    def __init__(self, source: TableImages, targets: Sequence[str]) -> None:
        super().__init__(source)
        self.targets = targets

    def target_path(self, index: int) -> str:
        return self.targets[index]


class InFolders(Mapped):
    """Maps in folders, under the relative names of the images, whose endings may differ.

    Args:
        folders: one for each folder of images, or one for all.
        key: names the folders in messages.

    Images without a map are in ``missing``, a list of their numbers, and reading one raises ImageError. Raises
    UsageError naming two files that would be the map of one image.
    """

    def __init__(self, source: ImageFolder, folders: Sequence[str], key: str, relist: bool = False) -> None:
        super().__init__(source)
        if len(folders) not in (1, len(source.listings)):
            raise UsageError(
                f"{key} must be one folder, or one per folder of images ({len(source.listings)}); got {len(folders)}"
            )
        self.listings = [list_folder(Path(folder), relist) for folder in folders]
        found = [_by_stem(listing, key) for listing in self.listings]
        self.positions = np.full(len(source), -1)
        for index in range(len(source)):
            folder, name = source.relative(index)
            position = found[folder % len(folders)].get(os.path.splitext(name)[0])
            if position is None:
                self.missing.append(index)
            else:
                self.positions[index] = position

    def target_path(self, index: int) -> str:
        if self.positions[index] < 0:
            raise ImageError(self.describe(index), "it has no target map")
        folder, _ = self.source.relative(index)  # type: ignore[attr-defined]  # an ImageFolder
        return self.listings[folder % len(self.listings)].path(int(self.positions[index]))


def map_of(sample: Sample, source: Source, index: int) -> tuple[Encoded | Tensor, str]:
    """The target map of a sample, and its name for messages. Raises ImageError if the source gives none."""
    given = sample.label
    name = given.name if isinstance(given, Encoded) else source.describe(index)
    if not isinstance(given, (Encoded, Tensor)):
        raise ImageError(name, f"its source gives no target map; got {type(given).__name__}")
    return given, name


def _by_stem(listing: Listing, key: str) -> dict[bytes, int]:
    """Positions of files by their relative names without endings."""
    found: dict[bytes, int] = {}
    for position, name in enumerate(listing.names):
        stem = os.path.splitext(name)[0]
        if stem in found:
            twice = " and ".join(shown(listing.path(place)) for place in (found[stem], position))
            raise UsageError(f"{key} has two files of one name: {twice}; remove one of them")
        found[stem] = position
    return found


def map_key(cfg: DataConfig, train: bool) -> str:
    """The key that says where the target maps are."""
    if cfg.target_column is not None:
        return "data.target_column"
    return f"data.{'target_path' if train else cfg.val_maps_key}"


def mapped_source(cfg: DataConfig, loader: LoaderConfig, train: bool) -> Source:
    """The samples of a data config whose labels are target maps: undecoded files, or what a source of the user's gives.

    Raises UsageError naming what is missing.
    """
    if cfg.cache is not None:
        raise ConfigError(f"data.cache must be null with target maps, which it does not keep; got {cfg.cache!r}")
    source = (train_source if train else val_source)(cfg, loader)
    key = map_key(cfg, train)
    given = getattr(cfg, "target_path" if train else cfg.val_maps_key)
    if isinstance(source, Own):
        return source
    if isinstance(source, TableImages):
        if source.targets is None or given is not None:
            wrong = "is not set" if given is None else "replaces data.target_path with data.name=table"
            raise UsageError(f"data.target_column {wrong}; name the column of target maps")
        return InTable(source, source.targets)
    if not isinstance(source, ImageFolder):
        raise UsageError(f"data.name is {cfg.name}; target maps are read with data.name=imagefolder or table")
    if given is None:
        raise UsageError(maps_not_set(key.removeprefix("data.")))
    return InFolders(source, as_list(given), key, loader.relist)
