"""Arrays with flipped bits and missing ends: pixels or an error of one line each, no crash and no hang."""

import multiprocessing
import random
import shutil
import time
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import pytest

from fcmae.data.pixels.decode import PixelFormat, decode
from fcmae.data.sources.array import ArrayImages
from fcmae.errors import UsageError

h5py = pytest.importorskip("h5py")
zarr = pytest.importorskip("zarr")
FILES = 25
"""Damaged copies of each array."""
SECONDS = 2
"""Of CPU time per file."""
START = 800
"""Bytes, where the metadata of one file are."""
TO = PixelFormat(2, dtype="float32")


def write_arrays(folder: Path) -> None:
    array = np.random.default_rng(0).integers(0, 99, (4, 2, 40, 40)).astype(np.int16)
    np.save(folder / "plain.npy", array)
    kinds: dict[str, dict[str, Any]] = {"gzip": {"compression": "gzip", "shuffle": True}, "lzf": {"compression": "lzf"}}
    for name, given in {**kinds, "plain": {}}.items():
        with h5py.File(folder / f"{name}.h5", "w") as file:
            file.create_dataset("a", data=array, chunks=(1, 1, 20, 20), **given)
    codecs: dict[str, dict[str, Any]] = {
        "lz4": {"compressors": numcodecs.LZ4(), "zarr_format": 2},
        "zstd": {"compressors": zarr.codecs.ZstdCodec(), "zarr_format": 3},
        "shards": {"compressors": zarr.codecs.BloscCodec(), "zarr_format": 3, "shards": (2, 2, 40, 40)},
    }
    for name, given in codecs.items():
        made = zarr.create_array(
            folder / f"{name}.zarr", shape=array.shape, chunks=(1, 1, 20, 20), dtype="int16", **given
        )
        made[:] = array


def damage(path: Path, rng: random.Random) -> None:
    """Cuts off a file, or flips some of its bits, often in the metadata."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    metadata = [file for file in files if file.name in ("zarr.json", ".zarray")] or files
    file = rng.choice(metadata if rng.random() < 0.4 else files)
    data = bytearray(file.read_bytes())
    if rng.random() < 0.2:
        data = data[: rng.randrange(len(data))]
    else:
        end = len(data) if rng.random() < 0.5 else min(len(data), START)
        for _ in range(rng.choice([1, 1, 3, 20])):
            data[rng.randrange(end)] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def read_all(folder: Path, send: Any) -> None:
    """What reading each damaged copy comes to, in a child process, which may crash."""
    for path in sorted(folder.iterdir()):
        for seed in range(FILES):
            copy = folder.parent / f"copy_{path.name}"
            (shutil.copytree if path.is_dir() else shutil.copy)(path, copy)
            damage(copy, random.Random(seed))
            began = time.process_time()
            try:
                source = ArrayImages(str(copy), TO)
                for index in range(min(len(source), 4)):
                    decode(source[index].image, *TO)
                said = "read"
            except UsageError as error:
                said = f"refused: {error}"
            except BaseException as error:
                said = f"{type(error).__name__}: {error}"
            send.send((path.name, seed, said, time.process_time() - began))
            shutil.rmtree(copy) if copy.is_dir() else copy.unlink()
    send.send(None)


def test_damage_is_refused_or_read(tmp_path):
    (tmp_path / "arrays").mkdir()
    write_arrays(tmp_path / "arrays")
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=read_all, args=(tmp_path / "arrays", send), daemon=True)
    child.start()
    send.close()
    found = []
    while True:
        assert receive.poll(120), f"hangs after {found[-1:]}"
        try:
            told = receive.recv()
        except EOFError:
            pytest.fail(f"crashed after {found[-1:]}")
        if told is None:
            break
        found.append(told)
    child.join()
    assert len(found) == 7 * FILES
    assert [told for told in found if not told[2].startswith(("read", "refused: ")) or "\n" in told[2]] == []
    assert [told for told in found if told[3] > SECONDS] == []
    assert len({told[2] for told in found}) > 30
