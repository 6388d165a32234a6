"""``fcmae report``: the page."""

import html
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from fcmae.errors import shown
from fcmae.files import output
from fcmae.report.charts import COLOURS, Line, chart, number
from fcmae.report.read import RunContent, read_runs
from fcmae.report.study import StudyContent, is_study, read_study
from fcmae.report.style import SCRIPT, STYLE
from fcmae.status import is_number
from fcmae.version import __version__

MOST_PROCESSES = 50
"""Of a run, the last ones."""
FIRST = ("loss", "val_loss")
LAST = ("images_per_second", "data_wait", "memory_gib", "grad_norm", "lr")
TITLES = {
    "loss": "loss",
    "val_loss": "loss on held-out images",
    "lr": "learning rate",
    "images_per_second": "images per second",
    "data_wait": "share of the time that waits for data",
    "memory_gib": "memory, GiB",
    "grad_norm": "norm of the gradient",
}


def write(runs: Sequence[str], out: str | Path) -> None:
    """Writes the page of some runs and studies. Raises UsageError if one is neither, or ``out`` cannot be written."""
    studies = [read_study(folder) for folder in runs if is_study(folder)]
    rest = [folder for folder in runs if not is_study(folder)]
    content = read_runs(rest) if rest else []
    with output("--out", out) as file:
        file.write(render(content, studies).encode())


def render(runs: Sequence[RunContent], studies: Sequence[StudyContent] = ()) -> str:
    """The page, complete in itself."""
    title = "fcmae: " + ", ".join([*(study.name for study in studies), *(run.name for run in runs)])
    sections = [_study(study) for study in studies]
    if runs:
        sections += [_summary(runs), _charts(runs), _evaluations(runs), _pictures(runs), _settings(runs)]
        sections += [_processes(runs), _files(runs)]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        f"style-src 'unsafe-inline'; script-src 'unsafe-inline'\">"
        f"<title>{_text(title)}</title><style>{STYLE}</style></head><body><main><h1>{_text(title)}</h1>"
        f"{''.join(sections)}<footer>fcmae {__version__}, {time.strftime('%Y-%m-%d %H:%M')}</footer></main>"
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def _text(value: str) -> str:
    return html.escape(shown(value))


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Cells are HTML."""
    head = "".join(f"<th>{cell}</th>" for cell in header)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _study(study: StudyContent) -> str:
    header, *rows = [[_text(cell) for cell in row] for row in study.rows] or [[]]
    plot = f'<img src="{study.picture}" alt="scores by the number of labelled images">' if study.picture else ""
    body = f"<p>{_text(study.sentence)}</p>{_table(header, rows)}"
    return f'<section><h2>Study {_text(study.name)}</h2>{body}<figure class="pictures">{plot}</figure></section>'


def _summary(runs: Sequence[RunContent]) -> str:
    rows = []
    for place, run in enumerate(runs):
        status = run.status
        step = "" if status.step is None else f"{status.step}/{status.total}" if status.total else str(status.step)
        scores = "<br>".join(f"{_text(name)} {number(value)}" for name, value in status.scores.items())
        loss = "" if status.loss is None else number(status.loss)
        speed = "" if status.images_per_second is None else number(round(status.images_per_second))
        swatch = f'<span class="swatch" style="background:var(--c{place % COLOURS})"></span>'
        name = f"{swatch}{_text(run.name)}"
        cells = (
            name,
            _text(status.task),
            status.state,
            step,
            number(run.images),
            _duration(run.hours),
            _cost(run),
            speed,
            loss,
            scores,
        )
        rows.append(cells)
    header = (
        "run",
        "task",
        "state",
        "step",
        "images seen",
        "training",
        "device hours",
        "images/s",
        "loss",
        "last evaluation",
    )
    return f"<section><h2>Runs</h2>{_table(header, rows)}</section>"


def _duration(hours: float) -> str:
    for unit, size in (("d", 48.0), ("h", 1.0), ("min", 1 / 60)):
        if hours >= size:
            return f"{hours / (24 if unit == 'd' else size):.3g} {unit}"
    return f"{number(round(3600 * hours))} s"


def _cost(run: RunContent) -> str:
    """Hours times the ranks of the last process."""
    ranks = run.processes[-1].get("ranks") if run.processes else None
    return number(round(run.hours * ranks, 2)) if is_number(ranks) else ""


def _charts(runs: Sequence[RunContent]) -> str:
    names = list(dict.fromkeys(name for run in runs for name in run.series))
    ordered = [name for name in FIRST if name in names]
    ordered += [name for name in names if name not in (*FIRST, *LAST)]
    ordered += [name for name in LAST if name in names]
    figures = []
    marks = [(event["step"], place) for place, run in enumerate(runs) for event in run.processes]
    for name in ordered:
        lines = [Line(run.name, place, run.series.get(name, ())) for place, run in enumerate(runs)]
        if any(line.points for line in lines) and any(y != 0 for line in lines for _, y in line.points):
            figures.append(chart(shown(TITLES.get(name, name)), lines, name in LAST, marks))
    if not figures:
        return "<section><h2>Curves</h2><p>Nothing is logged yet.</p></section>"
    restarts = any(step > 0 for step, _ in marks)
    note = "<p>A dotted line: a new process continued the run there.</p>" * restarts
    return f'<section><h2>Curves</h2><div class="charts">{"".join(figures)}</div>{note}</section>'


def _pictures(runs: Sequence[RunContent]) -> str:
    shows = []
    for run in runs:
        for name in dict.fromkeys(picture.name for picture in run.pictures):
            pictures = [picture for picture in run.pictures if picture.name == name]
            images = "".join(
                f'<img src="{picture.source}" alt="{_text(name)} at step {picture.step}" data-step="{picture.step}"'
                f"{'' if picture is pictures[-1] else ' hidden'}>"
                for picture in pictures
            )
            most = len(pictures) - 1
            slider = f'<input type="range" min="0" max="{most}" value="{most}" aria-label="step">' * (most > 0)
            shows.append(
                f'<figure class="pictures"><figcaption>{_text(run.name)}: {_text(name)}, step '
                f"<output>{pictures[-1].step}</output></figcaption>{slider}{images}</figure>"
            )
    return f"<section><h2>Pictures</h2>{''.join(shows)}</section>" if shows else ""


def _evaluations(runs: Sequence[RunContent]) -> str:
    """A row per file of results."""
    found = [(run.name, file, metrics) for run in runs for file, metrics in run.evaluations.items()]
    if not found:
        return ""
    names = list(dict.fromkeys(name for _, _, metrics in found for name in metrics))[:40]
    rows = [
        (_text(run), _text(file), *(number(metrics[name]) if name in metrics else "" for name in names))
        for run, file, metrics in found
    ]
    return f"<section><h2>Evaluations</h2>{_table(('run', 'file', *map(_text, names)), rows)}</section>"


def _processes(runs: Sequence[RunContent]) -> str:
    """When and where each run was trained, with which versions, and what it said at the start."""
    rows, notes = [], []
    for run in runs:
        for event in run.processes[-MOST_PROCESSES:]:
            given = event.get("versions")
            versions = ", ".join(f"{name} {value}" for name, value in given.items()) if isinstance(given, dict) else ""
            began = event.get("time")
            when = (
                time.strftime("%Y-%m-%d %H:%M", time.localtime(began))
                if is_number(began) and 0 <= began < 2**33
                else ""
            )
            cells = [run.name, when, event["step"]]
            cells += [event.get(key, "") for key in ("host", "ranks", "device", "precision", "batch", "images")]
            parameters = event.get("parameters")
            cells.append(number(parameters) if is_number(parameters) else "")
            rows.append([_text(str(cell)[:200]) for cell in (*cells, versions)])
            said = event.get("notes")
            notes += [f"{run.name}, step {event['step']}: {note}" for note in (said if isinstance(said, list) else [])]
    if not rows:
        return ""
    header = ("run", "began", "at step", "host", "ranks", "device", "precision", "batch", "images", "parameters")
    listed = "".join(f"<li>{_text(note[:1000])}</li>" for note in dict.fromkeys(notes))
    said = f"<p>Notes:</p><ul>{listed}</ul>" * bool(listed)
    return f"<section><h2>Processes</h2>{_table((*header, 'versions'), rows)}{said}</section>"


def _settings(runs: Sequence[RunContent]) -> str:
    keys = sorted({key for run in runs for key in run.settings})
    if not keys:
        return ""
    rows = [[f"<code>{_text(key)}</code>", *(_setting(run, key) for run in runs)] for key in keys]
    header = ["key", *(_text(run.name) for run in runs)]
    return (
        f"<section><h2>Settings that differ from the defaults</h2>{_table(header, rows)}"
        f"<p>A dot means the default.</p></section>"
    )


def _setting(run: RunContent, key: str) -> str:
    return f"<code>{_text(run.settings[key])}</code>" if key in run.settings else "·"


def _files(runs: Sequence[RunContent]) -> str:
    rows = []
    for run in runs:
        steps = ", ".join(map(str, run.status.checkpoints)) or "none"
        folder = f"<code>{_text(str(Path(run.status.folder).resolve()))}</code>"
        rows.append((_text(run.name), folder, steps))
    return f"<section><h2>Files</h2>{_table(('run', 'folder', 'checkpoints of steps'), rows)}</section>"
