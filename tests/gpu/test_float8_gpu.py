"""``precision=fp8`` on a GPU: products as exact as float8 allows, the same bits twice, and the curve of bf16."""

import pytest
import torch

from fcmae.config import OptimConfig
from fcmae.data.sources.fashion_mnist import FashionMNIST
from fcmae.errors import EXIT_RESUMABLE
from fcmae.masks.patches import random_mask
from fcmae.models import FCMAE
from fcmae.optim.adamw import create_optimizer, set_lr
from fcmae.training.step import TrainingStep
from tests.conftest import relative_error
from tests.results import metrics_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0), reason="no float8 products"
    ),
]


def zeros():
    return torch.zeros(1, dtype=torch.int32, device="cuda")


@pytest.mark.parametrize(("rows", "columns", "size"), [(1000, 48, 3e-9), (5001, 1408, 5.0), (160, 11264, 2e17)])
def test_a_matrix_is_rounded_as_torch_rounds(rows, columns, size):
    from fcmae.kernels.float8_triton import FLOAT8, scale

    x = (size * torch.randn(rows, columns, device="cuda")).bfloat16()
    values, transposed, factor = scale(x, zeros())
    assert torch.frexp(factor.cpu())[0] == 0.5
    assert torch.equal(values.view(torch.int8), (x.float() / factor).to(FLOAT8).view(torch.int8))
    assert 200 < values.float().abs().max() <= 448
    assert torch.equal(transposed[:, :rows].view(torch.int8), values.view(torch.int8).t())
    assert not transposed[:, rows:].view(torch.int8).any()


def test_other_rows_change_only_small_values():
    """A scale is a power of two: another one rounds otherwise only what it brings below 2^-6, of at most 448."""
    from fcmae.kernels.float8_triton import scale

    x = torch.randn(64, 32, device="cuda").bfloat16()
    alone, together = scale(x, zeros()), scale(torch.cat([x, 7 * x]), zeros())
    assert together.factor > 2 * alone.factor
    values, others = alone.values.float() * alone.factor, together.values[:64].float() * together.factor
    normal = x.float().abs() > 2**-6 * together.factor
    assert torch.equal(values[normal], others[normal])
    assert normal.float().mean() > 0.9


@pytest.mark.parametrize(("sites", "inner", "outer"), [(5001, 352, 1408), (1216, 5632, 1408)])
def test_products_are_those_of_the_rounded_matrices(sites, inner, outer):
    from fcmae.kernels.float8_triton import Float8, scale, weight_grad, zero_largest

    weight, x, grad = (
        torch.randn(rows, columns, device="cuda").bfloat16()
        for rows, columns in ((outer, inner), (sites, inner), (sites, outer))
    )
    float8 = Float8.of(weight, *zero_largest(1, weight.device))
    out, *kept = float8.product(x)
    scaled = float8.scale_grad(grad)
    of_x, of_weight = float8.input_grad(scaled, grad.dtype), weight_grad(scaled, *kept)
    w, x, grad = (m.double() for m in (weight, x, grad))
    w8, x8, grad8 = (m.values.double() * m.factor for m in (scale(m.bfloat16(), zeros()) for m in (w, x, grad)))
    for name, found, rounded, exact in (
        ("product", out, x8 @ w8.t(), x @ w.t()),
        ("input grad", of_x, grad8 @ w8, grad @ w),
        ("weight grad", of_weight, grad8.t() @ x8, grad.t() @ x),
    ):
        print(f"\n{name}: {relative_error(found, rounded):.1e} of the rounded, {relative_error(found, exact):.1e}")
        # Tensor cores keep 14 bits of the whole sum of the product alone.
        assert relative_error(found, rounded) < (6e-3 if name == "product" else 3e-3), name
        assert relative_error(found, exact) < 0.05, name


def train(steps, graphed):
    """The weights of Femto after some steps in float8."""
    torch.manual_seed(0)
    model = FCMAE("convnextv2_femto", decoder_embed_dim=64).cuda()
    optimizer = create_optimizer(model, OptimConfig())
    set_lr(optimizer, 3e-4)
    imgs = torch.randn(64, 3, 224, 224, device="cuda")
    masks = [random_mask(torch.rand(64, 49, device="cuda"), 19) for _ in range(8)]
    loss = lambda batch: (model(batch[0], batch[1], 19).loss, {})  # noqa: E731
    step = TrainingStep(model, loss, torch.device("cuda"), "fp8", graphed=graphed)
    for number in range(steps):
        step([[imgs, masks[number % 8]]])
        optimizer.step()
    step.close()
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_two_runs_give_the_same_bits_in_a_cuda_graph_too():
    first, again, graphed = (train(20, graphed) for graphed in (False, False, True))
    for name, value in first.items():
        assert value.isfinite().all(), name
        assert torch.equal(value, again[name]), name
        assert torch.equal(value, graphed[name]), name


@pytest.mark.skipif(not FashionMNIST.DEBIAN.exists(), reason="needs Debian's dataset-fashion-mnist")
def test_follows_the_curve_of_bf16(fcmae, tmp_path):
    """Large over 2,000 steps. Means of 10 steps, as a run logs them."""
    curves = []
    for name in ("bf16", "fp8"):
        fcmae(
            *("pretrain", "experiment=fashion_mnist/pretrain", "model=convnextv2_large", f"precision={name}"),
            *("optim.global_batch_size=128", "schedule.epochs=5", "schedule.warmup_epochs=1"),
            *("trainer.log_every=10", "trainer.eval_every_epochs=null", "trainer.max_steps=2000"),
            *("logger=quiet", f"hydra.run.dir={name}"),
            check=EXIT_RESUMABLE,
            threads=8,
        )
        curves.append(torch.tensor([line["loss"] for line in metrics_of(tmp_path / name) if "loss" in line]))
    bf16, fp8 = curves
    difference = ((fp8 - bf16).abs() / bf16).max().item()
    print(f"\nlosses {bf16[0]:.4f} to {bf16[-1]:.4f}, largest relative difference {difference:.1e}")
    assert len(bf16) == 200
    assert bf16[-1] < 0.5 * bf16[0]
    assert 0 < difference < 1e-2
