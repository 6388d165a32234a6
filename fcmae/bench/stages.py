"""What each stage from a file to a batch on the device takes, in one process."""

import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from PIL import Image

from fcmae.config import DataConfig
from fcmae.data.collate import Item, collate
from fcmae.data.pixels.crops import cut
from fcmae.data.pixels.decode import Encoded, explained
from fcmae.data.pixels.formats import MAX_PIXELS, open_picture
from fcmae.data.pixels.transforms import pretrain_transform
from fcmae.data.sources import train_source
from fcmae.threads import one_thread

Stages = dict[str, float]
"""Seconds per image."""
SAMPLES = 256
"""Images that are timed."""

T = TypeVar("T")
S = TypeVar("S")


def measure_stages(
    data: DataConfig, theirs: Callable | None, batch_size: int, device: torch.device
) -> tuple[Stages, float]:
    """CPU seconds per image of each stage on one thread, as in a worker, and the mean size of a file in kB.

    Of a file is decoded what a crop needs.

    Args:
        theirs: a transform of Pillow's images to time instead of this package's decoding and crop.
    """
    with one_thread():
        return _measure(data, theirs, batch_size, device)


def _measure(data: DataConfig, theirs: Callable | None, batch_size: int, device: torch.device) -> tuple[Stages, float]:
    source = train_source(data)
    stages: Stages = {}
    chosen = range(0, len(source), max(1, len(source) // SAMPLES))
    stages["read"], samples = _timed(lambda index: source[index].image, chosen)
    files = [sample for sample in samples if isinstance(sample, Encoded)]
    kilobytes = sum(len(file.data) for file in files) / max(1, len(files)) / 1e3
    if theirs is None:
        crop, numbers = pretrain_transform(data), random.Random(0)
        stages["decode"], parts = _timed(lambda sample: crop.part(sample, numbers.random), samples)
        stages["crop"], crops = _timed(lambda part: cut(*part, data.size), parts)
    else:
        stages["decode"], pictures = _timed(_decode_by_pillow, files)
        stages["crop"], crops = _timed(theirs, pictures)
    groups = [crops[i : i + batch_size] for i in range(0, len(crops), batch_size)]
    noise = torch.rand(49)
    seconds, batches = _timed(lambda group: collate([Item((crop, noise), []) for crop in group]).parts, groups)
    stages["collate"] = seconds / batch_size
    seconds, _ = _timed(lambda batch: batch[0].to(device, copy=True), batches)
    stages["copy"] = seconds / batch_size
    return stages, kilobytes


def _decode_by_pillow(file: Encoded) -> Image.Image:
    with explained(file.name), open_picture(file.data, MAX_PIXELS) as image:
        return image.convert("RGB")


def _timed(call: Callable[[S], T], items: Sequence[S]) -> tuple[float, list[T]]:
    """The median CPU time of a call, and the results."""
    times, results = [], []
    for item in items:
        began = time.process_time()
        results.append(call(item))
        times.append(time.process_time() - began)
    return statistics.median(times), results
