"""Several GPUs compute what one does: the real command under torchrun, over NCCL."""

import pytest
import torch

from tests.results import assert_same, metrics_of, newest

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
RUN = ("pretrain", "data=synthetic", "data.length=320", "optim.global_batch_size=64", "optim.lr=3e-4")
RUN += ("schedule.epochs=10", "schedule.warmup_epochs=2", "trainer.checkpoint_every_epochs=10")
RUN += ("trainer.eval_every_epochs=10", "trainer.log_every=1", "logger=quiet", "logger.progress=false")
"""50 steps."""


def losses(run_dir):
    lines = metrics_of(run_dir)
    return torch.tensor([line["loss"] for line in lines if "loss" in line], dtype=torch.float64)


@pytest.mark.parametrize("model", ["convnextv2_atto", "convnextv2_base"])
def test_the_curve_of_two_gpus_is_that_of_one(fcmae, tmp_path, model):
    """float32, the same global batch, micro-batches of 32: on one GPU two of them a step."""
    args = (*RUN, f"model={model}", "precision=float32", "trainer.micro_batch_size=32")
    for ranks in (1, 2):
        fcmae(*args, f"hydra.run.dir={ranks}", ranks=ranks, threads=8, timeout=400)
    one, two = losses(tmp_path / "1"), losses(tmp_path / "2")
    assert len(one) == len(two) == 50
    difference = ((two - one).abs() / one).max().item()
    print(f"\n{model}: losses {one[0]:.4f} to {one[-1]:.4f}, largest relative difference {difference:.1e}")
    assert difference <= 1e-5


@pytest.mark.parametrize("micro_batch_size", [32, 16])
def test_a_cuda_graph_with_the_exchange_changes_no_bit(fcmae, tmp_path, micro_batch_size):
    """With micro-batches of 16 a step replays a graph without the exchange, then one with it.

    torch's DistributedDataParallel gives the same bits, because a sum of two is the same in any order.
    """
    args = (*RUN, "model=convnextv2_atto", "precision=bf16", f"trainer.micro_batch_size={micro_batch_size}")
    runs = {"own": ("true", "own"), "eager": ("false", "own"), "ddp": ("true", "ddp")}
    for name, (graph, exchange) in runs.items():
        how = (f"trainer.cuda_graph={graph}", f"trainer.exchange={exchange}", f"hydra.run.dir={name}")
        fcmae(*args, *how, ranks=2, threads=8, timeout=400)
    own, eager, ddp = (newest(tmp_path / name) for name in runs)
    assert_same(own["model"], eager["model"])
    assert_same(own["model"], ddp["model"])
