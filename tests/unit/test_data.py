import dataclasses
import functools
import gzip
import struct

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from fcmae.config import AugmentConfig, DataConfig
from fcmae.data.loading import TrainBatches, Workers, eval_loader
from fcmae.data.pixels.decode import decode
from fcmae.data.pixels.policies import create_policy
from fcmae.data.pixels.transforms import denormalize, eval_transform, finetune_transform, normalize, pretrain_transform
from fcmae.data.plan import BatchPlan, MicroBatches
from fcmae.data.samples import EvaluationImages, LabelledImages, MaskedImages
from fcmae.data.sources import (
    FashionMNIST,
    ImageFolder,
    Synthetic,
    few_labels,
    require_labels,
    train_source,
    val_source,
)
from fcmae.errors import ConfigError, UsageError
from fcmae.randomness import Stream, seed_globals
from tests.interchange import timms_transform


def write_image(path, mode="RGB", size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    bands = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], bands), dtype=np.uint8)
    Image.fromarray(pixels.squeeze(), mode=None).convert(mode).save(path)


@pytest.fixture
def folder(tmp_path):
    for name in ("cat/1.png", "cat/2.jpg", "dog/deep/3.png"):
        write_image(tmp_path / name)
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    return tmp_path


def test_imagefolder_has_a_class_for_each_folder(folder):
    source = ImageFolder(folder)
    assert source.classes == ["cat", "dog"]
    assert [source.label(i) for i in range(len(source))] == [0, 0, 1]
    image, label = source[2]
    image = decode(image, 3)
    assert (image.shape, image.dtype, label) == ((3, 30, 40), torch.uint8, 1)
    assert source.describe(2).endswith("dog/deep/3.png")


def test_a_flat_folder_has_no_labels(tmp_path):
    write_image(tmp_path / "a.png", "L")
    source = ImageFolder(tmp_path)
    assert source.classes is None
    assert source[0].label is None
    with pytest.raises(UsageError, match=r"data.path has no labels: .* is in no folder of a class; every image"):
        require_labels(source, "data.path")


def test_the_parts_of_a_data_set_are_no_classes(tmp_path):
    for name in ("train/cat/1.png", "train/dog/1.png", "Val/cat/1.png", "Val/dog/1.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        write_image(tmp_path / name, "L")
    with pytest.raises(UsageError, match="data.path has the classes Val, train, which are parts .*data.path=FOLDER/"):
        require_labels(ImageFolder(tmp_path), "data.path")
    assert require_labels(ImageFolder(tmp_path / "train"), "data.path") == ["cat", "dog"]


def test_a_folder_without_images_is_named(tmp_path):
    with pytest.raises(UsageError, match="is not a folder"):
        ImageFolder(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="has no images"):
        ImageFolder(tmp_path / "empty")
    with pytest.raises(UsageError, match=r"data.path=FOLDER"):
        train_source(DataConfig())
    with pytest.raises(UsageError, match=r"data.val_path=FOLDER"):
        val_source(DataConfig())


def write_fashion_mnist(folder, count=20):
    rng = np.random.default_rng(0)
    for split in ("train", "t10k"):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        for kind, values in (("images-idx3", images), ("labels-idx1", labels)):
            header = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
            with gzip.open(folder / f"{split}-{kind}-ubyte.gz", "wb") as file:
                file.write(header + values.tobytes())


def test_fashion_mnist_from_a_folder(tmp_path):
    write_fashion_mnist(tmp_path)
    of_folder = functools.partial(DataConfig, name="fashion_mnist", path=str(tmp_path))
    source = train_source(of_folder(in_chans=1, mean=[0.5], std=[0.5]))
    assert len(source) == 20
    assert source[13].image.shape == (1, 28, 28)
    assert torch.equal(train_source(of_folder())[13].image, source[13].image.expand(3, -1, -1))
    with pytest.raises(ConfigError, match=r"data.in_chans must be 1 or 3 with data=fashion_mnist"):
        of_folder(in_chans=2, mean=[0.5, 0.5], std=[0.5, 0.5])
    assert source[13].label == 3
    assert source.classes[9] == "Ankle boot"


def test_fashion_mnist_missing_says_all_three_ways(tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise RuntimeError("no network")

    monkeypatch.setattr(FashionMNIST, "DEBIAN", tmp_path / "no")
    monkeypatch.setattr(FashionMNIST, "CACHE", tmp_path / "cache")
    monkeypatch.setattr("torchvision.datasets.FashionMNIST.__init__", no_network)
    with pytest.raises(UsageError, match=r"data.path=FOLDER.*dataset-fashion-mnist.*torchvision"):
        FashionMNIST(None, train=True)
    with pytest.raises(UsageError, match=r"data.path .* lacks train-images"):
        FashionMNIST(tmp_path, train=True)


def test_few_labels_are_balanced_and_chosen_by_the_seed():
    source = Synthetic(200, 1, (8, 8))
    few = few_labels(source, 3, seed=0)
    assert sorted(few.label(i) for i in range(len(few))) == sorted(list(range(10)) * 3)
    assert few.indices == few_labels(source, 3, seed=0).indices
    assert few.indices != few_labels(source, 3, seed=1).indices
    with pytest.raises(
        UsageError, match="labels_per_class must be at most 20, the number of images of class 0; got 21"
    ):
        few_labels(source, 21, seed=0)


CFG = DataConfig(name="synthetic", image_size=32, length=50, in_chans=3)


def test_pretraining_samples_are_raw_and_functions_of_seed_epoch_and_index():
    source = Synthetic(50, 3, (40, 40))
    dataset = MaskedImages(source, pretrain_transform(CFG), (4, 4), seed=0)
    image, noise = dataset[3, 7]
    assert (image.shape, image.dtype, noise.shape) == ((3, 32, 32), torch.uint8, (16,))
    torch.rand(5)  # whatever was drawn before
    again = dataset[3, 7]
    assert torch.equal(image, again[0])
    assert torch.equal(noise, again[1])
    for other in (dataset[4, 7], dataset[3, 8], MaskedImages(source, pretrain_transform(CFG), (4, 4), seed=1)[3, 7]):
        assert not torch.equal(noise, other[1])


def test_finetuning_samples_are_normalised_and_deterministic():
    augment = AugmentConfig(auto_augment="rand-m9-mstd0.5-inc1", random_erasing=1.0)
    dataset = LabelledImages(Synthetic(50, 3, (40, 40)), finetune_transform(CFG, augment), seed=0)
    image, label = dataset[0, 13]
    assert (image.dtype, image.shape, label) == (torch.float32, (3, 32, 32), 3)
    assert torch.equal(image, dataset[0, 13][0])
    assert not torch.equal(image, dataset[1, 13][0])


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "augmix-m5-w4-d2", "original"])
def test_augmentation_is_that_of_timms_create_transform(policy):
    """Everything after crop and flip, bicubic throughout as in the official recipe, for equal random numbers."""
    cfg = dataclasses.replace(CFG, mean=[1.0, 0.456, 0.406])
    ours = finetune_transform(cfg, AugmentConfig(auto_augment=policy, random_erasing=0.5)).transforms[1:]
    how = {"interpolation": "bicubic", "re_prob": 0.5, "re_mode": "pixel", "mean": cfg.mean, "std": cfg.std}
    theirs = timm.data.create_transform(32, is_training=True, auto_augment=policy, **how).transforms[2:]
    for seed in range(20):
        image = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
        results = []
        for transforms, start in ((ours, image), (theirs, F.to_pil_image(image))):
            seed_globals(seed, Stream.AUGMENT)
            results.append(v2.Compose(transforms)(start))
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("policy", ["rand-m0-p1", "rand-m0-p1-inc1", "rand-m10-p1-inc1", "rand-m10-p1-t3a"])
def test_every_operation_runs_at_the_ends_of_its_range(policy):
    """Pillow 13 refuses to posterize to 0 bits, which timm asks for at the end."""
    image = Image.new("RGB", (8, 8), (9, 200, 30))
    for operation in create_policy(CFG, policy).ops:
        assert operation(image).size == (8, 8)
        if operation.name.startswith("Posterize"):
            assert operation.aug_fn(image, 0).getpixel((3, 3)) == (0, 0, 0)


def test_numpy_and_torch_draw_different_numbers():
    """Both are Mersenne Twisters, of one stream if their seeds are the same."""
    seed_globals(3, Stream.AUGMENT, 1, 2)
    ours, theirs = (set(draw(0, 2**31, (20,)).tolist()) for draw in (torch.randint, np.random.randint))
    assert not ours & theirs


def test_auto_augment_needs_three_channels_and_a_known_policy():
    grey = DataConfig(in_chans=1, mean=[0.5], std=[0.5])
    with pytest.raises(ConfigError, match="augment.auto_augment must be null with data.in_chans=1; got 'rand-m9'"):
        finetune_transform(grey, AugmentConfig(auto_augment="rand-m9"))
    with pytest.raises(ConfigError, match="augment.auto_augment must be a policy of timm, .*; got 'strong'"):
        finetune_transform(CFG, AugmentConfig(auto_augment="strong"))


def test_normalize_and_back():
    raw = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    imgs = normalize(raw, CFG.mean, CFG.std)
    expected = (raw / 255 - torch.tensor(CFG.mean).view(3, 1, 1)) / torch.tensor(CFG.std).view(3, 1, 1)
    torch.testing.assert_close(imgs, expected)
    torch.testing.assert_close(denormalize(imgs, CFG.mean, CFG.std), raw / 255)
    assert normalize(imgs, CFG.mean, CFG.std) is imgs


@pytest.mark.parametrize(("size", "raw"), [(32, (50, 80)), (384, (50, 80)), ([32, 64], (50, 80))])
def test_evaluation_crops_below_384_and_warps_from_there_on(size, raw):
    cfg = DataConfig(image_size=size)
    gradient = torch.arange(raw[1], dtype=torch.uint8).expand(3, *raw)
    out = eval_transform(cfg)(gradient)
    assert out.shape == (3, *cfg.image_size)
    width = out[0, 0, -1].int() - out[0, 0, 0].int()
    if size == 384:
        assert width >= raw[1] - 3  # the whole width is there
    if size == 32:
        assert width < 50 * 0.9  # the centre of the short side


@pytest.mark.parametrize("raw", [(60, 84), (84, 60), (150, 40), (31, 57), (64, 96)])
@pytest.mark.parametrize(("size", "crop_pct"), [(32, 0.875), ([32, 64], 0.875), ([64, 32], 1.0), ([96, 64], 0.8)])
def test_evaluation_keeps_the_aspect_ratio_as_timm_does(raw, size, crop_pct):
    """To one level in 255 where no value is clipped: timm resizes with Pillow. Sizes and files that are no squares."""
    cfg = DataConfig(image_size=size, crop_pct=crop_pct)
    transform = timms_transform(
        input_size=(3, *cfg.size), interpolation="bicubic", crop_pct=crop_pct, crop_mode="center", normalize=False
    )
    pixels = torch.randint(64, 192, (3, *raw), dtype=torch.uint8)
    ours, theirs = eval_transform(cfg)(pixels), transform(F.to_pil_image(pixels))
    assert ours.shape == (3, *cfg.size)
    assert (ours.int() - theirs.int()).abs().max() <= 1


def test_a_plan_covers_each_sample_once_an_epoch():
    plan = BatchPlan.create(103, 20, 5, 2, seed=0)
    assert (plan.steps_per_epoch, plan.accum_steps) == (5, 2)
    epoch = [key for step in range(5) for key in plan.global_batch(step)]
    assert len(set(epoch)) == 100
    assert {e for e, _ in epoch} == {0}
    assert {e for e, _ in plan.global_batch(5)} == {1}
    assert [i for _, i in plan.global_batch(0)] != [i for _, i in plan.global_batch(5)]


@pytest.mark.parametrize(("ranks", "micro"), [(1, 20), (1, 5), (2, 10), (2, 5), (4, 5), (3, 20), (3, 3), (7, 2)])
def test_the_samples_of_a_step_do_not_depend_on_ranks_or_micro_batches(ranks, micro):
    plan = BatchPlan.create(103, 20, micro, ranks, seed=3)
    streams = [list(MicroBatches(plan, rank, 2, 8)) for rank in range(ranks)]
    assert {len(s) for s in streams} == {6 * plan.accum_steps} == {len(MicroBatches(plan, 0, 2, 8))}
    for i, step in enumerate(range(2, 8)):
        parts = slice(i * plan.accum_steps, (i + 1) * plan.accum_steps)
        keys = sorted(key for stream in streams for part in stream[parts] for key in part)
        assert keys == sorted(BatchPlan(103, 20, 20, 1, 3).global_batch(step))


def test_starting_late_gives_the_same_batches():
    plan = BatchPlan.create(50, 10, None, 1, seed=0)
    assert list(MicroBatches(plan, 0, 0, 12))[7:] == list(MicroBatches(plan, 0, 7, 12))


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_do_not_depend_on_workers(workers):
    plan = BatchPlan.create(50, 10, 5, 1, seed=0)
    dataset = MaskedImages(Synthetic(50, 3, (40, 40)), pretrain_transform(CFG), (4, 4), seed=0)

    def read(count):
        return list(TrainBatches(dataset, plan, 0, range(3, 6), Workers(count)))

    for ours, expected in zip(read(workers), read(0), strict=True):
        assert torch.equal(ours[0], expected[0])
        assert torch.equal(ours[1], expected[1])


@pytest.mark.parametrize("world_size", [1, 3])
def test_evaluation_reads_every_sample_once(world_size):
    dataset = EvaluationImages(Synthetic(50, 3, (40, 40)), lambda image: image.float().mean())
    seen = []
    for rank in range(world_size):
        loader = eval_loader(dataset, 7, rank=rank, world_size=world_size, workers=Workers())
        seen += [value for batch in loader for value in batch.parts[0].tolist()]
    assert sorted(seen) == sorted(dataset[i][0].item() for i in range(50))
