"""Arrays larger than memory: what a worker keeps does not grow with the array."""

import multiprocessing
import time

import numpy as np
import pytest
import torch

from benchmarks.listing import memory_mib
from fcmae.config import DataConfig
from fcmae.data.loading import TrainBatches, Workers
from fcmae.data.pixels.transforms import pretrain_transform
from fcmae.data.plan import BatchPlan
from fcmae.data.samples import MaskedImages
from fcmae.data.sources import train_source

zarr = pytest.importorskip("zarr")
MOST = 300
"""MiB of its own that a worker may have."""


@pytest.mark.slow
def test_two_gigabytes_of_zarr_in_300_mb_per_worker(tmp_path):
    """Every image of an epoch, each four megabytes, is cropped by two workers."""
    shape = (512, 2, 1024, 1024)
    array = zarr.create_array(
        str(tmp_path / "a.zarr"), shape=shape, chunks=(1, 2, 512, 512), dtype="uint16", compressors=None
    )
    part = np.random.default_rng(0).integers(0, 4096, (32, *shape[1:]), np.uint16)
    for first in range(0, shape[0], len(part)):
        array[first : first + len(part)] = part
    size = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
    assert size >= 2**31
    data = DataConfig(
        name="array",
        path=str(tmp_path / "a.zarr"),
        in_chans=2,
        bit_depth=12,
        image_size=224,
        mean=[0.5] * 2,
        std=[1.0] * 2,
    )
    dataset = MaskedImages(train_source(data), pretrain_transform(data), (7, 7), seed=0)
    plan = BatchPlan.create(shape[0], 8, None, 1, seed=0)
    most, seen = 0.0, 0
    for imgs, _ in TrainBatches(dataset, plan, 0, range(plan.steps_per_epoch), Workers(2)):
        seen += len(imgs)
        assert imgs.dtype == torch.uint16
        children = [child.pid for child in multiprocessing.active_children() if child.daemon]
        own = [memory_mib("Private_Dirty", pid) + memory_mib("Private_Clean", pid) for pid in children]
        most = max([most, *own])
        if seen == 8:
            began = time.monotonic()
    assert seen == shape[0]
    print(f"{size / 2**30:.2f} GiB in {time.monotonic() - began:.0f} s, at most {most:.0f} MiB per worker")
    assert 0 < most < MOST
