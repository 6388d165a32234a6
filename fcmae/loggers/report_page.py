"""``logger.report``: the page of ``fcmae report`` in the run directory, kept up to date."""

import contextlib
import time
from pathlib import Path

from PIL import Image

from fcmae.messages import say
from fcmae.report import page

REPORT_FILE = "report.html"
LEAST_SECONDS, SHARE = 60.0, 0.01
"""Seconds between two refreshes at least, and their share of the time at most."""


class ReportPage:
    """A sink that reads what the other sinks have written."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.due = time.monotonic() + LEAST_SECONDS

    def log(self, step: int, metrics: dict[str, float]) -> None:
        began = time.monotonic()
        if began >= self.due:
            page.write([str(self.run_dir)], self.run_dir / REPORT_FILE)
            ended = time.monotonic()
            self.due = ended + max(LEAST_SECONDS, (ended - began) / SHARE)

    def picture(self, step: int, name: str, image: Image.Image) -> None:
        pass

    def close(self) -> None:
        """The run writes the last page when it has ended (:func:`write_report`)."""


def write_report(run_dir: Path) -> None:
    """Writes the page of a run that has ended; a failure is one line."""
    try:
        page.write([str(run_dir)], run_dir / REPORT_FILE)
    except Exception as error:
        with contextlib.suppress(OSError):
            say(f"{run_dir / REPORT_FILE} could not be written: {error}")
