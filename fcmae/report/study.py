"""What a report shows of a study (``fcmae study``), from its folder, which may be anybody's."""

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path

from fcmae.errors import UsageError, shown
from fcmae.opening import read_regular
from fcmae.report.read import MAX_PICTURE, encoded

STUDY_FILE, PLOT_FILE = "study.json", "study.png"
MAX_BYTES, MAX_ROWS, MAX_TEXT = 2**24, 200, 4000
"""Of the file, of its table, and of a cell or the sentence."""


@dataclass
class StudyContent:
    """``rows``: the cells of the table, the first row being its header. ``picture``: a data URI, or empty."""

    name: str
    sentence: str
    rows: list[list[str]]
    picture: str


def is_study(folder: str | Path) -> bool:
    """Whether a folder holds a study that has ended."""
    return (Path(folder) / STUDY_FILE).is_file()


def read_study(folder: str | Path) -> StudyContent:
    """Raises UsageError if study.json cannot be read."""
    path = Path(folder) / STUDY_FILE
    try:
        given = json.loads(read_regular(path, MAX_BYTES, links=False))
        sentence, table = given["sentence"], given["table"]
        if not isinstance(sentence, str) or not all(isinstance(line, str) for line in table):
            raise TypeError("sentence and table must be text")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(f"{shown(str(path))} is no result of fcmae study: {error}") from error
    lines = [line for line in table[:MAX_ROWS] if set(line) - set("|- ")]
    rows = [[cell.strip()[:MAX_TEXT] for cell in line.strip().strip("|").split("|")] for line in lines]
    picture = ""
    with contextlib.suppress(OSError, ValueError, SyntaxError):
        picture = encoded(read_regular(Path(folder) / PLOT_FILE, MAX_PICTURE, links=False))
    return StudyContent(Path(folder).resolve().name, sentence[:MAX_TEXT], rows, picture)
