"""Images that stay decoded in memory or on the device (data.cache): the samples are those of the files."""

import io
import multiprocessing

import numpy as np
import pytest
import torch
from PIL import Image

from fcmae.config import DataConfig, LoaderConfig, compose
from fcmae.data import decoding as module
from fcmae.data import resident
from fcmae.data.decoded import DecodedImages
from fcmae.data.decoding import decoded
from fcmae.data.labels import Labels
from fcmae.data.loading import TrainBatches, Workers
from fcmae.data.pixels.crops import RandomCrop
from fcmae.data.pixels.decode import PixelFormat
from fcmae.data.plan import BatchPlan
from fcmae.data.resident import Resident, innermost
from fcmae.data.samples import MaskedImages
from fcmae.data.sources import train_source, val_source
from fcmae.data.sources.base import Sample
from fcmae.data.sources.map_files import mapped_source
from fcmae.errors import ConfigError, ImageError, UsageError
from tests.conftest import TINY_PRETRAIN
from tests.results import metrics_of

COUNT = 12
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of two classes and several sizes; one of them cannot be read."""
    rng = np.random.default_rng(0)
    top = tmp_path_factory.mktemp("images")
    for i in range(COUNT):
        content = io.BytesIO()
        pixels = np.kron(rng.integers(0, 2, (9 + i, 12, 3)) * 255, np.ones((8, 8, 1))).astype(np.uint8)
        Image.fromarray(pixels).save(content, "JPEG", quality=95)
        path = top / "ab"[i % 2] / f"{i:02}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content.getvalue() if i != 5 else b"no image")
    return top


def data(folder, cache=None, **more):
    given = {"path": str(folder), "val_path": str(folder / "a"), "image_size": 32, "exact_decode": True, **more}
    return DataConfig(cache=cache, **given)


def resident_batches(cfg, workers=0, labels=False, crops=1, device=CPU, pin=False):
    """All parts of two epochs, after they were on a device."""
    source, crop = train_source(cfg), RandomCrop(cfg)
    on_device = Resident(innermost(source), crop.input, cfg.size, cfg.pad) if cfg.cache == "gpu" else False
    more = {"labels": Labels(source, "target")} if labels else {}
    dataset = MaskedImages(source, crop, (2, 2), 3, crops, on_device, **more)
    plan = BatchPlan.create(COUNT, 4, None, 1, seed=3)
    for batch in TrainBatches(dataset, plan, 0, range(6), Workers(workers, pin), skip=True):
        yield [part.to(device, non_blocking=True).to(CPU).clone() for part in batch]


TWO = {"channels": {"input": [2, 0], "of": 3}, "in_chans": 2}
TURNS = {"vflip": 0.5, "rot90": True, "crop_scale": [0.01, 1.0]}


@pytest.mark.parametrize(
    ("workers", "labels", "crops", "more"),
    [
        (0, False, 1, {}),
        (1, True, 1, {"pad": 30, **TURNS}),
        (0, True, 2, {**TWO, **TURNS}),
    ],
)
@pytest.mark.parametrize("cache", ["ram", "gpu"])
def test_samples_are_those_of_the_files(folder, monkeypatch, cache, workers, labels, crops, more):
    """On the device by weights that are looked up, or computed for each batch."""
    monkeypatch.setattr(resident, "TABLE", 0 if crops == 2 else resident.TABLE)
    more |= {"mean": [0.5] * more.get("in_chans", 3), "std": [0.5] * more.get("in_chans", 3), "crops_per_image": crops}
    files, kept = data(folder, **more), data(folder, cache, **more)
    pairs = zip(resident_batches(files, 0, labels, crops), resident_batches(kept, workers, labels, crops), strict=True)
    for (expected, *parts), (found, *others) in pairs:
        apart = (expected.int() - found.int()).abs()
        assert apart.max() <= (cache == "gpu")
        assert (apart > 0).float().mean() < 1e-3
        assert all(map(torch.equal, parts, others))


@pytest.mark.parametrize(("bits", "dtype", "apart", "pad"), [(16, "uint", 1, 3), (8, "float32", 0.002, 0)])
def test_other_types_on_the_device(tmp_path, monkeypatch, bits, dtype, apart, pad):
    monkeypatch.setattr(resident, "TABLE", resident.TABLE if pad else 0)
    rng = np.random.default_rng(1)
    for i in range(COUNT):
        np.save(tmp_path / f"{i:02}.npy", rng.integers(0, 1000, (2, 20 + i, 30)).astype("uint16"))
    how = {"in_chans": 2, "mean": [0.5] * 2, "std": [0.5] * 2, "bit_depth": bits, "dtype": dtype, "image_size": 32}
    how["pad"] = pad
    for expected, found in zip(
        *(resident_batches(data(tmp_path, cache, **how)) for cache in (None, "gpu")), strict=True
    ):
        assert expected[0].dtype == found[0].dtype
        assert (expected[0].double() - found[0].double()).abs().max() <= apart
        assert torch.equal(expected[1], found[1])


def test_validation_images_and_what_cannot_be_read(folder):
    source, files = train_source(data(folder, "ram")), train_source(data(folder))
    assert isinstance(source, DecodedImages)
    assert (source.classes, [source.label(i) for i in range(COUNT)]) == (["a", "b"], [0] * 6 + [1] * 6)
    bad = next(i for i in range(COUNT) if "05.jpg" in files.describe(i))
    assert [i for i in range(COUNT) if not source.is_readable(i)] == [bad]
    with pytest.raises(ImageError, match=r"05.jpg: its bytes are of no image format"):
        MaskedImages(source, RandomCrop(data(folder)), (1, 1), 0)[0, bad]
    resident = Resident(source, None, (32, 32))
    with pytest.raises(ImageError, match=r"05.jpg: its bytes are of no image format"):
        MaskedImages(source, RandomCrop(data(folder)), (1, 1), 0, 1, resident)[0, bad]
    image, whole = source[0].image, source[0].image.pixels(1)
    part, top, left = image.part(3, 4, 5, 6)
    assert (part.stride(0), whole.stride(0), top, left) == (1, 1, 3, 4)
    assert torch.equal(part, whole[:, 3:8, 4:10])
    for copied in (image.pixels(1), part):
        copied.zero_()
    assert torch.equal(source[0].image.pixels(1), whole)
    assert isinstance(val_source(data(folder, "ram")), DecodedImages)


class Once:
    """A source that is read by the first rank only."""

    classes = None
    read = True

    def __len__(self):
        return 3

    def __getitem__(self, index):
        assert self.read
        return Sample(torch.full((1, 4 + index, 5), index, dtype=torch.uint8), None)

    def label(self, index):
        return None

    def describe(self, index):
        return f"once {index}"


def test_in_a_process_that_was_spawned(folder, monkeypatch):
    """There the workers of a DataLoader are spawned, too; the processes of a study are such processes."""
    monkeypatch.setattr(module, "BATCH", 4)
    monkeypatch.setattr(module, "cores_per_rank", lambda ranks: 2)
    before = multiprocessing.get_start_method(allow_none=True)
    expected = train_source(data(folder, "ram"))
    multiprocessing.set_start_method("spawn", force=True)
    try:
        found = train_source(data(folder, "ram"))
        (batch, *_) = resident_batches(data(folder, "ram"), workers=2)
    finally:
        multiprocessing.set_start_method(before, force=True)
    for index in set(range(COUNT)) - {5 // 2 + COUNT // 2}:  # the unreadable one
        pixels = found[index].image.pixels(1)
        assert pixels.equal(expected[index].image.pixels(1))
        assert pixels.any()
    assert batch[0].any()


def test_the_ranks_of_a_machine_share_them(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("MASTER_PORT", "12345")
    source, to = Once(), PixelFormat(1)
    first = decoded(source, to)
    source.read = False
    second = decoded(source, to)
    assert all(torch.equal(first[i].image.pixels(1), second[i].image.pixels(1)) for i in range(3))
    first.memory[0] = 77  # the same memory
    assert second[0].image.pixels(1)[0, 0, 0] == 77
    source.read = True
    monkeypatch.setattr("fcmae.processes.Process.is_alive", lambda _: False)
    assert decoded(source, to)[0].image.pixels(1)[0, 0, 0] == 0


def test_what_does_not_fit_is_refused_with_numbers(folder, monkeypatch):
    monkeypatch.setattr(module, "available_memory", lambda: 2**17)
    with pytest.raises(UsageError, match=r"data.cache=ram needs 0.0 GiB for 12 decoded images; 0.0 GiB of memory"):
        train_source(data(folder, "ram"))
    with pytest.raises(ConfigError, match=r"data.cache must be null or ram unless transforms=.*got 'gpu'"):
        data(folder, "gpu", fit="pad")
    with pytest.raises(ConfigError, match=r"data.cache must be null or ram in fine-tuning; got 'gpu'"):
        compose("finetune", ["data.path=x", "model=demo", "data.cache=gpu"])
    with pytest.raises(ConfigError, match=r"data.cache must be null with target maps"):
        mapped_source(data(folder, "ram", target_path=str(folder)), LoaderConfig(), True)
    with pytest.raises(ConfigError, match=r"data.cache must be null with data.name=coco; got 'ram'"):
        data(folder, "ram", name="coco")
    with pytest.raises(ConfigError, match=r"leave out data.cache=ram"):
        compose("prepare", ["data.path=x", "out=y", "data.cache=ram"])


def test_one_type_of_pixels(monkeypatch):
    class Mixed(Once):
        def __getitem__(self, index):
            image = super().__getitem__(index).image
            return Sample(image.float() if index else image, None)

    with pytest.raises(UsageError, match=r"data.cache needs one type of pixels, .* once 0 has .* torch.uint8"):
        decoded(Mixed(), PixelFormat(1))


def test_a_run_from_the_device_is_that_from_memory(fcmae_here, tmp_path):
    losses = {}
    for cache in ("ram", "gpu"):
        result = fcmae_here(*TINY_PRETRAIN, f"data.cache={cache}", f"hydra.run.dir={cache}")
        assert "data.cache=ram: 24 images" in result.stderr
        losses[cache] = [
            line.split('"images')[0] for line in (tmp_path / cache / "metrics.jsonl").read_text().splitlines()
        ]
    assert losses["ram"] == losses["gpu"]


@pytest.mark.slow
def test_two_ranks_share_the_images_of_a_run(fcmae, tmp_path):
    for name, cache in (("files", "null"), ("kept", "ram"), ("device", "gpu")):
        done = fcmae(*TINY_PRETRAIN, f"data.cache={cache}", f"hydra.run.dir={name}", "loader.workers=1", ranks=2)
        assert done.stderr.count("data.cache=ram: 24 images") == (cache != "null")
    lines = {name: [line.get("loss") for line in metrics_of(tmp_path / name)] for name in ("files", "kept", "device")}
    assert lines["files"] == lines["kept"] == lines["device"]
