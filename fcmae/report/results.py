"""Parts of the page: evaluations, and what the images are like."""

from collections.abc import Sequence

from fcmae.report.charts import number
from fcmae.report.kept import Evaluation, Sheet
from fcmae.report.parts import table, text, tiles, title_of
from fcmae.report.read import RunContent

MOST_NAMES = 60
"""Metrics in a table."""
OPEN = 20
"""Classes up to which their table is open."""


def evaluations(runs: Sequence[RunContent]) -> str:
    """A table of all metrics, a column for each evaluation; then the classes, plots and pictures of each."""
    found = [(run.name, evaluation) for run in runs for evaluation in run.evaluations]
    if not found:
        return ""
    several = len({run for run, _ in found}) > 1
    columns: dict[str, dict[str, float]] = {}
    for run, evaluation in found:
        title = f"{run}: {evaluation.name}" if several else evaluation.name
        classes = tuple(f"_{row[0]}" for row in evaluation.per_class[1:])
        plain = {n: v for n, v in evaluation.metrics.items() if not (classes and n.endswith(classes))}
        columns[title] = {name: value for name, value in plain.items() if not name.startswith("ema_")}
        averaged = {name[4:]: value for name, value in plain.items() if name.startswith("ema_")}
        if averaged:
            columns[f"{title}, averaged weights"] = averaged
    names = list(dict.fromkeys(name for of in columns.values() for name in of))[:MOST_NAMES]
    rows = [
        [text(title_of(name)), *(number(of[name]) if name in of else "" for of in columns.values())] for name in names
    ]
    body = table(["", *map(text, columns)], rows, numbers=1)
    return body + "".join(_details(f"{run}: {each.name}" if several else each.name, each) for run, each in found)


def _details(title: str, evaluation: Evaluation) -> str:
    body = "".join(
        f'<figure class="plot"><figcaption>{name}</figcaption><img src="{source}" alt="{name}"></figure>'
        for name, source in evaluation.plots.items()
    )
    body = f'<div class="plots">{body}</div>' * bool(body)
    if len(evaluation.per_class) > 1:
        header, *rows = [[text(cell) for cell in row] for row in evaluation.per_class]
        header = [name.replace("_", " ") for name in header]
        state = " open" * (len(rows) <= OPEN)
        body += f"<details{state}><summary>each class</summary>{table(header, rows, numbers=1)}</details>"
    if evaluation.worst:
        what = "the images with the largest errors"
        body += (
            f'<figure class="plain"><figcaption>{what}</figcaption><img src="{evaluation.worst}" alt="{what}"></figure>'
        )
    return f"<h3>{text(title)}</h3>{body}" if body else ""


def data_sheets(runs: Sequence[RunContent]) -> str:
    """Runs with the same images share a sheet."""
    sheets: list[tuple[Sheet, list[str]]] = []
    for run in runs:
        if run.sheet is None:
            continue
        same = next((names for sheet, names in sheets if sheet == run.sheet), None)
        if same is None:
            sheets.append((run.sheet, [run.name]))
        else:
            same.append(run.name)
    return "".join(_sheet(sheet, ", ".join(names) if len(runs) > 1 else "") for sheet, names in sheets)


def _sheet(sheet: Sheet, title: str) -> str:
    thumbs = "".join(
        f'<figure><img src="{picture}" alt="{text(name)}"><figcaption>{text(name.rsplit("/", 1)[-1][:60])}<br>'
        f"{text(what)}</figcaption></figure>"
        for name, what, picture in sheet.examples
    )
    head = f"<h3>{text(title)}</h3>" * bool(title)
    return (
        f'{head}{tiles({name: text(value) for name, value in sheet.facts.items()})}<div class="thumbs">{thumbs}</div>'
    )
