"""What runs as operations of our own on the device against float64, with what training does to it."""

import pytest
import timm
import torch
from timm.models.convnext import ConvNeXtBlock

from fcmae.engines import compiled, convnext, fused
from fcmae.engines.compiled import recomputed
from fcmae.engines.dense import dense
from fcmae.kernels import neighbors, packed_depthwise
from fcmae.models import FCMAE
from tests.conftest import relative_error

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1e-2}


def arguments(s, c, dtype):
    torch.manual_seed(s)
    block = ConvNeXtBlock(c, use_grn=True, ls_init_value=None).cuda()
    for param in block.parameters():
        torch.nn.init.normal_(param, std=0.1)
    index = torch.rand(5, 49, device="cuda").argsort(1)[:, :19].sort(1).values
    x = torch.randn(5, 19, s, s, c, device="cuda").to(dtype).requires_grad_()
    factor = torch.tensor([0.0, 1.25, 1.25, 0.0, 1.25], device="cuda", dtype=dtype)
    return block, x, neighbors(index, 7, 7), factor


def operation(block, x, where, factor):
    ((_, copies),) = fused.with_copies([block], x)
    assert copies is not None
    return fused.run(block, x, copies, where, "image", factor)


def plain(block, x, where, factor):
    h = packed_depthwise(x, block.conv_dw.weight, block.conv_dw.bias, where)
    h = convnext.pointwise(block, h, "image")
    return x + (h if factor is None else factor.view(-1, 1, 1, 1, 1) * h)


def outputs(function, block, x, where, factor):
    out = function(block, x, where, factor)
    torch.manual_seed(1)
    dy = torch.randn(out.shape, device="cuda").to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, [x, *block.parameters()], dy)]


@pytest.mark.parametrize("drops", [False, True])
@pytest.mark.parametrize(
    ("s", "c", "dtype"),
    [(8, 128, torch.bfloat16), (4, 80, torch.bfloat16), (2, 40, torch.float16), (1, 1024, torch.bfloat16)],
)
def test_equals_float64_and_itself(s, c, dtype, drops):
    block, x, where, factor = arguments(s, c, dtype)
    factor = factor if drops else None
    found = outputs(operation, block, x, where, factor)
    for function in (operation, recomputed(operation, True)):
        again = outputs(function, block, x, where, factor)
        assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    with torch.inference_mode():
        assert torch.equal(operation(block, x, where, factor), found[0])
    assert [g.dtype for g in found] == [dtype, dtype] + [torch.float32] * len(list(block.parameters()))
    exact = x.detach().double().requires_grad_()
    expected = outputs(plain, block.double(), exact, where, None if factor is None else factor.double())
    for value, wanted in zip(found, expected, strict=True):
        assert relative_error(value, wanted) < TOLERANCE[dtype]


@pytest.fixture
def _nothing_is_compiled(monkeypatch):
    monkeypatch.setattr(compiled, "_compiled", lambda function: pytest.fail(f"{function.__name__} was compiled"))


def network_gradients(model, run, dtype):
    model.zero_grad()
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float64):
        loss = run()
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **grads}


def assert_as_near(found, plain, exact):
    """To float64 as autocast of plain torch, whose sums of blocks are float32."""
    assert found.keys() == exact.keys()
    for name, wanted in exact.items():
        limit = 4 * relative_error(plain[name], wanted) + 5e-3
        assert relative_error(found[name], wanted) < limit, name


@pytest.mark.usefixtures("_nothing_is_compiled")
@pytest.mark.parametrize(
    ("dtype", "size", "how"),
    [
        (torch.bfloat16, (224, 224), {}),
        (torch.bfloat16, (192, 256), {"mask_patch_size": 64, "pred_patch_size": 16, "in_chans": 5}),
        (torch.float16, (128, 128), {"patch_size": 2, "in_chans": 1}),
    ],
)
def test_pretraining_is_not_compiled_and_as_near_to_float64_as_autocast(dtype, size, how):
    torch.manual_seed(0)
    model = FCMAE("convnextv2_atto", depths=(1, 1, 2, 1), decoder_embed_dim=128, **how).cuda()
    for name, param in model.named_parameters():
        if "grn" in name or "bias" in name:
            torch.nn.init.normal_(param, std=0.2)
    model.compile()
    imgs = torch.randn(8, how.get("in_chans", 3), *size, device="cuda")
    mask, keep = model.random_mask(imgs)
    weight = torch.rand(8, device="cuda")
    scale = 1024 if dtype == torch.float16 else 1

    def step(engine, imgs=imgs):
        model.engine = engine
        return model.train(engine == "packed")(imgs, mask, keep, weight).loss * scale

    found = network_gradients(model, lambda: step("packed"), dtype)
    assert all(p.grad is None or p.grad.stride() == p.stride() for p in model.parameters())
    again = network_gradients(model, lambda: step("packed"), dtype)
    assert all(torch.equal(again[name], value) for name, value in found.items())
    plain = network_gradients(model, lambda: step("masked"), dtype)
    model.double()
    assert_as_near(found, plain, network_gradients(model, lambda: step("masked", imgs.double()), torch.float64))


@pytest.mark.usefixtures("_nothing_is_compiled")
@pytest.mark.parametrize("size", [(224, 224), (200, 264)])
def test_dense_is_not_compiled_and_as_near_to_float64_as_autocast(size):
    torch.manual_seed(0)
    model = timm.create_model("convnextv2_atto", depths=(1, 1, 2, 1), num_classes=0).cuda()
    imgs = torch.randn(8, 3, *size, device="cuda")

    def loss(maps):
        torch.manual_seed(1)
        return (maps - torch.randn(maps.shape, device="cuda")).square().mean()

    found = network_gradients(model, lambda: loss(dense(model, imgs, compiled=True)[-1]), torch.bfloat16)
    assert all(p.grad is None or p.grad.stride() == p.stride() for p in model.parameters())
    plain = network_gradients(model, lambda: loss(model.forward_features(imgs)), torch.bfloat16)
    model.double()
    assert_as_near(
        found, plain, network_gradients(model, lambda: loss(model.forward_features(imgs.double())), torch.float64)
    )
