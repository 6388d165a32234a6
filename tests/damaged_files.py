"""Small files of every format, damaged in many ways by a seed, and what reads each.

``python -m tests.damaged_files [COUNT]`` reads COUNT damaged files of each format and prints what is not an error or an
image, and what took the most memory and time.
"""

import io
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fcmae.config import DataConfig, LoaderConfig
from fcmae.data.pixels.transforms import pretrain_transform
from fcmae.data.sources import train_source
from tests.bad_files import add_file, npy
from tests.hostile import Case, Read, measure
from tests.more_files import every_format

HEADER = 400
"""Bytes at the beginning, where sizes are."""
KINDS = ("cut", "bit in the header", "bits", "zeros", "large number", "shuffled", "repeated")
GOOD = ("ImageError: ", "UsageError: ", "ConfigError: ", "image")
MEMORY, SECONDS = 96, 10
MAX_PIXELS = 1_000_000
"""Which a damaged header may claim, in memory too."""


def damage(data: bytes, kind: str, rng: np.random.Generator) -> bytes:
    """A copy of a file with one kind of damage."""
    changed = bytearray(data)
    header = min(HEADER, len(data) - 1)
    if kind == "cut":
        return data[: int(rng.integers(1, len(data)))]
    if kind == "bit in the header":
        changed[int(rng.integers(0, header))] ^= 1 << int(rng.integers(0, 8))
    elif kind == "bits":
        for place in rng.integers(0, len(data), 12):
            changed[place] ^= 1 << int(rng.integers(0, 8))
    elif kind in ("zeros", "large number"):
        start = int(rng.integers(4, max(5, header - 4)))
        changed[start : start + 4] = bytes(4) if kind == "zeros" else b"\x7f\xff\xff\xff"
    elif kind == "shuffled":
        first, second = sorted(int(x) for x in rng.integers(0, len(data), 2))
        return data[:first] + data[second:] + data[first:second]
    else:
        start = int(rng.integers(0, len(data)))
        return data[:start] + data[start:] * 3
    return bytes(changed)


def read_folder(folder: Path) -> str:
    cfg = DataConfig(path=str(folder), image_size=16, dtype="float32", normalize="image")
    return read_all(cfg)


def read_all(cfg: DataConfig) -> str:
    """Reads a crop of every image, as training does."""
    source = train_source(cfg, LoaderConfig(max_pixels=MAX_PIXELS))
    crop = pretrain_transform(cfg, MAX_PIXELS)
    for i in range(len(source)):
        assert crop(source[i].image).isfinite().all()
    return "image"


def read_tar(folder: Path) -> str:
    return read_all(DataConfig(name="webdataset", path=str(folder / "a.tar"), image_size=16))


def read_table(folder: Path) -> str:
    return read_all(DataConfig(name="table", path=str(folder / "a.csv"), image_size=16))


def read_array(folder: Path) -> str:
    path = next(folder.glob("stack.*"))
    channels = 1 if path.suffix == ".tif" else 3  # a TIFF is read as pages of one channel
    cfg = DataConfig(name="array", path=str(path), in_chans=channels, image_size=16, dtype="float32", normalize="image")
    return read_all(cfg)


def sources() -> dict[str, tuple[bytes, str, Callable[[Path], str]]]:
    """Content, name and reader of other files than images."""
    files = every_format()
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for name, data in (("0.png", files["png"]), ("0.cls", b"1"), ("1.jpg", files["jpg"]), ("1.cls", b"0")):
            add_file(tar, name, data)
    stack = npy(np.arange(2 * 3 * 24 * 32, dtype=np.uint16).reshape(2, 3, 24, 32))
    return {
        "tar": (content.getvalue(), "a.tar", read_tar),
        "csv": (b"image,label\nb.png,x\nc.png,y\n", "a.csv", read_table),
        "array.npy": (stack, "stack.npy", read_array),
        "array.tif": (files["tiles.tif"], "stack.tif", read_array),
        "array-deflate.tif": (files["deflate.tif"], "stack.tif", read_array),
    }


def _case(name: str, data: bytes, read: Callable[[Path], str], beside: dict[str, bytes]) -> Case:
    def make(folder: Path) -> Read:
        for other, content in beside.items():
            (folder / other).write_bytes(content)
        (folder / name).write_bytes(data)
        return lambda: Said(read(folder))

    return Case(make, "", MEMORY)


class Said(str):
    def __repr__(self) -> str:
        return str(self)


def cases(count: int, seed: int = 0) -> dict[str, Case]:
    """``count`` damaged files of each format."""
    png = every_format()["png"]
    given: dict[str, tuple[bytes, str, Callable[[Path], str]]] = {
        ending: (data, f"a.{ending}", read_folder) for ending, data in every_format().items()
    }
    found = {}
    for ending, (data, name, read) in {**given, **sources()}.items():
        rng = np.random.default_rng([seed, *ending.encode()])
        beside: dict[str, bytes] = {"b.png": png, "c.png": png} if ending == "csv" else {}
        for number in range(count):
            kind = KINDS[number % len(KINDS)]
            found[f"{ending}: {kind}, {number}"] = _case(name, damage(data, kind, rng), read, beside)
    return found


def problems(count: int, seed: int = 0) -> tuple[int, list[str], list[Any]]:
    """The number of files, what went wrong, and the largest of memory and time."""
    made = cases(count, seed)
    taken = measure(made)
    wrong = [
        f"{name}: {what.said[:200]} ({what.memory} MiB, {what.seconds:.1f} s)"
        for name, what in taken.items()
        if not what.said.startswith(GOOD) or what.memory > MEMORY or what.seconds > SECONDS or "\n" in what.said
    ]
    most = [max((getattr(what, field), name) for name, what in taken.items()) for field in ("memory", "seconds")]
    return len(made), wrong, most


if __name__ == "__main__":
    total, wrong, most = problems(int(sys.argv[1]) if len(sys.argv) > 1 else 50)
    print(*wrong, f"{total} files, {len(wrong)} wrong; most memory and time: {most}", sep="\n")
