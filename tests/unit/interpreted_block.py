"""A ConvNeXt V2 block as one operation against plain torch, on the CPU; test_depthwise.py runs this file.

Float32, which a GPU does not give to it, tells a mistake from rounding.
"""

import pytest
import timm
import torch
from timm.models.convnext import ConvNeXtBlock
from torch.autograd import forward_ad

from fcmae import precision
from fcmae.engines import convnext, fused, tiles
from fcmae.engines import dense as dense_engine
from fcmae.engines.compiled import recomputed
from fcmae.engines.dense import dense
from fcmae.engines.masked import masked
from fcmae.engines.packed import packed
from fcmae.kernels import depthwise, depthwise_launch, float8_triton, neighbors, norm_triton, packed_depthwise
from fcmae.kernels.residual_triton import add_and_sum, residual, scale_and_sum
from fcmae.kernels.sums_triton import add_up, sum_rows
from tests.conftest import relative_error

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Rows that end within a tile, in several tiles per program."""
    monkeypatch.setattr(norm_triton, "TILE", 64)


@pytest.fixture(autouse=True)
def plain_depthwise(monkeypatch):
    """The depthwise kernels in plain torch: their own tests are in interpreted_depthwise.py, and take seconds."""

    def places(slots, cells):
        n, height, width = slots.shape
        rows, cols = height - 2 * depthwise.HALO, width - 2 * depthwise.HALO
        cells = cells.long().view(n, -1) - torch.arange(n)[:, None] * height * width
        return (cells // width - depthwise.HALO) * cols + cells % width - depthwise.HALO, rows, cols

    def forward(x, weight, bias, slots, cells):
        weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        return depthwise._plain_convolution(x, weight, bias, *places(slots, cells))

    def partial_weight_grad(x, grad, k, slots, cells):
        weight = x.new_zeros(x.shape[-1], 1, k, k)
        of_weight, of_bias = depthwise._plain_backward(grad, x, weight, *places(slots, cells))[1:]
        return torch.cat([of_weight.flatten(1).t(), of_bias[None]]).float()[None]

    def input_grad(grad, weight, slots, cells):
        return depthwise._plain_backward(grad, grad, weight.to(grad.dtype), *places(slots, cells))[0]

    for function in (forward, partial_weight_grad, input_grad):
        monkeypatch.setattr(depthwise_launch, function.__name__, function)


@pytest.mark.parametrize(("dtype", "shape"), [(torch.float32, (3, 7, 24)), (torch.bfloat16, (2, 5, 1, 32))])
def test_sums_equal_plain_torch(dtype, shape):
    x, z = torch.randn(2, *shape).to(dtype).unbind(0)
    bias, factor = torch.randn(shape[-1]), torch.randn(shape[0])
    factors = factor.view(-1, *[1] * (len(shape) - 1))
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 6e-3}[dtype]
    for given, factors_or_one in ((None, 1), (factor, factors)):
        expected = x.double() + factors_or_one * (z.double() + bias)
        assert relative_error(residual(x, z, bias, given), expected) < tolerance
    scaled, partial = scale_and_sum(z, factor)
    assert (scaled.dtype, partial.dtype) == (dtype, torch.float32)
    assert relative_error(scaled, z.double() * factors) < tolerance
    assert relative_error(partial.sum(0), (z.double() * factors).flatten(0, -2).sum(0)) < 1e-6
    expected = x.double() + z.double()
    total, partial = add_and_sum(x, z)
    assert relative_error(total, expected) < tolerance
    assert relative_error(partial.sum(0), z.double().flatten(0, -2).sum(0)) < 1e-6


@pytest.mark.parametrize("shape", [(3, 40), (130, 3, 7)])
def test_rows_are_added(shape):
    partial = torch.randn(shape)
    assert relative_error(sum_rows(partial), partial.double().sum(0)) < 1e-6


@pytest.mark.parametrize(("count", "channels"), [(0, 40), (1, None), (2, 40), (3, 5)])
def test_partial_sums_are_added_together(count, channels):
    """More rows than a tile, and widths that end within a block of columns."""
    partials = [torch.randn(shape) for shape in ((260, 2, 19), (3, 33), (1, 3, 32))[:count]]
    taps = None if channels is None else torch.randn(129, 10, channels)
    sums, gradients = add_up(partials, taps, 3)
    for actual, partial in zip(sums, partials, strict=True):
        assert actual.shape == partial.shape[1:]
        assert relative_error(actual, partial.double().sum(0)) < 1e-6
    assert (gradients is None) == (taps is None)
    if taps is not None:
        expected = taps.double().sum(0)
        assert relative_error(gradients[0], expected[:-1].t().reshape(-1, 1, 3, 3)) < 1e-6
        assert relative_error(gradients[1], expected[-1]) < 1e-6


def arguments(dtype=torch.float32, **kwargs):
    """A block, its input of two images with three of six patches, and the tables."""
    torch.manual_seed(0)
    block = ConvNeXtBlock(12, kernel_size=3, use_grn=True, ls_init_value=None, **kwargs)
    for param in block.parameters():
        torch.nn.init.normal_(param, std=0.5)
    where = neighbors(torch.tensor([[0, 1, 4], [2, 3, 5]]), 2, 3)
    return block, torch.randn(2, 3, 2, 2, 12).to(dtype), where


def plain(block, x, where, scope, factor=None):
    h = packed_depthwise(x, block.conv_dw.weight, block.conv_dw.bias, where)
    h = convnext.pointwise(block, h, scope)
    return x + (h if factor is None else factor.view(-1, 1, 1, 1, 1) * h)


def operation(block, x, where, scope, factor=None):
    layers = block.mlp.fc1, block.mlp.fc2
    copies = fused._cast([layer.weight.detach().flatten(1) for layer in layers], x.dtype)
    return fused.run(block, x, tuple(copies), where, scope, factor)


def outputs(function, block, x, *args):
    """The output, and the gradients by name; of the input ``x`` if it requires one."""
    out = function(block, x, *args)
    torch.manual_seed(1)
    wanted = {"x": x, **dict(block.named_parameters())}
    wanted = {name: t for name, t in wanted.items() if t.requires_grad}
    grads = torch.autograd.grad(out, list(wanted.values()), torch.randn(out.shape).to(out.dtype))
    for name, grad in zip(wanted, grads, strict=True):
        assert (grad.shape, grad.dtype) == (wanted[name].shape, wanted[name].dtype), name
    return {"out": out.detach(), **dict(zip(wanted, grads, strict=True))}


def check(actual, expected, tolerance):
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert relative_error(value, expected[name]) < tolerance, name


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("kind", "scope", "factor"),
    [("", "image", None), ("conv_mlp", "image", [0.0, 1.25]), ("no bias", "batch", None)],
)
def test_equals_plain_torch(kind, scope, factor, dtype):
    block, x, where = arguments(dtype, conv_mlp=kind == "conv_mlp")
    if kind == "no bias":
        block.conv_dw.bias = None
    factor = None if factor is None else torch.tensor(factor, dtype=dtype)
    exact = x.double().requires_grad_()
    expected = outputs(plain, block.double(), exact, where, scope, None if factor is None else factor.double())
    actual = outputs(operation, block.float(), x.requires_grad_(), where, scope, factor)
    assert actual["out"].dtype == dtype
    check(actual, expected, TOLERANCE[dtype])


def test_parameters_of_16_bits():
    block, x, where = arguments(torch.bfloat16)
    expected = outputs(plain, block.bfloat16().double(), x.double().requires_grad_(), where, "image")
    check(outputs(operation, block.bfloat16(), x.requires_grad_(), where, "image"), expected, 2e-2)


@pytest.mark.parametrize(
    ("trained", "drops"),
    [
        ("x", False), ("conv_dw.weight", True), ("norm.bias", False), ("mlp.fc1.weight", True), ("mlp.grn.bias", False),
        ("mlp.fc2.weight", True), ("mlp.fc2.bias", False), ("mlp.fc2.bias", True),
    ],
)  # fmt: skip
def test_only_what_is_trained_gets_a_gradient(trained, drops):
    block, x, where = arguments()
    for name, tensor in {"x": x, **dict(block.named_parameters())}.items():
        tensor.requires_grad_(name == trained)
    factor = torch.tensor([0.5, 2.0]) if drops else None
    expected = outputs(plain, block, x, where, "image", factor)
    check(outputs(operation, block, x, where, "image", factor), expected, 1e-5)


def test_recomputation_changes_no_bit_and_evaluation_keeps_nothing():
    block, x, where = arguments()
    x.requires_grad_()
    expected = outputs(operation, block, x, where, "image")
    again = outputs(recomputed(operation, True), block, x, where, "image")
    assert all(torch.equal(again[name], value) for name, value in expected.items())
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out = operation(block, x, where, "image")
        assert torch.equal(out, expected["out"])
        assert out.grad_fn is None


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # which torch calls for derivatives of its own
def test_forward_derivatives_are_refused():
    block, x, where = arguments()
    block.requires_grad_(False)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward mode"):
        operation(block, forward_ad.make_dual(x, torch.ones_like(x)), where, "image")


def network(**kwargs):
    torch.manual_seed(0)
    sizes = {"depths": (1, 2, 1, 1), "dims": (4, 8, 4, 12), "kernel_sizes": 3, "patch_size": 1}
    model = timm.create_model("convnextv2_atto", **{**sizes, **kwargs})
    for param in model.parameters():
        torch.nn.init.normal_(param, std=0.3)
    return model


def gradients(model, features):
    model.zero_grad()
    features.square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Every block runs as one operation; one entry for each that did."""
    ran = []
    monkeypatch.setattr(norm_triton, "TILE", 4096)
    run = fused.run
    monkeypatch.setattr(fused, "is_whole", lambda block, x: True)
    monkeypatch.setattr(fused, "run", lambda *args: ran.append(1) or run(*args))
    return ran


def test_packed_equals_masked(on_a_gpu):
    """With one stage recomputed."""
    model, imgs = network(), torch.randn(2, 3, 24, 16)
    mask = torch.tensor([[True, False, False, True, False, False], [False, True, True, False, False, False]])
    args = {"keep": 4, "patch_size": 8}
    expected = masked(model, imgs, mask, **args)[-1]
    wanted = gradients(model, expected)
    actual = packed(model, imgs, mask, **args, recompute_stages=[2])[-1]
    assert relative_error(actual, expected) < 1e-5
    assert len(on_a_gpu) == 5
    check(gradients(model, actual), wanted, 1e-5)
    assert len(on_a_gpu) == 7


@pytest.mark.usefixtures("on_a_gpu")
def test_a_network_in_float8_is_near_to_one_in_16_bits(monkeypatch):
    """Outputs and all gradients, with a stage recomputed. The interpreter rounds some float8 values wrongly: torch does
    it here. Largest values that a kernel found are those of what it wrote.
    """
    were_known = []

    def plain_scale(x, largest, known=False):
        were_known.append(known)
        assert not known or largest.view(torch.float32) == x.float().abs().max()
        factor = (x.float().abs().amax() / 448).log2().ceil().exp2()
        values = (x.float() / factor).to(float8_triton.FLOAT8)
        columns = torch.zeros(x.shape[1], -(-len(x) // 16) * 16, dtype=values.dtype)
        columns[:, : len(x)] = values.t()
        return float8_triton.Scaled(values, columns, factor.view(1))

    monkeypatch.setattr(float8_triton, "scale", plain_scale)
    model, imgs = network(dims=(16, 16, 32, 32)), torch.randn(2, 3, 16, 8)
    mask = torch.tensor([[True, False], [False, True]])

    def step(name):
        with precision.training(torch.device("cpu"), name):
            (out,) = packed(model, imgs, mask, keep=1, patch_size=8, recompute_stages=[2])
        return {"out": out.detach(), **gradients(model, out.float())}

    expected, found = step("bf16"), step("fp8")
    check(found, expected, 0.25)
    assert relative_error(found["out"], expected["out"]) > 1e-4
    depths = [len(stage.blocks) for stage in model.stages]
    # Of every MLP forward and backward, and of the recomputed stage's forward once more.
    assert were_known.count(True) == 2 * sum(depths) + depths[1]


@pytest.mark.usefixtures("on_a_gpu")
def test_dense_equals_timm_with_drop_path(monkeypatch):
    """In recomputed stages, too: the draws are not repeated."""
    model, imgs = network(drop_path_rate=0.6).train(), torch.randn(4, 3, 16, 8)
    layouts = [tiles.Layout(16 // s, 8 // s, max(1, 4 // s)) for s in (1, 2, 4, 8)]
    monkeypatch.setattr(dense_engine, "_layouts", lambda backbone, imgs: iter(layouts))
    torch.manual_seed(1)
    expected = model.forward_features(imgs)
    wanted = gradients(model, expected)
    torch.manual_seed(1)
    actual = dense(model, imgs, recompute_stages=[2])[-1]
    assert relative_error(actual, expected) < 1e-5
    check(gradients(model, actual), wanted, 1e-5)
