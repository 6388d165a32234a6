"""What pretraining brings where labels are few: AUROC on photographs of solar cells (docs/few_labels.md).

    pip download --no-deps elpv-dataset
    python -m benchmarks.few_labels prepare elpv_dataset-*.whl cells             # needs no network
    fcmae pretrain model=convnextv2_atto data.path=cells/train data.in_chans=1 data.mean=[0.49] data.std=[0.2] ...
    python -m benchmarks.few_labels run RUN cells --out results trainer.compile=false

``prepare`` writes 2,000 training and 624 test images, of the classes defect (a probability above 0.5) and fine, as
JPEGs of quality 80. ``run`` measures, on nested stratified subsets of 25 and 100 labels per class and on all labels:
random and pretrained features with a probe, training from scratch, fine-tuning, and ``recipe=auto`` from pretrained and
from random weights. Everything that is trained and chosen sees training images only. Results are kept in ``--out``, and
the same command continues. Further arguments are overrides of ``fcmae finetune``.
"""

import argparse
import csv
import dataclasses
import io
import json
import math
import statistics
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fcmae.checkpoints import checkpoint
from fcmae.config import compose
from fcmae.evaluation import run as evaluation
from fcmae.files import write_output
from fcmae.models.build import config_of
from fcmae.training.run import finetune

TRAIN = 2000
METHODS = ("random_probe", "pretrained_probe", "scratch", "finetuned", "auto", "auto_scratch")
T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}
"""Student's t for a 95 % interval, by the number of subsets."""


def prepare(wheel: Path, out: Path) -> None:
    """The images of the package ``elpv-dataset``, a wheel, as folders ``train`` and ``test`` of a folder per class."""
    with zipfile.ZipFile(wheel) as archive:
        (labels,) = [name for name in archive.namelist() if name.endswith("data/labels.csv")]
        rows = list(csv.reader(io.StringIO(archive.read(labels).decode()), delimiter=" ", skipinitialspace=True))
        order = np.random.RandomState(0).permutation(len(rows))
        for place, index in enumerate(order):
            name, probability = rows[index][0], float(rows[index][1])
            kind = "defect" if probability > 0.5 else "fine"
            file = out / ("train" if place < TRAIN else "test") / kind / f"{Path(name).stem}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(f"{labels.rpartition('/')[0]}/{name}") as image:
                Image.open(image).convert("L").save(file, quality=80)


@dataclasses.dataclass
class Benchmark:
    """The runs of a table; each is measured once, and its result is a file in ``out``."""

    pretrained: str
    data: str
    out: Path
    epochs: list[float]
    layer: str
    overrides: list[str]

    def __post_init__(self) -> None:
        file = checkpoint.resolve(self.pretrained)
        cfg: Any = config_of(checkpoint.header(file), file)
        network = {name: value for name, value in vars(cfg.model).items() if name in ("backbone", "depths", "dims")}
        network |= {"stem_stride": cfg.model.stem_stride, "strides": cfg.model.strides}
        images = {name: getattr(cfg.data, name) for name in ("in_chans", "mean", "std")}
        self.network = [f"model.{name}={_text(value)}" for name, value in network.items() if value is not None]
        self.images = [f"data.{name}={_text(value)}" for name, value in images.items()]
        self.images += [f"data.image_size={_text(cfg.data.image_size)}"]

    def result(self, method: str, labels: int | None, seed: int, epochs: float) -> dict[str, float]:
        """The metrics on the test images of a method with so many labels per class (None = all) of a subset."""
        name = f"{method}_{labels or 'all'}_{seed}"
        file = self.out / f"{name}.json"
        if file.exists():
            return json.loads(file.read_text())
        few = [f"data.labels_per_class={labels or 'null'}", f"seed={seed}"]
        if method.endswith("probe"):
            metrics = self._probe(method == "random_probe", few)
        else:
            metrics = self._finetune(method, [*few, f"schedule.epochs={epochs}"], self.out / "runs" / name)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_output("out", file, json.dumps(metrics) + "\n")
        return metrics

    def _probe(self, random: bool, few: list[str]) -> dict[str, float]:
        source = ["checkpoint=random", *self.network, *self.images] if random else [f"checkpoint={self.pretrained}"]
        loader = [override for override in self.overrides if override.startswith("loader.")]
        paths = [f"data.path={self.data}/train", f"data.val_path={self.data}/test"]
        cfg = compose("probe", [*source, *paths, "solver=lbfgs", f"layer={self.layer}", *few, *loader])
        result = evaluation.probe(cfg)
        assert result is not None
        return {name: value for name, value in result.items() if isinstance(value, float)}

    def _finetune(self, method: str, few: list[str], run_dir: Path) -> dict[str, float]:
        start = self.network + self.images if method.endswith("scratch") else [f"init_from={self.pretrained}"]
        plain = ["optim.lr=1e-3"]  # of the README
        auto = method.startswith("auto")
        # recipe=auto brings batch, warm-up and augmentation; without it the same ones are given.
        same = ["augment=none", "trainer.eval_every_epochs=null", "schedule.warmup_epochs=10"]
        how = ["recipe=auto"] if auto else [*same, f"optim.global_batch_size={self._batch(few)}", *plain]
        paths = [f"data.path={self.data}/train", "objective.best=auroc", "logger=quiet"]
        cfg = compose("finetune", [*how, *start, *paths, *few, "trainer.keep_checkpoints=1", *self.overrides])
        finetune(cfg, run_dir)
        loader = [override for override in self.overrides if override.startswith("loader.")]
        result = evaluation.evaluate(
            compose("evaluate", [f"checkpoint={run_dir}@last", f"data.val_path={self.data}/test", *loader])
        )
        assert result is not None
        return result | _chosen(run_dir)

    def _batch(self, few: list[str]) -> int:
        (labels,) = [each.partition("=")[2] for each in few if each.startswith("data.labels_per_class=")]
        return 32 if labels == "null" else min(32, 2 * int(labels))


def _text(value: Any) -> str:
    return f"[{','.join(map(str, value))}]" if isinstance(value, (list, tuple)) else str(value)


def _chosen(run_dir: Path) -> dict[str, Any]:
    file = run_dir / "auto" / "chosen.json"
    if not file.exists():
        return {}
    found = json.loads(file.read_text())
    return {name: found[name] for name in ("kept", "layer", "l2", "lr", "layer_decay")}


def table(results: dict[tuple[str, str], list[float]], budgets: Sequence[str]) -> Iterator[str]:
    """Markdown: mean and standard deviation over subsets, and what ``auto`` is better by than the best without
    pretraining, subset by subset."""
    yield "| AUROC | " + " | ".join(f"{name} per class" if name != "all" else "all labels" for name in budgets) + " |"
    yield "|---" * (len(budgets) + 1) + "|"
    for method in METHODS:
        cells = [results.get((method, budget), []) for budget in budgets]
        if any(cells):
            yield f"| {method} | " + " | ".join(map(_spread, cells)) + " |"
    for rivals in (("scratch", "random_probe"), ("auto_scratch",), ("finetuned",), ("pretrained_probe",)):
        cells = [_difference(results, budget, rivals) for budget in budgets]
        if any(cells):
            named = f"the best of {' and '.join(rivals)}" if len(rivals) > 1 else rivals[0]
            yield f"| auto minus {named} | " + " | ".join(cells) + " |"


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}" if len(values) > 1 else _one(values)


def _one(values: list[float]) -> str:
    return f"{values[0]:.1f}" if values else ""


def _difference(results: dict[tuple[str, str], list[float]], budget: str, rivals: Sequence[str]) -> str:
    """Mean and 95 % interval of the paired differences to the rival with the best mean."""
    measured = [results[name, budget] for name in rivals if results.get((name, budget))]
    ours = results.get(("auto", budget))
    if not ours or not measured:
        return ""
    best = max(measured, key=statistics.mean)
    differences = [a - b for a, b in zip(ours, best, strict=True)]
    if len(differences) < 2:
        return f"{differences[0]:+.1f}"
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return f"{statistics.mean(differences):+.1f} ± {T95.get(len(differences), 2.0) * error:.1f}"


def measure(benchmark: Benchmark, budgets: list[str], seeds: list[int], methods: list[str]) -> dict[str, Any]:
    """Everything, cheapest methods first, and the table."""
    results: dict[tuple[str, str], list[float]] = {}
    every: list[dict[str, Any]] = []
    for budget, epochs in zip(budgets, benchmark.epochs, strict=True):
        for method in methods:
            labels = None if budget == "all" else int(budget)
            for seed in seeds:
                metrics = benchmark.result(method, labels, seed, epochs)
                every.append({"method": method, "labels": budget, "seed": seed, **metrics})
                print(json.dumps(every[-1]), file=sys.stderr, flush=True)
            results[method, budget] = [each["auroc"] for each in every[-len(seeds) :]]
        print("\n".join(table(results, budgets)), flush=True)
    return {"results": every, "table": list(table(results, budgets))}


def _list(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    return lambda text: [kind(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("prepare")
    making.add_argument("wheel", type=Path)
    making.add_argument("out", type=Path)
    running = commands.add_parser("run")
    running.add_argument("pretrained", help="a pretraining run")
    running.add_argument("data", help="the folder that prepare wrote")
    running.add_argument("--out", type=Path, default=Path("few_labels"))
    running.add_argument("--labels", type=_list(str), default=["25", "100", "all"], help="per class: 25,100,all")
    running.add_argument("--epochs", type=_list(float), default=[100, 100, 30], help="for each of --labels")
    running.add_argument("--seeds", type=_list(int), default=[0, 1, 2, 3, 4], help="a subset each: 0,1,2,3,4")
    running.add_argument("--methods", type=_list(str), default=list(METHODS), help=",".join(METHODS))
    running.add_argument("--layer", default="stages", help="features of the two probes (default: %(default)s)")
    given, overrides = parser.parse_known_args()
    if given.command == "prepare":
        prepare(given.wheel, given.out)
        return
    benchmark = Benchmark(given.pretrained, given.data, given.out, given.epochs, given.layer, overrides)
    result = measure(benchmark, given.labels, given.seeds, given.methods)
    write_output("out", given.out / "table.json", json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
