"""What travels from the workers to the training process: several crops, shared memory, files left to the device."""

import gc
import multiprocessing
import os
import socket
from multiprocessing.connection import Client
from multiprocessing.resource_sharer import DupFd
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data._utils.pin_memory import pin_memory

from fcmae.config import DataConfig, compose
from fcmae.data import shared_memory as shared
from fcmae.data.collate import Batch, collate
from fcmae.data.loading import TrainBatches, Workers, _start_worker
from fcmae.data.pixels.on_device import PackedImages, decode_all, pack
from fcmae.data.pixels.transforms import pretrain_transform
from fcmae.data.plan import BatchPlan, MicroBatches
from fcmae.data.samples import MaskedImages
from fcmae.data.sources.base import Sample
from fcmae.data.unreadable import errors_aside
from fcmae.errors import ConfigError, ImageError
from tests.conftest import run_python
from tests.unit.test_pixels import encoded, exif, noise, smooth

CFG = DataConfig(image_size=32)
ROOT = Path(__file__).parents[2]


class Files:
    """JPEGs of several sizes, and one file in four that nvJPEG could not decode."""

    classes = None

    def __len__(self):
        return 24

    def __getitem__(self, index):
        pixels = smooth(60 + index, 90)
        kinds = [("JPEG", {}), ("JPEG", {}), ("PNG", {}), ("JPEG", {"exif": exif(6)})]
        kind, options = kinds[index % 4]
        return Sample(encoded(pixels, kind, **options), None)

    def label(self, index):
        return None

    def describe(self, index):
        return f"file {index}"


def batches(dataset, plan, workers, prefetch=2, start=0, stop=6):
    return TrainBatches(dataset, plan, 0, range(start, stop), Workers(workers, prefetch=prefetch))


@pytest.mark.parametrize(("workers", "prefetch"), [(1, 1), (1, 3), (2, 1), (2, 2)])
def test_batches_stay_what_they_are(workers, prefetch):
    """However many are taken before one is looked at: memory that workers use again is not what was handed out."""
    plan = BatchPlan.create(24, 4, 2, 1, seed=0)
    dataset = MaskedImages(Files(), pretrain_transform(CFG), (1, 1), seed=0)
    kept = list(batches(dataset, plan, workers, prefetch))
    expected = list(batches(dataset, plan, 0))
    assert len(kept) == 12
    for ours, theirs in zip(kept, expected, strict=True):
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])


@pytest.fixture
def worker(monkeypatch):
    """Both ends in this process: an exchange, and the slots of its only worker."""
    monkeypatch.setattr(shared, "_slots", [])
    exchange = shared.Exchange(1)
    shared.start_worker(exchange.number, exchange.used, 0)
    return exchange


def images(count, channels=3, dtype=np.uint8):
    return [torch.from_numpy(noise(8, 6, channels, dtype=dtype)).permute(2, 0, 1) for _ in range(count)]


def test_slots_are_used_again_once_nobody_holds_what_lies_in_them(worker):
    first, second = (shared.stack(images(2)) for _ in range(2))
    assert first.number != second.number
    whole = first.tensor()
    part = whole[1:]
    assert shared.stack(images(2)).number == 2  # the others are lent, or on their way
    del whole
    assert shared.stack(images(2)).number == 3
    kept = part.clone()
    assert torch.equal(part, kept)
    del part
    again = shared.stack(images(2))
    assert again.number == first.number
    assert again.memory is None  # the training process knows this memory
    assert shared.stack(images(9)).number == 4
    second.tensor()
    larger = shared.stack(images(9))
    assert larger.number == second.number
    assert larger.memory is not None  # too small, so there is a new one
    assert larger.tensor().shape == (9, 3, 8, 6)


def test_without_a_slot_left_a_batch_travels_as_torch_sends_it(worker):
    held = [shared.stack(images(2)) for _ in range(shared.SLOTS)]
    assert {placed.number for placed in held} == set(range(shared.SLOTS))
    found = images(2)
    assert torch.equal(shared.stack(found), torch.stack(found))


def test_slots_are_free_once_pinned(worker, monkeypatch):
    """As the thread of torch's loader does it, which finds what is placed wherever it is in a batch."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)  # no GPU here
    found, masks = images(2), [torch.rand(4) for _ in range(2)]
    batch = Batch([shared.stack(found), shared.stack(masks)], [], 0)
    assert worker.used.sum() == 2
    pinned = pin_memory(batch).opened()
    assert torch.equal(pinned.parts[0], torch.stack(found))
    assert torch.equal(pinned.parts[1], torch.stack(masks))
    assert worker.used.sum() == 0


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_images_keep_their_memory_order(worker, channels, dtype):
    found = images(2, channels, dtype)
    batch = shared.stack(found).tensor()
    assert batch.shape == (2, channels, 8, 6)
    assert batch.stride()[2:] == (6 * channels, channels)
    assert all(np.array_equal(ours.numpy(), theirs.numpy()) for ours, theirs in zip(batch, found, strict=True))
    batch = shared.stack([image.contiguous() for image in found]).tensor()
    assert batch.is_contiguous()
    assert all(np.array_equal(ours.numpy(), theirs.numpy()) for ours, theirs in zip(batch, found, strict=True))


def test_a_batch_with_images_that_cannot_be_read(worker):
    class Torn(Files):
        def __getitem__(self, index):
            if index % 5 == 2:
                raise ImageError(self.describe(index), "torn")
            return super().__getitem__(index)

    samples = errors_aside(MaskedImages(Torn(), pretrain_transform(CFG), (2, 2), seed=0), 24, 0, skip=True)
    keys = [(0, index) for index in range(8)]
    ours = collate([samples[key] for key in keys]).parts
    theirs = [samples[key].parts for key in keys]
    assert torch.equal(ours[0].tensor(), torch.stack([image for image, _ in theirs]))
    assert torch.equal(ours[1].tensor(), torch.stack([mask for _, mask in theirs]))


def test_several_crops_of_an_image_are_for_the_same_step():
    plan = BatchPlan.create(24, 8, 4, 1, seed=0, crops_per_image=2)
    assert (plan.steps_per_epoch, plan.steps_per_pass, plan.accum_steps) == (3, 6, 2)
    keys = [plan.global_batch(step) for step in range(12)]
    assert {len(step) for step in keys} == {4}
    assert sorted(key for step in keys[:6] for key in step) == [(0, index) for index in range(24)]
    assert sorted(key for step in keys[6:] for key in step) == [(1, index) for index in range(24)]


@pytest.mark.parametrize(("ranks", "micro"), [(1, 8), (1, 2), (2, 4), (2, 2), (3, 8), (1, 6)])
def test_crops_do_not_change_what_ranks_share(ranks, micro):
    plan = BatchPlan.create(24, 8, micro, ranks, seed=0, crops_per_image=2)
    streams = [list(MicroBatches(plan, rank, 2, 9)) for rank in range(ranks)]
    for i, step in enumerate(range(2, 9)):
        parts = slice(i * plan.accum_steps, (i + 1) * plan.accum_steps)
        keys = [
            key for micro in zip(*(stream[parts] for stream in streams), strict=True) for part in micro for key in part
        ]
        assert keys == plan.global_batch(step)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("undecoded", [False, True])
def test_the_crops_of_an_image_differ_and_the_first_is_that_of_one(workers, undecoded):
    crop, device = pretrain_transform(CFG), torch.device("cpu")
    one = MaskedImages(Files(), crop, (2, 2), seed=0)
    three = MaskedImages(Files(), crop, (2, 2), seed=0, crops_per_image=3, on_device=undecoded)
    plan = BatchPlan.create(24, 6, 6, 1, seed=0, crops_per_image=3)
    for step, (imgs, masks) in enumerate(batches(three, plan, workers)):
        imgs = imgs.to(device)
        assert (imgs.shape, masks.shape) == ((6, 3, 32, 32), (6, 4))
        for position, key in enumerate(plan.global_batch(step)):
            image, mask = one[key]
            assert torch.equal(imgs[3 * position], image)
            assert torch.equal(masks[3 * position], mask)
        assert len({tuple(mask.tolist()) for mask in masks}) == 6
        assert not torch.equal(imgs[0], imgs[1])


@pytest.mark.parametrize("workers", [0, 2])
def test_files_left_to_the_device_give_the_same_samples(workers):
    """Here the device is the CPU, whose decoder is the same."""
    crop = pretrain_transform(CFG)
    plan = BatchPlan.create(24, 8, 4, 1, seed=0)
    decoded = list(batches(MaskedImages(Files(), crop, (2, 2), seed=0), plan, 0))
    packed = list(batches(MaskedImages(Files(), crop, (2, 2), seed=0, on_device=True), plan, workers))
    assert any(isinstance(imgs, PackedImages) and len(imgs.decoded) for imgs, _ in packed)
    for ours, theirs in zip(packed, decoded, strict=True):
        assert torch.equal(ours[0].to(torch.device("cpu"), non_blocking=True), theirs[0])
        assert torch.equal(ours[1], theirs[1])


def test_what_the_gpu_refuses_is_decoded_on_the_cpu(monkeypatch):
    files = [encoded(smooth(30 + i, 40), "JPEG") for i in range(4)]
    tensors = [torch.frombuffer(bytearray(file.data), dtype=torch.uint8) for file in files]
    calls = []

    def refuse(data, device):
        calls.append(len(data))
        if any(torch.equal(file, tensors[2]) for file in data):
            raise RuntimeError("nvJPEG does not know this")
        return [torch.full((3, 1, 1), 7, dtype=torch.uint8) for _ in data]

    monkeypatch.setattr("fcmae.data.pixels.on_device._decode_on_gpu", refuse)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *_, **__: self)
    decoded = decode_all(tensors, ["a"] * 4, torch.device("cuda"))
    assert calls == [4, 1, 1, 1, 1]
    assert [pixels.shape[-1] for pixels in decoded] == [1, 1, 40, 1]


def test_a_file_that_nobody_can_decode_is_named():
    from fcmae.data.pixels.crops import Box
    from fcmae.data.pixels.decode import Encoded
    from fcmae.data.pixels.on_device import Undecoded

    file = encoded(noise(64, 64, 3), "JPEG")
    torn = Undecoded(Encoded(file.data[:300], "torn.jpg"), [Box(0, 0, 8, 8, False)], (8, 8))
    with pytest.raises(ImageError, match="torn.jpg"):
        pack([torn]).to(torch.device("cpu"))


@pytest.mark.parametrize(
    ("command", "override", "message"),
    [
        ("pretrain", ["data.decode_on=gpu", "loader.on_error=skip"], "data.decode_on must be cpu with.*; got 'gpu'"),
        ("pretrain", ["data.decode_on=tpu"], "data.decode_on must be one of cpu, gpu.*; got 'tpu'"),
        ("pretrain", ["data.crops_per_image=0"], "data.crops_per_image must be a positive number; got 0"),
        ("finetune", ["data.crops_per_image=2"], "data.crops_per_image must be 1 in fine-tuning.*; got 2"),
        ("finetune", ["data.decode_on=gpu"], "data.decode_on must be cpu in fine-tuning.*; got 'gpu'"),
        ("pretrain", ["data.bit_depth=20"], "data.bit_depth must be from 8 to 16.*; got 20"),
    ],
)
def test_config_mistakes_are_named(command, override, message):
    with pytest.raises(ConfigError, match=message):
        compose(command, override)


class Frozen(torch.utils.data.Dataset):
    """How many objects the garbage collector leaves alone."""

    def __getitem__(self, key):
        return torch.zeros(3), torch.tensor(gc.get_freeze_count())


def test_workers_leave_the_objects_of_the_training_process_where_they_are():
    """A full collection would write to each of them, and so copy what the fork shares."""
    before = gc.get_freeze_count()
    counts = next(batches(Frozen(), BatchPlan.create(24, 4, 2, 1, seed=0), 1))[1]
    assert counts.min() > len(gc.get_objects()) // 2
    assert gc.get_freeze_count() <= before  # frozen objects may die meanwhile


def test_workers_end_with_python():
    """Also if batches are left, though they ignore the signal that Python would end them by."""
    script = (
        "from tests.unit.test_batches import *\n"
        "dataset = MaskedImages(Files(), pretrain_transform(CFG), (2, 2), seed=0)\n"
        "left = batches(dataset, BatchPlan.create(24, 4, 2, 1, seed=0), 2)\n"
        "next(left)\n"
    )
    run_python(ROOT, "-c", script)


def test_a_worker_that_starts_after_the_end_of_its_parent_ends():
    """It would wait for work forever. Here the parent is one that never was."""
    used = torch.zeros(1, shared.SLOTS, dtype=torch.uint8)
    process = multiprocessing.get_context("fork").Process(target=_start_worker, args=(-1, 0, used, 0))
    process.start()
    process.join()
    assert process.exitcode == 1


def test_a_worker_says_nothing_when_the_training_process_hangs_up(capfd):
    """Which happens when another worker is killed while this one hands on memory."""
    ours, theirs = multiprocessing.Pipe()

    def work():
        _start_worker(os.getppid(), 0, torch.zeros(1, shared.SLOTS, dtype=torch.uint8), 0)
        theirs.send(DupFd(0)._id[0])
        theirs.recv()

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    address = ours.recv()
    for read in (1, 1000):  # the rest is lost: a reset; nothing is: an end
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(address)
            connection.recv(read)
    Client(address, authkey=multiprocessing.current_process().authkey).close()  # answered after those
    ours.send(None)
    process.join()
    assert capfd.readouterr().err == ""
