"""Gradients summed over ranks: the same as one process computes from the whole batch, in any buckets."""

import hashlib
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from benchmarks.exchanges import PeerBucket
from fcmae.config import compose
from fcmae.data.loading import TrainBatches, Workers
from fcmae.data.plan import BatchPlan, Padding
from fcmae.distributed import World
from fcmae.tasks.finetuning import Finetuning
from fcmae.tasks.pretraining import Pretraining
from fcmae.training.cuda_graphs import EagerBackward
from fcmae.training.exchange import Bucket, GradientExchange, _split, create_exchange
from fcmae.training.finite import FiniteGuard
from fcmae.training.state import TrainState
from fcmae.training.step import TrainingStep
from tests.conftest import TINY_FINETUNE, TINY_PRETRAIN, relative_error, run_python

RANKS = 2


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 3))


def micro_batches(rank: int, ranks: int) -> list[torch.Tensor]:
    """Two of a rank's share of 16 samples."""
    samples = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))
    return list(samples.chunk(ranks)[rank].chunk(2))


def gradients(model: nn.Module, rank: int, ranks: int, bucket_bytes: int = 2**20) -> list[torch.Tensor]:
    exchange = GradientExchange(model, ranks, bucket_bytes=bucket_bytes)

    def run(batch: list[torch.Tensor], last: bool) -> torch.Tensor:
        loss = model(batch[0]).square().mean() / 2
        with exchange(last):
            (loss / ranks).backward()
        return loss.detach()

    backward = EagerBackward(run, model)
    for _ in range(2):  # the second step must not know of the first
        backward.start_step()
        for last, batch in enumerate(micro_batches(rank, ranks)):
            backward([batch], bool(last))
    return [p.grad.clone() for p in model.parameters()]


class Run:
    """A task of padded micro-batches on two ranks; ``step`` takes the exchange to step with."""

    def __init__(self, task_type: type, overrides: tuple[str, ...]) -> None:
        sizes = ("optim.global_batch_size=7", "trainer.micro_batch_size=2", "optim.clip_grad=0.5")
        cfg = compose(overrides[0], [*overrides[1:], *sizes])
        torch.manual_seed(0)
        self.task, rank = task_type(cfg), dist.get_rank()
        self.world = World(rank, RANKS, rank, RANKS, torch.device("cpu"))
        self.plan = BatchPlan.create(24, 7, 2, RANKS, cfg.seed, cfg.data.crops_per_image, self.task.pairs)
        self.task.prepare(self.plan)
        assert self.plan.padding
        assert self.plan.accum_steps > 1
        self.padding = Padding(self.plan, rank, self.world.device)
        self.state = TrainState.create(self.task.model, cfg, self.world)
        self.state.optimizer.param_groups[0]["lr"] = 1e-2
        self.guard = FiniteGuard(self.world.device)
        self.task.model.train()

    def step(self, kind: str, poisoned: bool = False) -> None:
        """One optimizer step; ``poisoned``: with an infinite loss in the first micro-batch of the last rank."""
        task, plan, state, rank = self.task, self.plan, self.state, self.world.rank
        batches = TrainBatches(task.dataset(), plan, rank, range(state.step, state.step + 1), Workers())
        micro = range(plan.accum_steps)
        drawn = [self.padding(m, [*next(batches), *task.draw(state.step, plan.read(m, rank))]) for m in micro]
        passes: list[int] = []

        def loss(batch):
            passes.append(len(passes))
            value, parts = task.loss(task.model, batch[:-1], batch[-1])
            return (value + torch.inf if poisoned and rank == RANKS - 1 and passes == [0] else value), parts

        exchange = create_exchange(kind, task.model, RANKS)
        step = TrainingStep(
            task.model, loss, self.world.device, "float32", accum_steps=plan.accum_steps, exchange=exchange
        )
        state.update(step(drawn)["loss"], self.guard, 0.5, self.world)

    def bits(self) -> str:
        """The weights and the optimizer's state, and whether a step was found not to be finite."""
        optimizer = self.state.optimizer.state.values()
        tensors = [*self.task.model.parameters(), *(t for values in optimizer for t in values.values())]
        held = b"".join(t.detach().numpy().tobytes() for t in tensors)
        return f"{hashlib.sha256(held).hexdigest()} {self.guard.first_bad_step(self.world)}"


def bits_of(task_type: type, overrides: tuple[str, ...], kinds: str) -> str:
    """After three steps with these exchanges, the last one with an infinite loss on one rank."""
    run = Run(task_type, overrides)
    for number, kind in enumerate(kinds.split()):
        run.step(kind, poisoned=number == 2)
    return run.bits()


def on_a_rank() -> None:
    """Writes ``[gradients, error, what was left, bits]`` to a file in the current folder."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    found = {size: gradients(network(rank), rank, RANKS, size) for size in (4, 1000, 2**20)}
    model = network(0)
    exchange = GradientExchange(model, RANKS, bucket_bytes=4)
    with exchange():
        model(torch.ones(1, 6)).sum().backward()
    exchange.attach()
    left = sum(p.grad.abs().sum().item() for p in model.parameters())
    error = ""
    try:
        with exchange():
            model[:3](torch.ones(1, 6)).sum().backward()
    except RuntimeError as caught:
        error = str(caught)
    bits = [
        [bits_of(*task, kinds) for kinds in ("own own own", "ddp ddp ddp", "own ddp own")]
        for task in ((Pretraining, TINY_PRETRAIN), (Finetuning, TINY_FINETUNE))
    ]
    dist.destroy_process_group()
    numbers = {size: [grad.tolist() for grad in grads] for size, grads in found.items()}
    Path(f"{rank}.json").write_text(json.dumps([numbers, error, left, bits]))


def test_ranks_compute_the_gradient_of_the_whole_batch(tmp_path):
    run_python(tmp_path, "-c", "from tests.unit.test_exchange import on_a_rank; on_a_rank()", ranks=RANKS)
    answers = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(RANKS)]
    whole = gradients(network(0), 0, 1)
    for found, error, left, bits in answers:
        for own, ddp, changed in bits:
            assert own == ddp == changed, "torch's DistributedDataParallel computes something else"
            assert own.endswith(" 2"), "an infinite loss of one rank must reach all"
        for grads in found.values():
            for grad, reference in zip(grads, whole, strict=True):
                assert relative_error(torch.tensor(grad), reference) < 1e-6
        assert left == 0, "passes that add would add to the last sum"
        assert error == "the parameter 4.bias got no gradient"
    assert answers[0][0] == answers[1][0]


@pytest.mark.parametrize(("limit", "sizes"), [(1, [1] * 6), (8 * 4, [2, 1, 1, 2]), (200 * 4, [4, 2])])
def test_buckets(limit, sizes):
    """The last two have less than a 32nd of the bytes."""
    params = [nn.Parameter(torch.zeros(n)) for n in (4, 4, 100, 6, 2, 1)]
    parts = list(_split(params, limit))
    assert [len(part) for part in parts] == sizes
    assert [p for part in parts for p in part] == params


def test_a_bucket_holds_one_kind_of_parameter():
    params = [nn.Parameter(torch.zeros(1, dtype=dtype)) for dtype in (torch.float32, torch.float64)]
    assert [len(part) for part in _split(params, 100)] == [1, 1]


def test_gradients_keep_the_strides_of_their_parameters():
    """Fused AdamW walks the gradient in the memory order of the parameter."""
    start = torch.randn(4, 3, 2, 2).contiguous(memory_format=torch.channels_last)
    alone, exchanged = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    gradient = torch.randn(4, 3, 2, 2)
    alone.grad, exchanged.grad = gradient.contiguous(memory_format=torch.channels_last), gradient
    bucket = Bucket([exchanged])
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        bucket.launch()
        bucket.finish()
    finally:
        dist.destroy_process_group()
    assert exchanged.grad.stride() == exchanged.stride()
    assert torch.equal(exchanged.grad, gradient)
    for param in (alone, exchanged):
        torch.optim.AdamW([param], lr=0.1, fused=True).step()
    assert torch.equal(alone, exchanged)


class Shared:
    """The memory that ranks, here threads, share: as torch's symmetric memory."""

    def __init__(self, rank: int, buffers: list[torch.Tensor], barrier: threading.Barrier) -> None:
        self.rank, self.buffers, self.threads = rank, buffers, barrier

    def barrier(self, channel: int) -> None:
        self.threads.wait(60)

    def get_buffer(self, rank: int, sizes: list[int], dtype: torch.dtype, offset: int) -> torch.Tensor:
        return self.buffers[rank][offset:].view(dtype)[: sizes[0]]


def test_copies_between_gpus_sum_in_the_order_of_the_ranks(monkeypatch):
    """Several steps, so that a rank that overwrites what another one still reads is found out."""
    ranks, buffers, barrier = 4, [], threading.Barrier(4)

    def allocate(self, numel):
        part = -(-numel // ranks)
        self.memory = Shared(self.group, buffers, barrier)
        self.memory.world_size, self.received = ranks, torch.empty(ranks, part)
        buffers.append(torch.zeros(ranks * part))
        return buffers[-1]

    monkeypatch.setattr(PeerBucket, "allocate", allocate)
    params = [[nn.Parameter(torch.zeros(n)) for n in (1000, 33)] for _ in range(ranks)]
    buckets = [PeerBucket(own, rank) for rank, own in enumerate(params)]
    grads = torch.randn(3, ranks, 1033, generator=torch.Generator().manual_seed(0))
    found = torch.empty_like(grads)

    def run(rank):
        bucket = buckets[rank]
        for step, values in enumerate(grads[:, rank]):
            bucket.flat[:1033] = values
            bucket.sum_parts()
            found[step, rank] = bucket.flat[:1033]

    with ThreadPoolExecutor(ranks) as pool:
        list(pool.map(run, range(ranks)))
    in_order = ((grads[:, 0] + grads[:, 1]) + grads[:, 2]) + grads[:, 3]
    for rank in range(ranks):
        assert torch.equal(found[:, rank], in_order)
