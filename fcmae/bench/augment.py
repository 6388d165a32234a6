"""Augmentation for fine-tuning (``augment=in1k``): by Pillow in the workers against batches on the device."""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

from fcmae.bench.feed import STEPS_WITHOUT_END, SYNTHETIC, fed_speed
from fcmae.bench.measure import synchronize
from fcmae.bench.workloads import DENSE, DISTINCT_BATCHES, LABELS, classifier, forward_of
from fcmae.config import AugmentConfig, DataConfig, LoaderConfig, OptimConfig, compose
from fcmae.data.collate import Item, collate
from fcmae.data.loading import TrainBatches, Workers
from fcmae.data.pixels.transforms import finetune_transform
from fcmae.data.plan import BatchPlan
from fcmae.data.samples import LabelledImages
from fcmae.data.sources import train_source
from fcmae.data.to_device import to_device
from fcmae.optim.adamw import create_optimizer
from fcmae.precision import fastest
from fcmae.randomness import Stream, seed_globals, step_generator
from fcmae.tasks.mixup import Mixup
from fcmae.tasks.task import Losses
from fcmae.threads import one_thread
from fcmae.training.step import TrainingStep

PLACES = ("cpu", "gpu")
"""Values of ``augment.on``."""
CROPS = 256
"""Crops that are augmented alone."""
ALONE, READ = "crops in memory", "read"


@dataclass
class AugmentResult:
    """One row: images per second of augmentation alone, of reading with it, or of fine-tuning with it."""

    on: str
    measured: str
    """Crops in memory (``cpu``: one core; ``gpu``: the device, with what the host prepares), read, or a model."""
    images_per_second: float


def measure(
    models: Sequence[str], data: DataConfig, batch: int, workers: int, seconds: float, device: torch.device
) -> Iterator[AugmentResult]:
    """Both places alone, then with reading, then with fine-tuning steps after steps whose images lie on the device."""
    recipes = {place: replace(compose("finetune", ["data=synthetic"]).augment, on=place) for place in PLACES}
    for place, recipe in recipes.items():
        yield AugmentResult(place, ALONE, _alone(data, recipe, batch, seconds, device))
    ahead = workers * LoaderConfig.prefetch + 2  # batches that the workers are ahead do not count
    for place, recipe in recipes.items():
        batches = _batches(data, recipe, batch, workers, device)
        yield AugmentResult(place, READ, fed_speed(_moved(device), batches, batch, ahead, seconds, device))
        del batches
    for name in models:
        step = _step(name, data, recipes["cpu"], batch, device)
        generator = torch.Generator().manual_seed(0)
        lying = [
            [torch.randn(batch, 3, *data.size, generator=generator).to(device), torch.arange(batch, device=device) % 10]
            for _ in range(DISTINCT_BATCHES)
        ]
        yield AugmentResult(SYNTHETIC, name, fed_speed(step, itertools.cycle(lying), batch, 5, seconds, device))
        for place, recipe in recipes.items():
            batches = _batches(data, recipe, batch, workers, device)
            yield AugmentResult(place, name, fed_speed(step, batches, batch, ahead, seconds, device))
            del batches
        torch.compiler.reset()


def _alone(data: DataConfig, recipe: AugmentConfig, batch: int, seconds: float, device: torch.device) -> float:
    """What comes after the crop: on one core, image by image; on the device in batches, whose draws are made before."""
    rest = finetune_transform(data, recipe).transforms[1:]  # type: ignore[attr-defined]
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, 256, (CROPS, 3, 8, 8), generator=generator, dtype=torch.uint8)
    crops = v2.functional.resize(coarse, list(data.size))
    change = v2.Compose(rest)

    def changed(number: int) -> Any:
        seed_globals(0, Stream.AUGMENT, number)
        return change(crops[number % CROPS])

    if recipe.on == "cpu":
        with one_thread():
            return _per_second(changed, seconds, torch.device("cpu"))
    packed = [
        collate([Item((changed(number),), []) for number in range(first, first + batch)]).parts[0]
        for first in range(0, DISTINCT_BATCHES * batch, batch)
    ]
    if device.type == "cuda":
        packed = [part.pin_memory() for part in packed]
    return batch * _per_second(lambda i: to_device(packed[i % DISTINCT_BATCHES], device), seconds, device)


def _per_second(call: Callable[[int], object], seconds: float, device: torch.device) -> float:
    for i in range(DISTINCT_BATCHES):
        call(i)
    synchronize(device)
    began = time.perf_counter()
    for i in itertools.count(1):
        call(i)
        if i % DISTINCT_BATCHES == 0:
            synchronize(device)
            if time.perf_counter() - began > seconds:
                break
    return i / (time.perf_counter() - began)


def _batches(data: DataConfig, recipe: AugmentConfig, batch: int, workers: int, device: torch.device) -> TrainBatches:
    source = train_source(data)
    samples = LabelledImages(source, finetune_transform(data, recipe), seed=0)
    plan = BatchPlan.create(len(source), batch, None, 1, 0)
    return TrainBatches(samples, plan, 0, range(STEPS_WITHOUT_END), Workers(workers, device.type == "cuda"))


def _moved(device: torch.device) -> Callable[[Sequence[Any]], list[Tensor]]:
    return lambda batch: [to_device(part, device) for part in batch]


def _step(
    name: str, data: DataConfig, recipe: AugmentConfig, batch: int, device: torch.device
) -> Callable[[Sequence[Any]], None]:
    """A fine-tuning step as the loop runs it, with mixup and CutMix, of (images, labels)."""
    torch.manual_seed(0)
    model = classifier(name).to(device)
    optimizer = create_optimizer(model, OptimConfig(lr=1e-4))
    mixup = Mixup(recipe.mixup, recipe.cutmix, LABELS, data.size)
    forward, gpu, steps = forward_of(DENSE), device.type == "cuda", itertools.count()
    pairs = torch.arange(batch) // 2

    def loss(parts: Sequence[Tensor]) -> Losses:
        imgs, targets = mixup(*parts)
        return F.cross_entropy(forward(model, imgs, gpu).float(), targets, label_smoothing=recipe.label_smoothing), {}

    passes = TrainingStep(model, loss, device, fastest(device), graphed=gpu)
    move = _moved(device)

    def step(parts: Sequence[Any]) -> None:
        mixes = mixup.draw(step_generator(0, next(steps)), (batch + 1) // 2)[pairs]
        passes([move([*parts, mixes])])
        optimizer.step()

    return step


def table(results: Sequence[AugmentResult], workers: int) -> Iterator[str]:
    """The results as lines of text."""
    found = {(result.measured, result.on): result.images_per_second for result in results}
    yield f"{'img/s':26} {'on the device':>14} {'augment.on=cpu':>15} {'augment.on=gpu':>15} {'times':>6}"
    for measured in dict.fromkeys(result.measured for result in results):
        own, cpu, gpu = (found.get((measured, place)) for place in (SYNTHETIC, *PLACES))
        name = f"{measured} (cpu: one core)" if measured == ALONE else measured
        name += f" by {workers} workers" if measured == READ else ""
        assert cpu is not None
        assert gpu is not None
        yield f"{name:26} {'-' if own is None else f'{own:.0f}':>14} {cpu:15.0f} {gpu:15.0f} {gpu / cpu:6.2f}"
