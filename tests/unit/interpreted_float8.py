"""Linear layers in float8 against float64, on the CPU; test_depthwise.py runs this file.

The interpreter rounds some float8 values wrongly; tests/gpu/test_float8_gpu.py compares them with torch's.
"""

import pytest
import timm
import torch

from fcmae.engines import fused
from fcmae.errors import UsageError
from fcmae.kernels.float8_triton import FLOAT8, Float8, scale, weight_grad, zero_largest
from tests.conftest import relative_error


def zeros():
    return torch.zeros(1, dtype=torch.int32)


@pytest.mark.parametrize(("rows", "size"), [(100, 3e-9), (32, 5.0), (7, 2e17)])
def test_a_matrix_is_scaled_by_a_power_of_two(rows, size):
    x = (size * torch.randn(rows, 144)).bfloat16()
    values, transposed, factor = scale(x, zeros())
    assert values.dtype == transposed.dtype == FLOAT8
    assert torch.frexp(factor)[0] == 0.5
    largest = x.double().abs().max()
    assert ((values.double() * factor - x.double()).abs() <= 0.3 * largest).all()
    assert 200 < values.double().abs().max() <= 448
    assert transposed.shape == (144, -(-rows // 16) * 16)
    assert torch.equal(transposed[:, :rows].view(torch.int8), values.view(torch.int8).t())
    assert not transposed[:, rows:].view(torch.int8).any()


def test_zero_stays_zero():
    values, _, factor = scale(torch.zeros(3, 16, dtype=torch.bfloat16), zeros())
    assert not values.view(torch.int8).any()
    assert factor.isfinite().all()


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_told(value):
    x = torch.randn(5000, 16).bfloat16()
    x[4000, 7] = value
    assert scale(x, zeros()).factor.isnan()


@pytest.mark.parametrize(("shape", "sites"), [((32, 48), 21), ((144, 16), 64)])
def test_products(shape, sites):
    weight, x = torch.randn(shape).bfloat16(), torch.randn(sites, shape[1]).bfloat16()
    grad = 1e-6 * torch.randn(sites, shape[0]).bfloat16()
    float8 = Float8.of(weight, *zero_largest(1, weight.device))
    out, *kept = float8.product(x)
    scaled = float8.scale_grad(grad)
    of_x, of_weight = float8.input_grad(scaled, grad.dtype), weight_grad(scaled, *kept)
    assert (out.dtype, of_x.dtype, of_weight.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    assert 1e-3 < relative_error(out, x.double() @ weight.double().t()) < 0.15
    assert 1e-3 < relative_error(of_x, grad.double() @ weight.double()) < 0.15
    assert 1e-3 < relative_error(of_weight, grad.double().t() @ x.double()) < 0.15


def test_a_block_that_is_not_one_operation_is_refused():
    model = timm.create_model("convnextv2_atto", depths=(1, 1, 1, 1), num_classes=0)
    with pytest.raises(UsageError, match="precision=bf16 does not need it"):
        fused.with_copies(model.stages[0].blocks, torch.randn(1, 1, 8, 8, 40), True)
