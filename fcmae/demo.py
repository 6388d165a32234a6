"""``fcmae demo``: pretrains, evaluates and fine-tunes on Fashion-MNIST in a few minutes, on any hardware."""

import contextlib
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fcmae.config import DataConfig, FinetuneConfig, PretrainConfig, compose
from fcmae.data.sources import train_source
from fcmae.distributed import World, pick_device, start_time
from fcmae.errors import Interrupted
from fcmae.evaluation.features import Extractor
from fcmae.evaluation.knn import knn_of
from fcmae.files import json_text, output, read_metrics, write_output
from fcmae.imports import needed
from fcmae.models import FCMAE
from fcmae.models.build import build_fcmae, load
from fcmae.tasks.pretraining import Pretraining
from fcmae.training.budget import STEPS, median_speed, scaled
from fcmae.training.run import finetune, pretrain

GALLERY, QUERIES = 10_000, 2_000
MINUTES = 8.0
"""The time limit on a machine with two CPU cores."""
GPU_SECONDS = 200
"""The aim for pretraining on a GPU; the measured speed gives the number of epochs."""
GPU_EPOCHS = (2, 60)


@dataclass(frozen=True)
class Plan:
    """The number of epochs for this machine, by its speed in pretraining in images per second."""

    speed: float
    pretrain_epochs: float
    finetune_epochs: float

    RECIPE = (2.0, 60.0)
    """Epochs of pretraining and of fine-tuning in the recipe for CPUs, conf/experiment/demo."""
    PRETRAINING, REST = 120_000, 80_000
    """The cost of pretraining, and of the rest, on CPUs in images of pretraining."""
    LEAST = 0.25
    """The smallest share of pretraining that still gives useful features."""
    ENOUGH = 0.75
    """The smallest share of pretraining after which fine-tuning is compared.

    With the demo's 100 labels pretraining gained -1.7 points of top-1 after a quarter of it, +0.6 after half and +1.8
    after all (`fcmae demo` and its experiments, seed 0, 2 CPU cores, November 2026; with other labels, seed 1, +1.7
    after a quarter and +3.9 after half). Over the logarithm of the epochs that is about +1.3 after three quarters. On
    10,000 test images less than 1 may be chance: two standard errors of the difference of networks that disagree on a
    quarter of the images.
    """
    RESERVE = 0.15
    """Share of the time that is kept for a machine that becomes slower."""

    @property
    def finetunes(self) -> bool:
        """Whether pretraining is long enough for the comparison by fine-tuning."""
        return self.pretrain_epochs >= self.ENOUGH * self.RECIPE[0]

    @property
    def seconds(self) -> float:
        """What it takes on a CPU."""
        images = self.PRETRAINING * self.pretrain_epochs / self.RECIPE[0] + self.REST
        return images / self.speed / (1 - self.RESERVE)

    @classmethod
    def whole(cls, speed: float) -> int:
        """The minutes that a CPU of this speed needs for the whole demo, one of them for its start."""
        return 1 + math.ceil((cls.PRETRAINING + cls.REST) / speed / (1 - cls.RESERVE) / 60)

    @classmethod
    def for_cpu(cls, speed: float, seconds: float) -> "Plan":
        """As much of pretraining as fits into ``seconds``, and all of fine-tuning, which is short."""
        share = ((1 - cls.RESERVE) * seconds * speed - cls.REST) / cls.PRETRAINING
        pretraining, finetuning = cls.RECIPE
        return cls(speed, round(min(max(share, cls.LEAST), 1.0) * pretraining, 2), finetuning)

    @classmethod
    def for_gpu(cls, speed: float, images: int, finetune_epochs: float) -> "Plan":
        """As many epochs of pretraining as fit into GPU_SECONDS, within GPU_EPOCHS."""
        least, most = GPU_EPOCHS
        return cls(speed, int(min(max(GPU_SECONDS * speed / images, least), most)), finetune_epochs)


def run(out: Path, data_folder: str | None = None, minutes: float = MINUTES) -> dict[str, Any]:
    """Runs the demo into folder ``out`` and returns what it writes to summary.json.

    On a CPU it runs as much of pretraining as fits into ``minutes`` by the speed of a few steps, at least a quarter. If
    that is less than :attr:`Plan.ENOUGH`, it does not fine-tune.

    Raises UsageError, before anything is trained, if the data or matplotlib (for loss.png) is missing.
    """
    with needed("the demo plots its loss with matplotlib: pip install 'fcmae[demo]'"):
        import matplotlib  # noqa: F401
    began = time.perf_counter()
    device = pick_device("auto")
    runs = out / "runs" / start_time()
    data = [f"data.path={data_folder}"] if data_folder else []
    gpu = device.type == "cuda"
    pretraining = [f"experiment={'fashion_mnist/pretrain' if gpu else 'demo/pretrain'}", "logger=quiet", *data]
    finetuning = [f"experiment={'fashion_mnist/finetune_100' if gpu else 'demo/finetune'}", "logger=quiet", *data]
    cfg: PretrainConfig = compose("pretrain", pretraining)
    few: FinetuneConfig = compose("finetune", finetuning)
    images = len(train_source(cfg.data))
    speed = _speed(pretraining, runs)
    plan = Plan.for_cpu(speed, 60 * minutes - (time.perf_counter() - began))
    if gpu:
        plan = Plan.for_gpu(speed, images, few.schedule.epochs)
    print(
        f"{speed:.0f} images/s on this machine: {plan.pretrain_epochs:g} epochs of pretraining ({images} images each), "
        f"{plan.finetune_epochs if plan.finetunes else 0:g} of fine-tuning"
    )
    if not gpu and plan.seconds > 60 * minutes:
        print(
            f"that takes about {math.ceil(plan.seconds / 60)} minutes: less would teach too little. "
            "Do other programs use the cores? See docs/faq.md#it-is-slow-on-a-cpu"
        )
    steps = 5 if plan.finetunes else 3
    pretraining += _schedule(cfg, plan.pretrain_epochs)
    finetuning += _schedule(few, plan.finetune_epochs)
    cfg = compose("pretrain", pretraining)

    _step(1, steps, f"k-NN accuracy of random weights ({GALLERY} gallery, {QUERIES} test images)")
    before = _knn(build_fcmae(cfg), cfg.data, device)

    _step(2, steps, f"pretraining without labels, {cfg.schedule.epochs:g} epochs")
    pretrained = pretrain(cfg, runs / "pretrain")
    images_per_second = median_speed(runs / "pretrain")

    _step(3, steps, "k-NN accuracy of the pretrained encoder")
    model = load(pretrained)
    assert isinstance(model, FCMAE)
    after = _knn(model, cfg.data, device)
    task = Pretraining(cfg)
    task.model = model
    picture = task.picture(device)
    assert picture is not None
    with output("--out", out / "reconstruction.png") as file:
        picture.image.save(file, "PNG")
    _plot_loss(runs / "pretrain" / "metrics.jsonl", out / "loss.png")

    summary = {
        "knn_before": before,
        "knn_after": after,
        "pretrain_epochs": plan.pretrain_epochs,
        "images_per_second": images_per_second,
    }
    labels = 10 * (few.data.labels_per_class or 0)
    if plan.finetunes:
        few = compose("finetune", [*finetuning, f"init_from={pretrained}"])
        _step(4, steps, f"fine-tuning with {labels} labels, from the pretrained weights")
        summary["finetune_pretrained"] = _top1(finetune(few, runs / "finetune").parent.parent)
        _step(5, steps, f"the same with {labels} labels from random weights")
        summary["finetune_scratch"] = _top1(finetune(compose("finetune", finetuning), runs / "scratch").parent.parent)
        summary["finetune_epochs"] = plan.finetune_epochs
    summary["seconds"] = time.perf_counter() - began
    summary = {name: round(value, 2) for name, value in summary.items()}
    write_output("--out", out / "summary.json", json_text(summary, indent=1) + "\n")
    print(_table(summary, labels, out))
    return summary


def _table(summary: dict[str, float], labels: int, out: Path) -> str:
    recipe, pretrained = Plan.RECIPE[0], summary["pretrain_epochs"]
    few, shortened = "", ""
    if "finetune_scratch" in summary:
        few = (
            f"{f'fine-tuned with {labels} labels, top-1':36}{summary['finetune_scratch']:>15.1f}%"
            f"{summary['finetune_pretrained']:>11.1f}%\n"
        )
    if pretrained < recipe:
        minutes = Plan.whole(summary["images_per_second"])
        left_out = "" if few else f", too few to compare fine-tuning with {labels} labels"
        shortened = (
            f"\npretraining was shortened to {pretrained:g} of {recipe:g} epochs for this machine{left_out}; "
            f"the whole demo: fcmae demo --minutes {minutes} (make demo MINUTES={minutes})\n"
        )
    return f"""
{"Fashion-MNIST":36}{"random weights":>16}{"pretrained":>12}
{"10-NN accuracy of frozen features":36}{summary["knn_before"]:>15.1f}%{summary["knn_after"]:>11.1f}%
{few}{shortened}
{summary["seconds"]:.0f} s in all, {summary["images_per_second"]:.0f} images/s in pretraining
pictures: {out / "reconstruction.png"} {out / "loss.png"}
summary:  {out / "summary.json"}"""


def _step(number: int, steps: int, what: str) -> None:
    print(f"\n[{number}/{steps}] {what}", flush=True)


def _knn(model: FCMAE, data: DataConfig, device: torch.device) -> float:
    world = World(0, 1, 0, 1, device)
    extract = Extractor(model.backbone.to(device), data, world)
    accuracy = knn_of(data, extract.loader, extract, world, ks=[10], gallery=GALLERY, queries=QUERIES)["knn10"]
    print(f"{accuracy:.1f}%", flush=True)
    return accuracy


def _speed(overrides: list[str], runs: Path) -> float:
    """Images per second of a few steps of pretraining."""
    cfg: PretrainConfig = compose("pretrain", [*overrides, f"trainer.max_steps={STEPS}", "trainer.log_every=20"])
    with contextlib.suppress(Interrupted):
        pretrain(cfg, runs / "speed")
    return median_speed(runs / "speed")


def _schedule(cfg: PretrainConfig | FinetuneConfig, epochs: float) -> list[str]:
    """Overrides for a number of epochs, with the recipe's share of warm-up."""
    schedule = scaled(cfg.schedule, epochs)
    return [f"schedule.epochs={schedule.epochs}", f"schedule.warmup_epochs={schedule.warmup_epochs}"]


def _top1(run_dir: Path) -> float:
    top1 = [line["top1"] for line in read_metrics(run_dir / "metrics.jsonl") if "top1" in line][-1]
    print(f"{top1:.1f}%", flush=True)
    return top1


def _plot_loss(metrics: Path, path: Path) -> None:
    from matplotlib.figure import Figure

    lines = [line for line in read_metrics(metrics) if "loss" in line]
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot([line["step"] for line in lines], [line["loss"] for line in lines])
    axes.set(xlabel="step", ylabel="loss on masked patches", title="FCMAE pretraining on Fashion-MNIST")
    axes.grid(alpha=0.3)
    with output("--out", path) as file:
        figure.savefig(file, dpi=120, format="png")
