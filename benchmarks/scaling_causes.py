"""Why training steps on several GPUs take longer than on one, and what shortens them: one process per GPU.

    python -m benchmarks.scaling_causes                                # every GPU of this machine, all groups
    python -m benchmarks.scaling_causes groups=[copies,ddp] json=causes.json
    NCCL_ALGO=Tree python -m benchmarks.scaling_causes groups=[]       # what NCCL reads from the environment

Variants of a group take turns, together with steps without an exchange and with the exchange of training. So a change
of clocks or of temperature meets all of them.
"""

import contextlib
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks import exchanges
from fcmae import precision
from fcmae.bench.measure import machine, parse, write_report
from fcmae.bench.scaling import gpus_or, spawn
from fcmae.config import OptimConfig, check
from fcmae.distributed import World
from fcmae.masks.patches import grid_size, random_mask
from fcmae.models import FCMAE
from fcmae.optim.adamw import create_optimizer
from fcmae.training.exchange import Bucket, GradientExchange
from fcmae.training.step import TrainingStep

GROUPS = ("base", "copies", "ctas", "half", "shards", "sizes", "windows", "ddp")
ALONE, OWN, SOLO = "no exchange", "own", "one GPU at a time"


@dataclass
class CausesConfig:
    """What is measured."""

    groups: list[str] = field(default_factory=lambda: list(GROUPS))
    model: str = "convnextv2_base"
    batch_size: int = 256
    """Images per rank."""
    image_size: int = 224
    mask_ratio: float = 0.6
    precision: str = "auto"
    device: str = "auto"
    ranks: int | None = None
    """None = as many as there are GPUs; 2 on a CPU."""
    rounds: int = 3
    steps: int = 10
    """Per variant and round."""
    warm_up: int = 3
    json: str | None = None
    """A file for the result."""

    def __post_init__(self) -> None:
        for group in self.groups:
            check("groups", group, group in GROUPS, f"some of {', '.join(GROUPS)}")


@dataclass
class Variant:
    """A way to run a step."""

    name: str
    step: TrainingStep
    update: Callable[[], None]
    grads: list[Tensor | None] = field(default_factory=list)
    """What a replay of its graph fills."""
    difference: float = 0.0
    ms: list[float] = field(default_factory=list)
    state: list[tuple[float, float, float]] = field(default_factory=list)
    """MHz, watts and degrees Celsius of this rank's GPU, at work."""


@dataclass
class Row:
    """One line. Times are medians over all steps."""

    group: str
    variant: str
    slowest_ms: float
    """Of the ranks."""
    fastest_ms: float
    exposed_ms: float
    """The slowest rank's, more than without an exchange in the same rounds."""
    difference: float
    """Of the gradient from that of training's exchange, relative, on the first rank."""
    mhz: list[float]
    watts: list[float]
    celsius: list[float]


class Bench:
    """A model, its batches and the variants that run on them, in one process per GPU."""

    def __init__(self, cfg: CausesConfig, world: World) -> None:
        self.cfg, self.world, self.device = cfg, world, world.device
        torch._dynamo.config.optimize_ddp = False  # as without DDP, so that nothing is compiled again
        self.on_gpu = self.device.type == "cuda"
        self.precision = precision.settle("precision", cfg.precision, self.device, smallest=world.smallest)
        torch.manual_seed(0)
        model = FCMAE(cfg.model, mask_ratio=cfg.mask_ratio).to(self.device)
        model.backbone.head.requires_grad_(False)
        self.model, self.params = model, [p for p in model.parameters() if p.requires_grad]
        self.optimizer = create_optimizer(model, OptimConfig(lr=1e-4))
        keep, size = model.len_keep(cfg.image_size, cfg.image_size), cfg.image_size
        rows, cols = grid_size(size, size, model.mask_patch_size)
        imgs = torch.randn(cfg.batch_size, 3, size, size, device=self.device)
        noise = (torch.rand(cfg.batch_size, rows * cols, device=self.device) for _ in range(4))
        self.batches = [[imgs, random_mask(values, keep)] for values in noise]
        self.forward: Callable[[Any], Tensor] = lambda batch: model(batch[0], batch[1], keep).loss
        self._fill_caches()

    def _fill_caches(self) -> None:
        """The first rank compiles everything while the others wait."""
        if self.on_gpu:
            self.model.compile()
        for turn in (True, False):
            if self.world.is_main == turn:
                TrainingStep(self.model, self._loss, self.device, self.precision)([self.batches[0]])
                self.model.zero_grad()
            self.meet()

    def _loss(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return self.forward(batch), {}

    def meet(self) -> None:
        """Waits for the other ranks, on the host."""
        if self.on_gpu:
            torch.cuda.synchronize()
        self.world.sum(torch.zeros(1))

    def variant(self, name: str, exchange: GradientExchange | None = None, **options: Any) -> Variant:
        """A step with that exchange, recorded in a CUDA graph on a GPU.

        ``options``: ``forward`` instead of the model's; ``update`` instead of the optimizer's.
        """
        forward = options.get("forward", self.forward)
        step = TrainingStep(
            self.model,
            lambda batch: (forward(batch), {}),
            self.device,
            self.precision,
            graphed=self.on_gpu,
            exchange=exchange,
        )
        if "forward" in options and self.on_gpu:
            step.backward.warm_up = 11  # type: ignore[union-attr]  # DDP lays out its buckets in its first passes
        variant = Variant(name, step, options.get("update", self.optimizer.step))
        step([self.batches[0]])
        variant.grads = [p.grad for p in self.params]
        return variant

    def own(self, name: str, bucket: Callable = Bucket, mib: int | None = None, group: Any = None) -> Variant:
        """A step with training's exchange, of other buckets or in another group."""
        sizes = {} if mib is None else {"bucket_bytes": mib * 2**20}
        return self.variant(name, GradientExchange(self.model, self.world.size, group, bucket=bucket, **sizes))

    def compare(self, variant: Variant, own: Variant) -> None:
        """Notes how far the gradients of a batch are apart, after two steps each."""
        grads = []
        for one in (own, variant):
            for param, grad in zip(self.params, one.grads, strict=True):
                param.grad = grad
            for batch in self.batches[:2]:
                one.step([batch])
            grads.append([p.grad.clone() for p in self.params if p.grad is not None])
        apart = torch.nn.utils.get_total_norm([a - b for a, b in zip(*grads, strict=True)])
        variant.difference = float(apart / torch.nn.utils.get_total_norm(grads[0]))

    def time(self, variant: Variant) -> None:
        """A block of steps of a variant, and the GPU's state while it runs."""
        for param, grad in zip(self.params, variant.grads, strict=True):
            param.grad = grad
        ends = []
        for i in range(self.cfg.warm_up + self.cfg.steps + 1):
            variant.step([self.batches[i % len(self.batches)]])
            variant.update()
            ends.append(self._now())
        if self.on_gpu:
            variant.state.append(_state(self.device))
            torch.cuda.synchronize()
        ends = ends[self.cfg.warm_up :]
        variant.ms += [_between(a, b) for a, b in itertools.pairwise(ends)]

    def _now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _between(a: Any, b: Any) -> float:
    return 1e3 * (b - a) if isinstance(a, float) else a.elapsed_time(b)


def _state(device: torch.device) -> tuple[float, float, float]:
    """MHz, watts and degrees Celsius; zeros where they cannot be read."""
    try:
        return (
            float(torch.cuda.clock_rate(device)),
            torch.cuda.power_draw(device) / 1e3,
            float(torch.cuda.temperature(device)),
        )
    except (RuntimeError, ImportError, ModuleNotFoundError):
        return 0.0, 0.0, 0.0


def _nccl_group(**config: int) -> Any:
    """A communicator of all ranks with other settings. Raises AttributeError where NCCL has no such setting."""
    options = dist.ProcessGroupNCCL.Options()
    for name, value in config.items():
        if not hasattr(options.config, name):
            raise AttributeError(f"NCCL's config has no {name}")
        setattr(options.config, name, value)
    if not torch.cuda.is_available():
        raise RuntimeError("needs GPUs")
    group = dist.new_group(backend="nccl", pg_options=options)
    dist.all_reduce(torch.zeros(1, device="cuda"), group=group)  # it connects now
    return group


def _ddp(bench: Bench, mib: int) -> Variant:
    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = bench.model

        def forward(self, *batch: Tensor) -> Tensor:
            return bench.forward(batch)

    side = torch.cuda.Stream() if bench.on_gpu else None
    with torch.cuda.stream(side) if side else contextlib.nullcontext():
        wrapped = nn.parallel.DistributedDataParallel(
            Loss(),
            device_ids=[bench.device] if bench.on_gpu else None,
            bucket_cap_mb=mib,
            gradient_as_bucket_view=True,
            broadcast_buffers=False,
        )
    return bench.variant(f"DDP, {mib} MiB", forward=lambda batch: wrapped(*batch))


def _shards(bench: Bench, name: str, **options: Any) -> Variant:
    exchange = GradientExchange(bench.model, bench.world.size, bucket=exchanges.ShardBucket)
    buckets: Any = exchange.buckets
    return bench.variant(name, exchange, update=exchanges.ShardedUpdate(buckets, **options).step)


def _variants(bench: Bench, group: str) -> Iterator[Callable[[], Variant]]:
    """What makes the variants of a group; a variant that cannot be made raises."""
    if group == "base":
        yield partial(bench.own, "copies alone", exchanges.NothingSent)
    elif group == "ctas":
        for ctas in (1, 2, 4, 8, 16):
            yield lambda ctas=ctas: bench.own(f"max_ctas {ctas}", group=_nccl_group(max_ctas=ctas, min_ctas=1))
        yield lambda: bench.own("cga_cluster_size 0", group=_nccl_group(cga_cluster_size=0))
    elif group == "sizes":
        for mib in (25, 400):
            yield partial(bench.own, f"{mib} MiB", mib=mib)
    elif group == "half":
        yield partial(bench.own, "bfloat16", exchanges.HalfBucket)
    elif group == "copies":
        yield partial(bench.own, "copy engines", exchanges.PeerBucket)
        for mib in (25, 400):
            yield partial(bench.own, f"copy engines, {mib} MiB", exchanges.PeerBucket, mib)
        yield partial(bench.own, "symmetric memory, two-shot", exchanges.TwoShotBucket)
    elif group == "windows":
        yield lambda: bench.own("NCCL windows", exchanges.WindowBucket, group=_nccl_group())
        for number, policy in ((1, "efficient"), (2, "zero CTAs")):
            yield lambda number=number, policy=policy: bench.own(
                f"NCCL windows, {policy}", exchanges.WindowBucket, group=_nccl_group(cta_policy=number)
            )
    elif group == "shards":
        yield partial(_shards, bench, "sharded AdamW")
        yield partial(_shards, bench, "sharded AdamW, gather hidden", hidden=True)
        yield partial(_shards, bench, "sharded AdamW, bfloat16 gather", dtype=torch.bfloat16)
    elif group == "ddp":
        yield partial(_ddp, bench, 25)
        yield partial(_ddp, bench, 100)


def measure(cfg: CausesConfig, world: World) -> dict[str, Any] | None:
    """All groups. The report is the first rank's."""
    bench = Bench(cfg, world)
    say: Callable[..., None] = partial(print, flush=True) if world.is_main else _quiet
    where = machine(world.device)
    say(f"{where.get('gpu', where['cpu'])}, torch {where['torch']}, {bench.precision}; {world.size} ranks, "
        f"{cfg.model}, {cfg.batch_size} images each")  # fmt: skip
    say(
        f"{'group':8} {'variant':32} {'slowest ms':>10} {'fastest ms':>10} {'exposed ms':>10} "
        f"{'difference':>10}  MHz, W, C of each GPU"
    )
    alone, own = bench.variant(ALONE), bench.own(OWN)
    rows = []
    for group in cfg.groups or [""]:
        variants = [alone, own, *_made(bench, group, own, say)]
        if group == "base":
            variants.append(Variant(SOLO, alone.step, alone.update, alone.grads))
        for variant in variants:
            variant.ms, variant.state = [], []
        for _ in range(cfg.rounds):
            for variant in variants:
                for turn in range(world.size) if variant.name == SOLO else (world.rank,):
                    bench.meet()
                    if turn == world.rank:
                        bench.time(variant)
        bench.meet()
        without = 0.0
        for variant in variants:
            rows.append(_row(group, variant, without, world))
            without = without or rows[-1].slowest_ms
            say(_line(rows[-1]))
        report = {"machine": where, "config": asdict(cfg), "results": [asdict(row) for row in rows]}
        if world.is_main and cfg.json:  # now, so that it stays if a later group fails
            write_report(Path(cfg.json), **report)
        for variant in variants[2:]:
            if variant.name != SOLO:
                variant.step.close()
    for variant in (alone, own):
        variant.step.close()
    bench.meet()
    return report if world.is_main else None


def _made(bench: Bench, group: str, own: Variant, say: Callable[..., None]) -> Iterator[Variant]:
    """The variants of a group that can be made on this machine."""
    for make in _variants(bench, group):
        try:
            variant = make()
            bench.compare(variant, own)
            yield variant
        except (RuntimeError, AttributeError, ImportError, TypeError, ValueError) as error:
            lines = str(error).strip().splitlines() or [repr(error)]
            say(f"{group:8} not possible here: {type(error).__name__}: {lines[0][:150]}")


def _row(group: str, variant: Variant, without: float, world: World) -> Row:
    ms = statistics.median(variant.ms)
    states = torch.zeros(world.size, 3)
    if variant.state:
        states[world.rank] = torch.tensor(variant.state).median(0).values
    slowest, fastest = float(world.max(torch.tensor(ms))), -float(world.max(torch.tensor(-ms)))
    mhz, watts, celsius = world.sum(states).T.tolist()
    exposed = slowest - without if without else 0.0
    return Row(group, variant.name, slowest, fastest, exposed, variant.difference, mhz, watts, celsius)


def _line(row: Row) -> str:
    state = " ".join(f"{m:.0f},{w:.0f},{c:.0f}" for m, w, c in zip(row.mhz, row.watts, row.celsius, strict=True) if m)
    return (
        f"{row.group:8} {row.variant:32} {row.slowest_ms:10.2f} {row.fastest_ms:10.2f} {row.exposed_ms:10.2f} "
        f"{row.difference:10.1e}  {state}"
    )


def _quiet(*_: object, **__: object) -> None:
    """The first rank speaks for the others."""


def main() -> None:
    cfg = parse(CausesConfig, sys.argv[1:])
    spawn(measure, cfg, cfg.device, cfg.ranks or gpus_or(2, cfg.device))


if __name__ == "__main__":
    main()
