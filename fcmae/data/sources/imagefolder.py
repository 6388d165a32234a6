"""Image files in one or several folders and their subfolders."""

import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from fcmae.data.pixels.decode import read_file
from fcmae.data.pixels.formats import EXTENSIONS
from fcmae.data.sources.base import Sample, distinct_names, locate
from fcmae.data.sources.listing import list_folder
from fcmae.messages import print_once_rank0


class ImageFolder:
    """Image files below folders. Each subfolder is a class; subfolders of the same name are the same class.

    There are no labels if an image lies in a folder itself.

    Args:
        folders: one or several, whose images make one source in this order.
        relist: list them again even if nothing has changed.
        extensions: endings of image files, see :func:`~fcmae.data.sources.listing.list_folder`.
    """

    def __init__(
        self,
        folders: str | Path | Sequence[str | Path],
        relist: bool = False,
        extensions: Sequence[str] = EXTENSIONS,
    ) -> None:
        given = [Path(folder) for folder in ([folders] if isinstance(folders, (str, Path)) else folders)]
        _tell_twice(given)
        self.listings = [list_folder(folder, relist, extensions) for folder in given]
        self.ends = list(itertools.accumulate(map(len, self.listings)))
        self.classes: list[str] | None = None
        if all(listing.is_labelled for listing in self.listings):
            self.classes = sorted({name for listing in self.listings for name in listing.class_names})
            by_name = {name: i for i, name in enumerate(self.classes)}
            self.class_of = [[by_name[name] for name in listing.class_names] for listing in self.listings]

    @property
    def unlabelled(self) -> str:
        """Why there are no classes."""
        listing = next(listing for listing in self.listings if not listing.is_labelled)
        stray = listing.path(int(listing.labels.argmin()))
        return f"{stray} is in no folder of a class; every image must be in the folder of its class"

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> Sample:
        return Sample(read_file(self.describe(index)), self.label(index))

    def label(self, index: int) -> int | None:
        if self.classes is None:
            return None
        folder, position = locate(self.ends, index)
        return self.class_of[folder][self.listings[folder].labels[position]]

    def describe(self, index: int) -> str:
        folder, position = locate(self.ends, index)
        return self.listings[folder].path(position)

    def listing_parts(self) -> Iterator[bytes | np.ndarray]:
        for listing in self.listings:
            yield from (listing.names.data, listing.names.offsets)
        if len({listing.names.data.tobytes() for listing in self.listings}) < len(self.listings):
            yield distinct_names([os.fsdecode(listing.root) for listing in self.listings])

    def relative(self, index: int) -> tuple[int, bytes]:
        """The number of the folder that has the image, and the image's path in it."""
        folder, position = locate(self.ends, index)
        return folder, self.listings[folder].names[position]


def _tell_twice(folders: Sequence[Path]) -> None:
    """A line for each folder whose images are read twice."""
    found = [folder.resolve() for folder in folders]
    for i, folder in enumerate(found):
        for j, other in enumerate(found):
            if i != j and folder.is_relative_to(other) and (folder != other or i > j):
                print_once_rank0(f"{folders[i]} lies in {folders[j]}: its images are read twice")
                break
