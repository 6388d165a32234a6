"""What a study's folder says of it (``fcmae study``): how much is measured, and the result; without torch."""

import contextlib
import os
import textwrap
from dataclasses import dataclass
from pathlib import Path

from fcmae.errors import UsageError, reason_of, shown
from fcmae.files import json_object

STUDY_FILE, RECIPE, CELLS = "study.json", "recipe.json", "cells"
"""The result; what is compared when a study is continued, and the names of all measurements; a file for each."""
MAX_BYTES, MAX_TEXT = 2**24, 4000
"""Of a file, and of the sentence."""
COLUMNS = 80
SPREAD = "After ± is one standard deviation over the seeds; in rows of differences, half the 95 % interval."
"""What the numbers of a study's table mean."""


@dataclass(frozen=True)
class StudyStatus:
    """``done`` of ``total`` measurements, None if an earlier version did not write how many; the result's sentence."""

    folder: Path
    state: str
    """``running``, ``stopped``, ``killed``, ``done`` or ``unknown``."""
    holder: str
    """Host and process of a study that is running or was killed, or what is wrong with its lock."""
    done: int
    total: int | None
    sentence: str
    written: float | None
    """When a measurement or the result was last written, seconds since 1970."""

    @property
    def progress(self) -> str:
        return f"{self.done}/{self.total}" if self.total is not None else str(self.done)


def is_study(folder: str | Path) -> bool:
    """Whether a folder holds a study, ended or not. Raises UsageError if this user may not look."""
    folder = Path(folder)
    try:
        return (folder / STUDY_FILE).is_file() or ((folder / CELLS).is_dir() and (folder / RECIPE).is_file())
    except OSError as error:
        raise UsageError(f"{shown(str(folder))} cannot be read: {reason_of(error)}") from error


def read_study_status(folder: Path, lock: tuple[str, str] = ("stopped", "")) -> StudyStatus:
    """Reads the folder of a study.

    Args:
        lock: the state that its lock says, and who holds it.
    """
    files = {path.stem: path for path in (folder / CELLS).glob("*.json")}
    names = json_object(folder / RECIPE, MAX_BYTES).get("cells")
    planned = {name for name in names if isinstance(name, str)} if isinstance(names, list) else None
    result = json_object(folder / STUDY_FILE, MAX_BYTES)
    sentence = result.get("sentence")
    done = len(files if planned is None else planned & set(files))
    total = None if planned is None else len(planned)
    state, holder = lock
    if state == "stopped" and result and total in (None, done):
        state = "done"
    return StudyStatus(
        folder=folder,
        state=state,
        holder=holder,
        done=done,
        total=total,
        sentence=sentence[:MAX_TEXT] if isinstance(sentence, str) else "",
        written=max(filter(None, map(_changed, (folder / STUDY_FILE, *files.values()))), default=None),
    )


def describe_study(study: StudyStatus, ago: str) -> str:
    """A study in a few lines. ``ago``: when it last wrote."""
    where = f" ({study.holder})" if study.holder else ""
    lines = [
        f"{shown(str(study.folder))}: study, {study.state}{where}",
        f"  {study.progress} measured" + f", the last {ago}" * bool(study.written),
    ]
    if study.sentence:
        earlier = "" if study.state == "done" else "before that: "
        lines += [f"  {line}" for line in textwrap.wrap(shown(earlier + study.sentence), COLUMNS - 2)]
    return "\n".join(lines)


def _changed(path: Path) -> float | None:
    with contextlib.suppress(OSError):
        return os.stat(path).st_mtime
    return None
