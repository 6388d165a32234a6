"""Classes of different sizes: weights of the loss, balanced sampling, heads that read several stages."""

import itertools
import json

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import fcmae as package
from fcmae.checkpoints import checkpoint
from fcmae.config import compose
from fcmae.data.plan import BatchPlan, MicroBatches
from fcmae.data.sources import Subset
from fcmae.errors import ConfigError, UsageError
from fcmae.models.build import encoder_of
from fcmae.models.headed import Headed
from fcmae.models.pooled import pool_maps
from fcmae.tasks.finetuning import Finetuning
from fcmae.training.setup import create_plan
from tests.conftest import TINY_FINETUNE
from tests.results import assert_same, weights

LABELS = (0,) * 13 + (1,) * 3 + (4,) * 7


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Nine images of a, three of b; 32 px."""
    folder = tmp_path_factory.mktemp("unbalanced")
    for name, count in (("a", 9), ("b", 3)):
        (folder / name).mkdir()
        for i in range(count):
            Image.new("RGB", (40, 40), (20 * i, 100 * (name == "b"), 200)).save(folder / name / f"{i}.png")
    return folder


def args(images, *overrides):
    return [*TINY_FINETUNE, "data=imagefolder", f"data.path={images}", f"data.val_path={images}", *overrides]


def task(images, *overrides):
    return Finetuning(compose("finetune", args(images, *overrides)[1:]).settled({}))


@pytest.mark.parametrize("given", ["auto", "[2,0.5]"])
def test_class_weights_are_factors_on_the_loss(images, given):
    weights = torch.tensor([12 / 18, 2.0] if given == "auto" else [2, 0.5])
    objective = task(images, f"objective.class_weights={given}").objective
    output, labels = torch.randn(6, 2), torch.tensor([0, 1, 1, 0, 1, 0])
    losses = -output.log_softmax(1)[range(6), labels]
    torch.testing.assert_close(objective.loss(output, labels)[0], losses * weights[labels])
    shares = F.one_hot(labels, 2).float()
    torch.testing.assert_close(objective.loss(output, shares)[0], losses * weights[labels])


def test_class_weights_that_do_not_fit_are_a_line(images):
    with pytest.raises(ConfigError, match=r"objective.class_weights must be 2 numbers, one per class; got \[1.0\]"):
        task(images, "objective.class_weights=[1.0]")
    with pytest.raises(
        ConfigError, match=r"class_weights must be auto, null, or a positive number per class; got 'so'"
    ):
        task(images, "objective.class_weights=so")
    assert task(images, "objective.class_weights=auto", "data.labels_per_class=3",
                "optim.global_batch_size=6").objective.weights is None  # fmt: skip


def test_balanced_sampling_draws_every_class_equally_often():
    """The rarest class comes as often as the others, and none of its images twice before each has come."""
    plan = BatchPlan.create(23, 6, 2, 1, seed=3)
    balanced = BatchPlan(23, 6, 2, seed=3, labels=LABELS)
    assert balanced.steps_per_epoch == plan.steps_per_epoch
    for epoch in (0, 1):
        keys = balanced.keys(epoch).tolist()
        assert len(keys) == 23
        assert len({tuple(key) for key in keys}) == 23  # no sample, so no crop, comes twice
        classes = [LABELS[index] for _, index in keys]
        for first in range(0, 21, 3):
            assert sorted(classes[first : first + 3]) == [0, 1, 4]
        rare = [index for _, index in keys if LABELS[index] == 1]
        assert all(sorted(rare[first : first + 3]) == [13, 14, 15] for first in (0, 3))
    passes = [{number for number, _ in balanced.keys(epoch).tolist()} for epoch in range(4)]
    assert all(not a & b for a, b in itertools.pairwise(passes))
    assert balanced.keys(1).tolist() != balanced.keys(0).tolist()
    assert balanced.keys(1).equal(BatchPlan(23, 6, 2, seed=3, labels=LABELS).keys(1))


@pytest.mark.parametrize(("ranks", "micro"), [(1, 6), (1, 2), (2, 2), (3, 1)])
def test_a_step_of_balanced_sampling_is_the_same_on_any_ranks_and_after_any_start(ranks, micro):
    plan = BatchPlan(23, 6, micro, ranks, seed=3, labels=LABELS)
    for start in (0, 4):
        read = [list(MicroBatches(plan, rank, start, 8)) for rank in range(ranks)]
        for step in range(start, 8):
            first = (step - start) * plan.accum_steps
            of_step = [key for i in range(plan.accum_steps) for rank in read for key in rank[first + i]]
            assert of_step == plan.global_batch(step)


def test_the_plan_of_a_run_has_the_labels_of_its_images(images):
    from fcmae.distributed import World

    world = World(0, 1, 0, 1, torch.device("cpu"))
    balanced = task(images, "data.sampling=balanced")
    assert create_plan(balanced, world, None).labels == (0,) * 9 + (1,) * 3
    balanced.source = Subset(balanced.source, [0, *range(3, 12)])
    assert create_plan(balanced, world, None).labels == (0,) * 7 + (1,) * 3
    assert create_plan(task(images), world, None).labels is None
    balanced.source.label = lambda index: None
    with pytest.raises(UsageError, match=r"data.sampling=balanced needs a label of every image; .*/a/0.png has none"):
        create_plan(balanced, world, None)
    with pytest.raises(ConfigError, match=r"data.sampling must be uniform in pretraining.*; got 'balanced'"):
        compose("pretrain", ["data=synthetic", "data.sampling=balanced"])


def test_a_balanced_run_resumes_bit_for_bit(fcmae_here, images, tmp_path):
    run = args(images, "data.sampling=balanced", "objective.class_weights=auto", "optim.global_batch_size=4")
    fcmae_here(*run, "hydra.run.dir=whole")
    fcmae_here(*run, "hydra.run.dir=cut", "trainer.max_steps=2", check=75)
    fcmae_here(*run, "hydra.run.dir=cut")
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


def test_a_classifier_may_read_all_stages(fcmae_here, images, tmp_path):
    """It trains, is rebuilt from its checkpoint, evaluated and used as a backbone."""
    fcmae_here(*args(images, "objective.layer=stages_std", "optim.layer_decay=0.8"), "hydra.run.dir=run")
    model = package.load(tmp_path / "run@last")
    assert isinstance(model, Headed)
    imgs = torch.randn(2, 3, 32, 32)
    maps = model.backbone.forward_intermediates(imgs, intermediates_only=True)
    torch.testing.assert_close(model(imgs), model.head.fc(pool_maps(maps, "stages_std")))
    result = json.loads(fcmae_here("evaluate", "checkpoint=run@last").stdout)
    assert {"top1", "auroc", "images"} <= result.keys()
    rows = package.predict(str(tmp_path / "run@last"), [str(images / "a")])
    assert (rows.columns, rows.exclusive) == (["a", "b"], True)
    file = checkpoint.resolve(tmp_path / "run@last")
    assert encoder_of(checkpoint.read(file), file).num_classes == 0
    fcmae_here("export", "run@last", "--to", "timm", "--out", "timm")
