"""Windows of Zarr, HDF5 and .npy files are those of the array in memory."""

from pathlib import Path

import numcodecs
import numpy as np
import pytest

from fcmae.data.arrays import folders
from fcmae.data.arrays.stored import open_stored

h5py = pytest.importorskip("h5py")
zarr = pytest.importorskip("zarr")
TYPES = ["uint8", "uint16", "int16", "int32", "float16", "float32"]
SHAPE, CHUNKS = (7, 3, 20, 33), (2, 3, 8, 16)


def values(dtype, shape=SHAPE):
    return np.random.default_rng(0).integers(0, 250, shape).astype(dtype)


def write_zarr(path, array, version=3, chunks=CHUNKS, **options):
    made = zarr.create_array(path, shape=array.shape, chunks=chunks, dtype=array.dtype, zarr_format=version, **options)
    made[:] = array
    return str(path)


def check(path, array, dataset=None):
    """Windows are those of the array in memory."""
    found = open_stored(str(path), dataset)
    assert (found.shape, found.dtype.newbyteorder("=")) == (array.shape, array.dtype.newbyteorder("="))
    whole = tuple(slice(0, side) for side in array.shape)
    for index in (whole, (3, slice(0, 3), slice(5, 17), slice(8, 9)), (6, 2, slice(19, 20), slice(30, 33))):
        assert np.array_equal(found.read(index), array[index])


COMPRESSORS = {
    "none": None,
    "blosc": numcodecs.Blosc(shuffle=numcodecs.Blosc.BITSHUFFLE),
    "zlib": numcodecs.Zlib(),
    "gzip": numcodecs.GZip(),
    "zstd": numcodecs.Zstd(),
    "lz4": numcodecs.LZ4(),
}


@pytest.mark.parametrize("name", COMPRESSORS)
@pytest.mark.parametrize(
    ("order", "separator", "dtype"), [("C", ".", "uint16"), ("F", "/", ">f4"), ("C", "/", "float16")]
)
def test_zarr_2_is_read_as_zarr_python_writes_it(tmp_path, name, order, separator, dtype):
    array = values(dtype)
    keys = {"name": "v2", "separator": separator}
    given = {"compressors": COMPRESSORS[name], "filters": None, "order": order, "chunk_key_encoding": keys}
    check(write_zarr(tmp_path / "a.zarr", array, 2, **given), array)


@pytest.mark.parametrize("shards", [None, (4, 3, 16, 32)])
@pytest.mark.parametrize("codecs", ["", "blosc", "gzip", "zstd", "crc32c", "zstd crc32c"])
def test_zarr_3_is_read_as_zarr_python_writes_it(tmp_path, codecs, shards):
    kinds = {name: getattr(zarr.codecs, f"{name.capitalize()}Codec") for name in ("blosc", "gzip", "zstd", "crc32c")}
    for number, dtype in enumerate(TYPES):
        array = values(dtype)
        turned = [zarr.codecs.TransposeCodec(order=(3, 1, 0, 2))] if number % 2 else None
        big = zarr.codecs.BytesCodec(endian="big") if number % 3 and array.itemsize > 1 else "auto"
        given = {"shards": shards, "filters": turned, "serializer": big}
        compressors = [kinds[name]() for name in codecs.split()] or None
        check(write_zarr(tmp_path / f"{dtype}.zarr", array, compressors=compressors, **given), array)


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("fill", [7.5, np.nan, -np.inf])
def test_chunks_that_are_not_stored_have_the_fill_value(tmp_path, version, fill):
    made = zarr.create_array(
        tmp_path / "a.zarr", shape=(4, 5, 6), chunks=(1, 5, 6), dtype="float32", fill_value=fill, zarr_format=version
    )
    made[1] = 3
    found = open_stored(str(tmp_path / "a.zarr")).read((slice(0, 4), slice(0, 5), 2))
    assert np.array_equal(found, made[:, :, 2], equal_nan=True)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"chunks": CHUNKS},
        {"compression": "gzip"},
        {"compression": "lzf", "shuffle": True, "chunks": (1, 3, 20, 33)},
        {"compression": "gzip", "fletcher32": True, "shuffle": True},
    ],
)
def test_hdf5_is_read_as_h5py_writes_it(tmp_path, options):
    for dtype in (*TYPES, ">i2"):
        with h5py.File(tmp_path / f"{dtype}.h5", "w") as file:
            file.create_dataset("plate/well", data=values(dtype), **options)
        check(tmp_path / f"{dtype}.h5", values(dtype), "plate/well")


@pytest.mark.parametrize("dtype", [*TYPES, ">f4"])
def test_npy_is_mapped_in_both_orders(tmp_path, dtype):
    array = values(dtype)
    for number, stored in enumerate((array, np.asfortranarray(array))):
        np.save(tmp_path / f"{number}.npy", stored)
        check(tmp_path / f"{number}.npy", array)


def test_a_shards_index_is_read_once_for_neighbours(tmp_path, monkeypatch):
    path = write_zarr(tmp_path / "a.zarr", values("uint8", (1, 1, 64, 64)), chunks=(1, 1, 8, 8), shards=(1, 1, 64, 64))
    found, reads, pread = open_stored(path), [], folders.os.pread
    monkeypatch.setattr(folders.os, "pread", lambda *args: reads.append(args[1]) or pread(*args))
    found.read((0, 0, slice(0, 8), slice(0, 24)))
    assert reads[0] == 16 * 64 + 4
    assert len(reads) == 1 + 3
    assert Path(path).is_dir()
