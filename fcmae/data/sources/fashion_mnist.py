"""Fashion-MNIST in its idx files."""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from torchvision.datasets import FashionMNIST as TorchvisionFashionMNIST

from fcmae.data.sources.base import Sample
from fcmae.errors import UsageError
from fcmae.files import one_at_a_time
from fcmae.opening import open_regular

MOST = 60_000
"""Images of the larger split."""


class FashionMNIST:
    """Fashion-MNIST (Xiao et al. 2017, arXiv 1708.07747): grey 28 x 28 images in 10 classes.

    Read from ``folder`` if given, else from Debian's package ``dataset-fashion-mnist``, else downloaded by torchvision
    to ``~/.cache/fcmae``. Raises UsageError naming the three ways if none works.

    Args:
        channels: 1, or 3 equal ones for networks that take colours, as grey files give.
    """

    DEBIAN = Path("/usr/share/datasets/fashion-mnist")
    CACHE = Path("~/.cache/fcmae")

    def __init__(self, folder: str | Path | None, train: bool, channels: int = 1) -> None:
        self.channels = channels
        self.classes: list[str] | None = list(TorchvisionFashionMNIST.classes)
        self.split = "train" if train else "t10k"
        where = self._find(folder)
        # idx format: a header of 4 bytes and 4 more for each dimension, then the values
        self.images = self._read(where, "images-idx3", 16, (1, 28, 28))
        self.labels = self._read(where, "labels-idx1", 8, ())
        if len(self.images) != len(self.labels) or self.labels.max(initial=0) >= len(self.classes):
            labels = self._file(where, "labels-idx1")
            raise UsageError(f"{labels} does not hold a class from 0 to 9 for each image; download it again")

    def _file(self, folder: Path, kind: str) -> Path:
        return folder / f"{self.split}-{kind}-ubyte.gz"

    def _read(self, folder: Path, kind: str, header: int, shape: tuple[int, ...]) -> np.ndarray:
        """The values in a file, ``[N, *shape]``, at most as many as in the published one."""
        path = self._file(folder, kind)
        most = header + MOST * math.prod(shape)
        try:
            with open_regular(path) as packed, gzip.open(packed) as file:
                content = file.read(most + 1)
            if len(content) > most:
                raise ValueError(f"it holds more than {most} bytes")
            return np.frombuffer(content, np.uint8, offset=header).reshape(-1, *shape)
        except (OSError, EOFError, ValueError, zlib.error) as error:
            raise UsageError(f"{path} cannot be read: {error}; download it again") from error

    def _has_files(self, folder: Path) -> bool:
        return all(self._file(folder, kind).is_file() for kind in ("images-idx3", "labels-idx1"))

    def _find(self, folder: str | Path | None) -> Path:
        if folder is not None:
            if self._has_files(Path(folder)):
                return Path(folder)
            raise UsageError(f"data.path {folder} lacks {self._file(Path(folder), 'images-idx3').name} or its labels")
        if self._has_files(self.DEBIAN):
            return self.DEBIAN
        cache = self.CACHE.expanduser()
        raw = cache / "FashionMNIST" / "raw"
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with one_at_a_time(cache):  # the ranks of a run would write over each other's files
                if not self._has_files(raw):
                    TorchvisionFashionMNIST(str(cache), download=True)
        except (OSError, RuntimeError) as error:
            raise UsageError(
                "Fashion-MNIST was not found. Three ways to get it: a folder with the four .gz files "
                "(data.path=FOLDER, fcmae demo --data FOLDER); "
                "Debian's package, `apt-get install dataset-fashion-mnist`; or a network from which torchvision "
                f"can download it (tried just now: {error})"
            ) from error
        return raw

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Sample:
        return Sample(torch.from_numpy(self.images[index].repeat(self.channels, axis=0)), self.label(index))

    def label(self, index: int) -> int | None:
        return int(self.labels[index])

    def describe(self, index: int) -> str:
        return f"{self.split}[{index}]"
