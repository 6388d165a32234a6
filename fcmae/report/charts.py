"""Line charts as SVG, drawn in the colours of the page's style."""

import html
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fcmae.errors import shown

WIDTH, HEIGHT = 440, 250
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 10, 30
POINTS = 400
"""At most this many points of a line are drawn, each the mean of its neighbours."""
FEWER_POINTS = 100
"""Of a line among many."""
MARKS = 40
"""At most so many restarts and warnings are drawn, the last ones."""
COLOURS = 8
"""How many the page's style has, ``--c0`` and so on."""
SMOOTHED = 60
"""Points from which a noisy line is smoothed, by a mean over :data:`SHARE` of them."""
SHARE = 0.06


@dataclass(frozen=True)
class Line:
    """``points``: steps and values, in the order of the steps. ``band``: x, low and high of the area around it."""

    name: str
    colour: int
    points: Sequence[tuple[float, float]]
    dash: str = ""
    band: Sequence[tuple[float, float, float]] = ()


class Mark(NamedTuple):
    """Something that happened to a run at a step: ``kind`` is ``restart`` or ``warning``."""

    step: float
    colour: int
    kind: str
    text: str


def thinned(points: Sequence[tuple[float, float]], most: int = POINTS) -> list[tuple[float, float]]:
    """At most ``most`` points: the last ones of equal parts, with the mean of each part. The last point is kept."""
    if len(points) <= most:
        return list(points)
    ends = [len(points) * (part + 1) // most for part in range(most)]
    parts = [points[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    return [(part[-1][0], math.fsum(y for _, y in part) / len(part)) for part in parts]


def smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The mean of each point and its neighbours, fewer at the ends."""
    most = max(1, round(SHARE * len(points) / 2))
    found = []
    for place, (x, _) in enumerate(points):
        near = min(most, place, len(points) - 1 - place)
        some = points[place - near : place + near + 1]
        found.append((x, math.fsum(y for _, y in some) / len(some)))
    return found


def chart(
    title: str,
    lines: Sequence[Line],
    from_zero: bool = False,
    marks: Sequence[Mark] = (),
    noisy: bool = False,
    x_ticks: Sequence[tuple[float, str]] = (),
    steps: float = 0,
) -> str:
    """A chart of lines over optimizer steps: an HTML figure, whose data the page's script reads.

    Args:
        from_zero: the values start at 0.
        noisy: long lines are pale, below their smoothed values.
        x_ticks: places and names on another axis than steps.
        steps: at least so many are on the axis.
    """
    lines = [line for line in lines if line.points]
    most = max(FEWER_POINTS, POINTS * 2 // max(2, len(lines)))
    lines = [Line(line.name, line.colour, thinned(line.points, most), line.dash, line.band) for line in lines]
    xs = [x for line in lines for x, _ in line.points]
    low, high, cut = _range([y for line in lines for _, y in line.points], [b for line in lines for b in line.band])
    y_ticks = ticks(min(0, low) if from_zero else low, high, 5, around=True)
    start, end = (min(xs), max(xs)) if x_ticks else (0, max(steps, *xs))
    frame = _Frame((start, end), (y_ticks[0], y_ticks[-1]))
    parts = _axes(frame, y_ticks, x_ticks or [(tick, number(tick)) for tick in ticks(start, end, 5)])
    parts += [_mark(frame, mark) for mark in marks[-MARKS:] if start < mark.step < end]
    for line in lines:
        parts += _drawn(frame, line, noisy)
    last = ", ".join(f"{line.name}: {number(line.points[-1][1])}" for line in lines)
    over = "" if x_ticks else " over optimizer steps"
    label = html.escape(shown(f"{title}{over}; at the end {last}"))
    data = "" if x_ticks else f' data-lines="{html.escape(_data(lines, frame))}"'
    note = ' <span class="soft">· the highest values are cut off</span>' * cut
    return (
        f'<figure class="chart"><figcaption>{html.escape(shown(title))}{note}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}"{data}>{"".join(parts)}</svg>'
        "<output></output></figure>"
    )


class _Frame(NamedTuple):
    """Places values in the picture; those outside of the range at its edge."""

    x: tuple[float, float]
    y: tuple[float, float]

    def __call__(self, x: float, y: float) -> tuple[float, float]:
        across = (x - self.x[0]) / ((self.x[1] - self.x[0]) or 1)
        up = (y - self.y[0]) / ((self.y[1] - self.y[0]) or 1)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - min(1.0, up) * (HEIGHT - TOP - BOTTOM)

    def path(self, points: Sequence[tuple[float, float]]) -> str:
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in (self(*point) for point in points))


def _range(values: list[float], bands: Sequence[tuple[float, float, float]]) -> tuple[float, float, bool]:
    """The range that is drawn, and whether higher values are cut off: a few, far above the others."""
    ordered = sorted(values)
    low, high = ordered[0], ordered[-1]
    most = ordered[int(0.97 * (len(ordered) - 1))]
    cut = len(ordered) >= SMOOTHED and high - most > 2 * (most - low) > 0
    if cut:
        high = most + 0.2 * (most - low)
    return min([low, *(each[1] for each in bands)]), max([high, *(each[2] for each in bands)]), cut


def _axes(frame: _Frame, y_ticks: Sequence[float], x_ticks: Sequence[tuple[float, str]]) -> list[str]:
    parts = []
    for tick in y_ticks:
        _, y = frame(frame.x[0], tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{number(tick)}</text>')
    for tick, name in x_ticks:
        x, _ = frame(tick, frame.y[0])
        anchor = "end" if x > WIDTH - RIGHT - 12 else "middle"
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 10}" text-anchor="{anchor}">{html.escape(name)}</text>')
    return parts


def _mark(frame: _Frame, mark: Mark) -> str:
    x, _ = frame(mark.step, frame.y[0])
    colour = f"var(--c{mark.colour % COLOURS})"
    title = f"<title>{html.escape(shown(mark.text))}</title>"
    if mark.kind == "warning":
        return f'<path class="warning" d="M{x:.1f} {TOP} l5 9 h-10 z">{title}</path>'
    ends = f'x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"'
    return f'<line class="mark" {ends} stroke="{colour}">{title}</line>'


def _drawn(frame: _Frame, line: Line, noisy: bool) -> list[str]:
    colour, parts = f"var(--c{line.colour % COLOURS})", []
    dash = f' stroke-dasharray="{line.dash}"' if line.dash else ""
    if line.band:
        around = [(x, high) for x, _, high in line.band] + [(x, low) for x, low, _ in reversed(line.band)]
        parts.append(f'<polygon points="{frame.path(around)}" fill="{colour}"/>')
    points = line.points
    if noisy and len(points) >= SMOOTHED:
        parts.append(f'<polyline class="raw" points="{frame.path(points)}" stroke="{colour}"/>')
        points = smoothed(points)
    if len(points) > 1:
        parts.append(f'<polyline points="{frame.path(points)}" stroke="{colour}"{dash}/>')
    if len(points) <= 30:
        placed = (frame(*point) for point in points)
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}"/>' for x, y in placed]
    return parts


def _data(lines: Sequence[Line], frame: _Frame) -> str:
    """JSON for the page's script: ranges, and names and points of the lines."""
    given = [[line.name, [[x, float(f"{y:.5g}")] for x, y in line.points]] for line in lines]
    return json.dumps({"x": frame.x, "y": frame.y, "lines": given}, separators=(",", ":"))


def ticks(low: float, high: float, most: int, around: bool = False) -> list[float]:
    """At most ``most`` + 2 round numbers between ``low`` and ``high``, or from below one to above the other."""
    if high <= low:
        low, high = (low - abs(low) / 10, low + abs(low) / 10) if low else (0, 1)
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
