"""``fcmae bench data formats=[...]``: other formats than photographs, against the ``Dataset`` that a user would write.

That Dataset reads with the format's own library, crops with torchvision's v2 transforms, and is read by torch's
DataLoader. Both read the same files with the same number of processes, in turns, and end in normalised float32 on the
device.
"""

import contextlib
import importlib.util
import io
import random
import socket
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info
from torchvision.transforms import v2

from fcmae.config import DataConfig, LoaderConfig
from fcmae.errors import UsageError

Epoch = Callable[[], Iterable[Any]]
NEEDS = {
    "npy": (),
    "tiff": ("tifffile",),
    "zarr": ("zarr", "numcodecs"),
    "s3": ("moto", "s3fs", "boto3"),
}
"""The formats, and the packages that they need."""
BUCKET = "fcmae-bench"
SEED = 0


@dataclass
class FormatResult:
    """One row: medians of the repetitions, in images per second and per second of CPU time of one core."""

    format: str
    plain: float
    ours: float
    plain_per_cpu: float
    ours_per_cpu: float


@dataclass
class Case:
    """One format: a data config of this package, and what a user would write."""

    ours: DataConfig
    plain: Dataset
    loader: LoaderConfig


def crop_of(size: tuple[int, int], channels: int, flip: float = 0.5) -> v2.Transform:
    """What people write for tensors ``[C, H, W]``: normalised float32."""
    resize = v2.RandomResizedCrop(size, (0.2, 1.0), interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
    return v2.Compose([resize, v2.RandomHorizontalFlip(flip), v2.Normalize([0.5] * channels, [0.25] * channels)])


class Files(Dataset):
    """Files that a function reads as tensors, transformed."""

    def __init__(self, paths: Sequence[Path], read: Callable[[Path], Tensor], transform: Callable) -> None:
        self.paths, self.read, self.transform = list(paths), read, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(self.read(self.paths[index]))


class ZarrWindows(Dataset):
    """Random windows of one large image, read by zarr."""

    def __init__(self, path: Path, count: int, side: int) -> None:
        self.path, self.count, self.side = str(path), count, side
        self.array: Any = None

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        if self.array is None:
            import zarr

            self.array = zarr.open_array(self.path, mode="r")
        top, left = (random.randrange(side - self.side + 1) for side in self.array.shape[1:])
        window = self.array[:, top : top + self.side, left : left + self.side]
        image = torch.from_numpy(window.astype(np.float32) / 65535)
        return (image.flip(2) if random.random() < 0.5 else image).sub_(0.5).div_(0.25)


class S3Tars(IterableDataset):
    """The images of tar files, streamed by s3fs and tarfile."""

    def __init__(self, urls: Sequence[str], transform: Callable) -> None:
        self.urls, self.transform = list(urls), transform

    def __iter__(self) -> Iterator[Tensor]:
        import s3fs

        info = get_worker_info()
        urls = self.urls[info.id :: info.num_workers] if info is not None else self.urls
        for url in urls:
            with s3fs.S3FileSystem().open(url) as file, tarfile.open(fileobj=file, mode="r|") as tar:
                for member in tar:
                    if member.name.endswith(".jpg"):
                        content = tar.extractfile(member)
                        assert content is not None
                        with Image.open(content) as image:
                            yield self.transform(image.convert("RGB"))


def npy_case(folder: Path, images: int, data: DataConfig) -> Case:
    """float32 tiles of 12 x 64 x 64 as .npy."""
    tiles, rng = folder / "npy", np.random.default_rng(SEED)
    tiles.mkdir(exist_ok=True)
    for i in range(images):
        np.save(tiles / f"{i:06}.npy", rng.random((12, 64, 64), np.float32))
    ours = _config(data, "imagefolder", tiles, 12, dtype="float32", image_size=64)
    read = Files(sorted(tiles.iterdir()), lambda path: torch.from_numpy(np.load(path)), crop_of(ours.size, 12))
    return Case(ours, read, LoaderConfig())


def tiff_case(folder: Path, images: int, data: DataConfig) -> Case:
    """uint16 images of 2048 x 2048 as TIFF."""
    import tifffile

    top, rng = folder / "tiff", np.random.default_rng(SEED)
    top.mkdir(exist_ok=True)
    count = max(8, images // 64)
    for i in range(images):
        path = top / f"{i:06}.tif"
        if i < count:
            tifffile.imwrite(path, rng.integers(0, 2**16, (2048, 2048), np.uint16))
        else:
            path.hardlink_to(top / f"{i % count:06}.tif")
    ours = _config(data, "imagefolder", top, 1, bit_depth=16)

    def read(path: Path) -> Tensor:
        return torch.from_numpy(tifffile.imread(path).astype(np.float32) / 65535)[None]

    return Case(ours, Files(sorted(top.iterdir()), read, crop_of(ours.size, 1)), LoaderConfig())


def zarr_case(folder: Path, images: int, data: DataConfig) -> Case:
    """Windows at native resolution of one image of 3 x 8192 x 8192, uint16, in chunks of 3 x 256 x 256."""
    import zarr

    path, rng, side = folder / "large.zarr", np.random.default_rng(SEED), 8192
    array = zarr.create_array(str(path), shape=(3, side, side), chunks=(3, 256, 256), dtype="uint16", overwrite=True)
    for row in range(0, side, 1024):
        array[:, row : row + 1024] = rng.integers(0, 4096, (3, 1024, side), np.uint16)
    ours = _config(data, "array", path, 3, axes="CHW", fit="pad", windows_per_image=images, bit_depth=16)
    return Case(ours, ZarrWindows(path, images, ours.size[0]), LoaderConfig())


def s3_case(folder: Path, images: int, data: DataConfig) -> Case:
    """Tar files of JPEGs from an S3 server on loopback; this package reads its copies from the second epoch on."""
    import boto3

    client, per_tar, rng = boto3.client("s3"), max(1, images // 8), np.random.default_rng(SEED)
    client.create_bucket(Bucket=BUCKET)
    urls = []
    for first in range(0, images, per_tar):
        content = io.BytesIO()
        with tarfile.open(fileobj=content, mode="w") as tar:
            for i in range(first, min(images, first + per_tar)):
                file, small = io.BytesIO(), rng.integers(0, 256, (24, 32, 3), np.uint8)
                Image.fromarray(small).resize((256, 192)).save(file, "JPEG", quality=90)
                member = tarfile.TarInfo(f"{i:06}.jpg")
                member.size = file.tell()
                tar.addfile(member, io.BytesIO(file.getvalue()))
        client.put_object(Bucket=BUCKET, Key=f"t-{first:06}.tar", Body=content.getvalue())
        urls.append(f"s3://{BUCKET}/t-{first:06}.tar")
    ours = _config(data, "webdataset", f"s3://{BUCKET}", 3)
    steps = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), crop_of(ours.size, 3)]
    return Case(ours, S3Tars(urls, v2.Compose(steps)), LoaderConfig(cache_dir=str(folder / "cache")))


CASES = {"npy": npy_case, "tiff": tiff_case, "zarr": zarr_case, "s3": s3_case}


def _config(data: DataConfig, name: str, path: Path | str, channels: int, **more: Any) -> DataConfig:
    numbers: dict[str, Any] = {"mean": [0.5] * channels, "std": [0.25] * channels, "in_chans": channels}
    return replace(data, name=name, path=str(path), source=None, **numbers, **more)


@contextlib.contextmanager
def server(formats: Sequence[str]) -> Iterator[None]:
    """An S3 server in a process of its own, if one of the formats needs it; the environment names it."""
    if "s3" not in formats:
        yield
        return
    import os

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    known = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_DEFAULT_REGION": "us-east-1"}
    known |= {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}
    before = {name: os.environ.get(name) for name in known}
    os.environ |= known
    try:
        _wait_for(port, process)
        yield
    finally:
        process.kill()
        process.wait()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


def _wait_for(port: int, process: subprocess.Popen) -> None:
    for _ in range(600):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        if process.poll() is not None:
            break
        time.sleep(0.1)
    raise UsageError("formats: moto's server does not start; pip install 'moto[server]'")


def measure_formats(
    formats: Sequence[str],
    data: DataConfig,
    images: int,
    folder: Path,
    epoch_of: Callable[[DataConfig, LoaderConfig], Epoch],
    speed: Callable[[Epoch], tuple[float, float]],
    loader_of: Callable[[Dataset], Iterable[Any]],
    repeats: int,
) -> Iterator[FormatResult]:
    """Measures each format, its two ways in turns. Raises UsageError for a missing package.

    Args:
        epoch_of: an epoch of this package.
        speed: images per second, and per second of CPU time.
        loader_of: torch's DataLoader.
    """
    for name in formats:
        missing = [package for package in NEEDS[name] if importlib.util.find_spec(package) is None]
        if missing:
            raise UsageError(f"formats: {name} needs {', '.join(missing)}")
    with server(formats):
        for name in formats:
            case = CASES[name](folder, images, data)
            ways: dict[str, Epoch] = {"plain": lambda case=case: loader_of(case.plain)}  # type: ignore[misc]
            ways["ours"] = epoch_of(case.ours, case.loader)
            found: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
            for _ in range(repeats):
                for way, epoch in ways.items():
                    found[way].append(speed(epoch))
            rates = {
                way: [statistics.median(column) for column in zip(*rows, strict=True)] for way, rows in found.items()
            }
            yield FormatResult(name, rates["plain"][0], rates["ours"][0], rates["plain"][1], rates["ours"][1])


def format_table(results: Sequence[FormatResult]) -> Iterator[str]:
    """The result as lines of text."""
    yield f"{'format':7} {'plain img/s':>12} {'ours':>8} {'times':>6} {'plain img/s/core':>17} {'ours':>8} {'times':>6}"
    for row in results:
        wall, cpu = row.ours / row.plain, row.ours_per_cpu / row.plain_per_cpu
        yield (
            f"{row.format:7} {row.plain:12.0f} {row.ours:8.0f} {wall:6.2f} {row.plain_per_cpu:17.0f} "
            f"{row.ours_per_cpu:8.0f} {cpu:6.2f}"
        )


def plain_loader(dataset: Dataset, batch: int, workers: int, pin: bool) -> DataLoader:
    """The loader that people write."""
    shuffle = not isinstance(dataset, IterableDataset)
    return DataLoader(dataset, batch, shuffle=shuffle, num_workers=workers, pin_memory=pin, drop_last=True)
