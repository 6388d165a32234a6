"""The plot of a study: scores over the number of labelled images, a band of one standard deviation per arm."""

import math
from pathlib import Path
from typing import Any

from fcmae.files import output
from fcmae.studies.compare import spread

WIDTH, HEIGHT = 7.0, 4.5
"""Inches."""


def draw(summary: dict[str, Any], file: Path) -> str | None:
    """Draws what study.json holds. Returns a line that says what is missing to do so, if anything.

    One colour per kind of weights, random, pretrained and each of ``others``; the line style is the method's.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "no plot, which matplotlib would draw: pip install 'fcmae[demo]'"
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    axes = figure.subplots()
    images = {str(budget["label"]): budget["images"] for budget in summary["budgets"]}
    name = summary["metric"].removeprefix("-")
    for arm in summary["arms"]:
        points = []
        for label, count in images.items():
            of = {
                r["seed"]: r["metrics"][name]
                for r in summary["results"]
                if (r["arm"], str(r["labels"])) == (arm, label)
            }
            mean, deviation = spread(of)
            if not math.isnan(mean):
                points.append((count, mean, deviation))
        if points:
            x, means = [count for count, _, _ in points], [mean for _, mean, _ in points]
            (line,) = axes.plot(x, means, marker="o", markersize=4, label=arm, **_style(arm, summary))
            low, high = ([mean + sign * deviation for _, mean, deviation in points] for sign in (-1, 1))
            axes.fill_between(x, low, high, color=line.get_color(), alpha=0.12, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(images.values()), [f"{count:,}" for count in images.values()])
    axes.minorticks_off()
    axes.set(xlabel="labelled training images", ylabel=name)
    axes.grid(alpha=0.3)
    if axes.lines:  # no score may be defined
        axes.legend(fontsize=8)
    with output("study.png", file) as out:
        figure.savefig(out, dpi=150, format="png")
    return None


def _style(arm: str, summary: dict[str, Any]) -> dict[str, Any]:
    """Grey for random weights, blue for the pretraining that is studied, other colours for others."""
    others = list(summary["others"])
    kind = next((number for number, name in enumerate(others) if arm.startswith(f"{name}_")), None)
    colours = ("#c2410c", "#0f766e", "#9333ea", "#a16207")
    colour = "#64748b" if arm in summary["without"] else "#0b62c4" if kind is None else colours[kind % len(colours)]
    style = ":" if arm.endswith("probe") else "-" if arm.startswith("auto") or arm.endswith("_auto") else "--"
    return {"color": colour, "linestyle": style}
