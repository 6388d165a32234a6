"""HTML of texts, tables and quantities."""

import html
import re
import time
from collections.abc import Iterable, Mapping
from typing import Any

from fcmae.errors import shown
from fcmae.report.charts import COLOURS
from fcmae.status import is_number

TITLES = {
    "loss": "loss",
    "val_loss": "loss on held-out images",
    "lr": "learning rate",
    "images_per_second": "images per second",
    "data_wait": "share of the time waiting for data",
    "memory_gib": "peak memory, GiB",
    "grad_norm": "norm of the gradient",
    "checkpoint_stall_seconds": "waiting for checkpoints, s",
    "effective_rank": "effective rank of the features",
    "feature_cosine": "cosine between features of different images",
    "dead_channels": "share of dead channels",
    "skipped_steps": "skipped steps",
    "bad_samples": "unreadable samples",
    "balanced_accuracy": "balanced accuracy, %",
    "precision": "precision, %",
    "recall": "recall, %",
    "f1": "F1, %",
    "auroc": "AUROC, %",
    "average_precision": "average precision, %",
    "ece": "calibration error, %",
    "map": "mean average precision, %",
}
PATTERNS = (
    (r"knn(\d+)", r"k-NN accuracy (k = \1), %"),
    (r"probe_top(\d+)", r"linear probe, top-\1, %"),
    (r"top(\d+)", r"top-\1, %"),
    (r"map(50|75)", r"mean average precision, IoU 0.\1, %"),
    (r"mask_(map.*)", r"\1, of masks"),
    (r"ema_(.+)", r"\1 of the averaged weights"),
    (r"val_loss_(.+)", r"held-out loss of the target \1"),
    (r"loss_(.+)", r"loss of the target \1"),
    (r"weight_(.+)", r"learned weight of the target \1"),
)


def title_of(name: str) -> str:
    """What a metric is, in words."""
    if name in TITLES:
        return TITLES[name]
    for pattern, words in PATTERNS:
        found = re.fullmatch(pattern, name)
        if found:
            inner = title_of(found[1]) if name.startswith(("ema_", "mask_")) else found[1]
            return words.replace(r"\1", inner)
    return name


def text(value: Any) -> str:
    """Escaped, in one line, without control characters."""
    return html.escape(shown(str(value)))


def table(header: Iterable[str], rows: Iterable[Iterable[str]], numbers: int = 0) -> str:
    """Cells are HTML; from column ``numbers`` on, if it is not 0, they are aligned at the right."""

    def row(cells: Iterable[str], tag: str) -> str:
        aligned = ((' class="n"' if 0 < numbers <= place else "", cell) for place, cell in enumerate(cells))
        return "<tr>" + "".join(f"<{tag}{how}>{cell}</{tag}>" for how, cell in aligned) + "</tr>"

    body = "".join(row(cells, "td") for cells in rows)
    return f'<div class="wide"><table><thead>{row(header, "th")}</thead><tbody>{body}</tbody></table></div>'


def tiles(facts: Mapping[str, str]) -> str:
    """``facts``: HTML by title."""
    body = "".join(f'<div class="tile"><dt>{title}</dt><dd>{value}</dd></div>' for title, value in facts.items())
    return f'<dl class="tiles">{body}</dl>'


def swatch(place: int) -> str:
    return f'<span class="swatch" style="background:var(--c{place % COLOURS})"></span>'


def when(moment: Any) -> str:
    """Seconds since 1970 as local date and time; empty if they are no such number."""
    if not is_number(moment) or not 0 <= moment < 2**33:
        return ""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(moment))


def duration(hours: float) -> str:
    for unit, size in (("d", 48.0), ("h", 1.0), ("min", 1 / 60)):
        if hours >= size:
            value = hours / (24 if unit == "d" else size)
            return f"{value:.{1 if value < 10 else 0}f} {unit}"
    return f"{round(3600 * hours)} s"
