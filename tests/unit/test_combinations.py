"""Packed = masked, and resumed = uninterrupted, for every pair of values of what makes up a pretraining recipe."""

import copy
import itertools
import math
import re
import shutil
from pathlib import Path

import pytest
import timm
import torch

from fcmae.checkpoints import checkpoint
from fcmae.config import compose
from fcmae.data.collate import Item, collate
from fcmae.engines import ENGINES
from fcmae.tasks.pretraining import Pretraining
from fcmae.training.run import pretrain
from tests.conftest import TINY_PRETRAIN
from tests.results import assert_same

FACTORS = {
    "strides": ([1, 2, 2, 2], [2, 2, 2, 2], [4, 2, 2, 2], [8, 2, 2, 2], [4, 2, 2], [2, 2, 2, 2, 2]),
    "decoder": ("light", "unet"),
    "split": (1, 2),
    "mask": ("random", "block", "weighted"),
    "channels": (1, 3, 12),
    "backbone": ("convnext_atto", "convnextv2_atto"),
    "target": ("pixels", "hog", "laplacian", "channels", "teacher", "labels"),
}
"""``split``: predicted patches per side of a patch of the total stride."""
TEACHER = ("name=test_convnext", "checkpoint=teacher.pt", "channels=[0,0,0]")
DEPTHS, DIMS = [1, 1, 1, 1, 1], [8, 12, 16, 16, 24]


def pairs(values):
    return set(itertools.combinations(enumerate(values), 2))


def pairwise(factors):
    """Combinations that hold every pair of values of two factors; each is the one that adds most."""
    every = {values: pairs(values) for values in itertools.product(*(range(len(values)) for values in factors))}
    left = set().union(*every.values())
    while left:
        best = max(every, key=lambda values: len(every[values] & left))
        left -= every[best]
        yield [values[number] for values, number in zip(factors, best, strict=True)]


CASES = [dict(zip(FACTORS, values, strict=True)) for values in pairwise(FACTORS.values())]


def target_of(case, side):
    """Overrides of the target, and of images whose pixels are not all seen."""
    channels = case["channels"]
    small = f"length: 2, in_chans: {channels}, size: [{2 * side}, {side + 3}]"
    given = f"{{input: {list(range(channels))}, target: [{channels}], classes: [{channels + 1}], nodata: [7, 8]}}"
    classes = "{_target_: fcmae.targets.Channels, channels: 1, loss: ce, classes: 200, cell: 4}"
    return {
        "pixels": ["target=pixels"],
        "hog": ["target=hog", "target.hog.cell=4"],
        "laplacian": ["target=[pixels,laplacian]", "data.nodata=9"],
        "channels": ["target=channels", f"target.map={classes}", f"data.channels={given}", "data.nodata=9"],
        "teacher": ["target=teacher", *(f"target.teacher.{word}" for word in TEACHER)],
        "labels": [
            "target=[pixels,labels]",
            "data.fit=pad",
            f"data.source={{_target_: fcmae.data.sources.Synthetic, {small}}}",
        ],
    }[case["target"]]


def config(case, *more):
    """Two images, two steps of one image each."""
    strides, channels = case["strides"], case["channels"]
    n, side = len(strides), math.prod(strides)
    patches = 2 if case["target"] == "teacher" and side < 16 else 1  # smaller images leave it no feature map
    return compose(
        "pretrain",
        [
            *(key for key in TINY_PRETRAIN[1:] if not key.startswith(("model=", "schedule.", "trainer.eval"))),
            f"model.backbone={case['backbone']}",
            f"model.strides={strides}",
            f"model.depths={DEPTHS[:n]}",
            f"model.dims={DIMS[:n]}",
            f"model.decoder={case['decoder']}",
            f"model.pred_patch_size={side // case['split']}",
            f"mask={case['mask']}",
            *target_of(case, side),
            f"data.in_chans={channels}",
            f"data.mean={[0.5] * channels}",
            f"data.std={[0.25] * channels}",
            f"data.image_size=[{3 * patches * side},{2 * patches * side}]",
            "data.length=2",
            "optim.global_batch_size=1",
            "schedule.epochs=1",
            "schedule.warmup_epochs=0",
            "trainer.eval_every_epochs=null",
            "trainer.checkpoint_every_epochs=0.5",
            *more,
        ],
    )


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    file = tmp_path_factory.mktemp("teacher") / "teacher.pt"
    torch.save(timm.create_model("test_convnext").state_dict(), file)
    return file


@pytest.mark.parametrize(
    "case",
    [*CASES[:6], *(pytest.param(case, marks=pytest.mark.slow) for case in CASES[6:])],
    ids=lambda case: "-".join(map(str, case.values())).replace(" ", ""),
)
def test_packed_is_masked_and_resumed_is_uninterrupted(case, tmp_path, monkeypatch, teacher):
    monkeypatch.chdir(teacher.parent)
    cfg = config(case)
    losses, weights = zip(*(two_steps(Pretraining(cfg), engine) for engine in ("packed", "masked")), strict=True)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-9, atol=1e-9)
    for name, value in weights[0].items():
        torch.testing.assert_close(
            value, weights[1][name], rtol=1e-9, atol=1e-9, msg=lambda text, name=name: name + text
        )

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    pretrain(cfg, whole)
    shutil.copytree(whole, cut)
    (cut / "checkpoints" / "step_00000002.pt").unlink()
    pretrain(config(case), cut)
    before, after = (checkpoint.read(checkpoint.resolve(f"{run}@2")) for run in (whole, cut))
    assert_same(before["model"], after["model"])
    assert before["optimizer"].keys() == after["optimizer"].keys()


def two_steps(task, engine):
    """Losses and weights of training in float64 by plain gradient descent."""
    model = copy.deepcopy(task.model).double()
    model.engine = ENGINES[engine]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    dataset, losses = task.dataset(), []
    for index in range(2):
        batch = collate([Item(dataset[0, index], [])]).parts
        loss, _ = task.loss(lambda imgs, *args, **seen: model(imgs.double(), *args, **seen), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses), model.state_dict()


def test_every_pair_of_values_is_there():
    for (a, ours), (b, theirs) in itertools.combinations(FACTORS.items(), 2):
        assert all(any((case[a], case[b]) == pair for case in CASES) for pair in itertools.product(ours, theirs)), (
            a,
            b,
        )


def test_the_table_in_the_docs_has_every_value():
    page = (Path(__file__).parents[2] / "docs" / "targets.md").read_text().split("## Tested combinations")[1]
    words = re.findall(r"[\w,\[\]]+", page)
    values = [value for values in FACTORS.values() for value in values]
    assert {str(value).replace(" ", "") for value in values} <= set(words) | {word.strip(",") for word in words}
    assert f"{len(CASES)} networks" in page
