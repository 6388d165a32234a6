"""The results of a sweep (``--multirun``): a file per job, and a table of all jobs at the end."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fcmae import ranks as launch
from fcmae.errors import FCMAEError, Interrupted, reason_of
from fcmae.files import csv_text, read_metrics, read_result, write_output, write_result
from fcmae.imports import load
from fcmae.messages import say

JOB_FILE = "sweep.json"
"""In the directory of a job: its number, overrides, status and metrics."""
JOB = {"job": int, "overrides": list, "status": str, "metrics": dict}
TABLE_FILE = "results.csv"
OUTPUTS = ("out", "per_class", "confusion", "report")
"""Keys of files that otherwise every job would write."""
NO_RESULTS = ("step", "epoch", "lr", "images_per_second", "seconds_left", "grad_norm", "memory_gib", "images",
              "gallery", "queries")  # fmt: skip
"""Metrics that say nothing about the result of a job."""
SHOWN = 6
"""Metrics in the printed table at most; the file has all."""


def number_outputs(cfg: Any, number: int, overrides: list[str]) -> list[str]:
    """Adds the job's number to the names of its outputs, unless they are swept or interpolated.

    Returns:
        The keys with their new values.
    """
    named = []
    if getattr(cfg, "report", None) == "run":
        cfg.report = None  # every job would write into the run's folder
    for key in OUTPUTS:
        value = getattr(cfg, key, None)
        given = [override.partition("=")[2] for override in overrides if override.startswith(f"{key}=")]
        own = bool(given) and ("${" in given[-1] or "," in given[-1] or given[-1].startswith(("choice(", "glob(")))
        if value is not None and not own:
            path = Path(value)
            setattr(cfg, key, str(path.with_name(f"{path.stem}_{number}{path.suffix}")))
            named.append(f"{key}={getattr(cfg, key)}")
    return named


@contextlib.contextmanager
def recorded(folder: Path, number: int, overrides: list[str]) -> Iterator[dict[str, Any]]:
    """Writes into the directory of a job how this block ended, and the metrics that the block adds to the dict."""
    metrics: dict[str, Any] = {}
    status = "failed"
    try:
        yield metrics
        status = "done"
    except Interrupted:
        status = "stopped"
        raise
    except FCMAEError as error:
        status = f"failed: {reason_of(error)}"
        raise
    except BaseException as error:
        status = f"failed: {type(error).__name__}"
        raise
    finally:
        if launch.detect().rank == 0:
            entry = {"job": number, "overrides": overrides, "status": status, "metrics": metrics or logged(folder)}
            with contextlib.suppress(OSError):
                write_result(folder / JOB_FILE, entry)


def score(folder: Path, metrics: dict[str, Any]) -> float | None:
    """What a job returns to Hydra, for sweepers that search, such as Optuna's: higher is better.

    Of training the score of the best checkpoint (``val_loss`` with the sign changed, the metric of the objective), or
    without an evaluation the last loss with the sign changed; of other commands ``top1``, or the first metric.
    """
    if metrics:
        numbers = [float(value) for name, value in metrics.items() if _is_result(name, value)]
        return float(metrics["top1"]) if "top1" in metrics else next(iter(numbers), None)
    with contextlib.suppress(FCMAEError, OSError):
        file = load("fcmae.checkpoints.checkpoint:resolve")(f"{folder}@last")
        best = load("fcmae.checkpoints.checkpoint:read")(file, mmap=True).get("best")
        if best is not None:
            return float(best["score"])
    loss = logged(folder).get("loss")
    return None if loss is None else -loss


def logged(folder: Path) -> dict[str, float]:
    """The last value of each metric in a run directory."""
    metrics: dict[str, float] = {}
    with contextlib.suppress(OSError):
        for line in read_metrics(folder / "metrics.jsonl"):
            metrics |= line
    return metrics


def report(folder: Path) -> None:
    """Prints a table of the jobs in a sweep's folder, and writes it to ``results.csv``."""
    found = [(file.parent, read_result(file, **JOB)) for file in folder.glob(f"*/{JOB_FILE}")]
    jobs = [job | {"run": str(run)} for run, job in found if job is not None]
    jobs.sort(key=lambda job: job["job"])
    if launch.detect().rank != 0 or not jobs:
        return
    tried = [[override for override in job["overrides"] if not _is_in_all(override, jobs)] for job in jobs]
    metrics = [{name: value for name, value in job["metrics"].items() if _is_result(name, value)} for job in jobs]
    names = list(dict.fromkeys(name for one in metrics for name in one))
    header = ["job", "overrides", *names, "status", "run directory"]
    rows = [
        [job["job"], " ".join(own), *(one.get(name) for name in names), job["status"], job["run"]]
        for job, own, one in zip(jobs, tried, metrics, strict=True)
    ]
    write_output("the sweep's table", folder / TABLE_FILE, csv_text([header, *rows]))
    shown = [i for i in range(len(header)) if not 2 + SHOWN <= i < 2 + len(names)]
    say(_aligned([[_cell(row[i]) for i in shown] for row in [header, *rows]]))
    say(f"the same table: {folder / TABLE_FILE}")


def _is_in_all(override: str, jobs: list[dict[str, Any]]) -> bool:
    return len(jobs) > 1 and all(override in job["overrides"] for job in jobs)


def _is_result(name: str, value: Any) -> bool:
    return name not in NO_RESULTS and isinstance(value, (int, float)) and not name.endswith("_seconds")


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
