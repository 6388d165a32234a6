"""Zarr folders, HDF5 and .npy files made to do harm (see :mod:`tests.hostile`)."""

import gzip
import json
import os
import pickle
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numcodecs
import numpy as np

from fcmae.data.arrays import hdf5, zarr_folder  # noqa: F401  # imported before memory is measured
from fcmae.data.pixels.decode import PixelFormat, decode
from fcmae.data.sources.array import ArrayImages
from tests.hostile import MIB, Case, Read, npy

SIDE = 64


def read(path: Path, **given: Any) -> Read:
    """Opens an array of grey images and reads the first."""
    to = PixelFormat(1)
    return lambda: tuple(decode(ArrayImages(str(path), to, **given)[0].image, *to).shape)


class Harm:
    """Pickled, it makes a file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.folder / "harm"),)


def zarr_2(change: Callable[[Path, dict], Any], data: bytes = bytes(SIDE * SIDE)) -> Callable[[Path], Read]:
    """A Zarr folder of version 2 whose metadata ``change`` changes, of one image in one chunk."""

    def make(folder: Path) -> Read:
        top = folder / "a.zarr"
        top.mkdir()
        meta = {"zarr_format": 2, "shape": [1, SIDE, SIDE], "chunks": [1, SIDE, SIDE], "dtype": "|u1", "fill_value": 0}
        meta |= {"compressor": None, "filters": None, "order": "C"}
        (top / "0.0.0").write_bytes(data)
        change(folder, meta)
        (top / ".zarray").write_text(json.dumps(meta))
        return read(top)

    return make


def packed(name: str, data: bytes) -> Callable[[Path], Read]:
    return zarr_2(lambda _, meta: meta.update(compressor={"id": name}), data)


def zarr_3(text: Callable[[Path], str], data: bytes = b"") -> Callable[[Path], Read]:
    def make(folder: Path) -> Read:
        chunk = folder / "a.zarr" / "c" / "0" / "0" / "0"
        chunk.parent.mkdir(parents=True)
        chunk.write_bytes(data)
        (folder / "a.zarr" / "zarr.json").write_text(text(folder))
        return read(folder / "a.zarr")

    return make


def meta_3(**changes: Any) -> str:
    meta = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [1, SIDE, SIDE],
        "data_type": "uint8",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [1, SIDE, SIDE]}},
        "chunk_key_encoding": {"name": "default"},
        "fill_value": 0,
        "codecs": [{"name": "bytes"}],
    }
    return json.dumps({**meta, **changes})


def sharded(offset: int, length: int) -> Callable[[Path], Read]:
    """A shard of one chunk that lies anywhere."""
    inner = {"chunk_shape": [1, SIDE, SIDE], "codecs": [{"name": "bytes"}], "index_codecs": [{"name": "bytes"}]}
    index = np.array([offset, length], "<u8").tobytes()
    codecs = [{"name": "sharding_indexed", "configuration": inner}]
    return zarr_3(lambda _: meta_3(codecs=codecs), bytes(SIDE * SIDE) + index)


def pickled(folder: Path, meta: dict) -> None:
    (folder / "a.zarr" / "0.0.0").write_bytes(pickle.dumps(Harm(folder)))
    meta.update(dtype="|O", filters=[{"id": "pickle", "protocol": 5}])


def link_of_folder(folder: Path, meta: dict) -> None:
    (folder / "secret" / "0").mkdir(parents=True)
    (folder / "secret" / "0" / "0").write_bytes(bytes(SIDE * SIDE))
    (folder / "a.zarr" / "0").symlink_to(folder / "secret")
    meta.update(dimension_separator="/")


def link_of_chunk(folder: Path, _: dict) -> None:
    (folder / "a.zarr" / "0.0.0").rename(folder / "secret")
    (folder / "a.zarr" / "0.0.0").symlink_to(folder / "secret")


def pipe_of_chunk(folder: Path, _: dict) -> None:
    (folder / "a.zarr" / "0.0.0").unlink()
    os.mkfifo(folder / "a.zarr" / "0.0.0")


def link_of_metadata(folder: Path) -> Read:
    (folder / "secret.json").write_text(meta_3())
    (folder / "a.zarr").mkdir()
    (folder / "a.zarr" / "zarr.json").symlink_to(folder / "secret.json")
    return read(folder / "a.zarr")


def ome(path: str) -> Callable[[Path], Read]:
    """OME-Zarr whose largest level is elsewhere."""

    def make(folder: Path) -> Read:
        zarr_3(lambda _: meta_3())(folder)
        (folder / "b.zarr").mkdir()
        scales = [{"axes": [{"name": name} for name in "tyx"], "datasets": [{"path": path.format(folder)}]}]
        meta = {"zarr_format": 3, "node_type": "group", "attributes": {"ome": {"multiscales": scales}}}
        (folder / "b.zarr" / "zarr.json").write_text(json.dumps(meta))
        return read(folder / "b.zarr")

    return make


def sparse(folder: Path) -> Read:
    zarr_3(lambda _: "{")(folder)
    os.truncate(folder / "a.zarr" / "zarr.json", 2**36)
    return read(folder / "a.zarr")


def large(folder: Path) -> Read:
    """4 GiB of nothing, which is fine: an image is read without the others."""
    (folder / "a.npy").write_bytes(npy((2**20, SIDE, SIDE))[:-100])
    os.truncate(folder / "a.npy", (folder / "a.npy").stat().st_size + 2**32)
    return read(folder / "a.npy")


def npy_file(content: Callable[[], bytes]) -> Callable[[Path], Read]:
    def make(folder: Path) -> Read:
        (folder / "a.npy").write_bytes(content())
        return read(folder / "a.npy")

    return make


def object_npy(folder: Path) -> Read:
    array = np.empty((1, 2, 2), dtype=object)
    array[0, 0, 0] = Harm(folder)
    np.save(folder / "a.npy", array, allow_pickle=True)

    def first() -> str:
        try:
            return str(read(folder / "a.npy")())
        except Exception as error:
            return f"harm: {(folder / 'harm').exists()}; {error}"

    return first


def h5(write: Callable[[h5py.File, Path], Any]) -> Callable[[Path], Read]:
    def make(folder: Path) -> Read:
        with h5py.File(folder / "secret.h5", "w") as file:
            file["a"] = np.zeros((1, SIDE, SIDE), np.uint8)
        with h5py.File(folder / "a.h5", "w") as file:
            write(file, folder)
        return read(folder / "a.h5", dataset="a")

    return make


def external(file: h5py.File, folder: Path) -> None:
    (folder / "secret").write_bytes(bytes(SIDE * SIDE))
    file.create_dataset("a", (1, SIDE, SIDE), np.uint8, external=[(str(folder / "secret"), 0, SIDE * SIDE)])


def virtual(file: h5py.File, folder: Path) -> None:
    layout = h5py.VirtualLayout((1, SIDE, SIDE), np.uint8)
    layout[:] = h5py.VirtualSource(folder / "secret.h5", "a", (1, SIDE, SIDE))
    file.create_virtual_dataset("a", layout)


def bomb_h5(file: h5py.File, _: Path, size: int = 1600 * MIB) -> None:
    made = file.create_dataset("a", (1, SIDE, SIDE), np.uint8, chunks=(1, SIDE, SIDE), compression="gzip")
    packer = zlib.compressobj(9)
    first, again = (packer.compress(bytes(MIB)) + packer.flush(zlib.Z_FULL_FLUSH) for _ in range(2))
    adler = (size % 65521 << 16 | 1).to_bytes(4, "big")  # of zeros
    data = first + again * (size // MIB - 1) + packer.flush()[:-4] + adler
    made.id.write_direct_chunk((0, 0, 0), data)


def small_bomb_h5(file: h5py.File, folder: Path) -> None:
    bomb_h5(file, folder, 64 * MIB)


def lzf_bomb_h5(file: h5py.File, _: Path) -> None:
    """LZF repeats 264 bytes by 3."""
    made = file.create_dataset("a", (1, SIDE, SIDE), np.uint8, chunks=(1, SIDE, SIDE), compression="lzf")
    made.id.write_direct_chunk((0, 0, 0), b"\0\0" + b"\xe0\xff\0" * (64 * MIB // 264))


def plug_in(file: h5py.File, _: Path) -> None:
    """A filter that HDF5 would look for among its plug-ins."""
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_chunk((1, SIDE, SIDE))
    properties.set_filter(32015, h5py.h5z.FLAG_OPTIONAL, (3,))
    space = h5py.h5s.create_simple((1, SIDE, SIDE))
    h5py.h5d.create(file.id, b"a", h5py.h5t.NATIVE_UINT8, space, properties)


def vast_h5(file: h5py.File, _: Path) -> None:
    file.create_dataset("a", (1, 2**16, 2**16), np.uint8, chunks=(1, 2**16, 2**15))


def words_h5(file: h5py.File, _: Path) -> None:
    file["a"] = ["one", "two"]


BOMB = bytes(100 * MIB)
ARRAYS = {
    "Zarr 2: pickled objects": Case(zarr_2(pickled), "its filters are pickle; arrays with filters are not read"),
    "Zarr 2: a codec of JSON": Case(packed("json2", b"[]"), "its codec json2 is not read"),
    "Zarr 2: structures": Case(
        zarr_2(lambda _, meta: meta.update(dtype=[["a", "|O"]])), "its values are structures; they must be numbers"
    ),
    "Zarr 2: zlib of 100 MB": Case(packed("zlib", zlib.compress(BOMB)[:4000]), "instead of 4096"),
    "Zarr 2: gzip of 100 MB": Case(packed("gzip", gzip.compress(BOMB)[:4000]), "instead of 4096"),
    "Zarr 2: zstd of 100 MB": Case(packed("zstd", numcodecs.Zstd().encode(BOMB)), "from 104857600 bytes instead of"),
    "Zarr 2: blosc of 100 MB": Case(packed("blosc", numcodecs.Blosc("zstd").encode(BOMB)), "104857600 bytes inst"),
    "Zarr 2: lz4 of 100 MB": Case(packed("lz4", numcodecs.LZ4().encode(BOMB)[:4000]), "104857600 bytes inst"),
    "Zarr 2: chunks of 4 GB": Case(
        zarr_2(lambda _, meta: meta.update(shape=[1, 2**16, 2**16], chunks=[1, 2**16, 2**16])), "at most 268435456 are"
    ),
    "Zarr 2: 2^50 images": Case(zarr_2(lambda _, meta: meta.update(shape=[2**50, SIDE, SIDE])), "must have 1 to"),
    "Zarr 2: images of 2^40 pixels": Case(
        zarr_2(lambda _, meta: meta.update(shape=[1, 2**20, 2**20])), "loader.max_pixels is"
    ),
    "Zarr 2: negative shape": Case(zarr_2(lambda _, meta: meta.update(shape=[-1, SIDE, SIDE])), "its shape is"),
    "Zarr 2: no chunks": Case(zarr_2(lambda _, meta: meta.update(chunks=[1, 0, SIDE])), "its chunks are"),
    "Zarr 2: a folder of chunks elsewhere": Case(zarr_2(link_of_folder), r"\[0\]: .* is outside of "),
    "Zarr 2: a chunk elsewhere": Case(zarr_2(link_of_chunk), r"\[0\]: it is a link"),
    "Zarr 2: a chunk that is a pipe": Case(zarr_2(pipe_of_chunk), "not a regular file"),
    "Zarr 2: a chunk of 64 GiB": Case(
        zarr_2(lambda folder, _: os.truncate(folder / "a.zarr" / "0.0.0", 2**36)), "it has more than 70144 bytes"
    ),
    "Zarr 3: metadata elsewhere": Case(link_of_metadata, "it is a link"),
    "Zarr 3: deep metadata": Case(zarr_3(lambda _: "[" * 100_000), "cannot be read: "),
    "Zarr 3: metadata of 64 GiB": Case(sparse, "it has more than 16777216 bytes"),
    "Zarr 3: strings": Case(zarr_3(lambda _: meta_3(data_type="string")), "cannot be read: "),
    "Zarr 3: objects": Case(zarr_3(lambda _: meta_3(data_type="object")), "its pixels are object"),
    "Zarr 3: an unknown codec": Case(
        zarr_3(lambda _: meta_3(codecs=[{"name": "bytes"}, {"name": "numcodecs.pickle"}])), "codec numcodecs.pickle is"
    ),
    "Zarr 3: two compressors": Case(
        zarr_3(lambda _: meta_3(codecs=[{"name": "bytes"}, {"name": "gzip"}, {"name": "gzip"}])), "codec gzip is not"
    ),
    "Zarr 3: a chunk beyond its shard": Case(sharded(2**62, 4096), "is cut off"),
    "Zarr 3: a chunk before its shard": Case(sharded(2**64 - 2, 4096), "is cut off"),
    "Zarr 3: a chunk of 2^60 bytes in a shard": Case(sharded(0, 2**60), "is stored in 1152921504606846976 bytes, and"),
    "Zarr 3: a shard of 2^40 chunks": Case(
        zarr_3(
            lambda _: meta_3(
                shape=[1, 2**20, 2**20],
                chunk_grid={"name": "regular", "configuration": {"chunk_shape": [1, 2**20, 2**20]}},
                codecs=[{"name": "sharding_indexed", "configuration": {
                    "chunk_shape": [1, 1, 1], "codecs": [{"name": "bytes"}], "index_codecs": [{"name": "bytes"}]}}],
            )
        ),
        "loader.max_pixels is|the index of a shard has",
    ),
    "OME-Zarr: a level elsewhere": Case(ome("../a.zarr"), "a.zarr is outside of it"),
    "OME-Zarr: an absolute path": Case(ome("{}/a.zarr"), "a.zarr is outside of it"),
    ".npy of 4 GiB of nothing": Case(large, r"^\(1, 64, 64\)$"),
    ".npy stack without data": Case(npy_file(lambda: npy((2**20, SIDE, SIDE))), "cannot be read: "),
    ".npy of objects": Case(object_npy, "harm: False; "),
    ".npy with a header of 60 kB": Case(
        npy_file(lambda: b"\x93NUMPY\1\0" + (60_000).to_bytes(2, "little") + b"[" * 60_000), "cannot be read: "
    ),
    "HDF5: a link to another file": Case(
        h5(lambda file, folder: file.__setitem__("a", h5py.ExternalLink(folder / "secret.h5", "a"))), "a is a link"
    ),
    "HDF5: a link to itself": Case(
        h5(lambda file, _: file.__setitem__("a", h5py.SoftLink("/a"))), "a is a link|has only groups"
    ),
    "HDF5: values in another file": Case(h5(external), "takes its values from other files"),
    "HDF5: a virtual dataset": Case(h5(virtual), "takes its values from other files"),
    "HDF5: gzip of 1.6 GB": Case(h5(bomb_h5), "a chunk is stored in [0-9]+ bytes, and has 4096"),
    "HDF5: gzip of 64 MB": Case(h5(small_bomb_h5), "a chunk has 410. bytes instead of 4096"),
    "HDF5: lzf of 64 MB": Case(h5(lzf_bomb_h5), "."),
    "HDF5: a plug-in": Case(h5(plug_in), "its filter 32015 is not read"),
    "HDF5: chunks of 2 GB": Case(h5(vast_h5), "at most 268435456 are read"),
    "HDF5: words": Case(h5(words_h5), r"has the shape \[2\]|its pixels are object"),
}  # fmt: skip
