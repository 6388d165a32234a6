"""``fcmae bench step``: a whole training step (forward, backward, AdamW) of the engines, side by side in one run."""

import gc
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fcmae import precision, toolchain
from fcmae.bench.arithmetic import depthwise_traffic, visible_matmul_flops
from fcmae.bench.measure import (
    check_models,
    check_positive,
    check_some_of,
    copy_bandwidth,
    machine,
    matmul_peak,
    median_step_ms,
    parse,
    synchronize,
    title,
    write_report,
)
from fcmae.bench.profile import profile_step
from fcmae.bench.targets import KINDS, TEACHER, create_targets
from fcmae.bench.workloads import (
    DENSE,
    FINETUNE,
    PRETRAIN,
    SUPERVISED,
    TASKS,
    Workload,
    classifier,
    finetuning,
    pretraining,
)
from fcmae.config import OptimConfig
from fcmae.config.checks import check_one_of
from fcmae.config.model import DECODER_WIDTH
from fcmae.distributed import pick_device
from fcmae.engines import ENGINES, HOST_BOUND, get_engine
from fcmae.errors import UsageError
from fcmae.masks.patches import grid_size
from fcmae.models import FCMAE
from fcmae.optim.adamw import create_optimizer
from fcmae.precision import FLOAT8
from fcmae.training.determinism import only_deterministic_algorithms
from fcmae.training.step import TrainingStep

YARDSTICKS = {PRETRAIN: ["packed", "masked", SUPERVISED], FINETUNE: [DENSE, SUPERVISED]}
"""The engines that are measured by default; the first one is compared with the others."""


@dataclass
class StepConfig:
    """What ``fcmae bench step`` measures: every engine, compiled and not, for every model."""

    models: list[str] = field(default_factory=lambda: ["convnextv2_base"])
    task: str = PRETRAIN
    """``pretrain`` or ``finetune``, which chooses the engines."""
    engines: list[str] | None = None
    """None = packed, masked and timm, which is no pretraining but timm's dense step; of fine-tuning dense and timm.
    ``fp8`` is packed with ``precision=fp8``."""
    compile: list[bool] | None = None
    """[true] on a GPU, [false] on the CPU by default; [true,false] measures both."""
    strides: list[int] | None = None
    """As ``model.strides``; None = timm's."""
    decoder: str = "light"
    """As ``model.decoder``: ``light`` or ``unet``."""
    pred_patch_size: int | None = None
    """As ``model.pred_patch_size``; None = the total stride."""
    targets: list[str] = field(default_factory=lambda: ["pixels"])
    """Some of pixels, hog, laplacian, labels and teacher."""
    teacher: str = "vit_small_patch16_224"
    """timm's name of the network of the target ``teacher``."""
    recompute_stages: list[int] = field(default_factory=list)
    """Stages, 1 to 4, whose activations packed and masked recompute instead of keeping them."""
    cuda_graph: bool | None = None
    """Replay from a CUDA graph; None = where compiled, on a GPU."""
    batch_size: int = 256
    """Halved for an engine until it fits into memory."""
    image_size: int = 224
    mask_ratio: float = 0.6
    precision: str = "auto"
    device: str = "auto"
    deterministic: bool = False
    """As ``trainer.deterministic``; ``benchmarks/determinism.py`` measures with and without."""
    repeats: int = 20
    warm_up: int = 5

    def __post_init__(self) -> None:
        check_one_of("task", self.task, TASKS)
        self.engines = YARDSTICKS[self.task] if self.engines is None else self.engines
        check_some_of("engines", self.engines, (*ENGINES, SUPERVISED, DENSE, FLOAT8))
        check_one_of("decoder", self.decoder, tuple(DECODER_WIDTH))
        check_some_of("targets", self.targets, (*KINDS, TEACHER))
        check_one_of("precision", self.precision, precision.PRECISIONS)
        check_positive(self, "batch_size", "image_size", "repeats", "warm_up")


@dataclass
class StepResult:
    """One row. ``matmul_tflops``: of the linear layers over visible sites alone, whatever the engine computes."""

    model: str
    engine: str
    compiled: bool
    cuda_graph: bool
    batch_size: int
    images_per_second: float
    ms: float
    peak_gib: float | None
    matmul_tflops: float
    compile_seconds: float
    """Time to the end of the first step."""
    kernel_ms: dict[str, float] = field(default_factory=dict)
    """On a GPU, milliseconds by kind of kernel (:mod:`fcmae.bench.profile`)."""
    depthwise_gb_per_second: float | None = None
    """Of the packed engine's depthwise kernels: the bytes they have to move over the time they take."""


def run(overrides: Sequence[str], json_file: Path | None = None) -> list[StepResult]:
    """Measures, prints a table, and writes JSON if asked. Raises ConfigError for a wrong override."""
    cfg = parse(StepConfig, overrides)
    check_models(cfg.models, cfg.image_size, cfg.mask_ratio, **_network(cfg))
    if cfg.deterministic:
        only_deterministic_algorithms()
    device = pick_device(cfg.device)
    _check_engines(cfg, device)
    toolchain.check("compile", any(_compile_modes(cfg, device)), device.type)
    if FLOAT8 in (cfg.engines or ()):  # before the other, which sets TF32 for all that is measured
        precision.settle("precision", FLOAT8, device)
    cfg.precision = precision.settle("precision", cfg.precision, device)
    where = machine(device)
    dtype = precision.dtype_of(cfg.precision)
    peak, bandwidth = matmul_peak(device, dtype), copy_bandwidth(device)
    print(f"{title(where)}, {cfg.precision}, {cfg.image_size} px, "
          f"mask {cfg.mask_ratio}; matmul {peak / 1e12:.1f} TFLOP/s, copy {bandwidth / 1e12:.2f} TB/s")  # fmt: skip
    print(f"{'model':17} {'engine':9} {'how':15} {'batch':>5} {'img/s':>8} {'ms':>8} {'GiB':>6} {'TFLOP/s':>8} "
          f"{'of peak':>7} {'start s':>7}")  # fmt: skip
    results: list[StepResult] = []
    ceilings = {"matmul_tflops": peak / 1e12, "copy_gb_per_second": bandwidth / 1e9}
    for result in _measure_all(cfg, device):
        results.append(result)
        # Here, so that what was measured stays if a later engine fails.
        write_report(json_file, machine=where, **ceilings, config=cfg, results=results)
        print(_row(result, peak), flush=True)
        if result.kernel_ms:
            print("  " + _where_time_goes(result, bandwidth), flush=True)
    for line in _ratios(results):
        print(line)
    return results


def _check_engines(cfg: StepConfig, device: torch.device) -> None:
    """Raises UsageError for an engine that is not installed or does not take a model, before anything is measured."""
    try:
        for engine in set(cfg.engines or ()) - {SUPERVISED, DENSE, FLOAT8}:
            get_engine(engine, device.type)
    except ImportError as error:
        raise UsageError(str(error)) from error
    for name in cfg.models if FLOAT8 in (cfg.engines or ()) else ():
        with torch.device("meta"):
            FCMAE(name, **_network(cfg)).check_float8()


def _compile_modes(cfg: StepConfig, device: torch.device) -> list[bool]:
    return cfg.compile if cfg.compile is not None else [device.type == "cuda"]


def _measure_all(cfg: StepConfig, device: torch.device) -> Iterator[StepResult]:
    for model in cfg.models:
        for engine in cfg.engines or ():
            for compiled in _compile_modes(cfg, device):
                batch_size = cfg.batch_size
                while True:
                    try:
                        yield _measure(cfg, model, engine, compiled, batch_size, device)
                        break
                    except torch.OutOfMemoryError:
                        if batch_size == 1:
                            raise UsageError(f"{model} with engine {engine} does not fit into memory") from None
                        print(f"{model} {engine}: {batch_size} images do not fit into memory", flush=True)
                        batch_size //= 2


def _measure(
    cfg: StepConfig, name: str, engine: str, compiled: bool, batch_size: int, device: torch.device
) -> StepResult:
    torch.compiler.reset()
    gc.collect()
    can_be_graphed = device.type == "cuda" and engine not in HOST_BOUND
    graphed = can_be_graphed and (compiled if cfg.cuda_graph is None else cfg.cuda_graph)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(0)
    (model, loss, batches), flops = _workload(cfg, name, engine, compiled, batch_size, device)
    optimizer = create_optimizer(model, OptimConfig(lr=1e-4))

    own = FLOAT8 if engine == FLOAT8 else cfg.precision
    passes = TrainingStep(model, lambda batch: (loss(*batch), {}), device, own, graphed=graphed)

    def step(i: int) -> None:
        passes([batches[i % len(batches)]])
        optimizer.step()

    began = time.perf_counter()
    step(0)
    synchronize(device)
    compile_seconds = time.perf_counter() - began
    for i in range(cfg.warm_up):
        step(i)
    ms = median_step_ms(step, cfg.repeats, device)
    images_per_second = batch_size / ms * 1e3
    peak_memory = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    kernel_ms: dict[str, float] = {}
    if device.type == "cuda":

        def launched_step() -> None:
            model.zero_grad()  # a replay overwrites gradients; they must not be added up here
            passes.run_pass(batches[0], True)
            optimizer.step()

        kernel_ms = profile_step(launched_step)
    traffic = 0
    if engine in (*ENGINES, FLOAT8):
        assert isinstance(model, FCMAE)
        traffic = depthwise_traffic(model, batch_size, cfg.image_size, own)
    return StepResult(
        name,
        engine,
        compiled,
        graphed,
        batch_size,
        images_per_second,
        ms,
        peak_memory,
        flops * images_per_second / 1e12,
        compile_seconds,
        kernel_ms,
        traffic / kernel_ms["depthwise"] / 1e6 if kernel_ms and engine in ("packed", FLOAT8) else None,
    )


def _workload(
    cfg: StepConfig, name: str, engine: str, compiled: bool, batch_size: int, device: torch.device
) -> tuple[Workload, float]:
    """A step's workload, and floating-point operations per image of the linear layers over visible sites."""
    fcmae = FCMAE(
        name,
        mask_ratio=cfg.mask_ratio,
        engine=engine if engine in ENGINES else "packed",
        targets=create_targets(cfg.targets, cfg.teacher, cfg.image_size),
        **_network(cfg),
    )
    fcmae.recompute_stages = cfg.recompute_stages
    keep = fcmae.len_keep(cfg.image_size, cfg.image_size)
    rows, cols = grid_size(cfg.image_size, cfg.image_size, fcmae.mask_patch_size)
    flops = visible_matmul_flops(fcmae, keep, rows * cols)
    how = batch_size, cfg.image_size, compiled, device
    if engine in (SUPERVISED, DENSE):
        return finetuning(classifier(name, cfg.strides), engine, *how), flops
    return pretraining(fcmae, *how), flops


def _network(cfg: StepConfig) -> dict[str, Any]:
    return {"decoder": cfg.decoder, "pred_patch_size": cfg.pred_patch_size, "strides": cfg.strides}


def _row(result: StepResult, peak: float) -> str:
    how = ("compiled" if result.compiled else "eager") + (" graph" if result.cuda_graph else "")
    memory = f"{result.peak_gib:6.1f}" if result.peak_gib is not None else f"{'-':>6}"
    share = f"{1e12 * result.matmul_tflops / peak:7.1%}" if result.engine != FLOAT8 else f"{'-':>7}"
    return (
        f"{result.model:17} {result.engine:9} {how:15} {result.batch_size:5} {result.images_per_second:8.1f} "
        f"{result.ms:8.2f} {memory} {result.matmul_tflops:8.2f} {share} "
        f"{result.compile_seconds:7.1f}"
    )


def _where_time_goes(result: StepResult, bandwidth: float) -> str:
    parts = ", ".join(f"{kind} {ms:.1f}" for kind, ms in result.kernel_ms.items() if ms >= 0.05)
    line = f"GPU {sum(result.kernel_ms.values()):.1f} ms: {parts}"
    if result.depthwise_gb_per_second is not None:
        share = 1e9 * result.depthwise_gb_per_second / bandwidth
        line += f"; depthwise kernels {result.depthwise_gb_per_second:.0f} GB/s, {share:.0%} of a copy"
    return line


def _ratios(results: Sequence[StepResult]) -> Iterator[str]:
    """``fp8``, else packed, else dense against the others, in the same run, at its best and theirs."""
    for model in dict.fromkeys(result.model for result in results):
        best: dict[str, StepResult] = {}
        for result in results:
            if result.model == model:
                better = result.engine not in best
                if better or result.images_per_second > best[result.engine].images_per_second:
                    best[result.engine] = result
        own = next((best.pop(engine) for engine in (FLOAT8, "packed", DENSE) if engine in best), None)
        for other in best.values() if own else ():
            assert own is not None
            memory = ""
            if own.peak_gib and other.peak_gib:
                share = (own.peak_gib / own.batch_size) / (other.peak_gib / other.batch_size)
                memory = f", {share:.2f} of its memory per image"
            speed = own.images_per_second / other.images_per_second
            yield f"{model}: {own.engine} is {speed:.2f} times {other.engine}{memory}"
