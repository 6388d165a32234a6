"""Results of each class, written as JSON or CSV by the file's name."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fcmae.files import csv_text, write_output


def write_per_class(path: Path, classes: list[str], confusion: Tensor) -> None:
    """For each class the number of its ``images``, how many were ``right``, and ``top1`` in percent (none: null)."""
    images, right = confusion.sum(dim=1).tolist(), confusion.diagonal().tolist()
    rows = [[name, n, r, 100 * r / n if n else None] for name, n, r in zip(classes, images, right, strict=True)]
    header = ["class", "images", "right", "top1"]
    _write("per_class", path, {row[0]: dict(zip(header[1:], row[1:], strict=True)) for row in rows}, [header, *rows])


def write_confusion(path: Path, classes: list[str], confusion: Tensor) -> None:
    """How many images of each class (rows) were taken for each class (columns)."""
    matrix = confusion.tolist()
    rows = [[name, *counts] for name, counts in zip(classes, matrix, strict=True)]
    _write("confusion", path, {"classes": classes, "matrix": matrix}, [["true class", *classes], *rows])


def _write(key: str, path: Path, as_json: Any, as_rows: Iterable[Sequence[Any]]) -> None:
    write_output(key, path, json.dumps(as_json) if path.suffix == ".json" else csv_text(as_rows))
