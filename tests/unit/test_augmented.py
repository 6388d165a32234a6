"""``augment.on=gpu``, here on the CPU: the same draws and pictures as timm's and Pillow's, whatever the batch is."""

import functools
import random
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fcmae.config import AugmentConfig, DataConfig, compose
from fcmae.data.collate import Item, collate
from fcmae.data.loading import TrainBatches, Workers
from fcmae.data.pixels import augmented, operations
from fcmae.data.pixels.augmented import Augmented, Drawn, Erased, erase
from fcmae.data.pixels.operations import GROUPS, apply_operations
from fcmae.data.pixels.policies import create_policy, fill_of
from fcmae.data.pixels.transforms import finetune_transform
from fcmae.data.plan import BatchPlan
from fcmae.data.samples import LabelledImages
from fcmae.data.sources import Synthetic
from fcmae.data.sources.base import Sample, Source
from fcmae.errors import ConfigError
from fcmae.randomness import Stream, seed_globals
from fcmae.tasks.finetuning import Finetuning
from tests.conftest import TINY_FINETUNE

CPU = torch.device("cpu")
CFG = DataConfig(image_size=[48, 40])
POLICY = "rand-m9-mstd0.5-inc1"
PIXELS_APART = 1e-3
"""Share of values that may differ by one level after a shear, a translation or a rotation."""


@functools.cache
def photo(number: int, height: int = 48, width: int = 40) -> Image.Image:
    """Smooth shapes, texture, and an area of one colour."""
    rng = np.random.default_rng(number)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 5, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    pixels = (pixels + rng.integers(-12, 13, pixels.shape)).clip(20 * (number % 3), 255)
    pixels[: height // 4, width // 2 :] = (255, 200, 3)
    return Image.fromarray(pixels.astype(np.uint8))


def tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def drawn_by(operation, seed: int) -> list[float]:
    """The arguments that timm draws for an operation."""
    found, does = [], operation.aug_fn
    operation.aug_fn = lambda image, argument=0, **how: found.append(argument) or image
    random.seed(seed)
    operation(None)
    operation.aug_fn = does
    return found


@pytest.mark.parametrize("policy", ["rand-m9-p1-mstd3-inc1", "rand-m4-p1-mstd4", "rand-m5-p1-t3a", "originalr"])
def test_each_operation_is_pillows(policy):
    """To the bit, and to one level of a few pixels where the bicubic filter moves them."""
    made = create_policy(CFG, policy)
    operations = made.ops if hasattr(made, "ops") else [operation for pair in made.policy for operation in pair]
    apart: dict[str, list[Tensor]] = {}
    for operation in operations:
        name, operation.prob = operation.aug_fn.__name__.removeprefix("_"), 1.0
        for seed in range(8) if name in GROUPS else ():
            image = photo(seed)
            (argument,) = drawn_by(operation, seed)
            random.seed(seed)
            theirs = tensor(operation(image)).int()
            ours = apply_operations(tensor(image)[None].contiguous(), [[(name, argument)]], fill_of(CFG))[0]
            apart.setdefault(name, []).append((ours.int() - theirs).abs())
    assert len(apart) >= 2
    for name, found in apart.items():
        values = torch.stack(found)
        moves = name.startswith(("rotate", "shear", "translate"))
        assert values.max() <= moves, name
        assert (values > 0).float().mean() <= PIXELS_APART * moves, name


@pytest.mark.parametrize("values", [[7], [0, 255], [3, 3, 3, 250], list(range(256))])
def test_few_values_are_equalized_and_stretched_as_by_pillow(values):
    row = torch.tensor(values, dtype=torch.uint8).repeat(40)[:320]
    image = Image.fromarray(row.view(1, -1, 1).expand(4, -1, 3).contiguous().numpy())
    for operation in create_policy(CFG, "rand-m9-p1").ops[:2]:
        name = operation.aug_fn.__name__
        ours = apply_operations(tensor(image)[None].contiguous(), [[(name, 0)]], ())[0]
        assert torch.equal(ours, tensor(operation(image))), name


def dataset(where: str, source: Source | None = None, **augment) -> LabelledImages:
    given = {"auto_augment": POLICY, "random_erasing": 0.25, "on": where} | augment
    source = Synthetic(64, 3, (60, 50)) if source is None else source
    return LabelledImages(source, finetune_transform(CFG, AugmentConfig(**given)), seed=3)


class Photos(Synthetic):
    """Photos instead of noise."""

    def __init__(self) -> None:
        super().__init__(8, 3, (70, 60))

    def __getitem__(self, index: int) -> Sample:
        return Sample(tensor(photo(index, 70, 60)), 0)


def packed(samples: LabelledImages, keys) -> Augmented:
    return collate([Item(samples[key], []) for key in keys]).opened().parts[0]


def test_a_sample_is_drawn_and_looks_as_on_the_cpu():
    """The same crop, operations, magnitudes and rectangle; pixels differ where a filter is followed by a steep map."""
    keys = [(epoch, index) for epoch in range(4) for index in range(8)]
    batch = packed(dataset("gpu", Photos()), keys)
    ours = batch.to(CPU)
    theirs = torch.stack([dataset("cpu", Photos())[key][0] for key in keys])
    assert 2 <= len(batch.erased) < len(keys)
    kept = torch.ones_like(ours, dtype=torch.bool)
    for number, (top, left, height, width, _) in batch.erased:
        kept[number, :, top : top + height, left : left + width] = False
    differ = (ours - theirs).abs() > 1e-6
    assert differ[kept].float().mean() < PIXELS_APART
    assert differ[~kept].all(), "noise"
    level = 1 / (255 * min(CFG.std))
    assert ((ours - theirs).abs()[kept] > 8 * level).float().mean() < 1e-4


def test_operations_and_rectangles_are_as_frequent_as_timms():
    """The draws are timm's; this counts them."""
    draws = dataset("gpu", Synthetic(64, 3, CFG.size))
    samples = [draws[epoch, index][0] for epoch in range(24) for index in range(64)]
    names = Counter(name for one in samples for name, _ in one.operations)
    assert len(names) == 15
    expected = len(samples) / 15  # two layers, each with probability 0.5
    assert max(abs(count - expected) for count in names.values()) < 5 * expected**0.5
    erased = sum(one.erased is not None for one in samples)
    assert abs(erased - len(samples) / 4) < 5 * (len(samples) * 3 / 16) ** 0.5
    degrees = [abs(argument) for one in samples for name, argument in one.operations if name == "rotate"]
    assert abs(np.mean(degrees) - 27) < 0.7
    assert max(degrees) <= 30


def test_a_batch_is_the_sum_of_its_parts(monkeypatch):
    samples = dataset("gpu", random_erasing=0.6)
    keys = [(0, index) for index in range(8)]
    parts = [packed(samples, part).to(CPU) for part in (keys[:4], keys[4:])]
    whole = packed(samples, keys)
    assert torch.equal(whole.to(CPU), torch.cat(parts))
    assert torch.equal(whole.to(CPU), torch.cat(parts)), "the batch itself was changed"
    for module in (operations, augmented):
        monkeypatch.setattr(module, "CHUNK", 1)
    assert torch.equal(whole.to(CPU), torch.cat(parts)), "image by image"


def test_workers_send_the_same_batches():
    plan = BatchPlan.create(64, 8, 4, 1, seed=0)
    found = [
        [batch[0].to(CPU) for batch in TrainBatches(dataset("gpu"), plan, 0, range(3), Workers(count))]
        for count in (0, 2)
    ]
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_noise_is_normal_and_belongs_to_its_key():
    imgs = torch.zeros(3, 3, 64, 64)
    erase(imgs, [(0, Erased(0, 0, 64, 60, 5)), (2, Erased(0, 0, 64, 60, 2**62 + 1))])
    assert not imgs[1].any()
    assert not imgs[..., 60:].any()
    noise = imgs[[0, 2], :, :, :60]
    assert noise.mean().abs() < 0.03
    assert abs(noise.std() - 1) < 0.02
    assert 3 < noise.abs().max() < 4.5
    assert not torch.isclose(noise[0], noise[1]).float().mean() > 0.01
    alone = erase(torch.zeros(1, 3, 64, 64), [(0, Erased(0, 0, 64, 60, 5))])
    assert torch.equal(alone[0], imgs[0])


INVERTED = {"_target_": "torchvision.transforms.v2.RandomInvert", "p": 0.5}


@pytest.mark.parametrize(
    "given",
    [
        {"bit_depth": 12},
        {"dtype": "float32", "normalize": "image", "mean": [], "std": []},
        {"dtype": "float32", "normalize": "window", "low": 10, "high": 4000, "mean": [], "std": []},
        {"bit_depth": 12, "transforms": [INVERTED]},
    ],
)
def test_other_pixels_are_normalised_and_transformed_as_on_the_cpu(given):
    cfg = DataConfig(**{"image_size": 32, "in_chans": 2, "mean": [0.5, 0.4], "std": [0.2, 0.1]} | given)
    image = torch.randint(0, 4096, (2, 40, 40)).to(torch.float32 if cfg.dtype == "float32" else torch.uint16)
    results: list = []
    for where in ("cpu", "gpu"):
        transform = finetune_transform(cfg, AugmentConfig(on=where))
        seed_globals(0, Stream.AUGMENT)
        results.append(transform(image))
    assert isinstance(results[1], Drawn)
    assert torch.equal(collate([Item((results[1], 0), [])]).parts[0].to(CPU)[0], results[0])


@pytest.mark.parametrize(
    ("augment", "message"),
    [
        ({"on": "device"}, "augment.on must be one of cpu, gpu; got 'device'"),
        ({"auto_augment": "augmix-m3"}, "augment.on must be cpu with augment.auto_augment=augmix-m3: AugMix"),
        ({"auto_augment": "rand-m9-t3a"}, "augment.on must be cpu with augment.auto_augment=rand-m9-t3a: GaussianBlur"),
    ],
)
def test_what_the_device_cannot_do_is_refused(augment, message):
    with pytest.raises(ConfigError) as error:
        dataset("gpu", **augment)
    assert str(error.value) == message


def test_a_source_of_other_pixels_is_refused():
    with pytest.raises(ConfigError, match="uint8 of 3 channels; got uint16 of 3"):
        finetune_transform(CFG, AugmentConfig(POLICY, on="gpu"))(torch.zeros(3, 60, 60, dtype=torch.uint16))


def test_maps_and_boxes_are_refused():
    overrides = [*TINY_FINETUNE[1:], "objective=segment", "objective.classes=3", "augment.on=gpu"]
    with pytest.raises(ConfigError, match="augment.on must be cpu with objective: .*Segment, whose targets are maps"):
        Finetuning(compose("finetune", overrides))
