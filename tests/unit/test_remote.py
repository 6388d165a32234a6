"""Tar and Parquet files at URLs: the same samples as from local files, whatever the server does."""

import concurrent.futures
import os
import pickle
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fcmae.config import DataConfig, EvaluateConfig, LoaderConfig
from fcmae.data.loading import TrainBatches, Workers
from fcmae.data.pixels.transforms import pretrain_transform
from fcmae.data.plan import BatchPlan
from fcmae.data.remote.access import Access
from fcmae.data.remote.cache import Cache
from fcmae.data.remote.objects import stat
from fcmae.data.samples import MaskedImages
from fcmae.data.sources import WebDataset, train_source
from fcmae.errors import RemoteError, UsageError
from fcmae.evaluation.cache import fingerprint
from fcmae.messages import print_once
from tests.bad_files import add_file, encoded
from tests.remote_server import RangeServer

pytest.importorskip("aiohttp")
IMAGES, PER_TAR = 12, 6
URL = "/t-{000..001}.tar"


def jpeg(seed):
    pixels = np.random.default_rng(seed).integers(0, 255, (5, 5, 3), np.uint8)
    return encoded(Image.fromarray(pixels).resize((40, 48)), "JPEG")


def write_tar(path, numbers):
    with tarfile.open(path, "w") as tar:
        for i in numbers:
            for name, content in ((f"{i:04}.jpg", jpeg(i)), (f"{i:04}.cls", b"%d" % (i % 3))):
                add_file(tar, name, content)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    for number in range(IMAGES // PER_TAR):
        write_tar(folder / f"t-{number:03}.tar", range(number * PER_TAR, (number + 1) * PER_TAR))
    (folder / "classes.txt").write_text("ant\nbee\ncat\n")
    server = RangeServer(folder)
    yield server
    server.close()


@pytest.fixture
def server(served):
    print_once.cache_clear()
    served.is_down, served.cut, served.ranges, served.forbidden = False, 0, True, False
    served.gets.clear()
    return served


@pytest.fixture
def access(tmp_path):
    """Makes the access with a cache of so many bytes."""

    def make(size=10**7, limit=20.0):
        (tmp_path / "cache").mkdir(exist_ok=True)
        return Access(Cache(tmp_path / "cache", size), limit)

    return make


def copies(access):
    return sorted(path.name.partition("-")[2] for path in access.cache.folder.glob("*.data"))


@pytest.mark.parametrize("size", [10**7, 0], ids=["copied", "read in parts"])
def test_tar_files_at_a_url_are_read_like_local_ones(size, server, access):
    local, remote = WebDataset(server.folder), WebDataset(server.url + URL, access=access(size))
    assert remote.classes == local.classes == ["ant", "bee", "cat"]
    for source in (remote, pickle.loads(pickle.dumps(remote))):
        assert [(x.image.data, x.label) for x in source] == [(x.image.data, x.label) for x in local]
    assert remote.describe(7) == f"{server.url}/t-001.tar/0007.jpg"
    assert copies(access()) == (["t-000.tar.data", "t-001.tar.data"] if size else [])
    assert server.gets["t-000.tar"] == 1 if size else server.gets["t-000.tar"] > PER_TAR
    server.gets.clear()
    WebDataset(server.url + URL, access=access(size))  # its index is kept, too
    assert not server.gets["t-000.tar"]


@pytest.mark.parametrize("size", [10**7, 0], ids=["copied", "read in parts"])
@pytest.mark.parametrize("workers", [0, 1])
def test_batches_are_the_same_while_the_server_fails(workers, size, server, access, capfd):
    """Also from the middle of an epoch."""
    data, plan = DataConfig(image_size=32), BatchPlan.create(IMAGES, 4, None, 1, seed=3)

    def batches(source, first):
        dataset = MaskedImages(source, pretrain_transform(data), (1, 1), seed=3)
        return TrainBatches(dataset, plan, 0, range(first, 6), Workers(workers))

    local, remote = WebDataset(server.folder), WebDataset(server.url + URL, access=access(size))
    for first in (0, 2):
        found = []
        for number, batch in enumerate(batches(remote, first)):
            found.append([part.clone() for part in batch])
            if number == 0 and size == 0:
                server.cut = 1
                server.fails_for(2)
        for parts, expected in zip(found, batches(local, first), strict=True):
            assert all(map(torch.equal, parts, expected))
    told = capfd.readouterr().err
    assert ("waiting for http://" in told) == ("continues to read http://" in told) == (size == 0)


def test_a_download_continues_where_it_stopped(server, access, monkeypatch):
    monkeypatch.setattr("fcmae.data.remote.objects.BLOCK", 4096)
    size = (server.folder / "t-000.tar").stat().st_size
    file = stat(f"{server.url}/t-000.tar", 20.0)
    parts = []
    for part in file.blocks():
        parts.append(part)
        if len(parts) == 2:
            server.cut = 1
    assert b"".join(parts) == (server.folder / "t-000.tar").read_bytes()
    assert server.gets["t-000.tar"] == -(-size // 4096) + 1


def test_errors_name_url_and_key(server, access, monkeypatch):
    def message(url, kind=UsageError, **how):
        with pytest.raises(kind) as error:
            WebDataset(url, access=access(**how))[0]
        return str(error.value)

    url = server.url + "/t-000.tar"
    assert "must be a path, pipe:COMMAND or a URL of s3, gs, http, https, hf" in message("ftp://host/a.tar")
    assert "must be a path" in message("filecache::https://host/a.tar")
    assert "a https URL must not hold a user or a password" in message("https://me:word@host/a.tar")
    assert "nothing.tar: the server answers 404" in message(server.url + "/nothing.tar")
    assert "web servers list no files" in message(server.url + "/*.tar")
    server.ranges = False
    assert f"{url} must answer requests of" in message(url, size=0)
    server.ranges, server.is_down = True, True
    told = message(url, RemoteError, limit=0.6)
    assert told.startswith(f"cannot read {url}: ")
    assert "loader.retry_seconds is 0.6" in told
    server.is_down = False
    source = WebDataset(url, access=access(0))
    os.utime(server.folder / "t-000.tar")
    with pytest.raises(UsageError, match=r"t-000.tar has changed since the command began"):
        source[0]
    monkeypatch.setattr("fcmae.interrupt._received", ["SIGTERM"])
    server.is_down = True
    assert "stopped by SIGTERM while waiting" in message(url, RemoteError)


def test_a_changed_file_is_read_again(server, tmp_path):
    path = server.folder / "changing.tar"
    write_tar(path, [1])
    cfg = DataConfig(name="webdataset", path=f"{server.url}/changing.tar")
    loader = LoaderConfig(cache_dir=str(tmp_path / "cache"))
    source = train_source(cfg, loader)
    before = fingerprint(source, cfg)
    assert fingerprint(train_source(cfg, loader), cfg) == before
    write_tar(path, [2])
    os.utime(path, ns=(1, time.time_ns() + 1))
    source = train_source(cfg, loader)
    assert source[0].image.data == jpeg(2)
    assert fingerprint(source, cfg) != before
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700


def test_the_oldest_copies_make_room(server, access):
    """Up to the size of the cache, also for many that begin at a time; what a killed process left is deleted."""
    size = (server.folder / "t-000.tar").stat().st_size
    for name in "abcd":
        (server.folder / f"{name}.tar").write_bytes((server.folder / "t-000.tar").read_bytes())
    cache = access(2 * size + 10).cache
    stray = cache.folder / "0-x.data.123-00000000-0123456789abcdef.tmp"
    stray.write_bytes(bytes(2 * size))
    os.utime(stray, (0, 0))
    files = {name: stat(f"{server.url}/{name}.tar", 5.0) for name in "abcd"}
    for name in "ab":
        assert cache.fetch(files[name])
    assert not stray.exists()
    cache.open(files["a"]).close()
    cache.fetch(files["c"])
    assert copies(access()) == ["a.tar.data", "c.tar.data"]
    server.gets.clear()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(cache.fetch, [files["d"]] * 8))
    assert server.gets["d.tar"] == 1
    assert sum(path.stat().st_size for path in cache.folder.iterdir()) <= cache.size
    assert [cache.claim(files[name]) for name in "aabac"] == [True, True, True, True, False]
    assert access(size - 1).cache.fetch(files["b"]) is None
    server.cut = 10**6
    failing = stat(f"{server.url}/a.tar", 0.0)
    with pytest.raises(RemoteError):
        access().cache.fetch(failing)
    assert not list(cache.folder.glob("*.tmp"))
    server.cut = 0


def test_copies_that_others_may_write_are_not_used(server, access, capfd):
    source = WebDataset(server.url + "/t-000.tar", access=access())
    for copy in access().cache.folder.glob("*.data"):
        copy.write_bytes(bytes(copy.stat().st_size))
        copy.chmod(0o666)
    assert source[0].image.data == jpeg(0)
    assert "is not used: others may write it" in capfd.readouterr().err


def test_the_output_of_a_command(server, access, tmp_path, capfd):
    """It runs without a shell, once; one that a checkpoint names does not run."""
    (tmp_path / "a b;touch x.tar").write_bytes((server.folder / "t-000.tar").read_bytes())
    command = f"pipe:cat '{tmp_path}/a b;touch x.tar'"
    source = WebDataset([command, str(server.folder / "t-001.tar")], access=access())
    assert [x.image.data for x in source] == list(map(jpeg, range(IMAGES)))
    assert source.describe(0) == f"{command}/0000.jpg"
    assert not Path("x.tar").exists()
    (tmp_path / "a b;touch x.tar").unlink()
    assert len(WebDataset(command, access=access())) == PER_TAR
    for text, reason in (
        ("pipe:false", "pipe:false ended with exit code 1"),
        ("pipe:no-such-program x", "cannot be started: No such file"),
        ("pipe:", "must name a program"),
        ("pipe:cat 'a", "No closing quotation"),
    ):
        with pytest.raises((RemoteError, UsageError), match=reason):
            WebDataset(text, access=access())
    with pytest.raises(UsageError, match=r"its output must fit into loader.cache_size"):
        WebDataset(f"pipe:cat {server.folder}/t-001.tar", access=access(100))
    assert not list(access().cache.folder.glob("*.tmp"))
    cfg = EvaluateConfig(checkpoint="x")
    known = {"name": "webdataset", "path": command, "val_path": ["a.tar", f"pipe:touch {tmp_path}/made"]}
    merged = cfg.merge_data(known)
    assert merged.path is merged.val_path is None
    assert "data.val_path of the checkpoint is a command (pipe:), which is not run" in capfd.readouterr().err
    cfg.data.val_path = command
    assert cfg.merge_data(known).val_path == command


def test_preparing_what_is_at_a_url(server, fcmae_here, tmp_path):
    for name, path in (("local", server.folder), ("remote", server.url)):
        how = ("loader.workers=1", f"loader.cache_dir={tmp_path}/cache", f"out={tmp_path}/{name}")
        result = fcmae_here("prepare", "data.name=webdataset", f"data.path={path}{URL}", "samples_per_shard=8", *how)
        assert result.returncode == 0, result.stderr
    for name in ("train-000000.tar", "train-000001.tar", "classes.txt"):
        assert (tmp_path / "local" / name).read_bytes() == (tmp_path / "remote" / name).read_bytes()


def test_parquet_files_at_a_url(server, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    features = datasets.Features({"image": datasets.Image(), "kind": datasets.Value("string")})
    rows = {"image": [{"bytes": jpeg(i), "path": None} for i in range(4)], "kind": ["b", "a", "c", "a"]}
    made = datasets.Dataset.from_dict(rows, features=features)
    made.to_parquet(server.folder / "train-0.parquet")
    made.select([3]).to_parquet(server.folder / "test-0.parquet")
    cfg = DataConfig(name="hf", path=f"{server.url}/{{train,test}}-0.parquet", label_column="kind")
    loader = LoaderConfig(cache_dir=str(tmp_path / "cache"))
    source = train_source(cfg, loader)
    assert (source.classes, [sample.label for sample in source]) == (["a", "b", "c"], [1, 0, 2, 0])
    assert source[2].image == (jpeg(2), f"{cfg.path}:train[2]")
    cfg.split = "test[:1]"
    assert [sample.image.data for sample in train_source(cfg, loader)] == [jpeg(3)]
    cfg.split = "val"
    with pytest.raises(UsageError, match="no file that is named after the split val"):
        train_source(cfg, loader)
    cfg.split, loader.cache_size = "train", 0.0
    (server.folder / "train-0.parquet").touch()
    with pytest.raises(UsageError, match=r"which loader.cache_size must hold with data.name=hf"):
        train_source(cfg, loader)


@pytest.fixture
def arrays(server, tmp_path_factory):
    """The server of a folder with a Zarr 2 group, a sharded Zarr 3 array and OME-Zarr, with a chunk left out."""
    zarr = pytest.importorskip("zarr")
    before, server.folder = server.folder, tmp_path_factory.mktemp("arrays")
    rng = np.random.default_rng(0)
    images = rng.integers(1, 4096, (8, 2, 40, 48), np.uint16)
    images[5] = 0  # of which nothing is stored
    group = zarr.open_group(server.folder / "two.zarr", mode="w", zarr_format=2)
    group.create_array("images", shape=images.shape, chunks=(1, 2, 16, 16), dtype="uint16")[:] = images
    group.create_array("labels", shape=(8,), chunks=(8,), dtype="int64")[:] = np.arange(8) % 3
    three = {"shape": images.shape, "chunks": (1, 2, 8, 8), "shards": (2, 2, 40, 48), "dtype": "uint16"}
    zarr.create_array(server.folder / "three.zarr", **three)[:] = images
    ome = zarr.open_group(server.folder / "ome.zarr", mode="w", zarr_format=2)
    ome.create_array("0", shape=images.shape, chunks=(1, 1, 40, 48), dtype="uint16")[:] = images
    axes = [{"name": name} for name in "tcyx"]
    ome.attrs["multiscales"] = [{"axes": axes, "datasets": [{"path": "0"}]}]
    yield server
    server.folder = before


ARRAYS = {"two.zarr": {"dataset": "images", "label_column": "labels"}, "three.zarr": {}, "ome.zarr": {}}


def array_source(path, **more):
    how = {"in_chans": 2, "bit_depth": 12, "mean": [0.5] * 2, "std": [1.0] * 2, "image_size": 16}
    cfg = DataConfig(name="array", path=str(path), **how, **more)
    return cfg, train_source(cfg, LoaderConfig(retry_seconds=20.0))


@pytest.mark.parametrize("name", ARRAYS)
def test_zarr_at_a_url_is_read_like_a_folder(name, arrays, capfd):
    """The same batches, also from the middle of an epoch, while the server fails and sends half of its answers."""

    def batches(path, workers, first):
        cfg, source = array_source(path, **ARRAYS[name])
        dataset = MaskedImages(source, pretrain_transform(cfg), (1, 1), seed=3)
        plan = BatchPlan.create(8, 4, None, 1, seed=3)
        for number, batch in enumerate(TrainBatches(dataset, plan, 0, range(first, 6), Workers(workers))):
            yield [part.clone() for part in batch]
            if number == 0 and "http" in str(path):
                arrays.cut = 1
                arrays.fails_for(2)

    for workers, first in ((0, 0), (1, 3)):
        expected = list(batches(arrays.folder / name, workers, first))
        found = list(batches(f"{arrays.url}/{name}", workers, first))
        assert all(torch.equal(a, b) for x, y in zip(found, expected, strict=True) for a, b in zip(x, y, strict=True))
    assert "waiting for http://" in capfd.readouterr().err
    remote, local = (array_source(f"{top}/{name}", **ARRAYS[name])[1] for top in (arrays.url, arrays.folder))
    assert [remote.label(i) for i in range(8)] == [local.label(i) for i in range(8)]
    assert remote.describe(5).startswith(f"{arrays.url}/{name}")


def test_zarr_at_a_url_reads_the_touched_chunks_and_says_what_is_wrong(arrays):
    _, source = array_source(f"{arrays.url}/two.zarr", dataset="images", fit="pad")
    source[0].image.part(0, 0, 1, 1)  # which opens the array
    arrays.gets.clear()
    source[1].image.part(0, 0, 16, 20)
    assert dict(arrays.gets) == {"two.zarr/images/1.0.0.0": 1, "two.zarr/images/1.0.0.1": 1}
    for path, message, more in (
        (f"{arrays.url}/no.zarr", "neither zarr.json nor .zarray", {}),
        (f"{arrays.url}/two.zarr", "data.dataset is not set", {}),
        (f"{arrays.url}/two.zarr", "data.dataset is 'x'", {"dataset": "x"}),
        (f"{arrays.url}/two.zarr", "is outside of it", {"dataset": "../three.zarr"}),
        (f"{arrays.url}/*.zarr", "web servers list no files", {}),
        (f"{arrays.url}/two.zarr", "at URLs .npy files are not read", {"dataset": "images", "label_column": "a.npy"}),
    ):
        with pytest.raises(UsageError, match=message.replace("*", ".")):
            array_source(path, **more)
    cfg, source = array_source(f"{arrays.url}/two.zarr", dataset="images")
    before = fingerprint(source, cfg)
    (arrays.folder / "two.zarr" / "images" / ".zarray").touch()
    assert fingerprint(array_source(f"{arrays.url}/two.zarr", dataset="images")[1], cfg) != before


def test_what_may_not_be_read_is_no_fill_value(arrays, monkeypatch):
    """A server that forbids a chunk, because a credential has expired, is an error; and one that is away."""
    _, source = array_source(f"{arrays.url}/two.zarr", dataset="images")
    source[0].image.part(0, 0, 4, 4)
    arrays.forbidden = True
    with pytest.raises(UsageError, match="the server answers 403"):
        source[0].image.pixels(1)
    arrays.forbidden = False
    arrays.is_down = True
    for stored in source._open._arrays.values():
        stored.folder.limit = 0.1
    with pytest.raises(RemoteError, match="cannot read http"):
        source[0].image.pixels(1)
