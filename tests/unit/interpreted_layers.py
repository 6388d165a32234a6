"""What lies between blocks as operations, and the error of pixels, against plain torch; test_depthwise.py runs it.

Float32, which a GPU does not give to them, tells a mistake from rounding.
"""

import functools

import pytest
import timm
import torch
from torch import nn

from fcmae.engines import dense as dense_engine
from fcmae.engines import fused, tiles
from fcmae.engines.dense import dense
from fcmae.kernels import layers, norm_triton, patch_error_triton, patch_rows_triton, precompile
from fcmae.kernels.sums_triton import sum_many_rows
from fcmae.models import FCMAE
from fcmae.targets import Pixels, Seen, part
from tests.conftest import relative_error
from tests.unit.interpreted_block import check, gradients, plain_depthwise  # noqa: F401 (a fixture)

SIZES = {"depths": (1, 1, 1, 1), "dims": (4, 8, 4, 12), "kernel_sizes": 3}


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Everything runs as operations; the names of those that did."""
    ran = []
    for name in ("stem", "downsample", "linear", "with_tokens"):
        real = getattr(layers, name)
        monkeypatch.setattr(layers, name, lambda *args, name=name, real=real: ran.append(name) or real(*args))
    errors = Pixels.errors
    monkeypatch.setattr(Pixels, "errors", lambda *args: ran.append("errors") or errors(*args))
    monkeypatch.setattr(fused, "has_layers", lambda backbone, imgs: True)
    monkeypatch.setattr(fused, "is_whole", lambda block, x: True)
    monkeypatch.setattr(Pixels, "has_errors", lambda self, seen, pred: self.is_one_operation and seen.valid is None)
    return ran


def network(**kwargs):
    torch.manual_seed(0)
    model = timm.create_model("convnextv2_atto", **{**SIZES, **kwargs})
    for param in model.parameters():
        nn.init.normal_(param, std=0.3)
    return model


@pytest.mark.parametrize(("rows", "width"), [(5, 3), (700, 70)])
def test_rows_are_added(rows, width):
    x, wanted = torch.randn(rows, width), torch.rand(rows) < 0.5
    assert relative_error(sum_many_rows(x), x.double().sum(0)) < 1e-6
    assert relative_error(sum_many_rows(x, wanted), x.double()[wanted].sum(0)) < 1e-6
    assert relative_error(sum_many_rows(x.bfloat16()), x.bfloat16().double().sum(0)) < 1e-6


@pytest.mark.parametrize("bias", [True, False])
def test_linear_layer_equals_torch(bias):
    layer, x = nn.Linear(6, 5, bias=bias), torch.randn(3, 4, 6, requires_grad=True)
    leaves = [x, *layer.parameters()]
    dy = torch.randn(3, 4, 5)
    out = layers.linear(x, layer.weight, layer.bias)
    assert relative_error(out, layer(x)) < 1e-6
    for value, wanted in zip(
        torch.autograd.grad(out, leaves, dy), torch.autograd.grad(layer(x), leaves, dy), strict=True
    ):
        assert relative_error(value, wanted) < 1e-6


@pytest.mark.parametrize("count", [1, 3])
def test_the_mask_token_is_not_written(count):
    token, x = torch.ones(4), torch.randn(1, 4)
    out = layers.with_tokens(x, token, torch.tensor([0]), count)
    assert torch.equal(out, torch.cat((x, torch.ones(count - 1, 4))))
    assert torch.equal(token, torch.ones(4))


@pytest.mark.parametrize(
    ("height", "width", "before", "after", "stride"), [(8, 4, 4, 2, 2), (7, 5, 1, 1, 3), (4, 2, 2, 2, 1)]
)
def test_norm_in_another_order(height, width, before, after, stride, monkeypatch):
    """With a rest that is left out, in several tiles per program."""
    monkeypatch.setattr(norm_triton, "TILE", 64)
    norm, conv = nn.LayerNorm(6), nn.Conv2d(6, 4, stride, stride)
    whole, result = tiles.Layout(height, width, before), tiles.Layout(height // stride, width // stride, after)
    x = torch.randn(2, height, width, 6, requires_grad=True)
    leaves = [x, *norm.parameters(), *conv.parameters()]
    expected = tiles.tiled(conv(norm(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1), result).flatten(0, -2)
    move = precompile.Move(height, width, before, after, stride)
    sites = tiles.tiled(x, whole)
    actual = layers.downsample(sites, norm.weight, norm.bias, norm.eps, conv.weight, conv.bias, move)
    assert relative_error(actual, expected) < 1e-5
    dy = torch.randn(actual.shape)
    grads = torch.autograd.grad(actual, leaves, dy), torch.autograd.grad(expected, leaves, dy)
    for leaf, value, wanted in zip(leaves, *grads, strict=True):
        assert relative_error(value, wanted) < 1e-5
        assert value.stride() == leaf.stride()


# 52 x 36 px leave sides of 13 x 9 and 6 x 4 sites: a rest is ignored.
@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize(("size", "chans", "stride"), [((52, 36), 1, 4), ((32, 32), 5, 2)])
def test_dense_equals_timm(size, chans, stride, monkeypatch):
    monkeypatch.setattr(patch_rows_triton, "TILE", 1024)
    model = network(in_chans=chans, patch_size=stride)
    imgs = torch.randn(1, chans, *size)
    layouts = dense_engine._layouts
    monkeypatch.setattr(
        dense_engine, "_layouts", lambda *args: (tiles.best(height, width) for height, width, _ in layouts(*args))
    )
    expected = model.forward_features(imgs)
    wanted = gradients(model, expected)
    actual = dense(model, imgs)[-1]
    assert relative_error(actual, expected) < 1e-5
    check(gradients(model, actual), wanted, 1e-5)


@pytest.mark.parametrize("trained", ["stem.0.weight", "stem.0.bias", "stem.1.weight", "down.0.bias", "down.1.weight"])
def test_only_what_is_trained_gets_a_gradient(trained):
    model = nn.ModuleDict({"stem": nn.Sequential(nn.Conv2d(3, 6, 2, 2), nn.LayerNorm(6))})
    model["down"] = nn.Sequential(nn.LayerNorm(6), nn.Conv2d(6, 4, 2, 2))
    imgs, index, move = torch.randn(1, 3, 8, 8), torch.tensor([[0, 3]]), precompile.Move(2, 2, 2, 1, 2)
    for name, param in model.named_parameters():
        param.requires_grad_(name.startswith(trained.split(".")[0]))

    def output():
        (conv, norm), (second, last) = model["stem"], model["down"]
        x = layers.stem(
            imgs, conv.weight, conv.bias, norm.weight, norm.bias, norm.eps, index, side=2, dtype=torch.float32
        )
        return layers.downsample(x, second.weight, second.bias, second.eps, last.weight, last.bias, move)

    wanted = dict(model.named_parameters())[trained]
    (expected,) = torch.autograd.grad(output().square().sum(), wanted)
    for name, param in model.named_parameters():
        param.requires_grad_(name == trained)
    output().square().sum().backward()
    assert torch.equal(wanted.grad, expected)
    assert [name for name, param in model.named_parameters() if param.grad is not None] == [trained]


@pytest.mark.parametrize(
    ("size", "mask_patch", "pred_patch", "chans", "weighted"),
    [((32, 96), 32, 32, 3, False), ((128, 64), 64, 16, 1, True)],
)
def test_pretraining_equals_the_masked_engine(size, mask_patch, pred_patch, chans, weighted, on_a_gpu):
    torch.manual_seed(0)
    sizes = {"mask_patch_size": mask_patch, "pred_patch_size": pred_patch, "decoder_embed_dim": 6}
    targets = {"pixels": Pixels, "again": functools.partial(Pixels, loss="l1")}
    targets = targets if weighted else {"pixels": Pixels}
    model = FCMAE(network(in_chans=chans), mask_ratio=0.5, targets=targets, **sizes)
    for param in model.parameters():
        nn.init.normal_(param, std=0.3)
    imgs = torch.randn(2, chans, *size)
    mask, keep = model.random_mask(imgs)
    weight = torch.tensor([0.5, 2.0]) if weighted else None

    def step(engine):
        model.engine = engine
        model.zero_grad()
        output = model(imgs, mask, keep, weight)
        output.loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return {"loss": output.loss.detach(), **output.preds, **grads}

    actual = step("packed")
    ran = sorted(set(on_a_gpu))
    assert ran == ["downsample", "errors", "linear", "stem", "with_tokens"]
    assert all(p.grad.stride() == p.stride() for p in model.parameters() if p.grad is not None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pixels, "has_errors", lambda *args: False)
        expected = step("masked")
    check(actual, expected, 1e-5)
    with torch.no_grad():
        preds, _ = model.predict(imgs, mask)
    assert all(relative_error(preds[name], actual[name]) < 1e-5 for name in preds)


@pytest.mark.parametrize(("patch", "chans", "block"), [(4, 3, 2048), (2, 1, 2048), (6, 5, 64), (8, 3, 64)])
def test_error_of_pixels_equals_plain_torch(patch, chans, block, monkeypatch):
    """Of a patch of one value, too, in several blocks whose last one is not full."""
    monkeypatch.setattr(patch_error_triton, "BLOCK", block)
    target = Pixels(patch, chans)
    imgs = 100 + torch.randn(2, chans, 2 * patch, 3 * patch)
    imgs[0, :, :patch, :patch] = 7
    pred, hidden = torch.randn(2, 6, target.dim, requires_grad=True), torch.rand(2, 6) < 0.6
    hidden[0, 0] = True
    pred.data[~hidden] = torch.nan
    weight = torch.tensor([0.5, 3.0])

    def outputs():
        loss = part(target, Seen(imgs), pred, hidden, weight)
        return loss.detach(), torch.autograd.grad(loss, pred)[0]

    expected = outputs()
    monkeypatch.setattr(Pixels, "has_errors", lambda *args: True)
    for value, wanted in zip(outputs(), expected, strict=True):
        assert relative_error(value, wanted.nan_to_num()) < 1e-5  # plain torch multiplies NaN by 0
