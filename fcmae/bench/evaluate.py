"""``fcmae bench evaluate``: images per second of `fcmae evaluate` against timm's forward, in one run."""

import copy
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from timm.models.convnext import ConvNeXt
from torch import Tensor

from fcmae import precision, toolchain
from fcmae.bench.measure import check_models, check_positive, machine, median_step_ms, parse, title, write_report
from fcmae.bench.workloads import DENSE, DISTINCT_BATCHES, SUPERVISED, classifier, forward_of
from fcmae.config.checks import check_one_of
from fcmae.distributed import pick_device
from fcmae.evaluation import classify


@dataclass
class EvaluateConfig:
    """What ``fcmae bench evaluate`` measures, of every model: our kernels and timm, compiled on a GPU.

    timm computes as it does at its fastest: weights in the precision's type, channels last.
    """

    models: list[str] = field(default_factory=lambda: ["convnextv2_base"])
    batch_size: int = 256
    image_size: int = 224
    precision: str = "auto"
    device: str = "auto"
    rounds: int = 3
    """The two take turns so often."""
    repeats: int = 10
    """Batches per turn."""
    warm_up: int = 3

    def __post_init__(self) -> None:
        check_one_of("precision", self.precision, precision.PRECISIONS)
        check_positive(self, "batch_size", "image_size", "rounds", "repeats", "warm_up")


@dataclass
class EvaluateResult:
    """One row."""

    model: str
    engine: str
    batch_size: int
    ms: float
    images_per_second: float
    difference: float
    """Of the logits from those in float32, relative."""


def run(overrides: Sequence[str], json_file: Path | None = None) -> list[EvaluateResult]:
    """Measures, prints a table, and writes JSON if asked. Raises ConfigError for a wrong override."""
    cfg = parse(EvaluateConfig, overrides)
    check_models(cfg.models, cfg.image_size, 0.5)
    device = pick_device(cfg.device)
    toolchain.check("compile", device.type == "cuda", device.type)
    cfg.precision = precision.settle("precision", cfg.precision, device)
    where = machine(device)
    print(f"{title(where)}, {cfg.precision}, {cfg.image_size} px")
    print(f"{'model':17} {'engine':7} {'batch':>5} {'ms':>8} {'img/s':>9} {'difference':>10}")
    results: list[EvaluateResult] = []
    for name in cfg.models:
        ours, timm = _measure(cfg, name, device)
        results += [ours, timm]
        write_report(json_file, machine=where, config=cfg, results=results)
        for row in (ours, timm):
            print(f"{name:17} {row.engine:7} {row.batch_size:5} {row.ms:8.2f} {row.images_per_second:9.1f} "
                  f"{row.difference:10.1e}")  # fmt: skip
        print(f"{name}: dense is {timm.ms / ours.ms:.2f} times timm", flush=True)
    return results


def _measure(cfg: EvaluateConfig, name: str, device: torch.device) -> list[EvaluateResult]:
    torch.manual_seed(0)
    model = classifier(name).to(device).eval()
    size = cfg.batch_size, 3, cfg.image_size, cfg.image_size
    batches = [torch.randn(size, device=device) for _ in range(DISTINCT_BATCHES)]
    with torch.inference_mode():
        reference = model(batches[0][:8])
        engines = {DENSE: _ours(cfg, model, device), SUPERVISED: _timm(cfg, model, device)}
        apart = {engine: _relative(forward(batches[0])[:8], reference) for engine, forward in engines.items()}
        ms: dict[str, list[float]] = {engine: [] for engine in engines}
        for _ in range(cfg.rounds):
            for engine, forward in engines.items():
                turn = partial(_forward, forward, batches)
                for i in range(cfg.warm_up):
                    turn(i)
                ms[engine].append(median_step_ms(turn, cfg.repeats, device))
    best = {engine: statistics.median_high(values) for engine, values in ms.items()}
    return [
        EvaluateResult(name, engine, cfg.batch_size, best[engine], cfg.batch_size / best[engine] * 1e3, apart[engine])
        for engine in engines
    ]


def _forward(forward: Callable[[Tensor], Tensor], batches: list[Tensor], i: int) -> None:
    forward(batches[i % len(batches)])


def _relative(output: Tensor, reference: Tensor) -> float:
    return float((output.float() - reference).norm() / reference.norm())


def _ours(cfg: EvaluateConfig, model: ConvNeXt, device: torch.device) -> Callable[[Tensor], Tensor]:
    """As `fcmae evaluate` computes many images."""
    forward = classify.forward_of(model, device, sys.maxsize, cfg.batch_size)

    def run(imgs: Tensor) -> Tensor:
        with precision.autocast(device, cfg.precision):
            return forward(imgs)

    return run


def _timm(cfg: EvaluateConfig, model: ConvNeXt, device: torch.device) -> Callable[[Tensor], Tensor]:
    """As timm's own benchmark computes."""
    dtype = precision.dtype_of(cfg.precision)
    copied = copy.deepcopy(model).to(dtype).to(memory_format=torch.channels_last)
    forward, compiled = forward_of(SUPERVISED), device.type == "cuda"
    return lambda imgs: forward(copied, imgs.to(dtype), compiled)
