"""Linear classifiers on frozen features, and the features kept on disk."""

import os
from itertools import repeat

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from fcmae.config import DataConfig, LoaderConfig, ProbeConfig
from fcmae.data.sources import Synthetic, train_source
from fcmae.distributed import World
from fcmae.errors import UsageError
from fcmae.evaluation.cache import CachedExtractor, fingerprint
from fcmae.evaluation.features import Extractor, Features
from fcmae.evaluation.probe import Epochs, Heads, create_optimizer, probe, probe_by_sgd
from fcmae.models import create_backbone
from fcmae.optim.adamw import set_lr

CPU = World(0, 1, 0, 1, torch.device("cpu"))


def config(**kwargs) -> ProbeConfig:
    return ProbeConfig(checkpoint="x", **{"epochs": 20, "warmup_epochs": 2, "train_batch_size": 32, **kwargs})


def clusters(count: int, seed: int) -> Features:
    """Three classes that planes tell apart, on features of very different scale."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    centres = 4 * F.one_hot(labels, 6).float()
    return Features((centres + torch.randn(count, 6, generator=rng)) * torch.logspace(-2, 2, 6) + 7, labels)


@pytest.mark.parametrize(("optimizer", "blr"), [("lars", 30.0), ("sgd", 1.0), ("adamw", 0.1)])
def test_it_learns_what_is_linearly_separable(optimizer, blr):
    result = probe(repeat(clusters(300, 0)), clusters(90, 1), 3, config(optimizer=optimizer, blr=[blr]), CPU)
    assert result[0]["top1"] > 95
    assert "top5" not in result[0]  # of three classes
    assert result[0]["lr"] == pytest.approx(blr * 32 / 256)


@pytest.mark.parametrize("optimizer", ["lars", "sgd", "adamw"])
def test_each_learning_rate_trains_as_if_alone(optimizer):
    rates = [0.01, 1.0, 30.0]
    train, val = clusters(100, 0), clusters(60, 1)
    together = probe(repeat(train), val, 3, config(optimizer=optimizer, blr=rates, epochs=3), CPU)
    alone = [probe(repeat(train), val, 3, config(optimizer=optimizer, blr=[r], epochs=3), CPU)[0] for r in rates]
    assert together == alone
    assert len({head["top1"] for head in together}) > 1


@pytest.mark.parametrize("norm", ["batchnorm", "standardise"])
def test_the_rate_is_chosen_on_training_images(norm):
    """Wrong validation labels change what is reported, and nothing else."""
    train, val = clusters(150, 0), clusters(60, 1)
    cfg = config(blr=[1e-6, 1.0], norm=norm)
    result = probe_by_sgd(repeat(train), val, 3, cfg, CPU)
    assert (result["blr"], result["chosen"]) == (1.0, "one of 2 rates, on a fifth of the training images")
    assert result["top1"] == result["all"][1]["top1"] > 90
    wrong = probe_by_sgd(repeat(train), Features(val.values, (val.labels + 1) % 3), 3, cfg, CPU)
    assert wrong["blr"] == 1.0
    assert wrong["top1"] < 30
    assert probe_by_sgd(repeat(train), val, 3, config(blr=[1.0], norm=norm), CPU)["top1"] == result["top1"]


def test_features_of_crops_begin_again_for_the_second_training():
    seen = []
    epochs = Epochs(lambda epoch: seen.append(epoch) or clusters(60, epoch))
    probe_by_sgd(epochs, clusters(30, 9), 3, config(blr=[0.1, 1.0], epochs=3), CPU)
    assert seen == [0, 0, 1, 2, 0, 1, 2]


def test_a_batch_is_at_most_all_images_and_the_rate_follows():
    result = probe(repeat(clusters(40, 0)), clusters(30, 1), 3, config(train_batch_size=4096, blr=[0.1]), CPU)
    assert result[0]["lr"] == pytest.approx(0.1 * 40 / 256)


def test_lars_is_the_one_of_mae():
    """Weights: the gradient times 0.001 |w| / |g|, then momentum; biases: momentum alone (official MAE code)."""
    heads = Heads(1, 5, 3)
    weight, bias = heads.linears[0].weight, heads.linears[0].bias
    expected = [weight.detach().clone(), bias.detach().clone()]
    velocity = [torch.zeros_like(weight), torch.zeros_like(bias)]
    optimizer = create_optimizer(heads, [6.4], config(optimizer="lars"))
    for step in range(4):
        set_lr(optimizer, 0.5)
        weight.grad, bias.grad = torch.randn(3, 5), torch.randn(3)
        trust = 0.001 * expected[0].norm() / weight.grad.norm()
        for i, update in enumerate((trust * weight.grad, bias.grad.clone())):
            velocity[i] = 0.9 * velocity[i] + update
            expected[i] = expected[i] - 0.5 * 6.4 * velocity[i]
        optimizer.step()
        torch.testing.assert_close(weight.detach(), expected[0], msg=f"step {step}")
        torch.testing.assert_close(bias.detach(), expected[1], msg=f"step {step}")


def test_the_head_is_the_one_of_mae():
    heads = Heads(2, 256, 100)
    assert (heads.norm.affine, heads.norm.eps) == (False, 1e-6)
    assert heads.linears[0].weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert torch.equal(heads.linears[0].weight, heads.linears[1].weight)
    assert heads(torch.randn(4, 256)).shape == (2, 4, 100)


@pytest.fixture
def images(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (40, 40), (40 * i, 0, 200)).save(tmp_path / "images" / name / f"{i}.png")
    return tmp_path / "images"


class Counting:
    """An extractor that counts how often it had to work."""

    def __init__(self, folder, image_size=32, **kwargs) -> None:
        torch.manual_seed(0)
        backbone = create_backbone("convnextv2_atto", depths=(1, 1, 1, 1), dims=(8, 8, 8, 8))
        data = DataConfig(path=str(folder), val_path=str(folder), image_size=image_size)
        self.extract = Extractor(backbone, data, CPU, loader=LoaderConfig(workers=0), **kwargs)
        self.calls = 0

    def __getattr__(self, name):
        return getattr(self.extract, name)

    def __call__(self, source):
        self.calls += 1
        return self.extract(source)


def times_extracted(folder, cache, checkpoint="1", **kwargs) -> int:
    """How often the extractor had to work; what comes out is compared with what it gives without a cache."""
    counting = Counting(folder, **kwargs)
    source = train_source(counting.data)
    features = CachedExtractor(counting, cache, {"checkpoint": checkpoint})(source)
    fresh = counting.extract(source)
    assert torch.equal(features.values, fresh.values)
    assert torch.equal(features.labels, fresh.labels)
    return counting.calls


def test_features_are_extracted_once(images, tmp_path):
    cache = tmp_path / "features"
    assert [times_extracted(images, cache) for _ in range(3)] == [1, 0, 0]
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize(
    "change",
    [{"checkpoint": "2"}, {"image_size": 64}, {"precision": "bf16"}, {"layer": "mean"}],
    ids=lambda change: next(iter(change)),
)
def test_other_features_are_not_taken_for_these(images, tmp_path, change):
    assert times_extracted(images, tmp_path / "features") == 1
    assert times_extracted(images, tmp_path / "features", **change) == 1


def test_changed_images_are_extracted_again(images, tmp_path):
    cache = tmp_path / "features"
    assert times_extracted(images, cache) == 1
    Image.new("RGB", (40, 40), "red").save(images / "a" / "1.png")
    assert times_extracted(images, cache) == 1
    os.utime(images / "b" / "0.png", (1, 1))
    assert times_extracted(images, cache) == 1
    (images / "a" / "2.png").rename(images / "b" / "9.png")
    assert times_extracted(images, cache) == 1
    assert times_extracted(images, cache) == 0


def test_a_file_of_another_content_or_a_damaged_one_is_not_used(images, tmp_path, capsys):
    cache = tmp_path / "features"
    assert times_extracted(images, cache) == 1
    file = next(cache.iterdir())
    assert times_extracted(images, cache, "2") == 1
    other = next(path for path in cache.iterdir() if path != file)
    other.replace(file)  # as if two keys had the same hash
    assert times_extracted(images, cache) == 1
    file.write_bytes(file.read_bytes()[:300])
    assert times_extracted(images, cache) == 1
    assert "cannot be read" in capsys.readouterr().err
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    assert times_extracted(images, cache) == 1
    assert "its checksum is missing or wrong" in capsys.readouterr().err
    assert times_extracted(images, cache) == 0
    with safe_open(file, "pt") as opened:
        assert '"checkpoint": "1"' in opened.metadata()["wanted"]


@pytest.mark.parametrize("shape", [(4, 3), (4, 8, 1), (5, 8)])
def test_features_of_other_sizes_are_not_used(images, tmp_path, shape, capsys):
    cache = tmp_path / "features"
    assert times_extracted(images, cache) == 1
    file = next(cache.iterdir())
    with safe_open(file, "pt") as opened:
        metadata, labels = opened.metadata(), opened.get_tensor("labels")
    save_file({"values": torch.zeros(shape), "labels": labels}, file, metadata)
    file.chmod(0o644)
    assert times_extracted(images, cache) == 1
    assert "its arrays have other sizes; they are extracted again" in capsys.readouterr().err


def test_a_cache_that_cannot_be_written_is_a_line(images, tmp_path, capsys):
    (tmp_path / "features").write_text("a file where the folder should be")
    assert times_extracted(images, tmp_path / "features") == 1
    assert "are not kept" in capsys.readouterr().err


def test_a_fingerprint_is_of_the_labels_too():
    source = train_source(DataConfig(name="synthetic", length=12))
    before = fingerprint(source, DataConfig())
    assert before == fingerprint(source, DataConfig())
    assert before != fingerprint(train_source(DataConfig(name="synthetic", length=13)), DataConfig())
    source.label = lambda index: 0
    assert fingerprint(source, DataConfig()) != before


class Stored(Synthetic):
    """A source of the user's that reads a file."""

    def __init__(self, file):
        super().__init__(3, 3, (8, 8))


@pytest.mark.parametrize("name", ["data/deep/a.parquet", "train-001.tar", "cells/a.npy", "a.npy"])
def test_a_fingerprint_is_of_every_file_that_a_source_may_read(tmp_path, name):
    file = tmp_path / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"1")
    (file.parent / "loop").symlink_to(file.parent)
    cfg = {
        "data/deep/a.parquet": DataConfig(name="hf", path=str(tmp_path)),
        "train-001.tar": DataConfig(name="webdataset", val_path=[str(tmp_path / "train-{000..002}.tar")]),
        "cells/a.npy": DataConfig(name="webdataset", path=str(tmp_path / "c*" / "a.np?")),
        "a.npy": DataConfig(source={"_target_": f"{__name__}.Stored", "file": str(file)}),
    }[name]
    source = Stored(file)
    before = fingerprint(source, cfg)
    assert fingerprint(source, cfg) == before
    os.utime(file, (1, 1))
    assert fingerprint(source, cfg) != before


def test_a_single_image_is_too_few():
    with pytest.raises(UsageError, match="data.path has 1 image that can be read; a linear probe needs two or more"):
        probe(repeat(clusters(1, 0)), clusters(9, 1), 3, config(), CPU)
