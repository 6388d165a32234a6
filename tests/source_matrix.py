"""Every source x type of pixels, and what is checked of each.

``python -m tests.source_matrix`` prints the table of docs/tests.md, which a test compares with it.
"""

import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fcmae.config import DataConfig
from fcmae.data.loading import TrainBatches, Workers
from fcmae.data.pixels.transforms import pretrain_transform
from fcmae.data.plan import BatchPlan
from fcmae.data.samples import MaskedImages
from fcmae.data.sources import train_source
from fcmae.data.sources.base import Sample
from tests import bad_files

COUNT, CHANNELS, HEIGHT, WIDTH = 6, 2, 24, 32
TYPES = ("uint8", "uint16", "int16", "int32", "float16", "float32")
CHECKS = {
    "read": ["values"],
    "crop": ["crop", "pad", "zoom"],
    "resume": ["in the first epoch", "in the second epoch", "with a worker"],
    "prepare": ["batches"],
    "ranks 1 and 2": ["1", "2"],
}
"""What is checked, in which ways."""


def values(dtype: str) -> np.ndarray:
    """The images of a source, ``[N, C, H, W]``."""
    found = np.random.default_rng(1).normal(1500, 400, (COUNT, CHANNELS, HEIGHT, WIDTH))
    return (found / 12).clip(0, 255).astype(dtype) if dtype == "uint8" else found.astype(dtype)


def batches(cfg: DataConfig, start: int = 0, ranks: int = 1, rank: int = 0, workers: int = 0) -> list[list[Any]]:
    """Batches of two images, two epochs of them."""
    dataset = MaskedImages(train_source(cfg), pretrain_transform(cfg), (1, 1), seed=0)
    plan = BatchPlan.create(COUNT, 2, 2 // ranks, ranks, seed=0)
    read = TrainBatches(dataset, plan, rank, range(start, 6), Workers(workers))
    return [[part.clone() for part in batch] for batch in read]


def config(dtype: str, **more: Any) -> dict[str, Any]:
    """Keys of ``data`` that read such pixels."""
    kind = {"uint8": {}, "uint16": {"bit_depth": 16}}.get(dtype, {"dtype": "float32"})
    return {"in_chans": CHANNELS, **kind, **more}


def _files(folder: Path, dtype: str) -> list[str]:
    folder.mkdir()
    names = [f"{i}.npy" for i in range(COUNT)]
    for name, array in zip(names, values(dtype), strict=True):
        (folder / name).write_bytes(bad_files.npy(array))
    return names


def imagefolder(folder: Path, dtype: str) -> dict[str, Any]:
    _files(folder / "images", dtype)
    return {"path": str(folder / "images")}


def table(folder: Path, dtype: str) -> dict[str, Any]:
    (folder / "list.csv").write_text(
        "\n".join(["image", *(f"images/{name}" for name in _files(folder / "images", dtype))])
    )
    return {"name": "table", "path": str(folder / "list.csv")}


def webdataset(folder: Path, dtype: str) -> dict[str, Any]:
    with tarfile.open(folder / "a.tar", "w") as tar:
        for name in _files(folder / "images", dtype):
            tar.add(folder / "images" / name, name)
    return {"name": "webdataset", "path": str(folder / "a.tar")}


def hf(folder: Path, dtype: str) -> dict[str, Any]:
    import datasets

    rows = [{"image": {"bytes": bad_files.npy(array), "path": None}} for array in values(dtype)]
    features = datasets.Features({"image": datasets.Image()})
    (folder / "hf").mkdir()
    datasets.Dataset.from_list(rows, features=features).to_parquet(folder / "hf" / "a.parquet")
    return {"name": "hf", "path": str(folder / "hf")}


def zarr_folder(folder: Path, dtype: str) -> dict[str, Any]:
    import zarr

    how = {"shape": (COUNT, CHANNELS, HEIGHT, WIDTH), "chunks": (1, CHANNELS, 16, 16), "dtype": dtype}
    zarr.create_array(folder / "a.zarr", **how)[:] = values(dtype)
    return {"name": "array", "path": str(folder / "a.zarr")}


def hdf5(folder: Path, dtype: str) -> dict[str, Any]:
    import h5py

    with h5py.File(folder / "a.h5", "w") as file:
        file.create_dataset("images", data=values(dtype), chunks=(1, CHANNELS, 16, 16), compression="gzip")
    return {"name": "array", "path": str(folder / "a.h5")}


def npy(folder: Path, dtype: str) -> dict[str, Any]:
    np.save(folder / "a.npy", values(dtype))
    return {"name": "array", "path": str(folder / "a.npy")}


def tiff(folder: Path, dtype: str) -> dict[str, Any]:
    import tifffile

    how = {"photometric": "minisblack", "tile": (16, 16), "compression": "zlib"}
    tifffile.imwrite(folder / "a.tif", values(dtype), **how)
    return {"name": "array", "path": str(folder / "a.tif"), "axes": "NCYX"}


class Tensors:
    """A source of one's own: the images of one type in memory."""

    def __init__(self, dtype: str) -> None:
        self.images = values(dtype)
        self.classes = None

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> Sample:
        return Sample(torch.from_numpy(self.images[index].copy()), None)

    def label(self, index: int) -> None:
        return None

    def describe(self, index: int) -> str:
        return f"tensor {index}"


def own(folder: Path, dtype: str) -> dict[str, Any]:
    return {"source": {"_target_": "tests.source_matrix.Tensors", "dtype": dtype}}


class Kind(NamedTuple):
    make: Callable[[Path, str], dict[str, Any]]
    """Writes the files into a folder; returns keys of ``data``."""
    types: tuple[str, ...] = TYPES
    slow: bool = False
    """It imports a large package."""


SOURCES = {
    "imagefolder": Kind(imagefolder),
    "table": Kind(table),
    "webdataset": Kind(webdataset),
    "hf": Kind(hf, slow=True),
    "array: Zarr": Kind(zarr_folder),
    "array: HDF5": Kind(hdf5),
    "array: .npy": Kind(npy),
    "array: TIFF": Kind(tiff),
    "your own class": Kind(own),
}


def cells() -> Iterator[tuple[str, str, str, str]]:
    """Source, type, check and way of every test."""
    for source, kind in SOURCES.items():
        for dtype in kind.types:
            for check, ways in CHECKS.items():
                for way in ways:
                    yield source, dtype, check, way


def data_config(dtype: str, **given: Any) -> DataConfig:
    return DataConfig(**config(dtype), normalize="none", image_size=16, **given)


def lines() -> list[str]:
    """The table of docs/tests.md: the number of tests of each source and type."""
    found = [f"| source | type | {' | '.join(CHECKS)} |", f"|{'---|' * (2 + len(CHECKS))}"]
    counted = list(cells())
    for source, kind in SOURCES.items():
        counts = {
            dtype: [sum(cell[:3] == (source, dtype, check) for cell in counted) for check in CHECKS]
            for dtype in kind.types
        }
        for alike in {tuple(row): None for row in counts.values()}:
            types = ", ".join(dtype for dtype, row in counts.items() if tuple(row) == alike)
            found.append(f"| {source} | each of {types} | {' | '.join(map(str, alike))} |")
    return found


if __name__ == "__main__":
    sys.stdout.write("\n".join(lines()) + "\n")
