"""The packed depthwise convolution against a dense convolution with masks."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fcmae.kernels import depthwise
from fcmae.kernels.depthwise import gather_patches, neighbors, packed_depthwise, scatter_patches
from tests.conftest import run_python

ROWS, COLS = 3, 4


def visible(n: int, v: int) -> torch.Tensor:
    return torch.rand(n, ROWS * COLS).argsort(1)[:, :v].sort(1).values


def masked_dense(x, weight, bias, index):
    """The definition: a dense convolution of the image with masked sites zero, read at the visible sites."""
    n, v, s, _, c = x.shape
    dense = x.new_zeros(n, c, ROWS * s, COLS * s)
    for image in range(n):
        for patch in range(v):
            row, col = divmod(int(index[image, patch]), COLS)
            dense[image, :, row * s : (row + 1) * s, col * s : (col + 1) * s] = x[image, patch].permute(2, 0, 1)
    out = F.conv2d(dense, weight, bias, padding=weight.shape[-1] // 2, groups=c)
    patches = out.view(n, c, ROWS, s, COLS, s).permute(0, 2, 4, 3, 5, 1).reshape(n, ROWS * COLS, s, s, c)
    return torch.stack([patches[image, index[image]] for image in range(n)])


def arguments(s: int, c: int, k: int, v: int, dtype=torch.float64):
    torch.manual_seed(s * 100 + v)
    x = torch.randn(2, v, s, s, c, dtype=dtype, requires_grad=True)
    weight = torch.randn(c, 1, k, k, dtype=dtype, requires_grad=True)
    bias = torch.randn(c, dtype=dtype, requires_grad=True)
    return x, weight, bias, visible(2, v)


@pytest.mark.parametrize("v", [1, 5, ROWS * COLS])
@pytest.mark.parametrize(("s", "k"), [(8, 7), (4, 7), (2, 7), (1, 7), (3, 5), (2, 3)])
def test_equals_masked_dense_convolution(s, k, v):
    x, weight, bias, index = arguments(s, 3, k, v)
    out = packed_depthwise(x, weight, bias, neighbors(index, ROWS, COLS))
    expected = masked_dense(x, weight, bias, index)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    grads = torch.autograd.grad(out, (x, weight, bias), grad)
    for actual, wanted in zip(grads, torch.autograd.grad(expected, (x, weight, bias), grad), strict=True):
        torch.testing.assert_close(actual, wanted)


def test_without_bias():
    x, weight, bias, index = arguments(2, 3, 7, 5)
    where = neighbors(index, ROWS, COLS)
    out = packed_depthwise(x, weight, None, where)
    torch.testing.assert_close(out + bias, packed_depthwise(x, weight, bias, where))
    out.sum().backward()
    assert x.grad is not None
    assert weight.grad is not None


def test_neighbor_tables_invert_each_other():
    index = visible(3, 5)
    where = neighbors(index, ROWS, COLS)
    assert torch.equal(where.slots.flatten()[where.cells], torch.arange(15, dtype=torch.int32))
    assert (where.slots >= 0).sum() == 15
    row, col = int(index[1, 2]) // COLS, int(index[1, 2]) % COLS
    assert where.slots[1, row + depthwise.HALO, col + depthwise.HALO] == 1 * 5 + 2


def test_gather_inverts_scatter():
    x, _, _, index = arguments(4, 3, 7, 5)
    dense = scatter_patches(x, index, ROWS, COLS)
    assert dense.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(gather_patches(dense, index, ROWS, COLS), x)


def test_computes_in_the_autocast_dtype_with_float32_parameters():
    x, weight, bias, index = arguments(2, 8, 7, 5, torch.float32)
    where = neighbors(index, ROWS, COLS)
    with torch.autocast("cpu", torch.bfloat16):
        out = packed_depthwise(x, weight, bias, where)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert (x.grad.dtype, weight.grad.dtype, bias.grad.dtype) == (torch.float32,) * 3
    torch.testing.assert_close(out.float(), packed_depthwise(x, weight, bias, where), rtol=0.05, atol=0.1)


@pytest.mark.parametrize("shape", [(8, 1, 4, 4), (8, 1, 3, 5), (8, 8, 3, 3)])
def test_refuses_other_kernels(shape):
    where = neighbors(visible(2, 5), ROWS, COLS)
    with pytest.raises(ValueError, match="k odd"):
        packed_depthwise(torch.randn(2, 5, 2, 2, 8), torch.randn(shape), None, where)


# opcheck itself reads .grad of tensors that are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_operators_are_registered_correctly():
    x, weight, bias, index = arguments(2, 3, 7, 5, torch.float32)
    where = neighbors(index, ROWS, COLS)
    tables = (where.index, where.slots, where.cells, where.rows, where.cols)
    torch.library.opcheck(depthwise._packed_depthwise, (x, weight, bias, *tables))
    x, weight = x.detach(), weight.detach()
    torch.library.opcheck(depthwise._packed_depthwise_backward, (torch.randn_like(x), x, weight, *tables))


def test_compiles_into_one_graph():
    x, weight, bias, index = arguments(2, 8, 7, 5, torch.float32)

    def loss(x, weight, bias, index):
        return packed_depthwise(x, weight, bias, neighbors(index, ROWS, COLS)).square().mean()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    grads = torch.autograd.grad(compiled(x, weight, bias, index), (x, weight, bias))
    for actual, wanted in zip(grads, torch.autograd.grad(loss(x, weight, bias, index), (x, weight, bias)), strict=True):
        torch.testing.assert_close(actual, wanted)


INTERPRETED = ("depthwise", "grn", "norm", "block", "layers", "float8", "pixels")
DEFINED_AGAIN = """
import sys
for name in list(sys.modules):
    if name in ("triton", "fcmae.kernels") or name.startswith(("triton.", "fcmae.kernels.")):
        if not name.startswith("triton._C"):  # the compiled part cannot be imported twice
            del sys.modules[name]
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("cases", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_triton_kernels_in_the_interpreter(cases):
    """In a process of its own: Triton reads TRITON_INTERPRET when the kernels are defined."""
    pytest.importorskip("triton")
    files = [str(Path(__file__).with_name(f"interpreted_{name}.py")) for name in INTERPRETED]
    # Modules that are imported before cannot have their assertions rewritten.
    how = ("-q", "-x", "--assert=plain", "-p", "no:cacheprovider", "-m", cases)
    root = Path(depthwise.__file__).parents[2]
    run_python(root, "-c", DEFINED_AGAIN, *how, *files, timeout=300, variables={"TRITON_INTERPRET": "1"})
