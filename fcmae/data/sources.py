"""Sources of samples behind one small interface: a length, sample i, its label or none, and its name in messages."""

import gzip
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from fcmae.config import DataConfig
from fcmae.data.pixels import EXTENSIONS, Encoded, read_file
from fcmae.errors import UsageError
from fcmae.randomness import Stream, generator


class Sample(NamedTuple):
    """``image``: uint8 ``[C, H, W]``, or a file not yet decoded. ``label``: the class's index, or None."""

    image: Tensor | Encoded
    label: int | None


class Source(Protocol):
    """Samples by index. Reading sample i gives the same sample in any process, at any time."""

    classes: list[str] | None
    """Names of the classes; None without labels."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...

    def label(self, index: int) -> int | None:
        """The label without reading the image."""
        ...

    def describe(self, index: int) -> str:
        """What a message calls sample ``index``: its path."""
        ...


def list_images(folder: Path) -> list[Path]:
    """Every image file below ``folder``, sorted. Raises UsageError if there is none."""
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder")
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file())
    if not paths:
        raise UsageError(f"{folder} has no images; looked for {' '.join(EXTENSIONS)}")
    return paths


class ImageFolder:
    """Image files below a folder; each subfolder is a class. A folder without subfolders has no labels."""

    def __init__(self, folder: str | Path) -> None:
        root = Path(folder)
        self.paths = list_images(root)
        names = [p.relative_to(root).parts for p in self.paths]
        self.classes: list[str] | None = None
        if all(len(parts) > 1 for parts in names):
            self.classes = sorted({parts[0] for parts in names})
            by_name = {name: i for i, name in enumerate(self.classes)}
            self.labels = [by_name[parts[0]] for parts in names]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        return Sample(read_file(self.paths[index]), self.label(index))

    def label(self, index: int) -> int | None:
        return self.labels[index] if self.classes is not None else None

    def describe(self, index: int) -> str:
        return str(self.paths[index])


class FashionMNIST:
    """Fashion-MNIST (Xiao et al. 2017, arXiv 1708.07747): grey 28 x 28 images in 10 classes.

    Read from ``folder`` if given, else from Debian's package ``dataset-fashion-mnist``, else downloaded by torchvision
    to ``~/.cache/fcmae``. Raises UsageError, which says all three ways, if none works.
    """

    DEBIAN = Path("/usr/share/datasets/fashion-mnist")
    CACHE = Path("~/.cache/fcmae")

    def __init__(self, folder: str | Path | None, train: bool) -> None:
        from torchvision.datasets import FashionMNIST as TorchvisionFashionMNIST

        self.classes: list[str] | None = list(TorchvisionFashionMNIST.classes)
        self.split = "train" if train else "t10k"
        where = self._find(folder)
        # idx format: a header of 4 bytes and 4 more for each dimension, then the values
        self.images = self._read(where, "images-idx3", 16).reshape(-1, 1, 28, 28)
        self.labels = self._read(where, "labels-idx1", 8)

    def _file(self, folder: Path, kind: str) -> Path:
        return folder / f"{self.split}-{kind}-ubyte.gz"

    def _read(self, folder: Path, kind: str, header: int) -> np.ndarray:
        with gzip.open(self._file(folder, kind)) as file:
            return np.frombuffer(file.read(), np.uint8, offset=header)

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
        if not self._has_files(raw):
            from torchvision.datasets import FashionMNIST as TorchvisionFashionMNIST

            try:
                TorchvisionFashionMNIST(str(cache), download=True)
            except (OSError, RuntimeError) as error:
                raise UsageError(
                    "Fashion-MNIST was not found. Three ways to bring it: data.path=FOLDER with the four .gz files; "
                    "Debian's package, `apt-get install dataset-fashion-mnist`; or a network from which torchvision "
                    f"can download it (tried just now: {error})"
                ) from error
        return raw

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Sample:
        return Sample(torch.from_numpy(self.images[index].copy()), self.label(index))

    def label(self, index: int) -> int | None:
        return int(self.labels[index])

    def describe(self, index: int) -> str:
        return f"{self.split}[{index}]"


class Synthetic:
    """Random pixels and labels in 10 classes, functions of the index."""

    def __init__(self, length: int, in_chans: int, size: tuple[int, int]) -> None:
        self.classes: list[str] | None = [str(i) for i in range(10)]
        self.length = length
        self.shape = (in_chans, *size)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        rng = generator(0, Stream.INIT, index)
        return Sample(torch.randint(0, 256, self.shape, generator=rng, dtype=torch.uint8), self.label(index))

    def label(self, index: int) -> int | None:
        return index % 10

    def describe(self, index: int) -> str:
        return f"synthetic[{index}]"


class Subset:
    """Some samples of another source."""

    def __init__(self, source: Source, indices: list[int]) -> None:
        self.source = source
        self.indices = indices
        self.classes = source.classes

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Sample:
        return self.source[self.indices[index]]

    def label(self, index: int) -> int | None:
        return self.source.label(self.indices[index])

    def describe(self, index: int) -> str:
        return self.source.describe(self.indices[index])


def few_labels(source: Source, per_class: int, seed: int) -> Subset:
    """``per_class`` samples of each class, drawn by ``seed``. Raises UsageError if a class has fewer."""
    assert source.classes is not None
    order = torch.randperm(len(source), generator=generator(seed, Stream.SUBSET)).tolist()
    chosen: dict[int, list[int]] = {label: [] for label in range(len(source.classes))}
    for index in order:
        label = source.label(index)
        assert label is not None
        if len(chosen[label]) < per_class:
            chosen[label].append(index)
    for label, indices in chosen.items():
        if len(indices) < per_class:
            raise UsageError(
                f"data.labels_per_class is {per_class}; class {source.classes[label]} has {len(indices)} images"
            )
    return Subset(source, sorted(index for indices in chosen.values() for index in indices))


def train_source(cfg: DataConfig) -> Source:
    """The training samples of a data config."""
    if cfg.name == "fashion_mnist":
        return FashionMNIST(cfg.path, train=True)
    if cfg.name == "synthetic":
        return Synthetic(cfg.length, cfg.in_chans, cfg.size)
    if cfg.path is None:
        raise UsageError("data.path is not set; give the folder of training images, data.path=FOLDER")
    return ImageFolder(cfg.path)


def val_source(cfg: DataConfig) -> Source:
    """The validation samples of a data config."""
    if cfg.name == "fashion_mnist":
        return FashionMNIST(cfg.path, train=False)
    if cfg.name == "synthetic":
        return Synthetic(cfg.length, cfg.in_chans, cfg.size)
    if cfg.val_path is None:
        raise UsageError("data.val_path is not set; give the folder of validation images, data.val_path=FOLDER")
    return ImageFolder(cfg.val_path)


def require_labels(source: Source, key: str) -> list[str]:
    """The names of the classes. Raises UsageError if the source has none."""
    if source.classes is None:
        raise UsageError(f"{key} has no labels; sort the images into one folder a class")
    return source.classes
