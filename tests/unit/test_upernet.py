"""The UPerNet head: against Transformers' with the same weights, and in fine-tuning."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import UperNetConfig
from transformers.models.upernet.modeling_upernet import UperNetFCNHead, UperNetHead

from fcmae.config import compose
from fcmae.engines.dense import dense
from fcmae.models import create_backbone
from fcmae.models.backbone import stage_shapes
from fcmae.models.drop_path import draw_paths_by_sample
from fcmae.models.upernet import UPerNet, groups_of, pooled, resized
from fcmae.randomness import sample_keys
from fcmae.tasks.finetuning import Finetuning
from fcmae.tasks.initial import load_initial
from fcmae.tasks.objectives import Segment, Translate
from tests.conftest import TINY_FINETUNE, relative_error
from tests.dense_files import write_squares
from tests.results import assert_same, metrics_of, newest

DIMS, STRIDES = [8, 12, 16, 24], [4, 8, 16, 32]


def maps_of(height=64, width=96, count=2):
    return [torch.randn(count, dim, height // s, width // s) for dim, s in zip(DIMS, STRIDES, strict=True)]


def with_group_norm(module):
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, nn.GroupNorm(groups_of(child.num_features), child.num_features))
        else:
            with_group_norm(child)
    return module


def test_the_head_is_transformers_with_the_same_weights():
    """But for its norms, which are GroupNorm in both here, and those of the features, which come before."""
    config = UperNetConfig(hidden_size=64, num_labels=5, auxiliary_channels=256)
    main, auxiliary = (with_group_norm(kind(config, DIMS)).eval() for kind in (UperNetHead, UperNetFCNHead))
    ours = UPerNet(DIMS, STRIDES, outputs=5, width=64)
    theirs = list(main.parameters()) + list(auxiliary.parameters())
    # In the order of theirs: the last convolution, pools, bottleneck, laterals, levels, fuse; the auxiliary's.
    parts = (ours.last, ours.pools, ours.bottleneck, ours.laterals, ours.levels, ours.fuse)
    mine = [p for part in parts for p in part.parameters()] + [
        *ours.auxiliary[0].parameters(),
        *ours.auxiliary[2].parameters(),
    ]
    assert [p.shape for p in mine] == [p.shape for p in theirs]
    with torch.no_grad():
        for a, b in zip(mine, theirs, strict=True):
            a.copy_(torch.randn_like(a) * 0.1 if a.ndim > 1 else torch.rand_like(a))
            b.copy_(a)
    maps = maps_of()
    normed = [norm(x) for norm, x in zip(ours.norms, maps, strict=True)]
    expected = [F.interpolate(main(normed), scale_factor=4, mode="bilinear")]
    expected.append(F.interpolate(auxiliary(normed), scale_factor=16, mode="bilinear"))
    ours.train()
    ours.last[0].p = ours.auxiliary[1].p = 0.0
    found = ours(maps)
    assert [relative_error(a, b) < 1e-5 for a, b in zip(found, expected, strict=True)] == [True, True]
    assert ours.eval()(maps).equal(found[0])


@pytest.mark.parametrize("size", [(6, 5), (2, 3), (1, 1)])
def test_maps_are_pooled_and_resized_as_torch_does(size):
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    for side in (1, 2, 3, 6):
        torch.testing.assert_close(pooled(x, side).double(), F.adaptive_avg_pool2d(x, side), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            resized(x, (side, 7)), F.interpolate(x, (side, 7), mode="bilinear"), rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize("strides", [None, [2, 2, 2, 2], [4, 1, 2, 1], [4, 2, 2]])
def test_any_strides_have_a_prediction_per_pixel_and_every_parameter_learns(strides):
    n = len(strides or DIMS)
    backbone = create_backbone("convnextv2_atto", strides=strides, depths=[1] * n, dims=DIMS[:n])
    head = UPerNet(*stage_shapes(backbone), outputs=3, width=16)
    found = head(dense(backbone, torch.randn(2, 3, 64, 96)))
    assert [(x.shape, x.dtype) for x in found] == [((2, 3, 64, 96), torch.float32)] * 2
    sum((x * torch.randn_like(x)).sum() for x in found).backward()
    for name, param in head.named_parameters():
        assert param.grad.abs().sum() > 0, name
        assert param.grad.stride() == param.stride(), name


def test_an_image_does_not_depend_on_its_batch():
    head = UPerNet(DIMS, STRIDES, outputs=3, width=16)
    keys = draw_paths_by_sample(head)
    maps = maps_of(count=3)
    keys.values = sample_keys(0, 1, range(3))
    whole = head(maps)
    keys.values = sample_keys(0, 1, range(1, 2))
    for a, b in zip(whole, head([x[1:2] for x in maps]), strict=True):
        torch.testing.assert_close(a[1:2], b, rtol=1e-5, atol=1e-6)


def test_dropped_channels_are_a_tenth_and_belong_to_the_sample():
    model = nn.Sequential(nn.Dropout2d(0.1), nn.Dropout2d(0.1))
    keys = draw_paths_by_sample(model)
    keys.values = sample_keys(0, 3, range(64))
    first, second = (dropout(torch.ones(64, 512, 1, 1))[..., 0, 0] for dropout in model)
    assert not first.equal(second)
    for kept in (first, second):
        assert kept.unique().tolist() == pytest.approx([0, 1 / 0.9])
        assert abs((kept == 0).double().mean() - 0.1) < 0.01
        assert (kept == 0).sum(0).max() < 32  # no channel is dropped in all samples
    assert model.eval()(torch.ones(1, 512, 1, 1)).eq(1).all()


@pytest.mark.parametrize("objective", [Segment(3, head="upernet"), Translate(3, head="upernet")])
def test_the_auxiliary_loss_counts_four_tenths(objective):
    main, auxiliary = torch.randn(2, 2, 3, 8, 8)
    target = (
        torch.randint(0, 3, (2, 8, 8), dtype=torch.int16) if isinstance(objective, Segment) else torch.randn(2, 3, 8, 8)
    )
    losses, parts = objective.loss((main, auxiliary), target)
    torch.testing.assert_close(losses, objective.loss(main, target)[0] + 0.4 * objective.loss(auxiliary, target)[0])
    torch.testing.assert_close(parts["auxiliary"], objective.loss(auxiliary, target)[0])
    assert objective.width == 512
    with pytest.raises(ValueError, match="head must be one of unet, upernet; got 'fpn'"):
        type(objective)(3, head="fpn")


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    return write_squares(tmp_path_factory.mktemp("squares"), 8)


def upernet(folder):
    data = (f"data.path={folder}/images", f"data.target_path={folder}/masks", f"data.val_path={folder}/images")
    of = ("objective=segment", "objective.classes=3", "objective.head=upernet", "objective.width=16")
    how = ("data.name=imagefolder", "optim.layer_decay=0.8", "model.drop_path_rate=0.2", "optim.global_batch_size=4")
    return (*TINY_FINETUNE, *data, *of, *how)


def test_micro_batches_are_one_batch(squares):
    """Of a step with drop path, dropout and the auxiliary loss; layer decay takes the head for the last layer."""
    cfg = compose("finetune", list(upernet(squares)[1:])).settled({})
    whole = Finetuning(cfg)
    parts = Finetuning(copy.deepcopy(dataclasses.replace(cfg)))
    parts.model.load_state_dict(whole.model.state_dict())
    imgs, target = torch.randn(4, 3, 32, 32), torch.randint(0, 3, (4, 32, 32), dtype=torch.int16)
    whole.loss(whole.model.train(), [imgs, target, *whole.draw(7, range(4))])[0].backward()
    for rows in (range(2), range(2, 4)):
        part = [x[rows.start : rows.stop] for x in (imgs, target)]
        (parts.loss(parts.model.train(), [*part, *parts.draw(7, rows)])[0] / 2).backward()
    for (name, a), b in zip(whole.model.named_parameters(), parts.model.parameters(), strict=True):
        if a.requires_grad:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_a_stopped_run_ends_with_the_same_bits(fcmae_here, tmp_path, squares):
    args = (*upernet(squares), "optim.ema_decay=0.5", "trainer.eval_every_epochs=null")
    fcmae_here(*args, "hydra.run.dir=whole")
    fcmae_here(*args, "hydra.run.dir=cut", "trainer.max_steps=1", check=75)
    fcmae_here(*args, "hydra.run.dir=cut")
    states = [newest(tmp_path / run) for run in ("whole", "cut")]
    for kind in ("model", "ema"):
        assert_same(states[0][kind], states[1][kind])
    lines = metrics_of(tmp_path / "whole")
    assert {"loss_ce", "loss_auxiliary"} <= lines[0].keys()
    task = Finetuning(compose("finetune", list(upernet(squares)[1:])).settled({}))
    assert load_initial(task.model, f"{tmp_path}/whole", "strict").endswith("; the head is new")
