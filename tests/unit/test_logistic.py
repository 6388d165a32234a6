"""Logistic regression: its minimum, its cross-validation, and what it folds into."""

import pytest
import torch
import torch.nn.functional as F

from fcmae.config import ProbeConfig
from fcmae.distributed import World
from fcmae.errors import ConfigError, UsageError
from fcmae.evaluation import logistic
from fcmae.evaluation.features import Features
from fcmae.evaluation.logistic import class_shares, cross_validate, fit, stratified_folds
from fcmae.evaluation.probe import probe_by_lbfgs, table

CPU = World(0, 1, 0, 1, torch.device("cpu"))


def clusters(count, seed=0, spread=1.5):
    """Three unbalanced classes on features of very different scale, one of them constant."""
    rng = torch.Generator().manual_seed(seed)
    labels = (torch.arange(count) % 6).clamp(max=2)
    values = 2 * F.one_hot(labels, 8).float() + spread * torch.randn(count, 8, generator=rng)
    values[:, 5] = 3.0
    return values * torch.logspace(-3, 3, 8) + 7, labels


@pytest.mark.parametrize("weighted", [False, True])
def test_it_is_the_minimum(weighted):
    """The gradient of the penalised loss, written down again, is zero, and the loss is the weighted one."""
    values, labels = clusters(90)
    weights = class_shares(labels, 3) if weighted else None
    linear = fit(values, labels, 3, [0.1], weights)[0.1]
    values = values.double()
    std = values.std(0, correction=0)
    std[5] = 1
    weight = (linear.weight * std).requires_grad_()
    bias = linear.bias.clone().requires_grad_()
    shift = linear.weight @ values.mean(0)  # of the bias, in folding
    logits = ((values - values.mean(0)) / std) @ weight.T + (bias + shift)
    losses = F.cross_entropy(logits, labels, reduction="none")
    loss = (losses if weights is None else losses * weights[labels]).mean() + 0.05 * weight.square().sum()
    for gradient in torch.autograd.grad(loss, (weight, bias)):
        assert gradient.abs().max() < 1e-6


def test_it_is_deterministic_and_a_weaker_penalty_fits_better():
    values, labels = clusters(60)
    once, again = (fit(values, labels, 3, [1e-3, 1.0, 100.0]) for _ in range(2))
    assert all(torch.equal(once[l2].weight, again[l2].weight) for l2 in once)
    loss = {l2: float(F.cross_entropy(linear(values), labels)) for l2, linear in once.items()}
    assert loss[1e-3] < loss[1.0] < loss[100.0]


def test_weights_by_inverse_frequency_have_a_mean_of_one_over_images():
    labels = torch.tensor([0, 0, 0, 2])
    assert class_shares(labels, 3).tolist() == pytest.approx([4 / 6, 0, 2])
    assert class_shares(labels, 3)[labels].mean() == pytest.approx(1)


def test_folds_are_stratified():
    labels = torch.tensor([0] * 23 + [1] * 7 + [2] * 2 + [3])
    folds = stratified_folds(labels, 5, seed=1)
    assert folds.tolist() == stratified_folds(labels, 5, seed=1).tolist()
    assert folds.tolist() != stratified_folds(labels, 5, seed=2).tolist()
    assert folds[-1] == -1  # the only one of its class
    for label in (0, 1, 2):
        counts = folds[labels == label].bincount(minlength=5)
        assert counts.max() - counts.min() <= 1
    sizes = folds[:-1].bincount()
    assert sizes.max() - sizes.min() <= 1
    with pytest.raises(UsageError, match="data.path has no class with two images"):
        stratified_folds(torch.arange(4), 5, seed=0)


def test_cross_validation_scores_images_that_it_did_not_see():
    """Noise as features: without a penalty the training labels are fitted, the held-out ones are not."""
    values, labels = torch.randn(40, 60), torch.arange(40) % 2
    chosen = cross_validate(values, labels, 2, stratified_folds(labels, 4, 0), [1e-4, 100.0])
    assert chosen.l2 == 100.0
    assert chosen.log_loss[100.0] == pytest.approx(0.69, abs=0.05)
    assert chosen.log_loss[1e-4] > 1
    assert chosen.logits.shape == (40, 2)


def test_of_penalties_that_are_as_good_the_largest_is_taken():
    """Within one standard error of the least log loss; not where the labels say more than that."""
    values, labels = clusters(36, spread=2.0)
    chosen = cross_validate(values, labels, 3, stratified_folds(labels, 4, 0), [0.1, 0.3, 1.0, 10.0, 1e6])
    least = min(chosen.log_loss, key=chosen.log_loss.get)
    assert least <= chosen.l2 < 1e6
    assert chosen.log_loss[chosen.l2] >= chosen.log_loss[least]
    noise, labels = torch.randn(40, 60), torch.arange(40) % 2
    of_noise = cross_validate(noise, labels, 2, stratified_folds(labels, 4, 0), [1.0, 10.0, 100.0, 1e6])
    assert of_noise.l2 > min(of_noise.log_loss, key=of_noise.log_loss.get)  # which is the least by chance


def config(**kwargs):
    return ProbeConfig(checkpoint="x", solver="lbfgs", **kwargs)


def test_the_probe_never_chooses_on_the_validation_labels():
    train, val = [Features(*clusters(120))], Features(*clusters(60, seed=1))
    result = probe_by_lbfgs(train, val, 3, config(), CPU)
    assert result["top1"] > 60
    wrong = probe_by_lbfgs(train, Features(val.values, (val.labels + 1) % 3), 3, config(), CPU)
    assert (wrong["l2"], wrong["all"]) == (result["l2"], result["all"])
    assert wrong["top1"] < 30
    assert result["chosen"] == "5-fold cross-validation on the training images"
    few = probe_by_lbfgs([Features(*clusters(4))], val, 3, config(folds=50), CPU)
    assert few["chosen"] == "2-fold cross-validation on the training images"
    assert [line.split()[0] for line in table(result).splitlines()] == [
        "top1", "balanced_accuracy", "precision", "recall", "f1", "auroc", "average_precision", "ece"]  # fmt: skip


def test_class_weights_of_the_probe():
    train, val = [Features(*clusters(120))], Features(*clusters(60, seed=1))
    plain, weighted, listed = (
        probe_by_lbfgs(train, val, 3, config(l2=1.0, class_weights=weights), CPU)
        for weights in (None, "auto", [2.0, 2.0, 0.5])
    )
    assert weighted == listed  # a sixth, a sixth and four sixths of the images
    assert weighted["balanced_accuracy"] > plain["balanced_accuracy"]
    with pytest.raises(ConfigError, match=r"class_weights must be 3 numbers, one per class; got \[1.0, 2.0\]"):
        probe_by_lbfgs(train, val, 3, config(l2=1.0, class_weights=[1.0, 2.0]), CPU)


def test_few_images_take_one_thread(monkeypatch):
    """Several processes of a study with a thread per core each took twenty times as long."""
    seen = []
    minimum = logistic._minimum
    monkeypatch.setattr(logistic, "_minimum", lambda *args: (seen.append(torch.get_num_threads()), minimum(*args))[1])
    values, labels = clusters(60)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        fit(values, labels, 3, [0.1, 1])
        assert (seen, torch.get_num_threads()) == ([1, 1], 3)
    finally:
        torch.set_num_threads(threads)


def test_folds_of_another_cross_validation_are_not_taken(tmp_path):
    values, labels = clusters(60)
    for folds, l2s in ((4, [0.1, 1.0]), (4, [0.1]), (3, [0.1])):
        given = (values, labels, 3, stratified_folds(labels, folds, 0), l2s)
        found, expected = cross_validate(*given, folder=tmp_path), cross_validate(*given)
        assert found.log_loss == expected.log_loss
        assert torch.equal(found.logits, expected.logits)
