"""Image files that are not what their names say, as they turn up in large collections."""

import contextlib
import ctypes
import io
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

NOBODY = 65534


def picture(height: int = 40, width: int = 50, mode: str = "RGB", seed: int = 0) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def encoded(image: Image.Image, kind: str, **options: int) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def npy(array: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()


def tiff(array: np.ndarray, **options: Any) -> bytes:
    import tifffile

    content = io.BytesIO()
    tifffile.imwrite(content, array, **options)
    return content.getvalue()


def add_file(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def bomb() -> bytes:
    """A grey PNG of 30,000 x 30,000 pixels in about 110 kB."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checked = kind + content
        return len(content).to_bytes(4, "big") + checked + zlib.crc32(checked).to_bytes(4, "big")

    side = 30_000
    header = side.to_bytes(4, "big") * 2 + bytes([1, 0, 0, 0, 0])  # 1 bit a pixel, grey
    pixels = zlib.compress(bytes(side * (1 + side // 8)), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def _write(content: Callable[[], bytes]) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content())


def _without_permission(path: Path) -> None:
    path.write_bytes(encoded(picture(), "JPEG"))
    path.chmod(0)


UNREADABLE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "truncated JPEG": ("a.jpg", _write(lambda: encoded(picture(), "JPEG")[:900]), ""),
    "cut in its header": ("a.jpg", _write(lambda: encoded(picture(), "JPEG")[:20]), ""),
    "zero bytes": ("a.jpg", _write(bytes), ""),
    "text": ("a.jpg", _write(lambda: b"no image"), ""),
    "decompression bomb": ("a.png", _write(bomb), ""),
    "broken link": ("a.jpg", lambda path: path.symlink_to("nowhere.jpg"), "No such file or directory"),
    "without permission": ("a.jpg", _without_permission, "Permission denied"),
    "became a folder": ("a.jpg", lambda path: path.mkdir(), "Is a directory"),
}
"""Name, how to make it at a path, and what the message says, as far as it is not a decoder's words."""

READABLE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "PNG named JPEG": ("a.JPEG", _write(lambda: encoded(picture(), "PNG"))),
    "CMYK": ("a.jpg", _write(lambda: encoded(picture(mode="CMYK"), "JPEG"))),
    "1 x 1": ("a.png", _write(lambda: encoded(picture(1, 1), "PNG"))),
}


@contextlib.contextmanager
def permissions_count() -> Iterator[None]:
    """In this block files are opened with the rights of an ordinary user: root's, which are all, are set aside.

    Linux checks them by the thread's file system user.
    """
    if os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None)
    Image.init()  # would leave out the formats whose modules lie in a folder that nobody else may enter
    libc.setfsuid(NOBODY)
    try:
        yield
    finally:
        libc.setfsuid(0)
