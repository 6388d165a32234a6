"""``fcmae bench data``: how fast samples are read, side by side with what people write with torchvision.

The baseline is torchvision's ImageFolder, Pillow, and v2 transforms that end in normalised float32. All variants read
the same photographs with the same number of processes; their repetitions take turns, so what else the machine does hits
all alike. Two measures: images per second that arrive, and images per second of CPU time, which other processes disturb
less.
"""

import contextlib
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from fcmae.bench import augment, feed, photos
from fcmae.bench.feed import FeedResult
from fcmae.bench.formats import NEEDS, format_table, measure_formats, plain_loader
from fcmae.bench.measure import check_positive, check_some_of, machine, parse, title, write_report
from fcmae.bench.stages import Stages, measure_stages
from fcmae.config import DataConfig, LoaderConfig, PrepareConfig, check
from fcmae.config.prepare import PreparedDataConfig
from fcmae.data.cores import cores_per_rank
from fcmae.data.loading import TrainBatches, Workers
from fcmae.data.pixels.transforms import normalized, pretrain_transform
from fcmae.data.plan import BatchPlan
from fcmae.data.prepare.command import MANIFEST_FILE, prepare
from fcmae.data.samples import MaskedImages
from fcmae.data.sources import Windows, train_source
from fcmae.distributed import pick_device
from fcmae.grid import grid_size
from fcmae.processes import stat_fields

BASELINE = "baseline"
OWN = "own"
"""The variant of ``data.path=...``."""
VARIANTS = (BASELINE, "files", "shards", "raw")
SHORT_SIDE = 256
PATCH = 32


@dataclass
class DataBenchConfig:
    """What ``fcmae bench data`` measures."""

    variants: list[str] = field(default_factory=lambda: list(VARIANTS))
    """baseline; files: the same JPEGs, read by this package; shards, raw: after ``fcmae prepare`` with a short side of
    256, as JPEG and as .npy"""
    data: DataConfig = field(default_factory=DataConfig)
    """Crops and size for all variants; with ``data.path`` that data is measured too."""
    images: int = 2048
    photos: str | None = None
    """A folder of photographs to make the files of; None = scikit-image's, if it is installed, else noise."""
    folder: str | None = None
    """Where to keep the files; None = in a temporary folder, removed at the end."""
    workers: int | None = None
    """Processes; None = the cores this process may use."""
    batch_size: int = 64
    repeats: int = 5
    step_speed: list[float] = field(default_factory=lambda: [4000.0, 25000.0])
    """Images per second that a GPU takes, to say how many are fed."""
    models: list[str] = field(default_factory=list)
    """Pretraining steps of these models are fed from each variant but the baseline: what of their speed remains?"""
    crops: list[int] = field(default_factory=lambda: [1, 2, 4])
    """``data.crops_per_image`` of the feeds."""
    strides: list[int] | None = None
    """Of these models, as ``model.strides``; smaller for small images."""
    step_batch: int = 512
    """Images per step."""
    seconds: float = 5.0
    """How long each feed is measured."""
    device: str = "auto"
    formats: list[str] = field(default_factory=list)
    """Some of npy (float32 tiles of 12 x 64 x 64), tiff (uint16, 2048 x 2048), zarr (windows of a large image) and s3
    (tar files from a server on loopback), each against a plain Dataset with the format's own library; nothing else is
    measured then."""

    finetune: list[str] = field(default_factory=list)
    """Models whose fine-tuning steps are fed from each variant but the baseline with ``augment=in1k``, by
    ``augment.on=cpu`` and ``gpu``; nothing else is measured then."""

    def __post_init__(self) -> None:
        check_some_of("variants", self.variants, VARIANTS)
        check_some_of("formats", self.formats, tuple(NEEDS))
        check_positive(self, "images", "batch_size", "repeats", "step_batch", "seconds")
        check("workers", self.workers, self.workers is None or self.workers > 0, "a positive integer, or null")
        least = 4 * self.batch_size * (self.workers or 1)
        check("images", self.images, self.images >= least, f"{least} or more: some batches for each worker")


@dataclass
class DataResult:
    """One row: medians of the repetitions."""

    variant: str
    images_per_second: float
    images_per_cpu_second: float
    """Of one core, the training process's share included."""
    kilobytes: float
    """Mean size of a file."""
    stages: Stages


def run(overrides: Sequence[str], json_file: Path | None = None) -> list[DataResult]:
    """Measures, prints a table, and writes JSON if asked. Raises ConfigError for a wrong override."""
    cfg = parse(DataBenchConfig, overrides)
    device = pick_device(cfg.device)
    workers = cfg.workers or cores_per_rank(1)
    beside_training = cfg.workers or max(1, workers - 1)  # which takes a core
    with contextlib.ExitStack() as stack:
        folder = Path(cfg.folder or stack.enter_context(tempfile.TemporaryDirectory(prefix="fcmae-bench-")))
        where = machine(device)
        if cfg.formats:
            _measure_formats(cfg, folder, workers, device, json_file)
            return []
        origin = make_files(cfg, folder)
        print(f"{title(where)}, {where['cores']} cores, {workers} workers; "
              f"{cfg.images} JPEGs of {origin}, batches of {cfg.batch_size}, median of {cfg.repeats}")  # fmt: skip
        configs = variant_configs(cfg, folder)
        if cfg.finetune:
            _measure_augmentation(cfg, configs, beside_training, device, json_file)
            return []
        results = measure(cfg, configs, workers, device)
        for line in table(results, cfg.step_speed):
            print(line, flush=True)
        report: dict[str, Any] = {
            "machine": where,
            "config": cfg,
            "workers": workers,
            "photos": origin,
            "results": results,
            "feeds": [],
        }
        write_report(json_file, **report)
        for result in feed_models(cfg, configs, beside_training, device):
            report["feeds"].append(result)
            write_report(json_file, **report)  # after every row, so that it stays if a later one fails
    return results


def _measure_formats(
    cfg: DataBenchConfig, folder: Path, workers: int, device: torch.device, json_file: Path | None
) -> None:
    pin = device.type == "cuda"
    results = list(
        measure_formats(
            cfg.formats,
            cfg.data,
            cfg.images,
            folder,
            lambda data, loader: _normalized(_epoch(data, cfg.batch_size, workers, device, loader), data, device),
            lambda epoch: _speed(epoch, cfg.batch_size, 2 * workers, device),
            lambda dataset: plain_loader(dataset, cfg.batch_size, workers, pin),
            cfg.repeats,
        )
    )
    for line in format_table(results):
        print(line, flush=True)
    write_report(json_file, machine=machine(device), config=cfg, workers=workers, results=results)


def _measure_augmentation(
    cfg: DataBenchConfig, configs: dict[str, DataConfig], workers: int, device: torch.device, json_file: Path | None
) -> None:
    found: dict[str, list[augment.AugmentResult]] = {}
    for variant, data in configs.items():
        if variant == BASELINE:
            continue
        found[variant] = list(augment.measure(cfg.finetune, data, cfg.step_batch, workers, cfg.seconds, device))
        print(f"\n{variant}, batches of {cfg.step_batch}")
        for line in augment.table(found[variant], workers):
            print(line, flush=True)
        write_report(json_file, machine=machine(device), config=cfg, workers=workers, results=found)


def make_files(cfg: DataBenchConfig, folder: Path) -> str:
    """The files of all variants below ``folder``, those that are not there yet. Returns what they show."""
    if not cfg.variants:
        return "no photographs"
    found, origin = photos.photographs(cfg.photos)
    jpegs = folder / f"jpegs-{cfg.images}"
    if not jpegs.is_dir():
        photos.write_folder(jpegs, photos.variations(found, cfg.images))
    source = PreparedDataConfig(name="imagefolder", path=str(jpegs))
    for variant, encode in (("shards", "jpeg"), ("raw", "npy")):
        shards = folder / f"{variant}-{cfg.images}"
        if variant in cfg.variants and not (shards / MANIFEST_FILE).is_file():
            alone = LoaderConfig(workers=1)
            prepare(PrepareConfig(source, alone, out=str(shards), short_side=SHORT_SIDE, encode=encode))
    return origin


def variant_configs(cfg: DataBenchConfig, folder: Path) -> dict[str, DataConfig]:
    """The data config of each variant; the baseline's has the folder and the crops."""
    kinds = {BASELINE: ("imagefolder", "jpegs"), "files": ("imagefolder", "jpegs")}
    configs = {}
    for variant in cfg.variants:
        name, prefix = kinds.get(variant, ("webdataset", variant))
        configs[variant] = replace(cfg.data, name=name, path=str(folder / f"{prefix}-{cfg.images}"), source=None)
    if cfg.data.path is not None or cfg.data.source is not None or cfg.data.name == "fashion_mnist":
        configs[OWN] = cfg.data
    return configs


def baseline_transform(data: DataConfig) -> v2.Transform:
    """What people write."""
    return v2.Compose(
        [
            v2.RandomResizedCrop(
                data.size,
                scale=tuple(data.crop_scale),
                ratio=tuple(data.crop_ratio),
                interpolation=v2.InterpolationMode.BICUBIC,
                antialias=True,
            ),
            v2.RandomHorizontalFlip(data.hflip),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(data.mean, data.std),
        ]
    )


def measure(
    cfg: DataBenchConfig, configs: dict[str, DataConfig], workers: int, device: torch.device
) -> list[DataResult]:
    """All variants, repetition by repetition."""
    epochs: dict[str, Callable[[], Iterable[Any]]] = {}
    for variant, data in configs.items():
        make = _baseline_epoch if variant == BASELINE else _epoch
        epochs[variant] = make(data, cfg.batch_size, workers, device)
    wall: dict[str, list[float]] = {variant: [] for variant in configs}
    cpu: dict[str, list[float]] = {variant: [] for variant in configs}
    for _ in range(cfg.repeats):
        for variant, epoch in epochs.items():
            per_second, per_cpu_second = _speed(epoch, cfg.batch_size, warm_up=2 * workers, device=device)
            wall[variant].append(per_second)
            cpu[variant].append(per_cpu_second)
    results = []
    for variant, data in configs.items():
        transform = baseline_transform(data) if variant == BASELINE else None
        stages, kilobytes = measure_stages(data, transform, cfg.batch_size, device)
        medians = statistics.median(wall[variant]), statistics.median(cpu[variant])
        results.append(DataResult(variant, *medians, kilobytes, stages))
    return results


def _baseline_epoch(data: DataConfig, batch: int, workers: int, device: torch.device) -> Callable[[], Iterable[Any]]:
    dataset = ImageFolder(data.path, baseline_transform(data))
    pin = device.type == "cuda"
    return lambda: DataLoader(dataset, batch, shuffle=True, num_workers=workers, pin_memory=pin, drop_last=True)


def _epoch(
    data: DataConfig, batch: int, workers: int, device: torch.device, loader: LoaderConfig | None = None
) -> Callable[[], Iterable[Any]]:
    source = train_source(data, loader)
    if data.windows_per_image > 1:
        source = Windows(source, data.windows_per_image)
    dataset = MaskedImages(source, pretrain_transform(data), grid_size(*data.size, PATCH), seed=0)
    plan = BatchPlan.create(len(source), batch, None, 1, seed=0)
    pin = device.type == "cuda"
    return lambda: TrainBatches(
        dataset,
        plan,
        rank=0,
        steps=range(plan.steps_per_epoch),
        workers=Workers(workers, pin),
    )


def _normalized(epoch: Callable[[], Iterable[Any]], data: DataConfig, device: torch.device) -> Callable:
    """Images that a network could take."""
    return lambda: (normalized(parts[0].to(device, non_blocking=True), data) for parts in epoch())


def _speed(epoch: Callable[[], Iterable[Any]], batch: int, warm_up: int, device: torch.device) -> tuple[float, float]:
    """Images per second, and images per second of CPU time of all processes, once the workers run."""
    began = cpu_began = 0.0
    count = timed = 0
    batches = iter(epoch())
    for count, parts in enumerate(batches, 1):
        (parts if isinstance(parts, torch.Tensor) else parts[0]).to(device, non_blocking=True)
        if count == warm_up:
            began, cpu_began, timed = time.perf_counter(), _cpu_seconds(), count
    images = (count - timed) * batch
    return images / (time.perf_counter() - began), images / (_cpu_seconds() - cpu_began)


def _cpu_seconds() -> float:
    """CPU time of this process and of its children, those that ended included."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    alive = sum(_cpu_seconds_of(child.pid) for child in multiprocessing.active_children())
    return time.process_time() + ended.ru_utime + ended.ru_stime + alive


def _cpu_seconds_of(pid: int | None) -> float:
    """CPU time of another process; 0 where that is not to be had."""
    fields = stat_fields(pid)
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") if fields else 0.0


def feed_models(
    cfg: DataBenchConfig, configs: dict[str, DataConfig], workers: int, device: torch.device
) -> Iterator[FeedResult]:
    """Measures and prints how fast each model trains from each variant."""
    ours = {variant: data for variant, data in configs.items() if variant != BASELINE}
    if cfg.models:
        print(
            f"\n{'model':17} {'fed from':30} {'img/s':>7} {'share':>6}   {workers} workers, batches of {cfg.step_batch}"
        )
    data = feed.feeds(ours, cfg.crops, device)
    for result in feed.measure(cfg.models, data, cfg.step_batch, workers, cfg.seconds, device, cfg.strides):
        print(f"{result.model:17} {result.feed:30} {result.images_per_second:7.0f} {result.share:6.2f}", flush=True)
        yield result


def table(results: Sequence[DataResult], step_speeds: Sequence[float]) -> Iterator[str]:
    """The result as lines of text."""
    base = next((result for result in results if result.variant == BASELINE), None)
    feeds = "".join(f"{f'GPUs at {speed:g}/s':>18}" for speed in step_speeds)
    yield f"{'variant':9} {'img/s':>7} {'times':>6} {'img/s/core':>12} {'times':>6} {'kB':>5}{feeds}"
    for result in results:
        wall, cpu = result.images_per_second, result.images_per_cpu_second
        ratios = ["-", "-"]
        if base is not None:
            ratios = [f"{wall / base.images_per_second:.2f}", f"{cpu / base.images_per_cpu_second:.2f}"]
        fed = "".join(f"{wall / speed:18.2f}" for speed in step_speeds)
        yield (f"{result.variant:9} {wall:7.0f} {ratios[0]:>6} {cpu:12.0f} {ratios[1]:>6} {result.kilobytes:5.0f}{fed}")
    yield ""
    yield "stages in one process, microseconds per image:"
    yield f"{'variant':9} " + " ".join(f"{name:>9}" for name in results[0].stages)
    for result in results:
        yield f"{result.variant:9} " + " ".join(f"{1e6 * seconds:9.0f}" for seconds in result.stages.values())
