"""What a report shows of a run, from its folder, which may be anybody's: numbers are checked, pictures re-encoded."""

import contextlib
import functools
import json
import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fcmae.config import FinetuneConfig, PretrainConfig, compose, to_dict
from fcmae.errors import UsageError
from fcmae.files import json_lines
from fcmae.opening import open_regular, read_regular
from fcmae.report.charts import POINTS, thinned
from fcmae.report.kept import MAX_PICTURE, Evaluation, Sheet, encoded, read_evaluations, read_sheet
from fcmae.status import RunStatus, is_number, read_config, read_status
from fcmae.urls import tell_apart

MAX_METRICS = 2**30
"""Bytes of a metrics file."""
MAX_LINE = 2**16
MAX_EVENTS = 2**24
"""Bytes of the file of processes."""
PICTURE_BYTES = 2_400_000
"""Of all pictures in the page together; of those of evaluations at most half."""
MOST_PICTURES = 12
"""Of one name and run, evenly spaced in time."""


@dataclass
class Picture:
    """``source`` is a data URI."""

    name: str
    step: int
    source: str


@dataclass
class RunContent:
    """Of one run: its status, series by metric, settings by key, and pictures."""

    status: RunStatus
    name: str
    series: dict[str, list[tuple[float, float]]]
    settings: dict[str, str] = field(default_factory=dict)
    """What differs from the defaults of its command."""
    pictures: list[Picture] = field(default_factory=list)
    hours: float = 0.0
    """Of training, by the logged speed."""
    device_hours: float | None = None
    """The same times the ranks of each process; None where they are not known."""
    images: float = 0.0
    processes: list[dict[str, Any]] = field(default_factory=list)
    """Of ``events.jsonl``, each process that trained."""
    warnings: list[dict[str, Any]] = field(default_factory=list)
    """Of ``events.jsonl``, what was wrong: ``step``, ``time`` and the text ``warning``."""
    evaluations: list[Evaluation] = field(default_factory=list)
    sheet: Sheet | None = None


def read_run(folder: str | Path, name: str, picture_bytes: int = PICTURE_BYTES) -> RunContent:
    """Reads a run's folder. Raises UsageError if it holds no run."""
    status = read_status(folder)
    run = RunContent(status, name, {}, _settings(status.folder / "config.yaml"))
    for event in _events(status.folder / "events.jsonl"):
        (run.warnings if "warning" in event else run.processes).append(event)
    _read_series(run)
    run.evaluations = read_evaluations(status.folder, picture_bytes // 2)
    run.sheet = read_sheet(status.folder)
    pictures = [picture for each in run.evaluations for picture in (*each.plots.values(), each.worst)]
    run.pictures = _pictures(status.folder / "reconstructions", picture_bytes - sum(map(len, pictures)))
    return run


def _read_series(run: RunContent) -> None:
    """Step and value of every metric, thinned; the hours of training and the images seen, by the logged speeds."""
    points: dict[str, list[tuple[float, float]]] = defaultdict(list)
    batch, seconds, device_seconds, before = run.status.batch, 0.0, 0.0, 0.0
    for line in _lines(run.status.folder / "metrics.jsonl"):
        step = line["step"]
        speed = line.get("images_per_second", 0.0)
        if batch and speed > 0 and step > before:
            took = (step - before) * batch / speed
            seconds, device_seconds = seconds + took, device_seconds + took * _ranks(run.processes, before)
        if "loss" in line:
            before = step
        for name, value in line.items():
            if name not in ("step", "epoch", "seconds_left"):
                points[name].append((step, value))
                if len(points[name]) >= 20 * POINTS:
                    points[name] = thinned(points[name], 10 * POINTS)
    run.series, run.hours, run.images = dict(points), seconds / 3600, before * (batch or 0)
    run.device_hours = device_seconds / 3600 or None


def _ranks(processes: list[dict[str, Any]], step: float) -> float:
    """Of the last process that began at or before a step; 0 where it is not known."""
    known = [event.get("ranks", 0) for event in processes if event["step"] <= step]
    return known[-1] if known and is_number(known[-1]) else 0


def _lines(path: Path) -> Any:
    with contextlib.suppress(OSError), open_regular(path, links=False) as file:
        read = 0
        while read < MAX_METRICS and (text := file.readline(MAX_LINE)):
            read += len(text)
            with contextlib.suppress(ValueError, RecursionError):
                given = json.loads(text)
                if isinstance(given, dict) and is_number(given.get("step")):
                    yield {name: value for name, value in given.items() if is_number(value)}


def _events(path: Path) -> list[dict[str, Any]]:
    """The lines that have a step; a warning that a run repeated after it resumed counts once.

    Warnings that a process began with are among its ``notes``.
    """
    found: list[dict[str, Any]] = []
    with contextlib.suppress(OSError):
        lines = json_lines(read_regular(path, MAX_EVENTS, links=False))
        found = [given for _, given in lines if is_number(given.get("step"))]
    said = {(event["step"], event["warning"]): event for event in found if isinstance(event.get("warning"), str)}
    begun = [event for event in found if "warning" not in event]
    for event in begun:
        notes = event.get("notes")
        for note in notes if isinstance(notes, list) else []:
            if isinstance(note, str) and note.startswith("warning: "):
                said.setdefault((None, note), {"step": event["step"], "time": event.get("time"), "warning": note})
    return begun + list(said.values())


def _settings(path: Path) -> dict[str, str]:
    """The keys of a run's config that differ from the defaults of its command."""
    config = read_config(path)
    command = "finetune" if "objective" in config else "pretrain"
    defaults = _defaults(command)
    given = dict(_flat(config))
    return {key: given[key] for key in given if given[key] != defaults.get(key)}


@functools.cache
def _defaults(command: str) -> dict[str, str]:
    schema: PretrainConfig | FinetuneConfig = compose(command, ["data=synthetic"])
    return dict(_flat(to_dict(schema)))


def _flat(values: Any, prefix: str = "") -> Any:
    if isinstance(values, dict) and values and not (prefix and "_target_" in values):
        for key, value in values.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, _text(values)


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return json.dumps(value, default=str)[:400]


def _pictures(folder: Path, limit: int) -> list[Picture]:
    """Pictures evenly spaced in time, as JPEGs, at most ``limit`` bytes in all."""
    files: dict[str, list[tuple[int, Path]]] = defaultdict(list)
    if folder.is_dir() and not folder.is_symlink():
        for path in folder.iterdir():
            named = re.fullmatch(r"(\w{1,40})_(\d{1,12})\.png", path.name)
            if named:
                files[named[1]].append((int(named[2]), path))
    chosen = [(name, *which) for name in sorted(files) for which in spaced(sorted(files[name]), MOST_PICTURES)]
    pictures, left = [], limit
    for name, step, path in reversed(chosen):  # the last ones matter most
        try:
            source = encoded(read_regular(path, MAX_PICTURE, links=False))
        except (OSError, ValueError, SyntaxError):
            continue
        if len(source) > left:
            break
        left -= len(source)
        pictures.append(Picture(name, step, source))
    return pictures[::-1]


def spaced(items: list[Any], most: int) -> list[Any]:
    """At most ``most`` of the items, evenly spaced, with the first and the last."""
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def read_runs(folders: list[str]) -> list[RunContent]:
    """Raises UsageError naming the first folder that holds no run, or is given twice."""
    paths = [Path(folder).resolve() for folder in folders]
    for number, path in enumerate(paths):
        if path in paths[:number]:
            raise UsageError(f"{folders[number]} is given twice")
    names = tell_apart([str(path) for path in paths])
    return [read_run(folder, name, PICTURE_BYTES // len(paths)) for folder, name in zip(folders, names, strict=True)]
