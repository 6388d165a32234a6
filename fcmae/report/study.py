"""What a report shows of a study (``fcmae study``), from its folder, which may be anybody's."""

import json
import math
import statistics
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fcmae.errors import UsageError, shown
from fcmae.opening import read_regular
from fcmae.report.charts import Line
from fcmae.status import is_number
from fcmae.study_status import MAX_BYTES, MAX_TEXT, STUDY_FILE, read_study_status

MAX_ROWS = 200
"""Of the table."""
MOST_ARMS = 40
GREY, FIRST_OTHER = 7, 1
"""Colours of random weights, and of the first weights that the pretrained ones are compared with."""


@dataclass
class StudyContent:
    """``rows``: the cells of the table, the first row being its header.

    ``lines``: a mean score per arm over the logarithm of the labelled images, with a band of one standard deviation.
    """

    name: str
    sentence: str
    rows: list[list[str]]
    metric: str = ""
    ticks: list[tuple[float, str]] | None = None
    lines: list[Line] | None = None


def read_study(folder: str | Path) -> StudyContent:
    """Raises UsageError if study.json cannot be read."""
    path = Path(folder) / STUDY_FILE
    if not path.exists():
        status = read_study_status(Path(folder))
        raise UsageError(
            f"{shown(str(folder))} is a study without a result yet: {status.progress} measured; continue it first"
        )
    try:
        given = json.loads(read_regular(path, MAX_BYTES, links=False))
        sentence, table = given["sentence"], given["table"]
        if not isinstance(sentence, str) or not all(isinstance(line, str) for line in table):
            raise TypeError("sentence and table must be text")
        lines = [line for line in table[:MAX_ROWS] if set(line) - set("|- ")]
        rows = [[cell.strip()[:MAX_TEXT] for cell in line.strip().strip("|").split("|")] for line in lines]
        study = StudyContent(Path(folder).resolve().name, sentence[:MAX_TEXT], rows)
        if "results" in given:
            _read_lines(study, given)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(f"{shown(str(path))} is no result of fcmae study: {error}") from error
    return study


def _read_lines(study: StudyContent, given: dict[str, Any]) -> None:
    places = {str(budget["label"]): math.log2(budget["images"]) for budget in given["budgets"]}
    study.ticks = [
        (place, f"{budget['images']:,}") for place, budget in zip(places.values(), given["budgets"], strict=True)
    ]
    study.metric = given["metric"].removeprefix("-")
    scores: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for result in given["results"]:
        value = result["metrics"].get(study.metric)
        if is_number(value):
            scores[result["arm"]][str(result["labels"])].append(value)
    study.lines = []
    for arm in given["arms"][:MOST_ARMS]:
        spread = [(x, scores[arm][label]) for label, x in places.items() if scores[arm][label]]
        band = []
        for x, values in spread:
            mean, deviation = statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
            band.append((x, mean - deviation, mean + deviation))
        points = [(x, (low + high) / 2) for x, low, high in band]
        colour, dash = _look(arm, given)
        study.lines.append(Line(arm, colour, points, dash, band if len(band) > 1 else ()))


def _look(arm: str, given: dict[str, Any]) -> tuple[int, str]:
    """Grey for random weights, blue for the pretraining that is studied, other colours for others; by method a dash."""
    others = list(given["others"])
    kind = next((number for number, name in enumerate(others) if arm.startswith(f"{name}_")), None)
    colour = GREY if arm in given["without"] else 0 if kind is None else FIRST_OTHER + kind % (GREY - FIRST_OTHER)
    dash = "2 4" if arm.endswith("probe") else "" if arm.startswith("auto") or arm.endswith("_auto") else "7 4"
    return colour, dash
