"""Images in arrays as a source: layouts, parts of an array, labels, preparation, and what is refused."""

import io
import json
import os
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from fcmae.config import DataConfig, LoaderConfig, PrepareConfig, compose
from fcmae.config.prepare import PreparedDataConfig
from fcmae.data.arrays import zarr_folder
from fcmae.data.arrays.stored import open_stored
from fcmae.data.labels import Labels
from fcmae.data.loading import TrainBatches, Workers
from fcmae.data.pixels.crops import RandomCrop
from fcmae.data.pixels.decode import PixelFormat, decode
from fcmae.data.plan import BatchPlan
from fcmae.data.prepare.command import prepare
from fcmae.data.samples import MaskedImages
from fcmae.data.sources import Subset, few_labels, train_source, val_source
from fcmae.data.sources.array import ArrayImages
from fcmae.errors import ConfigError, ImageError, UsageError
from fcmae.evaluation.cache import fingerprint
from fcmae.tasks.objectives import Regress
from fcmae.tasks.pretraining import Pretraining
from tests.conftest import TINY_PRETRAIN
from tests.unit.test_arrays import values, write_zarr

h5py = pytest.importorskip("h5py")
zarr = pytest.importorskip("zarr")


def source(path, in_chans=3, dtype="float32", **given):
    normal = {"mean": [0.0] * in_chans, "std": [1.0] * in_chans, "dtype": dtype, "image_size": 16}
    return train_source(DataConfig(name="array", path=path, in_chans=in_chans, **{**normal, **given}))


def pixels(found, index):
    return decode(found[index].image, *found.to).numpy()


PLANES = values("int16", (4, 3, 2, 20, 24))
LAYOUTS = {
    "NHW, by default": (PLANES[:, 0, 0], {}, 1, lambda i: PLANES[i, :1, 0]),
    "NCHW, by default": (PLANES[:, 0], {}, 2, lambda i: PLANES[i, 0]),
    "NHWC": (PLANES[:, 0].transpose(0, 2, 3, 1), {"axes": "NHWC"}, 2, lambda i: PLANES[i, 0]),
    "CNYX": (PLANES[:, 0].transpose(1, 0, 2, 3), {"axes": "cnyx"}, 2, lambda i: PLANES[i, 0]),
    "TNCHW": (PLANES, {"axes": "TNCHW"}, 2, lambda i: PLANES[i // 3, i % 3]),
    "HW": (PLANES[2, 1, 0], {}, 1, lambda i: PLANES[2, 1, :1]),
    "CHW": (PLANES[2, :, 0], {"axes": "CHW"}, 3, lambda i: PLANES[2, :, 0]),
    "NZCHW folded": (PLANES, {}, 6, lambda i: PLANES[i].transpose(1, 0, 2, 3).reshape(6, 20, 24)),
    "two planes": (PLANES, {"planes": [2, 0]}, 4, lambda i: PLANES[i][[2, 0]].transpose(1, 0, 2, 3).reshape(4, 20, 24)),
    "planes as samples": (PLANES, {"planes_as": "samples"}, 2, lambda i: PLANES[i // 3, i % 3]),
    "two as samples": (PLANES, {"planes_as": "samples", "planes": [2, 0]}, 2, lambda i: PLANES[i // 2, 2 - i % 2 * 2]),
    "NZHW": (PLANES[:, :, 0], {"axes": "NZHW"}, 3, lambda i: PLANES[i, :, 0]),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout(tmp_path, name):
    array, given, in_chans, expected = LAYOUTS[name]
    np.save(tmp_path / "a.npy", array)
    write_zarr(tmp_path / "a.zarr", array, chunks=tuple(max(1, side // 2) for side in array.shape))
    for file in ("a.npy", "a.zarr"):
        found = source(str(tmp_path / file), in_chans, **given)
        assert len({found.describe(i) for i in range(len(found))}) == len(found)
        for i in range(len(found)):
            assert np.array_equal(pixels(found, i), expected(i).astype(np.float32))


@pytest.mark.parametrize("version", [2, 3])
def test_ome_zarr_says_its_axes_and_its_largest_level(tmp_path, version):
    array = PLANES.transpose(0, 2, 1, 3, 4)  # tczyx
    group = zarr.open_group(tmp_path / "a.zarr", mode="w", zarr_format=version)
    for level, name in ((1, "full"), (2, "half")):
        write_zarr(tmp_path / "a.zarr" / name, array[..., ::level, ::level], version, chunks=(1, 1, 1, 8, 8))
    axes = [{"name": name, "type": "space" if name in "zyx" else "other"} for name in "tczyx"]
    scales = [{"version": "0.4", "axes": axes, "datasets": [{"path": "full"}, {"path": "half"}]}]
    group.attrs.update({"multiscales": scales} if version == 2 else {"ome": {"multiscales": scales, "version": "0.5"}})
    found = source(str(tmp_path / "a.zarr"), 6)
    assert len(found) == 4
    assert np.array_equal(pixels(found, 1), array[1].reshape(6, 20, 24))
    half = source(str(tmp_path / "a.zarr"), 2, dataset="half", axes="TCZYX", planes_as="samples")
    assert np.array_equal(pixels(half, 4), array[1, :, 1, ::2, ::2])


def test_arrays_of_a_pattern_or_a_list_are_joined(tmp_path):
    for number in (2, 10, 7):
        np.save(tmp_path / f"well_{number:02}.npy", PLANES[: number // 2 or 1, 0] + number)
    joined = source(str(tmp_path / "well_*.npy"), 2)
    assert [joined.describe(i).rsplit("_", 1)[1] for i in (0, 1, 4, 7)] == [
        "02.npy[0]", "07.npy[0]", "10.npy[0]", "10.npy[3]",
    ]  # fmt: skip
    listed = source([str(tmp_path / "well_10.npy"), str(tmp_path / "well_02.npy")], 2)
    assert np.array_equal(pixels(listed, 4), PLANES[0, 0] + 2)


def test_not_all_files_are_open_at_once(tmp_path):
    """A process may open a thousand files by default, and a plate has more wells."""
    for number in range(80):
        with h5py.File(tmp_path / f"{number:03}.h5", "w") as file:
            file.create_dataset("a", data=PLANES[:, 0] + number)
    found = source(str(tmp_path / "*.h5"), 2)

    def opened():
        return sum(".h5" in os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink())

    assert opened() == 0
    for number in (*range(80), 3):
        assert np.array_equal(pixels(found, 4 * number), PLANES[0, 0] + number)
    assert 0 < opened() <= 64


def test_integers_follow_the_bit_depth(tmp_path):
    np.save(tmp_path / "a.npy", np.full((2, 1, 8, 8), 4095, np.uint16))
    found = source(str(tmp_path / "a.npy"), 1, "uint", bit_depth=12)
    assert decode(found[0].image, *found.to).unique().tolist() == [65535]
    np.save(tmp_path / "b.npy", np.full((2, 1, 8, 8), 200, np.uint8))
    found = source(str(tmp_path / "b.npy"), 1, "uint")
    assert decode(found[0].image, *found.to).dtype == torch.uint8


@pytest.mark.parametrize("kind", ["zarr", "h5", "npy"])
def test_a_crop_reads_a_part_and_is_the_same(tmp_path, kind):
    """Bit for bit, by any process: the source is sent to those of fcmae prepare."""
    array = values("float32", (3, 2, 90, 120))
    file = tmp_path / f"a.{kind}"
    if kind == "zarr":
        write_zarr(file, array, chunks=(1, 1, 30, 30))
    elif kind == "h5":
        with h5py.File(file, "w") as opened:
            opened.create_dataset("a", data=array, chunks=(1, 1, 30, 30), compression="gzip")
    else:
        np.save(file, array)
    found = source(str(file), 2)
    assert len(pickle.dumps(found)) < 3000
    crop = RandomCrop(DataConfig(in_chans=2, dtype="float32", mean=[0.0] * 2, std=[1.0] * 2, image_size=16))
    for i in range(3):
        for seed in range(3):
            expected = crop(torch.from_numpy(array[i]), random.Random(seed).random)
            assert torch.equal(crop(found[i].image, random.Random(seed).random), expected)
            assert torch.equal(crop(pickle.loads(pickle.dumps(found))[i].image, random.Random(seed).random), expected)


@pytest.mark.parametrize("kind", ["zarr", "shards", "h5"])
def test_only_the_chunks_that_a_window_touches_are_read(tmp_path, kind):
    """Every other one is damaged."""
    array = values("uint16", (3, 1, 64, 64))
    window = (1, 0, slice(20, 30), slice(40, 64))
    file = tmp_path / "a"
    if kind == "h5":
        with h5py.File(file, "w") as opened:
            made = opened.create_dataset("a", data=array, chunks=(1, 1, 32, 32), compression="gzip")
            infos = [made.id.get_chunk_info(i) for i in range(made.id.get_num_chunks())]
        places = {info.chunk_offset: (file, info.byte_offset, info.size) for info in infos}
    else:
        shards = (1, 1, 64, 64) if kind == "shards" else None
        write_zarr(file, array, chunks=(1, 1, 32, 32), shards=shards, compressors=[zarr.codecs.GzipCodec()])
        places = {}
        for part in file.rglob("c/*/*/*/*"):
            n, _, y, x = map(int, part.parts[-4:])
            if kind == "zarr":
                places[n, 0, 32 * y, 32 * x] = (part, 0, part.stat().st_size)
            else:
                index = np.frombuffer(part.read_bytes()[-68:-4], "<u8").reshape(2, 2, 2)
                for i, j in np.ndindex(2, 2):
                    places[n, 0, 32 * i, 32 * j] = (part, *map(int, index[i, j]))
    assert len(places) == 12
    needed = {(1, 0, 0, 32)}
    for place in places.keys() - needed:
        path, offset, size = places[place]
        data = bytearray(path.read_bytes())
        data[offset : offset + size] = bytes(size)
        path.write_bytes(data)
    found = open_stored(str(file))
    assert np.array_equal(found.read(window), array[window])
    with pytest.raises((ValueError, OSError)):
        found.read((1, 0, slice(20, 40), slice(40, 64)))


def test_only_the_channels_and_planes_that_are_needed_are_read(tmp_path, monkeypatch):
    array = values("int16", (2, 9, 5, 8, 8))  # NZCHW
    path = write_zarr(tmp_path / "a.zarr", array, chunks=(1, 1, 1, 8, 8))
    read, one = [], zarr_folder.ZarrArray._chunk
    monkeypatch.setattr(zarr_folder.ZarrArray, "_chunk", lambda self, place: read.append(place) or one(self, place))
    given = {"planes": [8, 0, 1], "channels": {"input": [13, 3], "target": [4], "of": 15}}
    found = source(path, 2, **given)
    image = pixels(found, 1)
    assert {place[:3] for place in read} == {(1, plane, channel) for plane in (0, 1, 8) for channel in (1, 4)}
    assert len(read) == 6
    expected = array[1][[8, 0, 1]].transpose(1, 0, 2, 3).reshape(15, 8, 8)
    assert np.array_equal(image[[13, 3, 4]], expected[[13, 3, 4]])
    assert not image[[0, 6, 9]].any()
    crop = RandomCrop(found_config(path, given), channels=True).seen(found[1].image, lambda: 0.0)
    assert len(crop) == 2


def found_config(path, given):
    return DataConfig(name="array", path=path, dtype="float32", in_chans=2, mean=[0.0] * 2, std=[1.0] * 2, **given)


def test_batches_are_the_same_for_any_workers_and_ranks_and_after_a_restart(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("a", data=values("int16", (24, 2, 40, 40)), chunks=(1, 1, 20, 20), compression="gzip")
    cfg = DataConfig(
        name="array",
        path=str(tmp_path / "a.h5"),
        in_chans=2,
        dtype="float32",
        mean=[0.0] * 2,
        std=[1.0] * 2,
        image_size=16,
    )
    dataset = MaskedImages(train_source(cfg), RandomCrop(cfg), (1, 1), seed=0)
    plan = BatchPlan.create(24, 4, 4, 1, seed=0)
    alone = [batch[0].clone() for batch in TrainBatches(dataset, plan, 0, range(6), Workers(0))]
    for start, workers in ((0, 2), (3, 1)):
        read = TrainBatches(dataset, plan, 0, range(start, 6), Workers(workers))
        assert all(torch.equal(a, b[0]) for a, b in zip(alone[start:], read, strict=True))
    ranks = [TrainBatches(dataset, BatchPlan.create(24, 4, 2, 2, seed=0), r, range(6), Workers(0)) for r in (0, 1)]
    for expected, *parts in zip(alone, *ranks, strict=True):
        assert torch.equal(torch.cat([part[0] for part in parts]), expected)


def test_labels_are_an_array_beside_the_images(tmp_path):
    classes, numbers = np.array([2, 0, 1, 2]), np.array([0.5, np.nan, -3, 8], np.float32)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("images", data=PLANES[:, 0])
        file.create_dataset("cell/kind", data=classes)
        file.create_dataset("mass", data=numbers)
    given = {"path": str(tmp_path / "a.h5"), "in_chans": 2, "dataset": "images"}
    found = source(**given, label_column="cell/kind")
    assert found.classes == ["0", "1", "2"]
    assert [found[i].label for i in range(4)] == [found.label(i) for i in range(4)] == [2, 0, 1, 2]
    assert len(few_labels(found, 1, seed=0)) == 3
    found = source(**given, label_column="mass")
    assert found.classes is None
    assert torch.equal(found[3].label, torch.tensor([8.0]))
    assert Labels(found, "target.labels")(found[1], 1).isnan().all()
    objective = Regress()
    objective.fit(found, compose("finetune", ["objective=regress"]))
    assert objective.columns == ["mass"]


def test_labels_in_a_npy_file_are_beside_each_array(tmp_path):
    for number, names in enumerate((["cat", "dog", "cat", "eel"], ["ant", "cat", "dog", "dog"])):
        (tmp_path / str(number)).mkdir()
        np.save(tmp_path / str(number) / "images.npy", PLANES)
        np.save(tmp_path / str(number) / "labels.npy", np.array(names))
    found = source(str(tmp_path / "*" / "images.npy"), 2, planes_as="samples", label_column="labels.npy")
    assert found.classes == ["ant", "cat", "dog", "eel"]
    assert [found.label(i) for i in (0, 2, 3, 11, 12, 23)] == [1, 1, 2, 3, 0, 2]
    cfg = DataConfig(name="array", val_path=str(tmp_path / "1" / "images.npy"), planes_as="samples", dtype="float32",
                     in_chans=2, mean=[0.0] * 2, std=[1.0] * 2, label_column="labels.npy")  # fmt: skip
    assert val_source(cfg).label(0) == 0
    for number in range(2):
        np.save(tmp_path / str(number) / "mass.npy", np.arange(4 * number, 4 * number + 4, dtype=np.float32))
    for cache in (None, "ram"):  # a number per image, which all of its planes have
        paths = (str(tmp_path / "*" / "images.npy"), 2)
        found = source(*paths, planes_as="samples", label_column="mass.npy", cache=cache)
        for given, first in ((found, 0), (Subset(found, list(range(9, 24))), 9)):
            assert [given[i].label.item() for i in range(len(given))] == [i // 3 for i in range(first, 24)]
            assert given.values[:, 0].tolist() == [i // 3 for i in range(first, 24)]


def refused(message, path, **given):
    with pytest.raises(UsageError, match=message) as raised:
        source(str(path), **given)
    assert "\n" not in str(raised.value)


def test_what_does_not_fit_is_named(tmp_path):
    np.save(tmp_path / "a.npy", PLANES[:, 0])
    np.save(tmp_path / "short.npy", np.arange(3))
    np.save(tmp_path / "negative.npy", np.array([0, -1, 0, 0]))
    np.save(tmp_path / "wide.npy", np.zeros((2, 2, 8, 8), np.uint16))
    np.save(tmp_path / "double.npy", np.zeros((2, 2, 8, 8)))
    np.save(tmp_path / "empty.npy", np.zeros((0, 2, 8, 8), np.uint8))
    a = tmp_path / "a.npy"
    refused(r"a.npy has 2 channels; data.in_chans is 3; its shape \[4, 2, 20, 24\] is read as NCYX, which data.a", a)
    refused("has 2 channels; data.channels needs files of 4 ", a, channels=[3, 2, 1])
    refused("has 24 channels; data.in_chans is 2", a, in_chans=2, axes="NHWC")
    for axes in ("NCH", "NCHH", "NCQW", "NCHWT", "NZCT"):
        refused(
            rf"data.axes must have a different letter for each axis, H, W and some of .*; got '{axes}'", a, axes=axes
        )
    refused("data.planes must be from 0 to 0 for .*a.npy; got ", a, in_chans=2, planes=[1])
    refused(r"short.npy must have 4 classes or numbers, .*; got \[3\] int64", a, in_chans=2, label_column="short.npy")
    refused("must have classes counted from 0; got -1 to 0", a, in_chans=2, label_column="negative.npy")
    refused("its pixels are int16; with data.dtype=uint .*; set data.dtype=float32", a, in_chans=2, dtype="uint")
    refused("double.npy: its pixels are float64; .* convert the files", tmp_path / "double.npy", in_chans=2)
    refused("wide.npy has 16 bits per value; set data.bit_depth", tmp_path / "wide.npy", in_chans=2, dtype="uint")
    refused("empty.npy has 0 images", tmp_path / "empty.npy", in_chans=2)
    refused("data.dataset must be null for a .npy file", a, dataset="x")
    refused("data.path: .*nowhere must be a Zarr folder, or an HDF5, .npy or TIFF file; nothing", tmp_path / "nowhere")
    refused("has neither zarr.json nor .zarray nor .zgroup, so it is no Zarr folder", tmp_path)
    (tmp_path / "text").write_text("text")
    refused("text must be a Zarr folder, or an HDF5, .npy or TIFF file", tmp_path / "text")
    with pytest.raises(ConfigError, match=r"data.planes must be a list of different planes.*; got \[1, 1\]"):
        DataConfig(planes=[1, 1])
    with pytest.raises(ConfigError, match="data.planes_as must be one of channels, samples"):
        DataConfig(planes_as="images")


def test_the_arrays_that_there_are_are_named(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("x", data=PLANES)
        file.create_dataset("y", data=PLANES)
        file.create_group("g")
    write_zarr(tmp_path / "a.zarr" / "deep" / "x", PLANES, chunks=PLANES.shape)
    zarr.open_group(tmp_path / "a.zarr", mode="a", zarr_format=3)
    zarr.open_group(tmp_path / "a.zarr" / "deep", mode="a", zarr_format=3)
    refused("data.dataset is not set; .*a.h5 has x, y", tmp_path / "a.h5")
    refused("data.dataset is 'z'; .*a.h5 has x, y", tmp_path / "a.h5", dataset="z")
    refused("data.dataset is 'g', which is a group", tmp_path / "a.h5", dataset="g")
    refused("data.dataset is not set; .*a.zarr is a group with deep/x", tmp_path / "a.zarr")
    refused("data.dataset is 'z'; .*a.zarr has deep/x", tmp_path / "a.zarr", dataset="z")


def test_missing_packages_are_named(tmp_path, monkeypatch):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("x", data=PLANES)
    monkeypatch.delitem(__import__("sys").modules, "fcmae.data.arrays.hdf5", raising=False)
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    refused(r"a.h5 needs h5py: pip install 'fcmae\[science\]'", tmp_path / "a.h5")


def test_damage_is_an_error_of_the_image(tmp_path):
    path = write_zarr(tmp_path / "a.zarr", PLANES[:, 0], chunks=(1, 2, 20, 24), compressors=[zarr.codecs.ZstdCodec()])
    found = source(path, 2)
    chunk = tmp_path / "a.zarr" / "c" / "1" / "0" / "0" / "0"
    chunk.write_bytes(chunk.read_bytes()[:-5])
    with pytest.raises(ImageError, match=r"cannot read the image .*a.zarr\[1\]: "):
        pixels(found, 1)
    assert np.array_equal(pixels(found, 2), PLANES[2, 0])
    with pytest.raises(ImageError, match="it has 24x20 pixels; loader.max_pixels is 479"):
        decode(ArrayImages(path, PixelFormat(2, max_pixels=479, dtype="float32"))[0].image, 2)


def test_an_array_that_changes_is_noticed_by_the_next_process(tmp_path):
    np.save(tmp_path / "a.npy", PLANES[:, 0])
    sent = pickle.dumps(source(str(tmp_path / "a.npy"), 2))
    np.save(tmp_path / "a.npy", PLANES[:2, 0])
    with pytest.raises(ImageError, match="it has changed from"):
        pixels(pickle.loads(sent), 0)


def test_the_fingerprint_is_of_the_metadata(tmp_path, monkeypatch):
    path = write_zarr(tmp_path / "a.zarr", PLANES[:, 0], chunks=(1, 2, 20, 24))
    cfg = DataConfig(name="array", path=path, in_chans=2, dtype="float32", mean=[0.0] * 2, std=[1.0] * 2)
    found = train_source(cfg)
    before = fingerprint(found, cfg)
    assert fingerprint(found, cfg) == before
    (tmp_path / "a.zarr" / "c" / "0" / "0" / "0" / "0").touch()
    assert fingerprint(found, cfg) == before
    meta = tmp_path / "a.zarr" / "zarr.json"
    meta.write_text(json.dumps(json.loads(meta.read_text())))
    assert fingerprint(found, cfg) != before


@pytest.mark.parametrize(("dtype", "given"), [("int16", {"dtype": "float32"}), ("float16", {"dtype": "float32"}),
                                              ("uint16", {"bit_depth": 12}), ("uint8", {})])  # fmt: skip
def test_prepare_keeps_type_and_bits(tmp_path, dtype, given):
    array = values(dtype, (5, 2, 20, 24))
    path = write_zarr(tmp_path / "a.zarr", array, chunks=(1, 2, 20, 24))
    common = {"in_chans": 2, **given}
    data = PreparedDataConfig(name="array", path=path, **common)
    prepare(PrepareConfig(data=data, out=str(tmp_path / "out"), shuffle=False, loader=LoaderConfig(workers=1)))
    normal = {"mean": [0.0] * 2, "std": [1.0] * 2}
    cfg = DataConfig(name="webdataset", path=str(tmp_path / "out"), **common, **normal)
    written, found = train_source(cfg), train_source(DataConfig(name="array", path=path, **common, **normal))
    for i in range(5):
        stored = np.load(io.BytesIO(written[i].image.data))
        assert stored.dtype == dtype
        assert np.array_equal(stored if stored.shape[0] == 2 else stored.transpose(2, 0, 1), array[i])
        assert torch.equal(decode(written[i].image, *PixelFormat.of(cfg)), decode(found[i].image, *PixelFormat.of(cfg)))


def test_prepare_prints_mean_and_std_of_an_array(tmp_path):
    np.save(tmp_path / "a.npy", values("int32", (40, 2, 20, 24)) - 300)
    given = {"name": "array", "path": str(tmp_path / "a.npy"), "in_chans": 2, "dtype": "float32", "stats": True}
    lines = prepare(PrepareConfig(data=PreparedDataConfig(**given), loader=LoaderConfig(workers=1))).splitlines()
    pixels = np.load(tmp_path / "a.npy").astype(np.float64)
    for name, expected in (("mean", pixels.mean((0, 2, 3))), ("std", pixels.std((0, 2, 3)))):
        line = next(line for line in lines if line.startswith(name))
        np.testing.assert_allclose(json.loads(line.split(": ")[1]), expected, rtol=1e-5)


def test_pretraining_reads_an_array(tmp_path):
    path = write_zarr(tmp_path / "a.zarr", values("int16", (24, 2, 40, 40)), chunks=(1, 2, 40, 40))
    given = ["data=array", f"data.path={path}", "data.in_chans=2", "data.dtype=float32", "data.mean=[125,125]"]
    task = Pretraining(compose("pretrain", [*TINY_PRETRAIN[1:], *given, "data.std=[70,70]"]))
    imgs, noise = task.dataset()[0, 3]
    assert torch.isfinite(task.loss(task.model, (imgs[None], noise[None]))[0])
    assert task.picture(torch.device("cpu")) is not None
