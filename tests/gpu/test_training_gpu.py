"""What training on a GPU promises: the same bits twice, with CUDA graphs or without, and the masked engine's curve."""

import time

import pytest
import torch

from fcmae.config import OptimConfig
from fcmae.distributed import World
from fcmae.loggers.meter import Meter
from fcmae.masks.patches import random_mask
from fcmae.models import FCMAE
from fcmae.optim.adamw import create_optimizer
from fcmae.optim.schedule import Schedule
from fcmae.training.cuda_graphs import EagerBackward, GraphedBackward

pytestmark = pytest.mark.gpu


def train(
    steps: int,
    engine: str = "packed",
    graphed: bool = False,
    accumulate: bool = False,
    dtype=torch.bfloat16,
    warmup=0,
    **network,
):
    """Weights and losses after some steps on a few random images."""
    torch.compiler.reset()
    torch.manual_seed(0)
    model = FCMAE("convnextv2_atto", engine=engine, decoder_embed_dim=64, **network).cuda()
    model.compile()
    optimizer = create_optimizer(model, OptimConfig())
    lr = Schedule(3e-4, 0.0, warmup, steps)
    imgs = torch.randn(64, 3, 7, 7, device="cuda").repeat_interleave(32, 2).repeat_interleave(32, 3)
    imgs = imgs + 0.3 * torch.randn(64, 3, 224, 224, device="cuda")
    masks = [random_mask(torch.rand(64, 49, device="cuda"), 19) for _ in range(8)]

    def run(batch, _):
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            loss = model(batch[0], batch[1], 19).loss
        loss.backward()
        return loss.detach()

    backward = GraphedBackward(run, model, accumulate) if graphed else EagerBackward(run, model)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr(step)
        backward.start_step()
        for _ in range(1 + accumulate):
            losses.append(backward([imgs, masks[step % 8]]).clone())
        optimizer.step()
    return model.state_dict(), torch.stack(losses).cpu()


def assert_same(a, b):
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_two_runs_give_the_same_bits():
    assert_same(train(20)[0], train(20)[0])


@pytest.mark.parametrize("accumulate", [False, True])
def test_a_cuda_graph_changes_no_bit(accumulate):
    assert_same(train(20, graphed=True, accumulate=accumulate)[0], train(20, accumulate=accumulate)[0])


@pytest.mark.parametrize("size", [4, 32])
def test_the_unet_gives_the_same_bits_in_a_cuda_graph_and_learns(size):
    network = {"decoder": "unet", "pred_patch_size": size}
    (graphed, losses), (eager, _) = (train(40, graphed=graphed, warmup=10, **network) for graphed in (True, False))
    print(f"\npatches of {size} px: losses {losses[0]:.4f} to {losses[-1]:.4f}")
    assert_same(graphed, eager)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 1e-2)])
def test_packed_follows_masked_with_the_unet(dtype, tolerance):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = dtype != torch.float32
    network = {"decoder": "unet", "pred_patch_size": 8}
    packed, masked = (train(40, engine, dtype=dtype, warmup=20, **network)[1] for engine in ("packed", "masked"))
    assert ((packed - masked).abs() / masked).max() < tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 1e-2)])
def test_packed_follows_the_masked_curve(dtype, tolerance):
    """Warmed up as recipes are: from the first step at full rate bfloat16's rounding alone grows to 2% of a loss."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = dtype != torch.float32
    packed, masked = (train(200, engine, dtype=dtype, warmup=40)[1] for engine in ("packed", "masked"))
    difference = ((packed - masked).abs() / masked).max().item()
    print(f"\n{dtype}: losses {masked[0]:.4f} to {masked[-1]:.4f}, largest relative difference {difference:.1e}")
    assert masked[-1] < 0.5 * masked[0]
    assert difference < tolerance


@pytest.mark.parametrize("accumulate", [False, True])
def test_a_cuda_graph_fills_the_parts_of_a_loss(accumulate):
    layer = torch.nn.Linear(8, 2).cuda()

    def run(batch, _):
        output = layer(batch[0])
        parts = {"loss_size": output.square().mean(), "loss_sum": output.sum(1).abs().mean()}
        loss = sum(parts.values())
        loss.backward()
        return {"loss": loss.detach(), **{name: part.detach() for name, part in parts.items()}}

    graphed, eager = GraphedBackward(run, layer, accumulate), EagerBackward(run, layer)
    for batch in torch.randn(3, 4, 8, device="cuda"):
        expected = {name: value.clone() for name, value in eager([batch]).items()}
        layer.zero_grad(set_to_none=not accumulate)
        graphed.start_step()
        assert all(value.equal(expected[name]) for name, value in graphed([batch]).items())


def test_recording_a_cuda_graph_leaves_no_trace_in_buffers():
    layer = torch.nn.Sequential(torch.nn.Linear(8, 2), torch.nn.BatchNorm1d(2)).cuda()
    like = torch.nn.Sequential(torch.nn.Linear(8, 2), torch.nn.BatchNorm1d(2)).cuda()
    like.load_state_dict(layer.state_dict())

    def run(batch, _, layer=layer):
        loss = layer(batch[0]).square().mean()
        loss.backward()
        return loss.detach()

    graphed = GraphedBackward(run, layer)
    batch = torch.randn(4, 8, device="cuda")
    graphed.record([torch.zeros_like(batch)])
    graphed.start_step()
    graphed([batch])
    run([batch], True, like)
    for buffer, expected in zip(layer.buffers(), like.buffers(), strict=True):
        assert buffer.equal(expected)


def test_waiting_for_data_counts_only_while_the_gpu_is_idle():
    """Seconds are compared with the same clock's: a GPU that is busy all the while has not waited."""
    meter = Meter(World(0, 1, 0, 1, torch.device("cuda")), images_per_step=8)
    matrix = torch.randn(8192, 8192, device="cuda")
    for busy in (True, False):
        torch.cuda.synchronize()
        meter.restart()
        for _ in range(4):
            for _ in range(60 if busy else 0):  # far more than a tenth of a second of work
                matrix @ matrix
            with meter.waiting_for_data():
                time.sleep(0.05)
        torch.cuda.synchronize()
        share = meter.read()["data_wait"]
        assert share < 0.05 if busy else share > 0.8
