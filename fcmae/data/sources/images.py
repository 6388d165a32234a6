"""Images that a command is given one after another: files, folders and tar files in one source without labels."""

import itertools
import os
from collections.abc import Sequence
from typing import Any

from fcmae.config import LoaderConfig
from fcmae.data.pixels.decode import read_file
from fcmae.data.pixels.formats import EXTENSIONS
from fcmae.data.sources.base import Sample, Source, locate
from fcmae.data.sources.imagefolder import ImageFolder
from fcmae.data.sources.table import ENDINGS, TableImages
from fcmae.data.sources.tar_names import Rule
from fcmae.data.sources.webdataset import WebDataset
from fcmae.errors import UsageError, first_of


class Files:
    """Image files."""

    classes: list[str] | None = None

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = list(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        return Sample(read_file(self.paths[index]), None)

    def label(self, index: int) -> None:
        return None

    def describe(self, index: int) -> str:
        return self.paths[index]


class Joined:
    """The samples of several sources in turn, without their labels."""

    classes: list[str] | None = None

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = list(sources)
        self.ends = list(itertools.accumulate(map(len, self.sources)))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, index: int) -> Sample:
        part, place = locate(self.ends, index)
        return Sample(self.sources[part][place].image, None)

    def label(self, index: int) -> None:
        return None

    def describe(self, index: int) -> str:
        part, place = locate(self.ends, index)
        return self.sources[part].describe(place)


def images_at(paths: Sequence[str], given: Any, loader: LoaderConfig) -> Joined:
    """The images at ``paths``, in this order: tables, files, tar files, and folders of tar files or of images.

    Args:
        given: has those keys of ``data`` that the command sets, others None; how a checkpoint's files were found says
            nothing about these.

    Raises UsageError naming what is missing or holds no image.
    """
    extensions = given.extensions or EXTENSIONS
    rule = Rule(tuple(extensions), given.keys or "auto")
    missing = [path for path in paths if not os.path.exists(path)]
    if missing:
        raise UsageError(f"no file or folder {first_of(missing)}")
    sources: list[Source] = []
    for path in paths:
        if path.endswith(".tar") or (os.path.isdir(path) and any(name.endswith(".tar") for name in os.listdir(path))):
            sources.append(WebDataset(path, loader.on_error == "skip", loader.relist, rule=rule))
        elif path.lower().endswith(ENDINGS) and os.path.isfile(path):
            sources.append(TableImages(path, given.root, given.image_column, split=given.split))
        else:
            folder = os.path.isdir(path)
            sources.append(ImageFolder(path, loader.relist, extensions) if folder else Files([path]))
    return Joined(sources)
