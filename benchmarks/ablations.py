"""The paper's claims in small (ConvNeXt V2, arXiv 2301.00808, section 3 and tables 1 to 3), three seeds each.

    python -m benchmarks.ablations sparse --out ablations            # sparse against zero-filled images
    python -m benchmarks.ablations sparse_v1 --out ablations         # the same with V1
    python -m benchmarks.ablations grn --out ablations               # GRN against none, by masking and supervised
    python -m benchmarks.ablations mask_ratio --out ablations        # 0.3 to 0.9
    python -m benchmarks.ablations decoder --out ablations           # light against U-Net, accuracy and minutes
    python -m benchmarks.ablations norm_pix --out ablations          # patches normalised or not
    python -m benchmarks.ablations epochs --out ablations            # 5 to 40
    python -m benchmarks.ablations all --out ablations --minutes 25  # as many as fit; the same command continues

Fashion-MNIST at 64 px with a total stride of 8, so 64 patches; Atto, 20 epochs, batch 512. Each pretraining is scored
by ``fcmae study``: a probe on the frozen features and fine-tuning, with 60 labels per class. Results are files in
``--out``, and a run that several ablations share is made once. ``--part 1/4`` to ``4/4`` are processes that share the
work; a last command without it prints the tables. Further arguments are overrides: ``data.KEY=VALUE`` and
``loader.KEY=VALUE`` of both, others of pretraining (``schedule.epochs=5``), after ``score.`` of the study
(``score.steps=100``).

15 runs for each seed, each of 2 to 3 minutes on an H200 (an estimate: 1.2 million crops at 20,000/s, a compilation, two
trainings of 400 steps).
"""

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from timm.models.convnext import ConvNeXt
from torch import Tensor

from fcmae.config import compose
from fcmae.engines import ENGINES
from fcmae.engines.dense import dense
from fcmae.files import defined, read_result, write_result
from fcmae.kernels import gather_patches
from fcmae.masks.patches import grid_size, upsample_mask, visible_indices
from fcmae.studies.compare import paired, spread
from fcmae.studies.run import study
from fcmae.training.run import pretrain

DATA = ("data=fashion_mnist", "data.image_size=64")
NETWORK = ("model=convnextv2_atto", "model.strides=[1,2,2,2]")
PRETRAINING = (
    *("data.cache=gpu", "optim.global_batch_size=512", "optim.lr=1.5e-3"),
    *("schedule.epochs=20", "schedule.warmup_epochs=2"),
    *("trainer.eval_every_epochs=null", "trainer.checkpoint_every_epochs=20", "trainer.keep_checkpoints=1"),
    *("trainer.log_every=117", "logger=quiet", "logger.progress=false"),
)
SCORE = ("labels=[60]", "arms=[pretrained_probe,finetuned]", "steps=400", "optim.global_batch_size=64")
SUPERVISED = ("labels=[all]", "arms=[scratch]", "steps=2000", "optim.global_batch_size=256")


class Variant(NamedTuple):
    """A run of an ablation. ``overrides`` are those of pretraining, or of the study if it is supervised alone."""

    name: str
    overrides: tuple[str, ...] = ()
    supervised: bool = False
    leaks: bool = False


BASE = Variant("base")
V1 = ("model=convnext_atto",)
ABLATIONS: dict[str, tuple[str, list[Variant]]] = {
    "sparse": (
        "sparse is better: 83.7 against 79.3 (Base, ImageNet)",
        [BASE, Variant("zero_filled", ("engine=masked",), leaks=True)],
    ),
    "sparse_v1": (
        "the same without GRN, which the paper added later",
        [Variant("v1", V1), Variant("v1_zero_filled", (*V1, "engine=masked"), leaks=True)],
    ),
    "grn": (
        "with FCMAE GRN helps; V1 gains nothing from FCMAE; supervised, GRN helps a little",
        [BASE, Variant("v1", V1), Variant("v2_supervised", (), True), Variant("v1_supervised", V1, True)],
    ),
    "mask_ratio": (
        "best from 0.5 to 0.7",
        [BASE, *(Variant(f"mask_{ratio}", (f"model.mask_ratio={ratio}",)) for ratio in (0.3, 0.45, 0.75, 0.9))],
    ),
    "decoder": (
        "equal accuracy, the U-Net takes 1.7 times as long",
        [BASE, Variant("unet", ("model.decoder=unet",))],
    ),
    "norm_pix": ("normalised patches are better", [BASE, Variant("raw_pixels", ("target.pixels.norm=none",))]),
    "epochs": (
        "more epochs are better",
        [
            BASE,
            *(
                Variant(f"epochs_{n}", (f"schedule.epochs={n}", f"schedule.warmup_epochs={n / 10}"))
                for n in (5, 10, 40)
            ),
        ],
    ),
}


def zero_filled(
    backbone: ConvNeXt,
    imgs: Tensor,
    mask: Tensor,
    *,
    keep: int,
    patch_size: int,
    grn_scope: str = "image",
    compiled: bool = False,
    recompute_stages: Collection[int] = (),
    all_stages: bool = False,
) -> list[Tensor]:
    """No engine: ordinary dense layers on images whose masked patches are 0, so that the shape of the mask leaks.

    It has an engine's signature, see :data:`fcmae.engines.Engine`, and is what the paper compares with.
    """
    rows, cols = grid_size(imgs.shape[-2], imgs.shape[-1], patch_size)
    visible = ~upsample_mask(mask, rows, cols, patch_size)
    maps = dense(backbone, imgs * visible[:, None], compiled=compiled, recompute_stages=recompute_stages)
    index = visible_indices(mask, keep)
    return [gather_patches(x, index, rows, cols) for x in (maps if all_stages else maps[-1:])]


@contextlib.contextmanager
def leaking(leaks: bool) -> Iterator[None]:
    """In this block engine=masked is :func:`zero_filled`, if ``leaks``."""
    engine = ENGINES["masked"]
    if leaks:
        ENGINES["masked"] = zero_filled
    try:
        yield
    finally:
        ENGINES["masked"] = engine


class Benchmark:
    """The runs in a folder; ``overrides`` as on the command line."""

    def __init__(self, out: Path, overrides: Sequence[str]) -> None:
        self.out = out
        data = [given for given in overrides if given.startswith(("data.", "data=", "loader."))]
        self.data = [*DATA, *data]
        self.score = [given.removeprefix("score.") for given in overrides if given.startswith("score.")]
        self.pretraining = [given for given in overrides if given not in data and not given.startswith("score.")]

    def file(self, variant: Variant, seed: int) -> Path:
        return self.out / "results" / f"{variant.name}_{seed}.json"

    def measure(self, variant: Variant, seed: int) -> dict[str, Any]:
        """The scores of a variant in percent, and the loss and minutes of its pretraining."""
        known = read_result(self.file(variant, seed))
        if known is not None:
            return known
        folder, began = self.out / "runs" / f"{variant.name}_{seed}", time.perf_counter()
        how: dict[str, Any] = {}
        if variant.supervised:
            given = [*self.data, *NETWORK, *variant.overrides, *SUPERVISED, *self.score, f"seeds=[{seed}]"]
        else:
            # What the command sets comes before the variant, which it would otherwise undo.
            given = [*self.data, *NETWORK, *PRETRAINING, *self.pretraining, *variant.overrides, f"seed={seed}"]
            with leaking(variant.leaks):
                pretrain(compose("pretrain", last(given)), folder / "pretrain")
            how = _of_pretraining(folder / "pretrain", time.perf_counter() - began)
            given = [f"init_from={folder}/pretrain", *self.data, *SCORE, *self.score, f"seeds=[{seed}]"]
        found = json.loads(study(compose("study", last(given)), folder / "study").read_text())
        scores = {each["arm"]: defined(each["metrics"])[found["metric"]] for each in found["results"]}
        result = {"variant": variant.name, "seed": seed, **scores, **how}
        self.file(variant, seed).parent.mkdir(parents=True, exist_ok=True)
        write_result(self.file(variant, seed), result)
        return result

    def table(self, name: str, seeds: Sequence[int]) -> Iterator[str]:
        """Markdown: mean and deviation over seeds, and the paired difference to the first variant of the kind."""
        expected, variants = ABLATIONS[name]
        results = {
            v: {s: defined(r) for s in seeds if (r := read_result(self.file(v, s))) is not None} for v in variants
        }
        columns = [c for c in COLUMNS if any(c in r for of in results.values() for r in of.values())]
        yield f"{name}: the paper says: {expected}"
        yield "| variant | seeds | " + " | ".join(columns) + " |"
        yield "|---" * (len(columns) + 2) + "|"
        for variant, found in results.items():
            first = next(v for v in variants if v.supervised == variant.supervised)
            cells = []
            for column in columns:
                values = {seed: defined(result)[column] for seed, result in found.items() if column in result}
                mean, deviation = spread(values)
                theirs = {seed: defined(result)[column] for seed, result in results[first].items() if column in result}
                gain = None if variant is first else paired(values, theirs)
                shown = f"{mean:.4g} ± {deviation:.2g}" if values else ""
                cells.append(shown + (f" ({gain})" if gain is not None and column in SCORES else ""))
            yield f"| {variant.name} | {len(found)} | " + " | ".join(cells) + " |"


SCORES = ("pretrained_probe", "finetuned", "scratch")
COLUMNS = (*SCORES, "loss", "minutes")


def _of_pretraining(run: Path, seconds: float) -> dict[str, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {"loss": [line["loss"] for line in lines if "loss" in line][-1], "minutes": round(seconds / 60, 2)}


def last(overrides: Sequence[str]) -> list[str]:
    """Overrides without those that a later one of the same key replaces: Hydra takes a group once."""
    return list({given.partition("=")[0]: given for given in overrides}.values())


def _part(text: str) -> tuple[int, int]:
    which, _, parts = text.partition("/")
    return int(which) - 1, int(parts)


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ablation", choices=[*ABLATIONS, "all"])
    parser.add_argument("--out", type=Path, default=Path("ablations"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, help="begin no run that would not end within this time")
    parser.add_argument("--part", type=_part, default=(0, 1), metavar="I/N", help="take every N-th run")
    given, overrides = parser.parse_known_args(args)
    names = list(ABLATIONS) if given.ablation == "all" else [given.ablation]
    variants = dict.fromkeys(variant for name in names for variant in ABLATIONS[name][1])
    benchmark, seeds = Benchmark(given.out, overrides), range(given.seeds)
    began, longest, which = time.perf_counter(), 0.0, given.part
    runs = [(variant, seed) for seed in seeds for variant in variants][which[0] :: which[1]]
    left = [run for run in runs if not benchmark.file(*run).exists()]
    for number, (variant, seed) in enumerate(left):
        start = time.perf_counter()
        if given.minutes is not None and start - began + longest > 60 * given.minutes:
            print(f"{len(left) - number} runs are left; the same command continues", file=sys.stderr, flush=True)
            break
        print(json.dumps(benchmark.measure(variant, seed)), file=sys.stderr, flush=True)
        longest = max(longest, time.perf_counter() - start)
    for name in names:
        print("\n".join([*benchmark.table(name, seeds), ""]), flush=True)
    return 0 if all(benchmark.file(*run).exists() for run in runs) else 75


if __name__ == "__main__":
    sys.exit(main())
