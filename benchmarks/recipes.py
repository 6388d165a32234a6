"""GPU-hours in the files of conf/experiment and the table of docs/recipes.md, from the speeds in benchmarks/*.json.

    python benchmarks/recipes.py            # writes them
    python benchmarks/recipes.py --check    # exit code 1 if they are not what the measurements say

A speed is that of a training step by `fcmae bench step ... --json benchmarks/MODEL-GPU-DATE.json`, the best of a GPU.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import NamedTuple

from fcmae.config import FinetuneConfig, PretrainConfig, compose
from fcmae.data.plan import BatchPlan

ROOT = Path(__file__).parents[1]
EXPERIMENTS = ROOT / "conf" / "experiment"
DOCUMENT = ROOT / "docs" / "recipes.md"
FOLDERS = ("in1k", "in22k", "budget")
SIZES = ("atto", "femto", "pico", "nano", "tiny", "base", "large", "huge")
IMAGES = {"in1k": 1_281_167, "in22k": 14_197_122}
COMMAND = re.compile(r"# fcmae (pretrain|finetune) experiment=(\S+)")
HEADING = "# GPU-hours: steps * images / (images/s) / 3600, by benchmarks/*.json; without reading data and evaluating"
BLOCK = re.compile(rf"{re.escape(HEADING)}\n(?:#   .*\n)*")
TABLE = re.compile(r"(<!-- table -->\n).*?(<!-- end of table -->)", re.DOTALL)


class Recipe(NamedTuple):
    """An experiment of one size with what follows from it."""

    name: str
    task: str
    size: str
    cfg: PretrainConfig | FinetuneConfig
    published: str

    def plan(self, ranks: int) -> BatchPlan:
        cfg = self.cfg
        return BatchPlan.create(
            images_of(self.name), cfg.optim.global_batch_size, cfg.trainer.micro_batch_size, ranks, cfg.seed
        )

    @property
    def steps(self) -> int:
        return round(self.cfg.schedule.epochs * self.plan(1).steps_per_epoch)


Speeds = dict[tuple[str, str, str, int], float]
"""Images/s in bf16 by (GPU, timm's model name, engine, pixels per side)."""


def images_of(experiment: str) -> int:
    """Training images of the data set that an experiment is made for."""
    return IMAGES["in22k" if experiment.startswith("in22k/finetune") else "in1k"]


def measured() -> Speeds:
    """The best speed of each GPU, model, engine and size of image."""
    speeds: Speeds = {}
    for file in sorted((ROOT / "benchmarks").glob("*.json")):
        report = json.loads(file.read_text())
        config = report.get("config", {})
        gpu = report.get("machine", {}).get("gpu")
        if gpu is None or config.get("precision") != "bf16" or "image_size" not in config:
            continue
        if config.get("targets", ["pixels"]) != ["pixels"]:
            continue
        for row in report.get("results", []):
            if not {"model", "engine", "compiled", "images_per_second"} <= row.keys():
                continue  # another benchmark's
            key = (gpu.removeprefix("NVIDIA "), row["model"], row["engine"], config["image_size"])
            speeds[key] = max(row["images_per_second"], speeds.get(key, 0.0))
    return speeds


def _config(command: str, experiment: str, size: str | None) -> PretrainConfig | FinetuneConfig:
    cfg = compose(command, [f"experiment={experiment}", *([f"model=convnextv2_{size}"] if size else [])])
    return cfg.settled({}) if isinstance(cfg, FinetuneConfig) else cfg


def recipes(file: Path) -> list[Recipe]:
    """What an experiment file is for: one size, all of them where the model is left open, or none."""
    text = file.read_text()
    match = COMMAND.search(text)
    name = file.relative_to(EXPERIMENTS).with_suffix("").as_posix()
    if match is None or name.split("/")[0] not in FOLDERS:
        return []
    found = re.search(r"# Published top-1: (\d+\.\d)", text)
    published = found[1] if found else ""
    own = [size for size in SIZES if re.search(rf"(^|[/_]){size}(_|$)", name)]
    if not own and match[1] == "finetune":
        return []  # what the files of the sizes share
    return [
        Recipe(name, match[1], size, _config(match[1], name, None if own else size), published) for size in own or SIZES
    ]


def cost_lines(recipe: Recipe, speeds: Speeds) -> list[str]:
    """The arithmetic of an experiment's GPU-hours, a line for each GPU that its step was measured on."""
    pixels, batch = recipe.cfg.data.size[0], recipe.cfg.optim.global_batch_size
    backbone = recipe.cfg.model.backbone
    # timm's forward and masked dense layers are slower: lower bounds of the speed.
    engines = {"packed": ""}
    if recipe.task == "finetune":
        engines = {"dense": "", "timm": " at most (engine=timm)", "masked": " at most (by masked dense layers)"}
    lines = []
    for gpu in sorted({key[0] for key in speeds}):
        for engine, remark in engines.items():
            speed = speeds.get((gpu, backbone, engine, pixels))
            if speed is not None:
                hours = recipe.steps * batch / round(speed) / 3600
                sum_ = f"{recipe.steps:,} * {batch:,} / {round(speed):,} / 3600"
                lines.append(f"{recipe.size.title()} on {gpu}: {sum_} = {hours:.1f}{remark}")
                break
    return lines


def block(found: list[Recipe], speeds: Speeds) -> str:
    """The lines of an experiment file that say its cost."""
    lines = [line for recipe in found for line in cost_lines(recipe, speeds)]
    unknown = [recipe for recipe in found if not cost_lines(recipe, speeds)]
    if unknown:
        names = ",".join(f"convnextv2_{recipe.size}" for recipe in unknown)
        engine = "packed" if unknown[0].task == "pretrain" else "timm"
        lines.append("not measured; measure the speed by")
        lines.append(f"fcmae bench step models=[{names}] engines=[{engine}] image_size={unknown[0].cfg.data.size[0]}")
    return "".join(f"{line}\n" for line in (HEADING, *(f"#   {line}" for line in lines)))


def table(all_recipes: list[Recipe], speeds: Speeds) -> str:
    """The table of docs/recipes.md."""
    header = "experiment | size | px | epochs (warm-up) | lr | steps | batch | on 1, 8, 64 GPUs | top-1 | GPU-hours"
    rows = [header.split(" | "), ["---"] * 10]
    for recipe in sorted(all_recipes, key=_order):
        cfg = recipe.cfg
        batch = cfg.optim.global_batch_size
        plans = [recipe.plan(ranks) for ranks in (1, 8, 64)]
        rows.append(
            [
                f"`{recipe.name}`",
                recipe.size.title(),
                str(cfg.data.size[0]),
                f"{cfg.schedule.epochs:g} ({cfg.schedule.warmup_epochs:g})",
                f"{cfg.optim.peak_lr:.3g}",
                f"{recipe.steps:,}",
                str(batch),
                ", ".join(f"{plan.micro_batch_size}×{plan.accum_steps}" for plan in plans),
                recipe.published,
                ", ".join(_short(line) for line in cost_lines(recipe, speeds)),
            ]
        )
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _order(recipe: Recipe) -> tuple:
    """Pretraining first, then fine-tuning, by size; 22K -> 1K after 22K."""
    folder = FOLDERS.index(recipe.name.split("/")[0])
    step = recipe.name if recipe.task == "pretrain" and folder == 0 else str("to_1k" in recipe.name)
    return folder, recipe.task != "pretrain", step, SIZES.index(recipe.size), recipe.cfg.data.size


def _short(cost: str) -> str:
    """A line of arithmetic as its GPU and result."""
    where, _, result = cost.partition(": ")
    hours, _, remark = result.partition(" = ")[2].partition(" ")
    return f"{'≤ ' if remark else ''}{hours} ({where.partition(' on ')[2]})"


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if something is out of date")
    check = parser.parse_args(args).check
    speeds, everything, stale = measured(), [], []
    for file in sorted(EXPERIMENTS.rglob("*.yaml")):
        found = recipes(file)
        if not found:
            continue
        everything += found
        text = file.read_text()
        if BLOCK.search(text) is None:
            sys.exit(f"{file} has no line {HEADING!r} to put its cost below")
        stale += _update(file, BLOCK.sub(lambda _, found=found: block(found, speeds), text), check)
    document = TABLE.sub(lambda match: f"{match[1]}{table(everything, speeds)}{match[2]}", DOCUMENT.read_text())
    stale += _update(DOCUMENT, document, check)
    for path in stale:
        print(f"{path.relative_to(ROOT)} {'is out of date' if check else 'written'}")
    return 1 if check and stale else 0


def _update(path: Path, text: str, check: bool) -> list[Path]:
    if path.read_text() == text:
        return []
    if not check:
        path.write_text(text)
    return [path]


if __name__ == "__main__":
    sys.exit(main())
