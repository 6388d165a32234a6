"""Image files made to do harm, each with what reads it, and a child process that measures what reading takes.

``python -m tests.hostile_sources`` prints a table: size of the file, what was said, MiB of memory, seconds of CPU time.
"""

import contextlib
import functools
import io
import multiprocessing
import os
import resource
import shutil
import struct
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from fcmae.config import DataConfig
from fcmae.data.pixels.decode import decode, read_file
from fcmae.data.pixels.transforms import eval_transform
from fcmae.errors import UsageError
from tests.bad_files import bomb

MIB = 2**20
MEMORY = 6 * 1024 * MIB
"""Bytes of address space that a child may add before what it reads is a MemoryError."""
SECONDS = 60
"""Of CPU time that a file may take before its child is killed."""
PATIENCE = 20 * SECONDS
"""Of wall time, for what waits without computing, on a machine with other work."""

Read = Callable[[], Any]


class Case(NamedTuple):
    """``make`` writes files into a folder and returns what reads them; ``says``: what the message must hold, if any."""

    make: Callable[[Path], Read]
    says: str
    memory: int = 64
    """MiB that reading may take."""


class Taken(NamedTuple):
    said: str
    """The error's type and message, or what was read."""
    memory: int
    """MiB at the peak, beyond what there was before."""
    seconds: float
    """Of CPU time."""
    size: int
    """Bytes of the files on the disk."""
    printed: str = ""
    """On standard error."""


def measure(cases: dict[str, Case], patience: float = PATIENCE) -> dict[str, Taken]:
    """Reads all cases in a child process; another one continues where one was killed or did not end in time."""
    context = multiprocessing.get_context("fork")
    taken: dict[str, Taken] = {}
    while len(taken) < len(cases):
        left = [name for name in cases if name not in taken]
        receive, send = context.Pipe(duplex=False)
        child = context.Process(target=_read_all, args=({name: cases[name] for name in left}, send), daemon=True)
        child.start()
        send.close()
        for name in left:
            try:
                taken[name] = receive.recv() if receive.poll(patience) else Taken("never ended", -1, SECONDS, -1)
            except EOFError:
                taken[name] = Taken("killed", -1, SECONDS, -1)
            if taken[name].size < 0:
                break
        child.kill()
        child.join()
    return taken


def _read_all(cases: dict[str, Case], send: Any) -> None:
    torch.set_num_threads(1)  # the threads of the parent are not here, and work for them would wait for ever
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + MEMORY, resource.RLIM_INFINITY))
    for case in cases.values():
        with _folder() as folder, tempfile.TemporaryFile() as errors:
            os.dup2(errors.fileno(), 2)
            read = case.make(folder)
            size = sum(min(file.lstat().st_size, file.lstat().st_blocks * 512) for file in _files(folder))
            used = resource.getrusage(resource.RUSAGE_SELF)
            spent = int(used.ru_utime + used.ru_stime)
            resource.setrlimit(resource.RLIMIT_CPU, (spent + SECONDS, resource.RLIM_INFINITY))
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
            before, began, written = _status("VmHWM"), os.times(), os.fstat(2).st_size
            try:
                said = repr(read())
            except Exception as error:  # whatever it is, it is told
                said = f"{type(error).__name__}: {error}"
            ended = os.times()
            seconds = ended.user + ended.system - began.user - began.system
            printed = os.pread(2, 2000, written).decode(errors="replace")
            send.send(Taken(said[:2000], (_status("VmHWM") - before) // MIB, seconds, size, printed))


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    name = tempfile.mkdtemp()
    yield Path(name)
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(10_000)  # for folders in folders
    shutil.rmtree(name)
    sys.setrecursionlimit(limit)


def _files(folder: Path) -> Iterator[Path]:
    """Of folders in folders too, which ``os.walk`` does not follow for ever."""
    left = [folder]
    while left:
        entries = list(os.scandir(left.pop()))
        left += [Path(entry) for entry in entries if entry.is_dir(follow_symlinks=False)]
        yield from (Path(entry) for entry in entries if not entry.is_dir(follow_symlinks=False))


def _status(key: str) -> int:
    """Bytes, of what Linux counts for this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def _chunk(kind: bytes, content: bytes) -> bytes:
    checked = kind + content
    return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))


def png(height: int, width: int, *chunks: bytes) -> bytes:
    """A grey PNG of 8 bits, all black, with ``chunks`` before its pixels."""
    rows = zlib.compressobj(9)
    data = rows.compress(bytes(height * (1 + width))) + rows.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"".join(
        [b"\x89PNG\r\n\x1a\n", _chunk(b"IHDR", header), *chunks, _chunk(b"IDAT", data), _chunk(b"IEND", b"")]
    )


def tiff(*pages: dict[int, tuple[int, ...]], after: bytes = b"", last: int = 0) -> bytes:
    """A TIFF of pages of tags; values that do not fit into a tag follow it. ``last``: where the last page points to.

    A value of -1 is where ``after``, the end of the file, begins.
    """
    body = b"II*\0" + struct.pack("<I", 8)
    lengths = [2 + 12 * len(page) + 4 + sum(4 * len(v) for v in page.values() if len(v) > 1) for page in pages]
    end = 8 + sum(lengths)
    for i, page in enumerate(pages):
        start = len(body)
        values, entries = b"", b""
        for tag, value in sorted(page.items()):
            packed = b"".join(struct.pack("<I", end if v == -1 else v) for v in value)
            where = packed if len(value) == 1 else struct.pack("<I", start + 2 + 12 * len(page) + 4 + len(values))
            values += b"" if len(value) == 1 else packed
            entries += struct.pack("<HHI", tag, 4, len(value)) + where
        following = start + lengths[i] if i + 1 < len(pages) else last
        body += struct.pack("<H", len(page)) + entries + struct.pack("<I", following) + values
    return body + after


def page(height: int, width: int, channels: int, **tags: tuple[int, ...]) -> dict[int, tuple[int, ...]]:
    """Tags of a TIFF's page of 8 bits; by default one strip, of no bytes."""
    named = {"compression": 259, "offsets": 273, "counts": 279, "rows": 278, "description": 270}
    named |= {"tile_width": 322, "tile_length": 323, "tile_offsets": 324, "tile_counts": 325}
    found = {256: (width,), 257: (height,), 258: (8,) * channels, 259: (1,), 262: (1,), 277: (channels,)}
    if "tile_width" not in tags:
        found |= {278: (height,), 273: (0,), 279: (0,)}
    return found | {named[name]: value for name, value in tags.items()}


def image(name: str, content: Callable[[], bytes], in_chans: int = 3, size: int = 224) -> Callable[[Path], Read]:
    """A file of an image, read as evaluation does."""

    def make(folder: Path) -> Read:
        (folder / name).write_bytes(content())
        cfg = DataConfig(in_chans=in_chans, image_size=size, mean=[0.5] * in_chans, std=[0.5] * in_chans)
        return lambda: tuple(eval_transform(cfg)(read_file(folder / name)).shape)

    return make


def npy(shape: tuple[int, ...]) -> bytes:
    """The header of a large array, and none of it."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return file.getvalue() + bytes(100)


def jpeg_of_scans(count: int, side: int) -> bytes:
    """A progressive JPEG whose last scan comes again and again."""
    file = io.BytesIO()
    Image.new("L", (side, side)).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    last = data.rfind(b"\xff\xda")
    return data[:-2] + data[last:-2] * count + data[-2:]


def jpeg_of_exif() -> bytes:
    """A JPEG whose metadata are so many mistakes."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG")
    exif = b"Exif\0\0" + tiff({40000 + i: (1, 2) for i in range(2600)})
    exif = exif[: 20 + 12 * 2600]  # the values are missing
    return file.getvalue()[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + file.getvalue()[2:]


@functools.cache
def deflated(count: int) -> bytes:
    packer = zlib.compressobj(9)
    return b"".join(packer.compress(bytes(MIB)) for _ in range(count // MIB)) + packer.flush()


def bomb_tiff() -> bytes:
    content = deflated(100 * MIB)
    return tiff(page(64, 64, 5, compression=(8,), offsets=(-1,), counts=(len(content),)), after=content)


def tile_tiff() -> bytes:
    content = deflated(100 * MIB)
    tile = {"tile_width": (10240,), "tile_length": (10240,), "tile_offsets": (-1,), "tile_counts": (len(content),)}
    return tiff(page(64, 64, 1, compression=(8,), **tile), after=content)


def endless_tiff() -> bytes:
    pages = [page(64, 64, 5), *[{}] * 200]
    return tiff(*pages, last=len(tiff(*pages)) - 6 * 50)  # to the fiftieth from the end


def foreign_tiff(folder: Path) -> Read:
    """OME metadata that take their pixels from another file."""
    other = folder / "secret.tif"
    Image.new("L", (64, 64), 77).save(other)
    xml = (
        '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image ID="Image:0"><Pixels ID="Pixels:0" '
        'DimensionOrder="XYCZT" Type="uint8" SizeX="64" SizeY="64" SizeC="2" SizeZ="1" SizeT="1">'
        + "".join(
            f'<TiffData FirstC="{i}" IFD="0" PlaneCount="1"><UUID FileName="{other}">urn:uuid:{i}</UUID></TiffData>'
            for i in range(2)
        )
        + "</Pixels></Image></OME>"
    )
    import tifffile

    file = folder / "a.tif"
    tifffile.imwrite(file, np.zeros((64, 64), np.uint8), description=xml, metadata=None)
    return lambda: int(decode(read_file(file), 2).max())


def postscript(folder: Path) -> Read:
    """PostScript named .jpg, where a program of the interpreter's name tells that it was started."""
    started = folder / "started"
    (folder / "gs").write_text(f"#!/bin/sh\ntouch {started}\n")
    (folder / "gs").chmod(0o755)
    (folder / "a.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n")

    def read() -> str:
        path = os.environ["PATH"]
        os.environ["PATH"] = f"{folder}{os.pathsep}{path}"
        try:
            return str(decode(read_file(folder / "a.jpg"), 3).shape)
        except UsageError as error:
            return f"started: {started.exists()}; {error}"
        finally:
            os.environ["PATH"] = path

    return read


def sparse(name: str, start: bytes = b"", size: int = 2**36) -> Callable[[Path], Read]:
    """A file of 64 GiB that takes no room on the disk."""

    def make(folder: Path) -> Read:
        (folder / name).write_bytes(start)
        os.truncate(folder / name, size)
        return lambda: decode(read_file(folder / name), 3).shape

    return make


def pipe(folder: Path) -> Read:
    os.mkfifo(folder / "a.jpg")
    return lambda: read_file(folder / "a.jpg")


IMAGES = {
    "PostScript named .jpg": Case(postscript, "started: False; cannot read the image .*a.jpg: its bytes are of no ima"),
    "PNG, 1 x 4000": Case(image("a.png", lambda: png(1, 4000)), r"^\(3, 224, 224\)$"),
    "PNG, 4000 x 1": Case(image("a.png", lambda: png(4000, 1)), r"^\(3, 224, 224\)$"),
    "PNG, 1 x 65500": Case(image("a.png", lambda: png(1, 65500)), r"^\(3, 224, 224\)$"),
    "PNG, 1000000 x 1, at 384 px": Case(image("a.png", lambda: png(1_000_000, 1), size=384), "384", 100),
    "PNG, 30000 x 30000": Case(image("a.png", bomb), "set loader.max_pixels=900000000 to read it"),
    "TIFF of 20 channels without data": Case(
        image("a.tif", lambda: tiff(page(9000, 9000, 20, compression=(8,)))), "it has 20 channels; data.in_chans is 3"
    ),
    "TIFF, a deflated strip of 100 MB": Case(
        image("a.tif", bomb_tiff, in_chans=5), "more bytes than its pixels have|INSUFFICIENT_SPACE"
    ),
    "TIFF, a tile of 100 MB": Case(
        image("a.tif", tile_tiff, in_chans=1), "it has tiles of 10240x10240 pixels; loader."
    ),
    "TIFF of 70,000 pages": Case(image("a.tif", lambda: tiff(*[{}] * 70_000)), "more than 4096 pages"),
    "TIFF whose pages never end": Case(image("a.tif", endless_tiff, in_chans=5), "its pages form a cycle"),
    "TIFF that names another file": Case(foreign_tiff, "channel|axes|pages"),
    "JPEG of 500 scans": Case(image("a.jpg", lambda: jpeg_of_scans(500, 2000)), "a JPEG of 5.. scans"),
    "JPEG of bad metadata": Case(image("a.jpg", jpeg_of_exif), r"^\(3, 224, 224\)$"),
    ".npy of 10 GB without data": Case(image("a.npy", lambda: npy((3, 60_000, 60_000))), "a.npy: it is cut off"),
    ".npy of 2^62 bytes without data": Case(image("a.npy", lambda: npy((3, 2**30, 2**30))), "a.npy: it is cut off"),
    "64 GiB of nothing named .jpg": Case(sparse("a.jpg"), "a.jpg: it has 68719476736 bytes; at most"),
    "64 GiB after a PNG's header": Case(sparse("a.png", png(8, 8)[:40]), "a.png: it has 68719476736 bytes; at most"),
    "a pipe named .jpg": Case(pipe, "cannot read the image .*a.jpg: not a regular file"),
}


def table(taken: dict[str, Taken]) -> Iterable[str]:
    yield f"{'file':36} {'bytes':>9} {'MiB':>6} {'CPU s':>6}  said"
    for name, what in taken.items():
        yield f"{name:36} {what.size:9} {what.memory:6} {what.seconds:6.2f}  {what.said[:150]} {what.printed[:60]!r}"
