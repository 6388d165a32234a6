"""What ``fcmae evaluate`` prints and writes beside its metrics: a table, CSV files and plots."""

import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fcmae.checkpoints.checkpoint import run_of
from fcmae.config import DataConfig
from fcmae.data.pixels.transforms import eval_transform, normalized
from fcmae.data.samples import EvaluationImages
from fcmae.data.sources import Source
from fcmae.distributed import World
from fcmae.errors import shown
from fcmae.evaluation.display import choose, rgb
from fcmae.evaluation.features import Images, gather_in_order
from fcmae.evaluation.map_pictures import sheet, titled
from fcmae.files import csv_text, json_text, make_folder, output, write_output
from fcmae.messages import say
from fcmae.models.objective import DenseObjective, Objective, Plots, Predictions, Report

MOST = 2**27
"""Numbers of all outputs up to which they are kept for plots: 512 MiB."""
WORST = 16
"""Images in the picture of the worst."""
PRINTED = 20
"""Classes up to which their numbers are printed."""
DPI = 110


def named(prefix: str, metrics: Mapping[str, float]) -> dict[str, float]:
    """Metrics of the network that ``prefix`` stands for; the number of images is the same for all."""
    return {name if name == "images" else f"{prefix}{name}": value for name, value in metrics.items()}


class Recorder:
    """Passes predictions on and keeps them."""

    def __init__(self, share: Iterable[Predictions], world: World) -> None:
        self.share, self.world = share, world
        self.parts: list[Predictions] = []
        self.numbers = 0

    def __iter__(self) -> Iterator[Predictions]:
        for each in self.share:
            if isinstance(each.outputs, Tensor):
                self.numbers += each.outputs.numel()
                if self.numbers * self.world.size <= MOST:
                    self.parts.append(each)
            yield each

    def gathered(self) -> Predictions | None:
        """Those of all ranks in the order of the source, on the CPU; None if they are too many."""
        world, empty = self.world, torch.zeros(0)
        shape = torch.zeros(2, 3, dtype=torch.int64)  # dimensions and type, which a rank without images lacks
        for row, name in enumerate(("outputs", "targets")):
            part: Tensor = getattr(self.parts[0], name) if self.parts else empty
            shape[row] = torch.tensor([part.ndim, part.shape[1] if part.ndim > 1 else 0, part.is_floating_point()])
        most = world.max(torch.cat([shape.flatten(), torch.tensor([self.numbers])]))
        if not 0 < int(most[-1]) * world.size <= MOST or int(most[0]) > 2 or int(most[3]) > 2:
            return None
        blanks = []
        for ndim, columns, floating in (most[:3].tolist(), most[3:6].tolist(), (1, 0, 0)):
            kind = torch.float32 if floating else torch.int64
            blanks.append(torch.zeros(0, *([columns] if ndim > 1 else []), dtype=kind, device=world.device))
        return Predictions(*(column.cpu() for column in gather_in_order([blanks, *self.parts], world)))


class Errors:
    """How wrong each image with a target map is; a ``look`` of :func:`fcmae.evaluation.windows.whole_predictions`."""

    def __init__(self, objective: DenseObjective) -> None:
        self.objective = objective
        self.found: list[tuple[float, float]] = []

    def __call__(self, image: Images, predicted: Tensor) -> None:
        self.found.append((self.objective.error(image.labels[0], predicted), float(image.places)))

    def worst(self, world: World) -> list[tuple[int, float]]:
        """The places and errors of the worst images of all ranks, the worst first."""
        rows = torch.tensor(self.found, dtype=torch.float64, device=world.device).view(-1, 2)
        errors, places = (column.cpu() for column in gather_in_order([rows.unbind(1)], world))
        return [(int(places[i]), float(errors[i])) for i in worst_of(errors)]


def worst_of(errors: Tensor) -> list[int]:
    """The rows of the largest errors, the largest first, of equal ones the first."""
    known = errors.isfinite().nonzero()[:, 0]
    return known[errors[known].argsort(descending=True, stable=True)[:WORST]].tolist()


def table(metrics: Mapping[str, float], classes: Iterable[str]) -> str:
    """Metrics as text, those of single classes left out; of averaged weights in a second column."""
    ends = tuple(f"_{name}" for name in classes)
    names = [name for name in metrics if not name.startswith("ema_") and not (ends and name.endswith(ends))]
    averaged = any(name.startswith("ema_") for name in metrics)
    lines = [f"{'metric':20}{'value':>10}" + (f"{'ema':>10}" if averaged else "")]
    for name in names:
        values = [metrics[key] for key in (name, f"ema_{name}") if key in metrics]
        lines.append(f"{name:20}" + "".join(f"{_short(value):>10}" for value in values))
    return "\n".join(lines)


def _short(value: float) -> str:
    return f"{value:.0f}" if math.isfinite(value) and value == int(value) else f"{value:.5g}"


def class_table(per_class: Mapping[str, Mapping[str, float]]) -> str:
    """Numbers of each class as text."""
    widths = {column: max(len(column), 7) + 2 for column in next(iter(per_class.values()))}
    per_class = {shown(name): row for name, row in per_class.items()}
    first = max(len(name) for name in ("class", *per_class)) + 1
    lines = ["class".ljust(first) + "".join(f"{column:>{width}}" for column, width in widths.items())]
    for name, row in per_class.items():
        lines.append(name.ljust(first) + "".join(f"{_short(row[column]):>{width}}" for column, width in widths.items()))
    return "\n".join(lines)


def describe(metrics: Mapping[str, float], report: Report, classes: Iterable[str]) -> None:
    """Prints the metrics, and those of single classes where there are few."""
    say(table(metrics, classes))
    if 0 < len(report.per_class) <= PRINTED:
        say(class_table(report.per_class))


def write(folder: Path, metrics: Mapping[str, float], report: Report) -> None:
    """``metrics.json`` and ``.csv``, ``per_class.csv`` and a picture for each plot."""
    make_folder("report", folder)
    write_output("report", folder / "metrics.json", json_text(dict(metrics)) + "\n")
    _rows(folder / "metrics.csv", [["metric", "value"], *([name, value] for name, value in metrics.items())])
    if report.per_class:
        columns = list(next(iter(report.per_class.values())))
        rows = [[name, *(row[column] for column in columns)] for name, row in report.per_class.items()]
        _rows(folder / "per_class.csv", [["class", *columns], *rows], digits=7)
    draw(folder, report.plots)


def _rows(file: Path, rows: Iterable[Iterable[Any]], digits: int | None = None) -> None:
    write_output("report", file, csv_text(rows, digits))


def draw(folder: Path, drawings: Plots) -> None:
    """Writes a PNG for each drawing, or a line that says what is missing."""
    if not drawings:
        return
    try:
        from matplotlib.figure import Figure
    except ImportError:
        say("no plots: matplotlib is missing; pip install 'fcmae[plots]'")
        return
    for name, into in drawings.items():
        figure = Figure(figsize=(6, 5), layout="constrained")
        into(figure)
        with output("report", folder / f"{name}.png") as file, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")  # a line per letter that its font does not have
            figure.savefig(file, dpi=DPI, format="png")


def write_worst(
    folder: Path, report: Report, source: Source, places: Tensor, data: DataConfig, max_pixels: int
) -> None:
    """``worst.csv`` and a picture of the images that are most wrong."""
    if report.errors is None:
        return
    rows = worst_of(report.errors)
    say_worst(folder, [(int(places[row]), float(report.errors[row]), report.caption(row)) for row in rows], source)
    images = EvaluationImages(source, eval_transform(data, max_pixels), lambda *_: 0)
    shown = [(_picture(images[int(places[row])][0], data), report.caption(row)) for row in rows]
    if shown:
        _save(folder, sheet(shown))


def say_worst(folder: Path, rows: Iterable[tuple[int, float, str]], source: Source) -> None:
    """``worst.csv``: names of images, their errors and captions."""
    lines = [[source.describe(place), error, " ".join(caption.split())] for place, error, caption in rows]
    _rows(folder / "worst.csv", [["image", "error", "what"], *lines])


def _save(folder: Path, picture: Image.Image) -> None:
    with output("report", folder / "worst.png") as file:
        picture.save(file, "PNG")


def _picture(raw: Tensor, data: DataConfig) -> Tensor:
    imgs = normalized(raw[None], data)
    return rgb(choose(imgs, data), imgs, data=data)[0][0]


def folder_of(report: str | None, checkpoint: Path) -> Path | None:
    """Where ``report`` says that files go; None = nowhere, as of a checkpoint that is in no run."""
    if report != "run":
        return None if report is None else Path(report)
    run = run_of(checkpoint)
    if run is None:
        return None
    if not os.access(run, os.W_OK):
        say(f"no report: {run} cannot be written; give report=FOLDER")
        return None
    return run / "evaluation"


def finish_images(
    folder: Path | None,
    objective: Objective,
    metrics: Mapping[str, float],
    recorder: Recorder,
    source: Source,
    data: DataConfig,
    max_pixels: int,
    classes: list[str],
) -> None:
    """Prints and writes what is known of images with labels; every rank calls it."""
    results = recorder.gathered()

    def finish() -> None:
        of_objective = getattr(objective, "report", None)
        report = Report() if results is None or of_objective is None else of_objective(results)
        describe(metrics, report, classes)
        if folder is not None:
            write(folder, metrics, report)
            if results is not None:
                write_worst(folder, report, source, results.places, data, max_pixels)
            say(f"report: {folder}")

    recorder.world.on_main(finish)


Worst = list[tuple[int, float, str]]
"""Places in the source, errors and captions, the worst first."""


def finish_whole(
    folder: Path | None,
    report: Callable[[], Report],
    metrics: Mapping[str, float],
    worst: Callable[[Report], Worst],
    source: Source,
    draw: Callable[[list[int], World], tuple[Image.Image | None, Mapping[str, Tensor]]],
    classes: list[str],
    world: World,
) -> None:
    """The same of whole images, whose targets are maps or boxes.

    Args:
        worst: of a report.
        draw: predicts images again, and draws input, target and prediction; the second is what colours mean.
    """

    def finish() -> None:
        found = report()
        describe(metrics, found, classes)
        if folder is None:
            return
        write(folder, metrics, found)
        rows = worst(found)
        say_worst(folder, rows, source)
        if rows:
            picture, legend = draw([place for place, _, _ in rows], World(0, 1, 0, 1, world.device))
            if picture is not None:
                _save(folder, titled(picture, ("input", "target", "prediction"), legend))
        say(f"report: {folder}")

    world.on_main(finish)
