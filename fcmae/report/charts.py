"""Line charts as SVG, drawn in the colours of the page's style."""

import html
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 440, 250
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 10, 30
POINTS = 400
"""At most this many points of a line are drawn, each the mean of its neighbours."""
MARKS = 40
"""At most so many restarts are drawn, the last ones."""
COLOURS = 8
"""How many the page's style has, ``--c0`` and so on."""


@dataclass(frozen=True)
class Line:
    """``points``: steps and values, in the order of the steps."""

    name: str
    colour: int
    points: Sequence[tuple[float, float]]


def thinned(points: Sequence[tuple[float, float]], most: int = POINTS) -> list[tuple[float, float]]:
    """At most ``most`` points: the last ones of equal parts, with the mean of each part. The last point is kept."""
    if len(points) <= most:
        return list(points)
    ends = [len(points) * (part + 1) // most for part in range(most)]
    parts = [points[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    return [(part[-1][0], math.fsum(y for _, y in part) / len(part)) for part in parts]


def chart(title: str, lines: Sequence[Line], from_zero: bool = False, marks: Sequence[tuple[float, int]] = ()) -> str:
    """A chart of lines over optimizer steps: an HTML figure, whose data the page's script reads.

    Args:
        from_zero: the values start at 0.
        marks: steps at which a run began again, each with its colour.
    """
    lines = [Line(line.name, line.colour, thinned(line.points)) for line in lines if line.points]
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    y_ticks = ticks(min(0, *ys) if from_zero else min(ys), max(ys), 5, around=True)
    x_range, y_range = (0, max(xs)), (y_ticks[0], y_ticks[-1])
    x_ticks = ticks(*x_range, 4)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_range[0]) / ((x_range[1] - x_range[0]) or 1)
        up = (y - y_range[0]) / ((y_range[1] - y_range[0]) or 1)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = []
    for tick in y_ticks:
        _, y = place(x_range[0], tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{number(tick)}</text>')
    for tick in x_ticks:
        x, _ = place(tick, y_range[0])
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 10}" text-anchor="middle">{number(tick)}</text>')
    for step, number_of_colour in marks[-MARKS:]:
        if x_range[0] < step < x_range[1]:
            x, _ = place(step, y_range[0])
            colour = f"var(--c{number_of_colour % COLOURS})"
            ends = f'x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"'
            parts.append(f'<line class="mark" {ends} stroke="{colour}"><title>restart at step {step:g}</title></line>')
    for line in lines:
        colour = f"var(--c{line.colour % COLOURS})"
        placed = [place(x, y) for x, y in line.points]
        if len(placed) > 1:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
            parts.append(f'<polyline points="{path}" stroke="{colour}"/>')
        if len(placed) <= 30:
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}"/>' for x, y in placed]
    last = ", ".join(f"{line.name}: {number(line.points[-1][1])}" for line in lines)
    label = html.escape(f"{title} over optimizer steps; at the end {last}")
    data = html.escape(_data(lines, x_range, y_range))
    drawing = "".join(parts)
    return (
        f'<figure class="chart"><figcaption>{html.escape(title)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}" data-lines="{data}">{drawing}</svg>'
        "<output></output></figure>"
    )


def _data(lines: Sequence[Line], x_range: tuple[float, float], y_range: tuple[float, float]) -> str:
    """JSON for the page's script: ranges, and names and points of the lines."""
    shown = [[line.name, [[x, float(f"{y:.5g}")] for x, y in line.points]] for line in lines]
    return json.dumps({"x": x_range, "y": y_range, "lines": shown}, separators=(",", ":"))


def ticks(low: float, high: float, most: int, around: bool = False) -> list[float]:
    """At most ``most`` + 2 round numbers between ``low`` and ``high``, or from below one to above the other."""
    if high <= low:
        low, high = (low - abs(low) / 2, low + abs(low) / 2) if low else (0, 1)
    rough = (high - low) / most
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 5, 10, 20) if size * factor >= rough)
    down, up = (math.floor, math.ceil) if around else (math.ceil, math.floor)
    first, last = down(low / step + (1e-9 if around else -1e-9)), up(high / step - (1e-9 if around else -1e-9))
    return [round(i * step, 12) for i in range(first, last + 1)]


def number(value: float) -> str:
    """A number in few characters."""
    if value == int(value) and abs(value) < 1e4:
        return str(int(value))
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):.4g}{unit}"
    return f"{value:.4g}"
