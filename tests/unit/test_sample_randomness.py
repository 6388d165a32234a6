"""What is random in a step belongs to the sample: distributed as timm's, the same for any ranks and micro-batches."""

import numpy as np
import pytest
import timm.data
import torch
from timm.layers import DropPath
from torch._dynamo.testing import CompileCounter

from fcmae.config import compose
from fcmae.models.drop_path import SampleDropPath, SampleKeys
from fcmae.randomness import sample_keys, step_generator, uniform
from fcmae.tasks.finetuning import Finetuning
from fcmae.tasks.mixup import Mixup
from tests.conftest import TINY_FINETUNE

PAIRS = 4000


def test_numbers_are_uniform_and_independent_of_each_other():
    """Over samples, layers, steps and seeds, within four standard deviations (correlations: five)."""
    keys = torch.stack([sample_keys(seed, step, range(2000)) for seed, step in ((0, 0), (0, 1), (1, 0))])
    drawn = torch.stack([uniform(row, layer) for row in keys for layer in range(6)])
    assert drawn.min() >= 0
    assert drawn.max() < 1
    for power, variance in ((1, 1 / 12), (2, 4 / 45)):
        means = drawn.pow(power).mean(1)
        torch.testing.assert_close(means, torch.full((18,), 1 / (power + 1)), rtol=0, atol=4 * (variance / 2000) ** 0.5)
    neighbours = torch.cat([drawn, drawn.roll(1, dims=1)])
    assert torch.corrcoef(neighbours).fill_diagonal_(0).abs().max() < 5 / 2000**0.5
    assert len(keys.unique()) == keys.numel()


def test_keys_are_those_of_the_position():
    whole = sample_keys(3, 7, range(64))
    assert torch.equal(torch.cat([sample_keys(3, 7, range(a, b)) for a, b in ((0, 22), (22, 43), (43, 64))]), whole)


def test_drop_path_is_distributed_as_timms():
    """The share of samples that are left, for each layer, and their scale; a sample is dropped as a whole."""
    keys = SampleKeys(layers=4)
    keys.values = sample_keys(0, 0, range(5000))
    x = torch.ones(5000, 2, 1, 3)
    for layer in range(4):
        ours, theirs = SampleDropPath(0.3, layer, keys)(x), DropPath(0.3)(x)
        assert torch.equal(ours.unique(), theirs.unique())
        assert ours.flatten(1).unique(dim=1).shape[1] == 1
        assert torch.equal(ours[:, 0, 0, 0] > 0, uniform(keys.values, layer) >= 0.3)
        assert ours.mean().item() == pytest.approx(1, abs=4 * (0.3 / 0.7 / 5000) ** 0.5)
    assert torch.equal(SampleDropPath(0.3, 0, keys).eval()(x), x)


def draw(mixup, cutmix, size, seed=0):
    mixing = Mixup(mixup, cutmix, 10, size)
    return mixing, mixing.draw(step_generator(seed, 0), PAIRS)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.3, 0.3), (0.8, 1.0)])
def test_shares_are_distributed_as_timms(mixup, cutmix):
    """Mean and spread of a sample's own share, and the share of pairs that are cut."""
    size = (32, 24)
    _, drawn = draw(mixup, cutmix, size)
    share, top, bottom, left, right = drawn.unbind(1)
    cut = bottom > top
    theirs = timm.data.Mixup(mixup, cutmix, mode="pair", label_smoothing=0, num_classes=2)
    np.random.seed(0)
    expected = []
    for _ in range(PAIRS // 500):
        imgs = torch.zeros(1000, 1, *size)
        _, targets = theirs(imgs, torch.arange(1000) // 500)  # pairs are the first with the last
        expected.append(targets[:500, 0])
    other = torch.cat(expected)
    bound = 5 * share.std().item() * (2 / PAIRS) ** 0.5
    assert share.mean().item() == pytest.approx(other.mean().item(), abs=bound)
    assert share.std().item() == pytest.approx(other.std().item(), abs=bound)
    quantiles = torch.linspace(0.1, 0.9, 9)
    torch.testing.assert_close(share.quantile(quantiles), other.quantile(quantiles), rtol=0, atol=0.06)
    wanted = 0.5 if mixup and cutmix else float(cutmix > 0)
    assert cut.float().mean().item() == pytest.approx(wanted, abs=0.06)  # a box of less than a pixel cuts nothing
    area = (bottom - top) * (right - left) / (size[0] * size[1])
    torch.testing.assert_close(share[cut], 1 - area[cut])


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0)])
def test_pairs_are_mixed_as_timm_mixes_them_for_the_same_share_and_box(mixup, cutmix, monkeypatch):
    mixing, drawn = draw(mixup, cutmix, (8, 6))
    drawn = drawn[:3]
    imgs, labels = torch.randn(6, 3, 8, 6), torch.tensor([1, 2, 3, 3, 5, 0])
    theirs = timm.data.Mixup(mixup, cutmix, mode="pair", label_smoothing=0, num_classes=10)
    monkeypatch.setattr(theirs, "_params_per_elem", lambda n: (drawn[:, 0].numpy().copy(), np.full(n, cutmix > 0)))
    boxes = iter((tuple(row[1:].int().tolist()), row[0].item()) for row in drawn)
    monkeypatch.setattr("timm.data.mixup.cutmix_bbox_and_lam", lambda *_, **__: next(boxes))
    order = torch.tensor([0, 2, 4, 5, 3, 1])  # timm pairs the first with the last
    expected, targets = theirs(imgs[order].clone(), labels[order])
    ours, own = mixing(imgs, labels, drawn.repeat_interleave(2, dim=0))
    torch.testing.assert_close(ours[order], expected)
    torch.testing.assert_close(own[order], targets)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo looks at it
def test_random_steps_are_compiled_once_and_change_nothing():
    """Other keys are another input, so a step is neither compiled again nor repeated."""
    mixing = ("augment.mixup=0.8", "augment.cutmix=1.0", "model.drop_path_rate=0.5")
    task = Finetuning(compose("finetune", [*TINY_FINETUNE[1:], *mixing, "engine=timm"]))
    dense = Finetuning(compose("finetune", [*TINY_FINETUNE[1:], *mixing]))
    imgs, labels = torch.randn(8, 3, 32, 32), torch.arange(8)
    torch.compiler.reset()
    counter = CompileCounter()

    def losses(task=task):
        return [task.loss(task.model, [imgs, labels, *task.draw(step, range(8))])[0].item() for step in range(3)]

    eager = losses()
    task.model.compile(backend=counter, fullgraph=True)
    assert losses() == pytest.approx(eager, rel=1e-6)
    assert counter.frame_count == 1
    assert len(set(eager)) == 3
    assert losses(dense) == pytest.approx(eager, rel=1e-5)
