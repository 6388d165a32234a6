"""Every kind of file × way to normalise: the same batches from a folder, a table and prepared tar files, for any number
of workers and ranks, and after a restart. docs/tests.md has the table.
"""

import json
import shutil
import zlib

import numpy as np
import pytest
import torch

from fcmae.checkpoints import checkpoint
from fcmae.config import DataConfig, LoaderConfig, PrepareConfig, compose
from fcmae.config.prepare import PreparedDataConfig
from fcmae.data.pixels.transforms import normalized, pretrain_transform
from fcmae.data.prepare.command import prepare
from fcmae.data.sources import train_source
from fcmae.training.run import pretrain
from tests import bad_files
from tests import more_files as made
from tests.bad_files import encoded, npy, picture
from tests.conftest import TINY_PRETRAIN
from tests.hostile import Case, measure
from tests.results import assert_same, metrics_of
from tests.source_matrix import COUNT, batches

tifffile = pytest.importorskip("tifffile")
for package in ("imagecodecs", "pydicom", "pillow_heif"):
    pytest.importorskip(package)
HEIGHT, WIDTH = 24, 32


def values(index, dtype, channels=1):
    rng = np.random.default_rng([index, channels])
    found = rng.normal(1500, 400, (channels, HEIGHT, WIDTH))
    return found.astype(dtype) if dtype != "uint8" else (found / 12).clip(0, 255).astype(dtype)


def tiff(array, **options):
    return bad_files.tiff(array, photometric="minisblack", **options)


def wide(index):
    return made.jpeg2000(values(index, "uint16", 3).transpose(1, 2, 0), 16, boxed=False)


FLOATS, SIXTEEN = {"dtype": "float32"}, {"bit_depth": 16}
KINDS = {
    "JPEG": ("jfif", lambda i: encoded(picture(HEIGHT, WIDTH, seed=i), "JPEG"), 3, {}),
    "PNG": ("png", lambda i: encoded(picture(HEIGHT, WIDTH, "RGBA", seed=i), "PNG"), 3, {}),
    "AVIF": ("avif", lambda i: encoded(picture(HEIGHT, WIDTH, seed=i), "AVIF"), 3, {}),
    "HEIC": ("heic", lambda i: made.heic(picture(HEIGHT, WIDTH, seed=i)), 3, {}),
    "JPEG 2000": ("jp2", lambda i: encoded(picture(HEIGHT, WIDTH, seed=i), "JPEG2000"), 3, {}),
    "JPEG 2000, uint16": ("j2k", wide, 3, SIXTEEN),
    "DICOM, uint16": ("dcm", lambda i: made.dicom(values(i, "uint16"), made.RLE), 1, SIXTEEN),
    "DICOM, int16": ("dcm", lambda i: made.dicom(values(i, "uint16"), stored=12, RescaleIntercept=-1024), 1, FLOATS),
    "TIFF, uint16 pages": ("tif", lambda i: tiff(values(i, "uint16", 3), compression="zlib"), 3, SIXTEEN),
    "TIFF, int32 tiles": ("tif", lambda i: tiff(values(i, "int32"), tile=(16, 16)), 1, FLOATS),
    "TIFF, float16": ("tif", lambda i: tiff(values(i, "float16", 2)), 2, FLOATS),
    ".npy, int16": ("npy", lambda i: npy(values(i, "int16", 4)), 4, FLOATS),
    ".npy, float32": ("npy", lambda i: npy(values(i, "float32", 2)), 2, {**FLOATS, "nodata": "nan"}),
}
MODES = ("dataset", "image", "window", "percentile", "none")
CASES = [(kind, mode) for kind in KINDS for mode in MODES]
FEW = [(kind, MODES[i % len(MODES)]) for i, kind in enumerate(KINDS)]


def config(kind, mode, **where):
    _, _, channels, keys = KINDS[kind]
    unit = 1000.0 if keys.get("dtype") == "float32" else 1.0
    scale = {"dataset": {"mean": [0.5 * unit] * channels, "std": [0.2 * unit] * channels}}
    clip = {"low": 0.01 * unit, "high": 0.9 * unit}
    given = {**scale, "window": clip, "percentile": clip}.get(mode, {})
    return DataConfig(in_chans=channels, image_size=16, normalize=mode, **keys, **given, **where)


def equal(ours, theirs):
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    ("kind", "mode"),
    [*FEW, *(pytest.param(*case, marks=pytest.mark.slow) for case in CASES if case not in FEW)],
)
def test_batches_are_the_same_wherever_and_whenever_they_are_read(kind, mode, tmp_path):
    ending, make, _, keys = KINDS[kind]
    (tmp_path / "images").mkdir()
    for i in range(COUNT):
        (tmp_path / "images" / f"{i}.{ending}").write_bytes(make(i))
    cfg = config(kind, mode, path=str(tmp_path / "images"))
    expected = batches(cfg)
    imgs = normalized(torch.cat([batch[0] for batch in expected]), cfg)
    assert imgs.dtype == torch.float32
    assert imgs.isfinite().all()
    assert imgs.std() > 0
    equal(batches(cfg, start=2), expected[2:])  # after a restart
    shares = [batches(cfg, ranks=2, rank=rank) for rank in (0, 1)]
    equal([[torch.cat(parts) for parts in zip(*pair, strict=True)] for pair in zip(*shares, strict=True)], expected)
    lines = ["image", *(f"{i}.{ending}" for i in range(COUNT))]
    (tmp_path / "images" / "list.csv").write_text("\n".join(lines))
    equal(batches(config(kind, mode, name="table", path=str(tmp_path / "images" / "list.csv"))), expected)
    data = PreparedDataConfig(path=str(tmp_path / "images"), in_chans=cfg.in_chans, **keys)
    prepare(PrepareConfig(data=data, out=str(tmp_path / "tar"), shuffle=False, loader=LoaderConfig(workers=0)))
    equal(batches(config(kind, mode, name="webdataset", path=str(tmp_path / "tar"))), expected)


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_batches_are_the_same_for_any_number_of_workers(workers, tmp_path):
    for i in range(COUNT):
        (tmp_path / f"{i}.tif").write_bytes(KINDS["TIFF, float16"][1](i))
    cfg = config("TIFF, float16", "image", path=str(tmp_path))
    equal(batches(cfg, workers=workers), batches(cfg))


@pytest.mark.parametrize("mode", MODES)
def test_windows_of_a_tiff_are_those_of_the_npy_file(mode, tmp_path):
    array = np.concatenate([values(i, "uint16") for i in range(COUNT)])
    np.save(tmp_path / "a.npy", array)
    tifffile.imwrite(tmp_path / "a.tif", array, photometric="minisblack", tile=(16, 16), compression="zlib")
    found = [
        batches(config("DICOM, uint16", mode, name="array", axes="NYX", path=str(tmp_path / name), fit="pad"))
        for name in ("a.npy", "a.tif")
    ]
    equal(*found)


def overrides(folder):
    given = ["data=imagefolder", f"data.path={folder}", "data.in_chans=1", "data.dtype=float32", "data.image_size=32"]
    return [*TINY_PRETRAIN[1:], *given, "data.normalize=image", "optim.global_batch_size=2", "schedule.epochs=2"]


def test_a_run_on_dicom_is_resumed_bit_for_bit(tmp_path):
    (tmp_path / "ct").mkdir()
    for i in range(4):
        (tmp_path / "ct" / f"{i}.dcm").write_bytes(KINDS["DICOM, int16"][1](i))
    cfg = compose("pretrain", [*overrides(tmp_path / "ct"), "trainer.eval_every_epochs=null"])
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    pretrain(cfg, whole)
    shutil.copytree(whole, cut)
    last = sorted((cut / "checkpoints").glob("step_*.pt"))[-1]
    last.unlink()
    pretrain(compose("pretrain", [*overrides(tmp_path / "ct"), "trainer.eval_every_epochs=null"]), cut)
    before, after = (checkpoint.read(run / "checkpoints" / last.name) for run in (whole, cut))
    assert_same(before["model"], after["model"])
    assert after["config"]["data"]["normalize"] == "image"


@pytest.mark.slow
def test_two_ranks_train_as_one(tmp_path, fcmae):
    (tmp_path / "ct").mkdir()
    for i in range(8):
        (tmp_path / "ct" / f"{i}.dcm").write_bytes(KINDS["DICOM, int16"][1](i))
    args = ["pretrain", *overrides(tmp_path / "ct"), "trainer.eval_every_epochs=null"]
    fcmae(*args, f"hydra.run.dir={tmp_path}/one")
    fcmae(*args, f"hydra.run.dir={tmp_path}/two", ranks=2)
    one, two = ([line.get("loss") for line in metrics_of(tmp_path / run)] for run in ("one", "two"))
    np.testing.assert_allclose([x for x in two if x is not None], [x for x in one if x is not None], rtol=1e-4)


def zarr_of_2_gib(folder):
    """uint16 ``[32768, 32768]`` whose chunks of 512 x 512 are one file under many names."""
    side, chunk = 2**15, 512
    (folder / "a.zarr").mkdir()
    meta = {"zarr_format": 2, "shape": [side, side], "chunks": [chunk, chunk], "dtype": "<u2", "order": "C",
            "compressor": {"id": "zlib", "level": 1}, "fill_value": 0, "filters": None}  # fmt: skip
    (folder / "a.zarr" / ".zarray").write_text(json.dumps(meta))
    first = folder / "a.zarr" / "0.0"
    first.write_bytes(zlib.compress(np.random.default_rng(0).integers(0, 4000, (chunk, chunk)).astype("<u2"), 1))
    for row in range(side // chunk):
        for column in range(side // chunk):
            if row or column:
                (folder / "a.zarr" / f"{row}.{column}").hardlink_to(first)
    cfg = DataConfig(name="array", path=str(folder / "a.zarr"), in_chans=1, bit_depth=12, fit="pad", image_size=224,
                     normalize="window", low=0.0, high=1.0, windows_per_image=400)  # fmt: skip

    def read():
        source, crop = train_source(cfg), pretrain_transform(cfg)
        return sum(float(crop(source[0].image).float().mean() > 0) for _ in range(400))

    return read


@pytest.mark.slow
def test_windows_of_2_gib_take_little_memory():
    """Of a Zarr array, in a process of its own."""
    taken = measure({"Zarr": Case(zarr_of_2_gib, "")})["Zarr"]
    assert taken.said == "400.0"
    assert taken.memory < 64
