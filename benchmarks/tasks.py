"""Pretrained against random weights, for each objective: canvases of Fashion-MNIST's pieces (docs/learning.md).

    python -m benchmarks.tasks prepare canvases            # --data FOLDER with Fashion-MNIST's four .gz files
    fcmae pretrain model=convnextv2_atto model.stem_stride=1 data.path=canvases/pretrain/images data.in_chans=1 ...
    python -m benchmarks.tasks run canvases runs/light --unet runs/unet --out results trainer.compile=false

A canvas has two to five pieces, some over others, at sizes of 24 to 48 px, on a background of soft noise. ``run``
measures which kinds of pieces a canvas shows (multilabel), the kind of each pixel (segment), the sharp canvas from a
blurred one (translate), and boxes (detect): on nested subsets of labelled canvases, with the learning rate that is best
on canvases for validation, the same number of rates for every start. Test canvases are made of Fashion-MNIST's test
pieces, the others of its training pieces. Each result is a file in ``--out``, and the same command continues. Further
arguments are overrides of ``fcmae finetune``.
"""

import argparse
import csv
import dataclasses
import functools
import gzip
import json
import math
import multiprocessing
import statistics
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from fcmae.config import compose
from fcmae.evaluation import run as evaluation
from fcmae.files import defined, json_text, write_output
from fcmae.training.run import finetune

KINDS = ("top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
PARTS = {"pretrain": 10_000, "train": 1000, "val": 300, "test": 1000}
SIZE = 96
STARTS = ("random", "pretrained", "unet", "unet_new_decoder")
"""Random weights; an encoder that was pretrained with the light decoder; one with the U-Net, which is carried over; the
same with a new decoder."""


@dataclasses.dataclass(frozen=True)
class Task:
    """An objective, its overrides, and the metric of its table."""

    overrides: tuple[str, ...]
    metric: str
    dense: bool = False
    """Whether a decoder of pretraining can be carried over."""


TASKS = {
    "multilabel": Task(("objective=multilabel", f"data.label_column=[{','.join(KINDS)}]"), "map"),
    "segment": Task(
        ("objective=segment", f"objective.classes={len(KINDS) + 1}", "data.target_column=mask"), "miou", True
    ),
    "detect": Task(("objective=detect", "objective.width=64", "data.scale_jitter=[0.8,1.25]"), "map"),
    "translate": Task(("objective=translate", "objective.channels=1", "data.target_column=sharp"), "psnr", True),
}


def read_idx(file: Path) -> np.ndarray:
    """An array of Fashion-MNIST: images [N, 28, 28] or labels [N]."""
    with gzip.open(file) as stream:
        data = stream.read()
    shape = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(data[3])]
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)


def canvas(
    images: np.ndarray, labels: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, list[Any]]:
    """A canvas [SIZE, SIZE], the kind of each pixel (0 = background), and (kind, box) of each piece that can be seen.

    A box is x, y, width, height in pixels of what a piece shows beside the pieces over it.
    """
    noise = Image.fromarray(rng.integers(0, 140, (6, 6), dtype=np.uint8)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    picture = np.asarray(noise, np.float32) * 0.5 + rng.normal(0, 4, (SIZE, SIZE))
    owner = np.zeros((SIZE, SIZE), np.int64)
    kinds = [0]
    for index in rng.choice(len(images), rng.integers(2, 6), replace=False):
        side = int(rng.integers(24, 49))
        piece = np.asarray(Image.fromarray(images[index]).resize((side, side), Image.Resampling.BICUBIC), np.float32)
        y, x = rng.integers(0, SIZE - side + 1, 2)
        shown = piece > 24
        picture[y : y + side, x : x + side][shown] = piece[shown]
        owner[y : y + side, x : x + side][shown] = len(kinds)
        kinds.append(int(labels[index]) + 1)
    boxes = []
    for number, kind in enumerate(kinds[1:], 1):
        rows, columns = np.nonzero(owner == number)
        if len(rows) >= 40:
            left, top = int(columns.min()), int(rows.min())
            boxes.append((kind, [left, top, int(columns.max()) + 1 - left, int(rows.max()) + 1 - top]))
    return np.clip(picture, 0, 255).astype(np.uint8), np.array(kinds, np.uint8)[owner], boxes


def prepare(data: Path, out: Path) -> None:
    """All canvases, of each part a folder, and a table of each part in its folder."""
    for part, count in PARTS.items():
        images, labels = (
            read_idx(data / f"{'t10k' if part == 'test' else 'train'}-{kind}")
            for kind in ("images-idx3-ubyte.gz", "labels-idx1-ubyte.gz")
        )
        rng = np.random.default_rng([0, *part.encode()])
        folder = out / part
        for name in ("images", "masks", "blurred"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        rows, annotations = [], []
        for number in range(count):
            picture, mask, boxes = canvas(images, labels, rng)
            name = f"{number:05d}.png"
            image = Image.fromarray(picture)
            image.save(folder / "images" / name)
            if part != "pretrain":
                Image.fromarray(mask).save(folder / "masks" / name)
                image.filter(ImageFilter.GaussianBlur(2)).save(folder / "blurred" / name)
            seen = {kind for kind, _ in boxes}
            rows.append([name, *(int(kind in seen) for kind in range(1, len(KINDS) + 1))])
            annotations.append(boxes)
        if part != "pretrain":
            write_lists(folder, part, rows, annotations)
    print(f"{out}: {PARTS}")


def write_lists(folder: Path, name: str, rows: list[list[Any]], annotations: list[list[Any]]) -> None:
    """``NAME.csv`` and ``NAME_blurred.csv`` (the images of translation), and ``NAME.json`` with boxes."""
    for ending, images in (("", "images"), ("_blurred", "blurred")):
        with (folder / f"{name}{ending}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["image", "mask", "sharp", *KINDS])
            writer.writerows([f"{images}/{row[0]}", f"masks/{row[0]}", f"images/{row[0]}", *row[1:]] for row in rows)
    boxes = [(number, kind, box) for number, each in enumerate(annotations) for kind, box in each]
    coco = {
        "images": [{"id": i, "file_name": row[0], "width": SIZE, "height": SIZE} for i, row in enumerate(rows)],
        "categories": [{"id": i, "name": kind} for i, kind in enumerate(KINDS, 1)],
        "annotations": [
            {"id": i, "image_id": image, "category_id": kind, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
            for i, (image, kind, box) in enumerate(boxes, 1)
        ],
    }
    (folder / f"{name}.json").write_text(json.dumps(coco))


def subset(data: Path, count: int, seed: int) -> str:
    """Writes the lists of the first ``count`` training canvases in the order of a seed once, and returns their name."""
    folder, name = data / "train", f"train_{count}_{seed}"
    if (folder / f"{name}.json").exists():
        return name
    order = np.random.default_rng([1, seed]).permutation(PARTS["train"])[:count]
    with (folder / "train.csv").open(newline="") as file:
        rows = list(csv.reader(file))[1:]
    found = json.loads((folder / "train.json").read_text())
    boxes: dict[int, list[Any]] = {}
    for each in found["annotations"]:
        boxes.setdefault(each["image_id"], []).append((each["category_id"], each["bbox"]))
    chosen = [[Path(rows[i][0]).name, *rows[i][3:]] for i in order]
    write_lists(folder, name, chosen, [boxes.get(int(i), []) for i in order])
    return name


@dataclasses.dataclass(frozen=True)
class Run:
    """One fine-tuning."""

    task: str
    start: str
    count: int
    seed: int
    lr: float

    @property
    def name(self) -> str:
        return f"{self.task}_{self.start}_{self.count}_{self.seed}_{self.lr:g}"


def images_of(task: str, folder: Path, name: str, val: str = "") -> list[str]:
    """The keys that name the training images of the list ``name``, or with ``val="val_"`` the validation images."""
    if task == "detect":
        return [f"data.{val}path={folder / 'images'}", f"data.{val}annotations={folder / name}.json"]
    return [f"data.{val}path={folder / name}{'_blurred' if task == 'translate' else ''}.csv"]


def measure(given: argparse.Namespace, overrides: list[str], run: Run) -> dict[str, float]:
    """The metric of a run on the canvases for validation and for the test."""
    file = given.out / f"{run.name}.json"
    if file.exists():
        return defined(json.loads(file.read_text()))
    task = TASKS[run.task]
    random = ["model=convnextv2_atto", "model.stem_stride=1", "data.in_chans=1", "data.mean=[0.23]", "data.std=[0.23]"]
    carried = given.unet if run.start.startswith("unet") else given.pretrained
    start = random if run.start == "random" else [f"init_from={carried}"]
    if run.start == "unet_new_decoder":
        start.append("init_decoder=false")
    batch = min(32, run.count)
    epochs = given.steps * batch / run.count
    schedule = [
        f"schedule.epochs={epochs:g}",
        f"schedule.warmup_epochs={epochs / 10:g}",
        f"optim.global_batch_size={batch}",
        f"trainer.checkpoint_every_epochs={epochs:g}",  # an epoch may be a single step
    ]
    width = [f"objective.width={given.width}"] if task.dense else []
    source = [] if run.task == "detect" else ["data=table"]
    source += images_of(run.task, given.data / "train", f"train_{run.count}_{run.seed}")
    cfg = compose("finetune", [
        *task.overrides, *width, *start, *schedule, "augment=none", *source,
        f"data.image_size={SIZE}", f"seed={run.seed}", f"optim.lr={run.lr}", "logger=quiet",
        "trainer.eval_every_epochs=null", "trainer.keep_checkpoints=1", *overrides,
    ])  # fmt: skip
    run_dir = given.out / "runs" / run.name
    finetune(cfg, run_dir)
    metrics = {}
    loader = [override for override in overrides if override.startswith(("loader.", "device="))]
    for part in ("val", "test"):
        images = images_of(run.task, given.data / part, part, "val_")
        found = evaluation.evaluate(compose("evaluate", [f"checkpoint={run_dir}@last", *images, *loader]))
        assert found is not None
        metrics[part] = found[task.metric]
    write_output("out", file, json_text(metrics) + "\n")
    return metrics


def runs_of(given: argparse.Namespace) -> Iterator[Run]:
    for count in given.images:
        for task in given.tasks:
            for start in given.starts:
                if start.startswith("unet") and not (given.unet and TASKS[task].dense):
                    continue
                for seed in given.seeds:
                    for lr in given.lrs:
                        yield Run(task, start, count, seed, lr)


def table(given: argparse.Namespace, results: dict[Run, dict[str, float]]) -> Iterator[str]:
    """Markdown: the mean over subsets on the test canvases, at the rate with the best mean on those for validation."""
    yield "| | " + " | ".join(f"{count} images" for count in given.images) + " |"
    yield "|---" * (len(given.images) + 1) + "|"
    for task in given.tasks:
        for start in STARTS:
            cells = [_cell(given, results, task, start, count) for count in given.images]
            if any(cells):
                yield f"| {task} ({TASKS[task].metric}), {start} | " + " | ".join(cells) + " |"


def _cell(given: argparse.Namespace, results: dict[Run, dict[str, float]], task: str, start: str, count: int) -> str:
    def at(lr: float, part: str) -> list[float]:
        each = (results.get(Run(task, start, count, seed, lr)) for seed in given.seeds)
        return [found[part] for found in each if found]

    measured = [lr for lr in given.lrs if at(lr, "val")]
    if not measured:
        return ""
    best = max(measured, key=lambda lr: statistics.mean(at(lr, "val")))
    values = at(best, "test")
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread} (lr={best:g})" if not math.isnan(values[0]) else "nan"


def run_all(given: argparse.Namespace, overrides: list[str]) -> None:
    for count in given.images:
        for seed in given.seeds:
            subset(given.data, count, seed)
    runs = list(runs_of(given))
    results = {}
    # A process each, so that one run's failure or memory is not another's.
    with ProcessPoolExecutor(given.jobs, multiprocessing.get_context("spawn"), max_tasks_per_child=None) as pool:
        for run, found in zip(runs, pool.map(functools.partial(measure, given, overrides), runs), strict=True):
            results[run] = found
            print(run.name, found, file=sys.stderr, flush=True)
    lines = list(table(given, results))
    print("\n".join(lines))
    every = [{**dataclasses.asdict(run), **found} for run, found in results.items()]
    write_output("out", given.out / "table.json", json_text({"results": every, "table": lines}, indent=1) + "\n")


def _list(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    return lambda text: [kind(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("prepare")
    making.add_argument("out", type=Path)
    making.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    running = commands.add_parser("run")
    running.add_argument("data", type=Path, help="the folder that prepare wrote")
    running.add_argument("pretrained", help="a pretraining run with the light decoder")
    running.add_argument("--unet", help="a pretraining run with model.decoder=unet")
    running.add_argument("--out", type=Path, default=Path("tasks"))
    running.add_argument("--tasks", type=_list(str), default=list(TASKS), help=",".join(TASKS))
    running.add_argument("--starts", type=_list(str), default=list(STARTS), help=",".join(STARTS))
    running.add_argument("--images", type=_list(int), default=[25, 100, 1000], help="labelled canvases: 25,100,1000")
    running.add_argument("--seeds", type=_list(int), default=[0, 1, 2], help="a subset each: 0,1,2")
    running.add_argument("--lrs", type=_list(float), default=[3e-4, 1e-3, 3e-3], help="tried for every start")
    running.add_argument(
        "--steps", type=int, default=600, help="of up to 32 images, of every run (default: %(default)s)"
    )
    running.add_argument("--width", type=int, default=64, help="of the U-Nets, model.decoder_embed_dim of --unet")
    running.add_argument("--jobs", type=int, default=1, help="processes side by side (default: %(default)s)")
    given, overrides = parser.parse_known_args()
    if given.command == "prepare":
        prepare(given.data, given.out)
    else:
        run_all(given, overrides)


if __name__ == "__main__":
    main()
