"""Windows of Zarr, HDF5 and .npy files are those of the array in memory."""

import multiprocessing
import pickle
from pathlib import Path

import numcodecs
import numpy as np
import pytest

from fcmae.data.arrays import folders
from fcmae.data.arrays import shared_chunks as module
from fcmae.data.arrays.codecs import scalar
from fcmae.data.arrays.shared_chunks import Layout, SharedChunks, shared_chunks
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
    """Windows are those of the array in memory, also those of chunks that are decoded already."""
    found = open_stored(str(path), dataset)
    assert (found.shape, found.dtype.newbyteorder("=")) == (array.shape, array.dtype.newbyteorder("="))
    whole = tuple(slice(0, side) for side in array.shape)
    for index in (whole, (3, slice(0, 3), slice(5, 17), slice(8, 9)), (6, 2, slice(19, 20), slice(30, 33))):
        assert np.array_equal(found.read(index), array[index])
    if found.chunks is not None:
        (found.shared,) = shared_chunks([Layout(found.shape, found.chunks, found.dtype)])
        assert np.array_equal(found.read(whole), array)
        found._chunk = None
        assert np.array_equal(found.read(whole), array)


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
    found = open_stored(str(tmp_path / "a.zarr"))
    (found.shared,) = shared_chunks([Layout(found.shape, found.chunks, found.dtype)])
    for _ in range(2):
        values = found.read((slice(0, 4), slice(0, 5), 2))
        assert np.array_equal(values, made[:, :, 2], equal_nan=True)
        found._chunk = None


@pytest.mark.parametrize(("fill", "dtype"), [("NaN", "uint8"), (1e300, "int16"), (-1e30, "float16"), ("a", "int8")])
def test_a_fill_value_that_the_type_cannot_hold_is_refused(fill, dtype):
    with pytest.raises(ValueError, match="its fill_value is"):
        scalar(fill, np.dtype(dtype))


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


def test_processes_share_decoded_chunks_and_none_keeps_a_damaged_one(tmp_path):
    array = values("uint16")
    path = write_zarr(tmp_path / "a.zarr", array, compressors=[zarr.codecs.ZstdCodec()])
    damaged = tmp_path / "a.zarr" / "c" / "3" / "0" / "2" / "2"
    whole, content = damaged.read_bytes(), b"no chunk"
    damaged.write_bytes(content)
    found = open_stored(path)
    shares = shared_chunks([None, *[Layout(found.shape, found.chunks, found.dtype)] * 2])
    assert shares[0] is None
    found.shared = shares[2]
    first = (slice(0, 2), slice(0, 3), slice(0, 20), slice(0, 33))
    process = multiprocessing.get_context("fork").Process(target=found.read, args=(first,))
    process.start()
    process.join()
    last = (6, slice(0, 3), slice(19, 20), slice(32, 33))
    for _ in range(2):
        with pytest.raises(ValueError, match="zstd"):
            found.read(last)
    damaged.write_bytes(whole)
    assert np.array_equal(found.read(last), array[last])
    found._chunk = None  # nothing is decoded again
    assert np.array_equal(found.read(first), array[first])
    assert np.array_equal(found.read(last), array[last])
    found.shared = shares[1]  # another array's chunks are its own
    with pytest.raises(TypeError):
        found.read(first)
    assert pickle.loads(pickle.dumps(shares[1])) is None


def test_chunks_that_do_not_fit_are_not_kept(monkeypatch):
    layout = Layout((4, 100), (1, 64), np.dtype("float32"))
    assert (layout.grid, layout.size) == ((4, 2), 4 * 2 * 64 * 4)
    monkeypatch.setattr(module, "available_memory", lambda: 8 * (layout.size + 8))
    assert [type(one) for one in shared_chunks([layout])] == [SharedChunks]
    assert shared_chunks([layout, layout]) == [None, None]
    monkeypatch.setattr(module, "MOST", layout.size)
    assert shared_chunks([layout]) == [None]
