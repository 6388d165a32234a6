"""docs/images/speed.png: images per second in training, packed against masked, from results of `fcmae bench step`.

python benchmarks/plot.py benchmarks/convnextv2_*-h200-2026-11-30.json
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ENGINES = {"packed": "tab:blue", "masked": "tab:grey", "timm": "tab:olive"}
NAMES = {"packed": "packed", "masked": "masked dense", "timm": "timm, supervised, nothing masked"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/images/speed.png"))
    given = parser.parse_args()
    reports = [json.loads(file.read_text()) for file in given.files]
    # of several batch sizes and modes, the fastest; no bars for a model that only one engine ran
    speeds: dict[str, dict[str, float]] = {}
    for row in (row for report in reports for row in report["results"]):
        engines = speeds.setdefault(row["model"], {})
        engines[row["engine"]] = max(engines.get(row["engine"], 0), row["images_per_second"])
    speeds = {model: engines for model, engines in speeds.items() if {"packed", "masked"} <= engines.keys()}
    models = sorted(speeds, key=lambda model: -speeds[model]["packed"])

    figure, axes = plt.subplots(figsize=(8, 0.8 * len(models) + 1.4), layout="constrained")
    for position, engine in enumerate(ENGINES):
        if not any(engine in engines for engines in speeds.values()):
            continue
        rows = [(index, model) for index, model in enumerate(models) if engine in speeds[model]]
        heights = [index + 0.28 * (position - 1) for index, _ in rows]
        ratios = [speeds[model][engine] / speeds[model]["masked"] for _, model in rows]
        bars = axes.barh(heights, ratios, 0.26, color=ENGINES[engine], label=NAMES[engine])
        axes.bar_label(bars, [f" {speeds[model][engine]:,.0f} img/s" for _, model in rows], fontsize=8)
    axes.set_xlim(right=1.2 * max(s / engines["masked"] for engines in speeds.values() for s in engines.values()))
    axes.set_yticks(range(len(models)), [model.replace("convnextv2_", "ConvNeXt V2 ") for model in models])
    axes.invert_yaxis()
    config = reports[0]["config"]
    gpus = " and ".join(sorted({report["machine"]["gpu"] for report in reports}))
    axes.set_xlabel("speed of a training step (forward, backward, AdamW), masked dense = 1")
    axes.set_title(
        f"{gpus}, {config['precision']}, {config['image_size']} px, mask {config['mask_ratio']}", fontsize=10
    )
    figure.legend(fontsize=8, loc="outside lower center", ncols=len(ENGINES))
    figure.savefig(given.out, dpi=110)


if __name__ == "__main__":
    main()
