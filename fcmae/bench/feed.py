"""What of a training step's speed remains when its images are read, instead of lying on the device already."""

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fcmae.bench.measure import synchronize
from fcmae.bench.workloads import DISTINCT_BATCHES
from fcmae.config import DataConfig, LoaderConfig, OptimConfig
from fcmae.data.loading import TrainBatches, Workers
from fcmae.data.pixels.transforms import normalized, pretrain_transform
from fcmae.data.plan import BatchPlan
from fcmae.data.resident import Resident, innermost
from fcmae.data.samples import MaskedImages
from fcmae.data.sources import train_source
from fcmae.data.to_device import to_device
from fcmae.errors import UsageError
from fcmae.masks.patches import grid_size, random_mask
from fcmae.models import FCMAE
from fcmae.optim.adamw import create_optimizer
from fcmae.precision import fastest
from fcmae.tasks.task import Losses
from fcmae.training.step import TrainingStep

DECODED = ("raw", "own")
"""The variants whose images are also kept in memory and on the device."""
NO_FILES = ("array", "fashion_mnist", "synthetic")
"""Sources whose images are not files that a GPU could decode."""
SYNTHETIC = "synthetic"
STEPS_WITHOUT_END = 10**6


@dataclass
class FeedResult:
    """One row."""

    model: str
    feed: str
    images_per_second: float
    share: float
    """Of the speed with images that lie on the device."""


def feeds(configs: dict[str, DataConfig], crops: Sequence[int], device: torch.device) -> dict[str, DataConfig]:
    """The data of each variant; also with several crops per image, decoded on the GPU if there is one, and cached."""
    found = {}
    for variant, data in configs.items():
        for count in crops:
            found[f"{variant}, {count} crops" if count > 1 else variant] = replace(data, crops_per_image=count)
        plain = (data.in_chans, data.bit_depth, data.dtype) == (3, 8, "uint")
        if device.type == "cuda" and variant != "raw" and plain and data.name not in NO_FILES:
            found[f"{variant}, decoded on the GPU"] = replace(data, decode_on="gpu")
        if variant in DECODED:
            found[f"{variant}, decoded in memory"] = replace(data, cache="ram")
            found[f"{variant}, decoded on the device"] = replace(data, cache="gpu")
    return found


def measure(
    models: Sequence[str],
    data: dict[str, DataConfig],
    batch_size: int,
    workers: int,
    seconds: float,
    device: torch.device,
    strides: Sequence[int] | None = None,
) -> Iterator[FeedResult]:
    """Each model with each feed, after one with images on the device. Raises UsageError."""
    for name in models:
        first = next(iter(data.values()))
        step, grid = training_step(name, first, device, strides)
        generator = torch.Generator().manual_seed(0)
        lying = []
        for _ in range(DISTINCT_BATCHES):
            imgs = torch.randint(
                0, 256, (batch_size, first.in_chans, *first.size), generator=generator, dtype=torch.uint8
            )
            lying.append([imgs.to(device), torch.rand(batch_size, math.prod(grid), generator=generator).to(device)])
        fastest = fed_speed(step, itertools.cycle(lying), batch_size, 5, seconds, device)
        yield FeedResult(name, SYNTHETIC, fastest, 1.0)
        for feed, cfg in data.items():
            batches = _batches(cfg, batch_size, grid, workers, device)
            # the batches that the workers are ahead do not count
            speed = fed_speed(step, batches, batch_size, workers * LoaderConfig.prefetch + 2, seconds, device)
            del batches
            yield FeedResult(name, feed, speed, speed / fastest)
        torch.compiler.reset()


def training_step(
    name: str, data: DataConfig, device: torch.device, strides: Sequence[int] | None = None
) -> tuple[Callable[[Sequence[Tensor]], None], tuple[int, int]]:
    """A pretraining step as the loop runs it, of (raw images, mask noise ``[N, L]``) on the device; and the grid."""
    torch.manual_seed(0)
    try:
        model = FCMAE(name, in_chans=data.in_chans, strides=strides).to(device)
        keep = model.len_keep(*data.size)
    except ValueError as error:
        raise UsageError(str(error)) from error
    grid = grid_size(*data.size, model.mask_patch_size)
    optimizer = create_optimizer(model, OptimConfig(lr=1e-4))
    gpu = device.type == "cuda"
    if gpu:
        model.compile()

    def loss(batch: Sequence[Tensor]) -> Losses:
        imgs, noise = batch
        return model(normalized(imgs, data), random_mask(noise, keep), keep).loss, {}

    passes = TrainingStep(model, loss, device, fastest(device), graphed=gpu)

    def step(batch: Sequence[Tensor]) -> None:
        passes([[to_device(part, device) for part in batch]])
        optimizer.step()

    return step, grid


def _batches(
    data: DataConfig, batch_size: int, grid: tuple[int, int], workers: int, device: torch.device
) -> TrainBatches:
    source = train_source(data)
    crop = pretrain_transform(data)
    on_device: bool | Resident = data.decode_on == "gpu"
    if data.cache == "gpu":
        on_device = Resident(innermost(source), crop.input, data.size, data.pad)
    return TrainBatches(
        MaskedImages(source, crop, grid, 0, data.crops_per_image, on_device),
        BatchPlan.create(len(source), batch_size, None, 1, 0, data.crops_per_image),
        rank=0,
        steps=range(STEPS_WITHOUT_END),
        workers=Workers(workers, device.type == "cuda"),
    )


def fed_speed(
    step: Callable[[Sequence[Tensor]], object],
    batches: Iterator[Sequence[Tensor]],
    batch_size: int,
    warm_up: int,
    seconds: float,
    device: torch.device,
) -> float:
    """Images per second over so many seconds, after some steps of warm-up."""
    for batch in itertools.islice(batches, warm_up):
        step(batch)
    synchronize(device)
    began = time.perf_counter()
    count = 0
    for batch in batches:
        step(batch)
        count += 1
        if time.perf_counter() - began > seconds:
            break
    synchronize(device)
    return count * batch_size / (time.perf_counter() - began)
