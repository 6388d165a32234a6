"""``fcmae report``: the page."""

import time
from collections.abc import Sequence
from pathlib import Path

from fcmae.files import output
from fcmae.report.charts import COLOURS, Line, Mark, chart, number
from fcmae.report.parts import duration, swatch, table, text, tiles, title_of, when
from fcmae.report.read import RunContent, read_runs
from fcmae.report.results import data_sheets, evaluations
from fcmae.report.study import StudyContent, read_study
from fcmae.report.style import SCRIPT, STYLE
from fcmae.status import SIGNS, is_number
from fcmae.study_status import SPREAD, is_study
from fcmae.version import __version__

MOST_PROCESSES = 50
"""Of a run, the last ones."""
MOST_EVENTS, MOST_CHARTS = 100, 24
"""On the time line, and of scores; others come last."""
LOSSES = ("loss", "val_loss")
"""They come first, then what begins with their names."""
SPEED = ("images_per_second", "data_wait", "memory_gib", "checkpoint_stall_seconds")
OPTIMISER = ("grad_norm", "lr", "skipped_steps", "bad_samples")
NOISY = ("loss", "grad_norm", "images_per_second", "data_wait")


def write(runs: Sequence[str], out: str | Path) -> None:
    """Writes the page of some runs and studies. Raises UsageError if one is neither, or ``out`` cannot be written."""
    studies = [read_study(folder) for folder in runs if is_study(folder)]
    rest = [folder for folder in runs if not is_study(folder)]
    content = read_runs(rest) if rest else []
    with output("--out", out) as file:
        file.write(render(content, studies).encode())


def render(runs: Sequence[RunContent], studies: Sequence[StudyContent] = ()) -> str:
    """The page, complete in itself."""
    title = ", ".join([*(study.name for study in studies), *(run.name for run in runs)])
    sections = [(f"Study {study.name}" if len(studies) > 1 else "Study", _study(study)) for study in studies]
    if runs:
        sections += [
            ("Overview", _overview(runs)),
            ("Time line", _timeline(runs)),
            ("Curves", _curves(runs)),
            ("Evaluations", evaluations(runs)),
            ("Pictures", _pictures(runs)),
            ("Images", data_sheets(runs)),
            ("Settings", _settings(runs)),
            ("Processes", _processes(runs)),
            ("Files", _files(runs)),
        ]
    shown = [(number, name, body) for number, (name, body) in enumerate(sections) if body]
    links = "".join(f'<a href="#s{number}">{text(name)}</a>' for number, name, _ in shown)
    body = "".join(f'<section id="s{number}"><h2>{text(name)}</h2>{body}</section>' for number, name, body in shown)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        f"style-src 'unsafe-inline'; script-src 'unsafe-inline'\">"
        f"<title>fcmae: {text(title)}</title><style>{STYLE}</style></head><body><main>"
        f"<header><h1>{text(title)}</h1><p>fcmae {__version__}, written {time.strftime('%Y-%m-%d %H:%M')}</p></header>"
        f"{f'<nav>{links}</nav>' * (len(shown) > 1)}{body}</main><script>{SCRIPT}</script></body></html>\n"
    )


def _study(study: StudyContent) -> str:
    header, *rows = [[text(cell) for cell in row] for row in study.rows] or [[]]
    lead = f'<p class="lead">{text(study.sentence[:1].upper() + study.sentence[1:])}</p>'
    spread = f"<p>{SPREAD}</p>" if any("±" in cell for row in rows for cell in row) else ""
    body = f"{lead}{table(header, rows, numbers=1)}{spread}"
    lines = [line for line in study.lines or () if line.points]
    if not lines or not study.ticks:
        return body
    legend = "".join(
        f'<span><svg viewBox="0 0 26 8"><polyline points="0,4 26,4" stroke="var(--c{line.colour})" '
        f'stroke-dasharray="{line.dash}"/></svg>{text(line.name)}</span>'
        for line in lines
    )
    drawn = chart(f"{study.metric} by the number of labelled images", lines, x_ticks=study.ticks)
    note = "<p>A line is the mean over seeds, the area around it one standard deviation.</p>"
    return f'{body}<div class="study"><div class="legend">{legend}</div>{drawn}</div>{note}'


def _overview(runs: Sequence[RunContent]) -> str:
    """Tiles of one run; a column for each of several."""
    facts = [_facts(run) for run in runs]
    if len(runs) == 1:
        return tiles(facts[0])
    header = ["", *(f"{swatch(place)}{text(run.name)}" for place, run in enumerate(runs))]
    names = dict.fromkeys(name for each in facts for name in each)
    return table(
        header, ([f'<span class="soft">{name}</span>', *(each.get(name, "") for each in facts)] for name in names)
    )


def _facts(run: RunContent) -> dict[str, str]:
    """HTML by title."""
    status = run.status
    facts = {"task": text(status.task), "state": f'<span class="{status.state}">{status.state}</span>'}
    if status.step is not None:
        facts["step"] = f"{status.step:,}" + (f" of {status.total:,}" if status.total else "")
    if status.epoch is not None:
        facts["epoch"] = f"{status.epoch:.4g}"
    if status.loss is not None:
        facts["loss"] = number(status.loss)
    scores = [(name, value) for name, value in status.scores.items() if name not in SIGNS]
    facts |= {text(title_of(name)): number(value) for name, value in scores[:6]}
    if run.images:
        facts["images seen"] = f"{run.images:,.0f}"
    if status.images_per_second is not None:
        facts["images per second"] = f"{status.images_per_second:,.0f}"
    if waits := [value for _, value in run.series.get("data_wait", ())]:
        facts["time waiting for data"] = f"{100 * sum(waits) / len(waits):.1f} %"
    if memory := [value for _, value in run.series.get("memory_gib", ())]:
        facts["peak memory"] = f"{max(memory):.3g} GiB" if max(memory) else "not measured"
    facts["time of training"] = duration(run.hours)
    if run.device_hours is not None:
        facts[f"cost, {_device(run)} time"] = duration(run.device_hours)
    return facts


def _device(run: RunContent) -> str:
    device = run.processes[-1].get("device") if run.processes else None
    return "CPU" if device == "cpu" else "GPU" if isinstance(device, str) else "device"


def _timeline(runs: Sequence[RunContent]) -> str:
    """A strip per run over its steps, with restarts and warnings, and these in words."""
    strips, rows = [], []
    for place, run in enumerate(runs):
        most = max([run.status.total or 0, run.status.step or 0, 1])
        done = 100 * min(1.0, (run.status.step or 0) / most)
        marks = [f'<em style="left:0;width:{done:.2f}%;background:var(--c{place % COLOURS})"></em>']
        events = [(event["step"], event.get("time"), _began(event), "") for event in run.processes]
        events += [(event["step"], event.get("time"), event["warning"], "warning") for event in run.warnings]
        events = sorted(events, key=lambda event: event[0])[-MOST_EVENTS:]
        for step, _, what, kind in events:
            colour = "" if kind else f";background:var(--c{place % COLOURS})"
            at = f'style="left:{100 * min(1.0, max(0.0, step / most)):.2f}%{colour}"'
            marks.append(f'<i class="{kind}" {at} title="step {step:g}: {text(what[:300])}"></i>')
        name = f'<div class="legend"><span>{swatch(place)}{text(run.name)}, {most:,} steps</span></div>'
        strips.append(name * (len(runs) > 1))
        strips.append(f'<div class="strip">{"".join(marks)}</div>')
        for step, moment, what, kind in events:
            name = f"{swatch(place)}{text(run.name)}"
            what = f'<span class="stopped">{text(what[:1000])}</span>' if kind else text(what[:300])
            rows.append([name, f"{step:,g}", when(moment), f'<div class="long">{what}</div>'])
    if not rows:
        return ""
    legend = "<p>A dot: a process began or continued the run. A triangle: a warning. Steps, from left to right.</p>"
    if len(runs) == 1:
        return "".join(strips) + legend + table(("step", "when", "what"), (row[1:] for row in rows))
    return "".join(strips) + legend + table(("run", "step", "when", "what"), rows)


def _began(event: dict) -> str:
    what = "continued" if event["step"] > 0 else "began"
    where = [str(event[key])[:80] for key in ("host", "device") if isinstance(event.get(key), str)]
    ranks = event.get("ranks")
    return " ".join([what, *(f"on {place}" for place in where[:1]), *(f"({ranks} × {place})" for place in where[1:])])


def _curves(runs: Sequence[RunContent]) -> str:
    names = list(dict.fromkeys(name for run in runs for name in run.series))
    losses = sorted((n for n in names if n.startswith((*LOSSES, "weight_"))), key=lambda n: (n not in LOSSES, n))
    speed = [name for name in SPEED if name in names]
    optimiser = [name for name in OPTIMISER if name in names]
    scores = [name for name in names if name not in {*losses, *speed, *optimiser}]
    marks = [Mark(event["step"], place, "restart", f"{run.name}: {_began(event)} at step {event['step']:g}")
             for place, run in enumerate(runs) for event in run.processes]  # fmt: skip
    marks += [Mark(event["step"], place, "warning", f"{run.name}: {event['warning'][:300]}")
              for place, run in enumerate(runs) for event in run.warnings]  # fmt: skip
    ordered = [*losses, *scores[:MOST_CHARTS], *speed, *optimiser, *scores[MOST_CHARTS : 4 * MOST_CHARTS]]
    steps = max((points[-1][0] for run in runs for points in run.series.values()), default=0)
    figures = [figure for name in ordered if (figure := _figure(name, runs, marks, steps))]
    if not figures:
        return "<p>Nothing is logged yet.</p>"
    body = f'<div class="charts">{"".join(figures)}</div>'
    if len(runs) > 1:
        legend = "".join(f"<span>{swatch(place)}{text(run.name)}</span>" for place, run in enumerate(runs))
        body = f'<div class="legend">{legend}</div>{body}'
    restarts = any(mark.kind == "restart" and mark.step > 0 for mark in marks)
    return body + "<p>A dotted line: a new process continued the run there.</p>" * restarts


def _figure(name: str, runs: Sequence[RunContent], marks: Sequence[Mark], steps: float) -> str:
    """A chart, if there is anything to see in it."""
    lines = [Line(run.name, place, run.series.get(name, ())) for place, run in enumerate(runs)]
    if not any(y != 0 for line in lines for _, y in line.points):
        return ""
    zero = name in (*SPEED, *OPTIMISER)
    return chart(title_of(name), lines, zero, marks, noisy=name.startswith(NOISY), steps=steps)


def _pictures(runs: Sequence[RunContent]) -> str:
    shows = []
    for run in runs:
        for name in dict.fromkeys(picture.name for picture in run.pictures):
            pictures = [picture for picture in run.pictures if picture.name == name]
            images = "".join(
                f'<img src="{picture.source}" alt="{text(name)} at step {picture.step}" data-step="{picture.step}"'
                f"{'' if picture is pictures[-1] else ' hidden'}>"
                for picture in pictures
            )
            most = len(pictures) - 1
            slider = f'<input type="range" min="0" max="{most}" value="{most}" aria-label="step">' * (most > 0)
            of = f"{text(run.name)}: " * (len(runs) > 1)
            shows.append(
                f'<figure class="pictures"><figcaption>{of}{text(name)}, step <output>{pictures[-1].step}</output>'
                f"</figcaption>{slider}{images}</figure>"
            )
    return "".join(shows)


def _settings(runs: Sequence[RunContent]) -> str:
    keys = sorted({key for run in runs for key in run.settings})
    if not keys:
        return ""
    rows = [[f"<code>{text(key)}</code>", *(_setting(run, key) for run in runs)] for key in keys]
    header = ["key", *(text(run.name) if len(runs) > 1 else "value" for run in runs)]
    note = "What differs from the defaults of the command." + " A dot means the default." * (len(runs) > 1)
    return f"<p>{note}</p>{table(header, rows)}"


def _setting(run: RunContent, key: str) -> str:
    return f"<code>{text(run.settings[key])}</code>" if key in run.settings else "·"


def _processes(runs: Sequence[RunContent]) -> str:
    """When and where each run was trained, with which versions, and what it said at the start."""
    rows, notes = [], []
    for run in runs:
        for event in run.processes[-MOST_PROCESSES:]:
            given = event.get("versions")
            versions = ", ".join(f"{name} {value}" for name, value in given.items()) if isinstance(given, dict) else ""
            cells = [run.name, when(event.get("time")), f"{event['step']:,g}"]
            cells += [event.get(key, "") for key in ("host", "ranks", "device", "precision", "batch", "images")]
            parameters = event.get("parameters")
            cells.append(number(parameters) if is_number(parameters) else "")
            rows.append([text(str(cell)[:200]) for cell in (*cells, versions)])
            said = event.get("notes")
            notes += [f"{run.name}, step {event['step']}: {note}" for note in (said if isinstance(said, list) else [])]
    if not rows:
        return ""
    header = ("run", "began", "at step", "host", "ranks", "device", "precision", "batch", "images", "parameters")
    listed = "".join(f"<li>{text(note[:1000])}</li>" for note in dict.fromkeys(notes))
    said = f"<p>What they said at the start:</p><ul>{listed}</ul>" * bool(listed)
    return table((*header, "versions"), rows) + said


def _files(runs: Sequence[RunContent]) -> str:
    rows = []
    for run in runs:
        steps = ", ".join(map(str, run.status.checkpoints)) or "none"
        folder = f"<code>{text(str(Path(run.status.folder).resolve()))}</code>"
        rows.append((text(run.name), folder, steps))
    return table(("run", "folder", "checkpoints of steps"), rows)
