"""What a run's folder holds of its images and evaluations. It may be anybody's: all is checked, pictures re-encoded."""

import base64
import contextlib
import csv
import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

from PIL import Image

from fcmae.data.pixels.formats import open_picture
from fcmae.data.sheet import EXAMPLES, SHEET_FILE
from fcmae.files import json_object
from fcmae.opening import read_regular
from fcmae.status import is_number

PICTURE_WIDTH, MAX_PICTURE = 960, 2**25
"""Pixels of a picture in the page, and bytes of a picture file."""
PLOT_WIDTH, PLOT_COLOURS = 640, 255
MOST_EVALUATIONS, MOST_ROWS, MOST_COLUMNS = 20, 200, 12
MAX_BYTES = 2**22
"""Of a file of results."""
METRICS_FILE = "metrics.json"
PLOTS = {
    "confusion": "confusion matrix",
    "roc": "ROC curves",
    "precision_recall": "precision and recall",
    "precision_recall_50": "precision and recall, IoU 0.50",
    "precision_recall_75": "precision and recall, IoU 0.75",
    "reliability": "reliability",
    "scatter": "predicted and true numbers",
}
"""Files of ``fcmae evaluate``, and what they show."""
WORST = "worst"


@dataclass
class Evaluation:
    """Numbers by name; header and rows of the classes' table; as data URIs plots by title, and the worst images."""

    name: str
    metrics: dict[str, float]
    per_class: list[list[str]] = field(default_factory=list)
    plots: dict[str, str] = field(default_factory=dict)
    worst: str = ""


@dataclass
class Sheet:
    """``facts`` by title; ``examples``: a name, a description and a data URI each."""

    facts: dict[str, str]
    examples: list[tuple[str, str, str]]


def read_evaluations(folder: Path, picture_bytes: int) -> list[Evaluation]:
    """What ``fcmae evaluate`` left in folders of a run, and metrics that any command wrote into it as JSON.

    Args:
        picture_bytes: of all plots and pictures together, at most.
    """
    left, found = picture_bytes, []
    for path in sorted((*folder.glob("*.json"), *folder.glob(f"*/{METRICS_FILE}")))[:MOST_EVALUATIONS]:
        inside = path.parent != folder
        metrics = None if path.parent.is_symlink() and inside else _metrics(path)
        if metrics is None:
            continue
        evaluation = Evaluation(path.parent.name if inside else path.stem, metrics)
        if inside:
            evaluation.per_class = _rows(path.with_name("per_class.csv"))
            for name, title in PLOTS.items():
                source = _picture(path.with_name(f"{name}.png"), left, plot=True)
                left -= len(source)
                evaluation.plots |= {title: source} if source else {}
            evaluation.worst = _picture(path.with_name(f"{WORST}.png"), left, plot=False)
            left -= len(evaluation.worst)
        found.append(evaluation)
    return found


def _metrics(path: Path) -> dict[str, float] | None:
    """None of a file that holds anything else than numbers and null; those that are not finite are left out."""
    given = json_object(path, MAX_BYTES)
    if given and all(type(value) in (int, float, NoneType) for value in given.values()):
        return {name: value for name, value in given.items() if is_number(value)}
    return None


def _rows(path: Path) -> list[list[str]]:
    with contextlib.suppress(OSError, ValueError, csv.Error):
        text = read_regular(path, MAX_BYTES, links=False).decode()
        rows = [[_short(cell) for cell in row[:MOST_COLUMNS]] for row in csv.reader(io.StringIO(text))]
        return [row for row in rows[: 1 + MOST_ROWS] if len(row) == len(rows[0])]
    return []


def _short(cell: str) -> str:
    """A number with four digits; other text as it is, up to a length."""
    try:
        return f"{float(cell):.6g}" if float(cell).is_integer() else f"{float(cell):.4g}"
    except (ValueError, OverflowError):
        return cell[:80]


def _picture(path: Path, most: int, plot: bool) -> str:
    """A data URI of at most ``most`` characters; empty if there is none."""
    source = ""
    with contextlib.suppress(OSError, ValueError, SyntaxError):
        source = encoded(read_regular(path, MAX_PICTURE, links=False), plot)
    return source if len(source) <= most else ""


def encoded(data: bytes, plot: bool = False) -> str:
    """A picture file as a data URI, made smaller if it is large: a JPEG, or of a plot a PNG with few colours.

    Raises OSError, ValueError or SyntaxError if it cannot be read.
    """
    with open_picture(data, 2**26) as image:
        picture = image.convert("RGB")
    width = PLOT_WIDTH if plot else PICTURE_WIDTH
    if picture.width > width:
        size = width, max(1, round(picture.height * width / picture.width))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    if plot:
        picture.quantize(PLOT_COLOURS).save(buffer, "PNG", optimize=True)
    else:
        picture.save(buffer, "JPEG", quality=82)
    return f"data:image/{'png' if plot else 'jpeg'};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def read_sheet(folder: Path) -> Sheet | None:
    """What a run kept of its images (:mod:`fcmae.data.sheet`); None if nothing is readable."""
    given = json_object(folder / SHEET_FILE, MAX_BYTES)
    if not isinstance(given.get("examples"), list):
        return None
    examples = list(_examples(given["examples"][:EXAMPLES]))
    with contextlib.suppress(ValueError):  # of a number of thousands of digits
        return Sheet(_facts(given, examples), [(e["name"], e["what"], e["picture"]) for e in examples])
    return None


def _examples(given: list[Any]) -> Iterator[dict[str, Any]]:
    for example in given:
        with contextlib.suppress(OSError, ValueError, SyntaxError, TypeError, KeyError, OverflowError):
            height, width = (int(side) for side in example["size"])
            picture = encoded(base64.b64decode(example["picture"]))
            texts = {name: str(example[name])[:200] for name in ("name", "kind", "channels", "type")}
            yield {**texts, "size": (height, width), "picture": picture, "what": f"{width} × {height}, {texts['kind']}"}


def _facts(given: dict[str, Any], examples: list[dict[str, Any]]) -> dict[str, str]:
    facts = {}
    for name in ("images", "classes", "unreadable"):
        value = given.get(name)
        if type(value) is int and (value or name == "images"):
            facts[name] = f"{value:,}"
    if "unreadable" in facts:
        facts["unreadable"] += f" of {len(examples) + given['unreadable']} that were looked at"
    if examples:
        sizes = sorted((example["size"] for example in examples), key=lambda size: size[0] * size[1])
        least, middle, most = (f"{sizes[i][1]} × {sizes[i][0]}" for i in (0, len(sizes) // 2, -1))
        facts["size, px"] = least if least == most else f"{least} to {most}, median {middle}"
        for title, name in (("format", "kind"), ("channels", "channels"), ("type", "type")):
            counts = Counter(example[name] for example in examples).most_common()
            facts[title] = counts[0][0] if len(counts) == 1 else ", ".join(f"{v} ({n})" for v, n in counts)
    return facts
