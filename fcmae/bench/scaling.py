"""``fcmae bench scaling``: training steps on 1, 2, 4, ... GPUs, and what the exchange of gradients costs.

It starts a process for each GPU itself; started by torchrun or srun, it measures those ranks, on several nodes too.
"""

import contextlib
import itertools
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from fcmae import distributed, precision, toolchain
from fcmae import ranks as launch
from fcmae.bench.measure import (
    check_models,
    check_positive,
    check_some_of,
    machine,
    median_step_ms,
    parse,
    title,
    write_report,
)
from fcmae.bench.workloads import DENSE, FINETUNE, PRETRAIN, TASKS, Workload, classifier, finetuning, pretraining
from fcmae.config import OptimConfig, check
from fcmae.config.checks import check_one_of
from fcmae.config.training import EXCHANGES
from fcmae.distributed import World
from fcmae.errors import UsageError
from fcmae.models import FCMAE
from fcmae.optim.adamw import create_optimizer
from fcmae.training.exchange import create_exchange
from fcmae.training.step import TrainingStep

WEAK, STRONG = "weak", "strong"


@dataclass
class ScalingConfig:
    """What ``fcmae bench scaling`` measures."""

    models: list[str] = field(default_factory=lambda: ["convnextv2_base"])
    task: str = PRETRAIN
    """``pretrain`` or ``finetune``."""
    exchange: str = "own"
    """As ``trainer.exchange``."""
    ranks: list[int] | None = None
    """Numbers of ranks; None = 1, 2, 4, ... as many as there are GPUs. The first is the yardstick."""
    modes: list[str] = field(default_factory=lambda: [WEAK, STRONG])
    """``weak``: ``batch_size`` images per rank; ``strong``: ``batch_size`` images per step, over all ranks."""
    batch_size: int = 256
    image_size: int = 224
    mask_ratio: float = 0.6
    precision: str = "auto"
    device: str = "auto"
    compile: bool | None = None
    """None = on GPUs."""
    cuda_graph: bool | None = None
    """None = on GPUs."""
    repeats: int = 30
    warm_up: int = 5

    def __post_init__(self) -> None:
        check_some_of("modes", self.modes, (WEAK, STRONG))
        check_one_of("task", self.task, TASKS)
        check_one_of("exchange", self.exchange, EXCHANGES)
        check_one_of("precision", self.precision, precision.PRECISIONS)
        ok = self.ranks is None or (len(self.ranks) > 0 and all(n > 0 for n in self.ranks))
        check("ranks", self.ranks, ok, "positive integers")
        check_positive(self, "batch_size", "image_size", "repeats")


@dataclass
class ScalingResult:
    """One row. Times are those of the slowest rank."""

    model: str
    mode: str
    ranks: int
    batch_size: int
    """Images per rank."""
    cuda_graph: bool
    ms: float
    images_per_second: float
    """Of all ranks."""
    efficiency: float
    """Images per second per rank, as a share of the first row of the same mode."""
    exposed_ms: float
    """What a step takes longer than one that exchanges nothing: communication that nothing hides."""
    gradient_mb: float
    all_reduce_ms: float
    """The gradients at once, and nothing else going on."""
    bus_gb_per_second: float
    """2 (ranks - 1) / ranks of the gradient's bytes, in that time."""


def run(overrides: Sequence[str], json_file: Path | None = None) -> list[ScalingResult]:
    """Measures, prints a table, and writes JSON if asked. Ranks but the first return nothing."""
    cfg = parse(ScalingConfig, overrides)
    check_models(cfg.models, cfg.image_size, cfg.mask_ratio)
    launched = launch.detect()
    if launched.size > 1:
        world = distributed.connect(cfg.device)
        try:
            report = _measure_all(cfg, world)
        finally:
            distributed.disconnect()
    else:
        report = _spawn(cfg)
    if report is None:
        return []
    write_report(json_file, **report)
    return [ScalingResult(**row) for row in report["results"]]


def _spawn(cfg: ScalingConfig) -> dict[str, Any] | None:
    """Measures in as many processes as the largest number of ranks asks for."""
    there = gpus_or(max(cfg.ranks or [2]), cfg.device)
    return spawn(_measure_all, cfg, cfg.device, _counts(cfg, there)[-1])


def gpus_or(number: int, device: str) -> int:
    """The GPUs of this machine, or ``number`` where ``device`` is a CPU."""
    return torch.cuda.device_count() if distributed.pick_device(device).type == "cuda" else number


def spawn(
    measure: Callable[[Any, World], dict[str, Any] | None], cfg: Any, device: str, size: int
) -> dict[str, Any] | None:
    """What ``measure`` returns on the first rank of ``size`` processes of this machine."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    results = mp.get_context("spawn").SimpleQueue()
    mp.spawn(_spawned, args=(measure, cfg, device, size, port, results), nprocs=size)
    return results.get()


def _counts(cfg: ScalingConfig, most: int) -> list[int]:
    """The numbers of ranks to measure. Raises UsageError for too large a one, or one that does not divide the batch."""
    powers = itertools.takewhile(lambda n: n <= most, (2**i for i in itertools.count()))
    counts = sorted(cfg.ranks or {*powers, most})
    if counts[-1] > most:
        raise UsageError(f"ranks must be at most {most}, as many as there are; got {cfg.ranks}")
    for count in counts if STRONG in cfg.modes else ():
        if cfg.batch_size % count:
            raise UsageError(f"batch_size must be a multiple of {count} in mode strong; got {cfg.batch_size}")
    return counts


def _spawned(rank: int, measure: Callable, cfg: Any, device: str, size: int, port: int, results: Any) -> None:
    """One of the processes, in the environment that torchrun would give it."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    world = distributed.connect(device)
    report = measure(cfg, world)
    distributed.disconnect()
    if rank == 0:
        results.put(report)


def _compiles(cfg: ScalingConfig, device: torch.device) -> bool:
    return device.type == "cuda" if cfg.compile is None else cfg.compile


def _measure_all(cfg: ScalingConfig, world: World) -> dict[str, Any] | None:
    """Every row, in the same processes, so that each shape is compiled once. The report is the first rank's."""
    toolchain.check("compile", _compiles(cfg, world.device), world.device.type)
    cfg.precision = precision.settle(
        "precision", cfg.precision, world.device, smallest=world.smallest, main=world.is_main
    )
    counts = _counts(cfg, world.size)
    where = machine(world.device)
    say = print if world.is_main else _quiet
    say(f"{title(where)}, {cfg.precision}, {cfg.image_size} px, "
        f"mask {cfg.mask_ratio}; {cfg.task}, {world.size} ranks, exchange {cfg.exchange}")  # fmt: skip
    say(f"{'model':17} {'mode':6} {'ranks':>5} {'batch':>5} {'graph':>5} {'ms':>8} {'img/s':>9} {'of linear':>9} "
        f"{'exposed ms':>10} {'grad MB':>8} {'all-reduce ms':>13} {'bus GB/s':>8}")  # fmt: skip
    results: list[ScalingResult] = []
    for name, mode in itertools.product(cfg.models, cfg.modes):
        first: ScalingResult | None = None
        for count in counts:
            result = _row(cfg, name, mode, count, world)
            first = first or result
            result.efficiency = (result.images_per_second / count) / (first.images_per_second / first.ranks)
            results.append(result)
            say(_line(result), flush=True)
    if not world.is_main:
        return None
    return {"machine": where, "config": asdict(cfg), "results": [asdict(result) for result in results]}


def _row(cfg: ScalingConfig, name: str, mode: str, count: int, world: World) -> ScalingResult:
    """One row, on the first ``count`` ranks; the others wait."""
    batch_size = cfg.batch_size if mode == WEAK else cfg.batch_size // count
    on_gpu = world.device.type == "cuda"
    graphed = on_gpu if cfg.cuda_graph is None else cfg.cuda_graph
    group = dist.new_group(list(range(count))) if count > 1 else None
    measured = torch.zeros(4, dtype=torch.float64)
    if world.rank < count:
        measured = torch.tensor(_times(cfg, name, batch_size, count, group, world, graphed), dtype=torch.float64)
    ms, alone_ms, nbytes, all_reduce_ms = world.max(measured).tolist()
    bus = 2 * (count - 1) / count * nbytes / all_reduce_ms / 1e6 if count > 1 else 0.0
    return ScalingResult(
        name, mode, count, batch_size, graphed, ms, count * batch_size / ms * 1e3, 1.0,
        max(0.0, ms - alone_ms), nbytes / 1e6, all_reduce_ms, bus,
    )  # fmt: skip


def _times(
    cfg: ScalingConfig, name: str, batch_size: int, count: int, group: Any, world: World, graphed: bool
) -> tuple[float, float, float, float]:
    """ms of a step, of one without exchange, bytes of the gradient, ms of its all-reduce."""
    torch.manual_seed(0)
    device = world.device
    model, loss, batches = _workload(cfg, name, batch_size, device)
    exchange = create_exchange(cfg.exchange, model, count, group)
    optimizer = create_optimizer(model, OptimConfig(lr=1e-4))

    def time_steps(exchanging: bool) -> float:
        step = TrainingStep(
            model,
            lambda batch: (loss(*batch), {}),
            device,
            cfg.precision,
            graphed=graphed,
            exchange=exchange if exchanging else None,
        )

        def run(i: int) -> None:
            step([batches[i % len(batches)]])
            optimizer.step()

        with contextlib.closing(step):
            for i in range(cfg.warm_up + 1):
                run(i)
            return median_step_ms(run, cfg.repeats, device)

    if count == 1:
        ms = time_steps(exchanging=False)
        return ms, ms, _gradient_bytes(model), 0.0
    alone_ms = time_steps(exchanging=False)  # first: once torch's DDP is there, it looks at every backward pass
    ms = time_steps(exchanging=True)
    return ms, alone_ms, _gradient_bytes(model), _all_reduce_ms(model, group, cfg.repeats, device)


def _workload(cfg: ScalingConfig, name: str, batch_size: int, device: torch.device) -> Workload:
    how = batch_size, cfg.image_size, _compiles(cfg, device), device
    if cfg.task == FINETUNE:
        return finetuning(classifier(name), DENSE, *how)
    model = FCMAE(name, mask_ratio=cfg.mask_ratio)
    model.backbone.head.requires_grad_(False)  # it gets no gradient that could be exchanged
    return pretraining(model, *how)


def _gradient_bytes(model: nn.Module) -> float:
    return float(sum(p.nbytes for p in model.parameters() if p.requires_grad))


def _all_reduce_ms(model: nn.Module, group: Any, repeats: int, device: torch.device) -> float:
    flat = torch.zeros(int(_gradient_bytes(model)) // 4, device=device)

    def all_reduce(_: int) -> None:
        dist.all_reduce(flat, group=group)

    return median_step_ms(all_reduce, repeats, device)


def _line(result: ScalingResult) -> str:
    return (
        f"{result.model:17} {result.mode:6} {result.ranks:5} {result.batch_size:5} {result.cuda_graph!s:>5} "
        f"{result.ms:8.2f} {result.images_per_second:9.1f} {result.efficiency:9.1%} {result.exposed_ms:10.2f} "
        f"{result.gradient_mb:8.1f} {result.all_reduce_ms:13.2f} {result.bus_gb_per_second:8.1f}"
    )


def _quiet(*_: object, **__: object) -> None:
    """The first rank speaks for the others."""
