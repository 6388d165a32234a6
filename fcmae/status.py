"""``fcmae status`` and ``fcmae ls``: what runs and studies do, read from their folders, without torch, anywhere."""

import contextlib
import errno
import json
import math
import os
import re
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeGuard

import yaml

from fcmae.errors import UsageError, reason_of, shown
from fcmae.files import json_lines, json_object
from fcmae.opening import open_regular, read_regular
from fcmae.processes import Process
from fcmae.study_status import StudyStatus, describe_study, is_study, read_study_status

try:
    import fcntl
except ImportError:  # not a POSIX system: whether a run goes on is not known
    fcntl = None  # type: ignore[assignment]

TAIL = 2**18
"""Bytes from the end of metrics.jsonl that are read."""
PROGRESS_FILE = "progress.json"
"""In the folder ``auto`` of a search: which training it does, and what is left (fcmae/loggers/search_progress.py)."""
MAX_CONFIG, MAX_LOCK, MAX_DEPTH = 2**20, 4096, 4
HELD = (errno.EACCES, errno.EAGAIN)
"""Errors of locking where another process has the lock. Any other error: this file system has no locks."""
own_locks: set[tuple[int, int]] = set()
"""Device and inode of each ``run.lock`` that this process holds: if it closed such a file, its lock would be gone."""
LARGEST = 1e300
SIGNS = ("effective_rank", "feature_cosine", "dead_channels")
HEADER = ("run", "task", "state", "step", "loss", "last evaluation", "images/s", "written")


@dataclass(frozen=True)
class Search:
    """Where ``recipe=auto`` is, before it has chosen."""

    training: str | None
    """The folder of the training that it does."""
    done: int
    total: int
    samples_after: float
    """Of the trainings after this one."""


@dataclass(frozen=True)
class RunStatus:
    """What a run's folder says. Numbers are None where nothing is logged yet."""

    folder: Path
    task: str
    """The run's name in its config."""
    state: str
    """``running``, ``stopped``, ``done``, ``killed``: it left its lock behind; or ``unknown``: it is damaged."""
    holder: str
    """Host and process of a run that is running or was killed, or what is wrong with the lock."""
    step: int | None
    total: int | None
    epoch: float | None
    loss: float | None
    earlier: tuple[int, float] | None
    """The step and loss of the first line of the last :data:`TAIL` bytes."""
    images_per_second: float | None
    memory_gib: float | None
    seconds_left: float | None
    scores: dict[str, float]
    """The last evaluation."""
    scored_at: int | None
    written: float | None
    """When metrics.jsonl was last written, seconds since 1970."""
    checkpoints: list[int]
    batch: int | None
    """Images per step, by its config."""
    search: Search | None
    """Steps, loss, scores and checkpoints are of its training, ``seconds_left`` of all its trainings."""


def is_run(folder: Path) -> bool:
    """Whether it holds a run: its files, or at the start only its lock."""
    files, folders = ("metrics.jsonl", "run.lock"), ("checkpoints", "auto")
    return any((folder / name).is_file() for name in files) or any((folder / name).is_dir() for name in folders)


def read_any(folder: str | Path) -> RunStatus | StudyStatus:
    """Reads the folder of a run or a study. Raises UsageError if it holds neither, or cannot be read."""
    folder = Path(folder)
    return read_study_status(folder, _state(folder / "run.lock")) if is_study(folder) else read_status(folder)


def read_status(folder: str | Path) -> RunStatus:
    """Reads a run's folder. Raises UsageError if it holds no run."""
    folder = Path(folder)
    if not is_run(folder):
        raise UsageError(f"{shown(str(folder))} holds no run: it has neither metrics.jsonl nor checkpoints")
    search = _search(folder / "auto")
    current = folder / "auto" / search.training if search and search.training else folder
    lines, written = _metrics(current / "metrics.jsonl")
    training = [line for line in lines if "loss" in line]
    last: dict[str, float] = training[-1] if training else {}
    known = [line for line in training if not math.isnan(line["loss"])]
    looks = [line for line in lines if "loss" not in line]
    config = read_config(current / "config.yaml")
    if search and not config:
        given = json_object(folder / "auto" / "recipe.json", MAX_CONFIG).get("config")
        config = given if isinstance(given, dict) else {}
    left, speed, batch = last.get("seconds_left"), last.get("images_per_second"), _batch_size(config)
    step = int(last["step"]) if last else None
    total = None if step is None else _total(step, last.get("epoch"), config)
    state, holder = _state(folder / "run.lock")
    if search and left is not None and speed:
        whole = left + search.samples_after / speed
        left = whole if is_number(whole) else None
    steps = sorted(int(path.stem[5:]) for path in current.glob("checkpoints/step_*.pt") if path.stem[5:].isdecimal())
    if state == "stopped" and not search and (_is_final(folder, steps) or (step is not None and step == total)):
        state = "done"
    return RunStatus(
        folder=folder,
        task=str(config.get("name", "?"))[:40],
        state=state,
        holder=holder,
        step=step,
        total=total,
        epoch=last.get("epoch"),
        loss=last["loss"] if known and known[-1] is last else None,
        earlier=(int(known[0]["step"]), known[0]["loss"]) if len(known) > 1 else None,
        images_per_second=speed,
        memory_gib=last.get("memory_gib") or None,
        seconds_left=left if state == "running" else None,
        scores=_last_scores(looks),
        scored_at=int(looks[-1]["step"]) if looks else None,
        written=written,
        checkpoints=steps,
        batch=batch,
        search=search,
    )


def find_runs(folder: str | Path) -> list[Path]:
    """The runs and studies at or below a folder, at most :data:`MAX_DEPTH` deep, in the order of their names.

    The runs of a study are left out. Raises UsageError if there is none.
    """
    top = Path(folder)
    if not top.is_dir():
        raise UsageError(f"no folder {shown(str(top))}")
    found = sorted(_runs_below(top, MAX_DEPTH))
    if not found:
        raise UsageError(f"{shown(str(top))} holds no runs and no studies")
    return found


def _runs_below(folder: Path, depth: int) -> Iterator[Path]:
    with contextlib.suppress(OSError, UsageError):  # it may be another user's
        if is_study(folder) or is_run(folder):
            yield folder
        elif depth:
            for entry in folder.iterdir():
                if entry.is_dir() and not entry.is_symlink() and not entry.name.startswith("."):
                    yield from _runs_below(entry, depth - 1)


def describe(run: RunStatus | StudyStatus, now: float | None = None) -> str:
    """A run or a study in a few lines of at most 80 columns, file names aside."""
    if isinstance(run, StudyStatus):
        return describe_study(run, _ago(run.written, now))
    where = f" ({run.holder})" if run.holder else ""
    lines = [f"{shown(str(run.folder))}: {shown(run.task)}, {run.state}{where}"]
    left = "" if run.seconds_left is None else f"{minutes(run.seconds_left)} left"
    if run.search:
        about = f", about {left}" if left else ""
        lines.append(f"  recipe=auto: {run.search.done} of {run.search.total} trainings done{about}")
    if run.step is not None:
        total = f"/{run.total}" if run.total else ""
        epoch = f", epoch {run.epoch:.4g}" if run.epoch is not None else ""
        part = f" of {run.search.training}" if run.search else ""
        end = f", {left}" if left and not run.search else ""
        lines.append(f"  step {run.step}{total}{part}{epoch}{end}")
    if run.loss is not None:
        before = f" ({run.earlier[1]:.4g} at step {run.earlier[0]})" if run.earlier else ""
        speed = f", {run.images_per_second:.0f} images/s" if run.images_per_second else ""
        memory = f", {run.memory_gib:.1f} GiB of memory" if run.memory_gib else ""
        lines.append(f"  loss {run.loss:.4g}{before}{speed}{memory}")
    if run.scores:
        lines.append(f"  at step {run.scored_at}: {_scores(run.scores, most=6)}")
    if run.step is None and run.state == "running":
        lines.append("  the first logged step will tell the time left")
    if run.written is None and run.state == "running":
        return "\n".join(lines)
    kept = ", ".join(map(str, run.checkpoints[-4:])) or "none"
    lines.append(f"  checkpoints of steps {kept}; metrics written {_ago(run.written, now)}")
    return "\n".join(lines)


def table(runs: Sequence[RunStatus | StudyStatus], top: str | Path, now: float | None = None) -> str:
    """A line per run or study, under a header."""
    rows: list[tuple[str, ...]] = [HEADER]
    for run in runs:
        cells = ("study", run.state, run.progress, "", "", "") if isinstance(run, StudyStatus) else _cells(run)
        rows.append((shown(os.path.relpath(run.folder, top)), *cells, _ago(run.written, now)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    padded = ([f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)] for row in rows)
    return "\n".join("  ".join(cells).rstrip() for cells in padded)


def _cells(run: RunStatus) -> tuple[str, ...]:
    step = "" if run.step is None else f"{run.step}/{run.total}" if run.total else str(run.step)
    loss = "" if run.loss is None else f"{run.loss:.4g}"
    speed = "" if run.images_per_second is None else f"{run.images_per_second:.0f}"
    if run.search:
        step = f"{run.search.done}/{run.search.total} trainings"
    return shown(run.task), run.state, step, loss, _scores(run.scores, most=2), speed


def _scores(scores: dict[str, float], most: int) -> str:
    text = " ".join(f"{shown(name)} {value:.4g}" for name, value in list(scores.items())[:most])
    return text + " ..." * (len(scores) > most)


def minutes(seconds: float) -> str:
    """A time such as ``1 h 05 min``."""
    count = round(seconds / 60)
    return f"{count // 60} h {count % 60:02} min" if count >= 60 else f"{count} min"


def _ago(moment: float | None, now: float | None) -> str:
    if moment is None:
        return "never"
    seconds = max(0.0, (time.time() if now is None else now) - moment)
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def _search(folder: Path) -> Search | None:
    """What a search that has not chosen says of itself in its folder, which may be anybody's."""
    given = json_object(folder / PROGRESS_FILE, MAX_CONFIG)
    name, done, total, after = (given.get(key) for key in ("training", "done", "total", "samples_after"))
    if not (type(done) is int and type(total) is int and 0 <= done <= total < 2**31 and is_number(after)):
        return None
    if (folder / "chosen.json").exists():
        return None
    known = isinstance(name, str) and re.fullmatch(r"fold[\w.+-]{1,80}", name, re.ASCII)
    return Search(name if known else None, done, total, max(0.0, float(after)))


def _metrics(path: Path) -> tuple[list[dict[str, float]], float | None]:
    """The numbers of the last lines and when they were written; a loss may be NaN."""
    try:
        with open_regular(path, links=False) as file:
            status = os.fstat(file.fileno())
            start = max(0, status.st_size - TAIL)
            file.seek(start)
            content = file.read(TAIL)
    except OSError:
        return [], None
    lines = []
    for _, given in json_lines(content.partition(b"\n")[2] if start else content):
        if is_number(given.get("step")):
            numbers = {name: value for name, value in given.items() if is_number(value)}
            lines.append({"loss": math.nan, **numbers} if "loss" in given else numbers)
    return lines, status.st_mtime


def _last_scores(looks: list[dict[str, float]]) -> dict[str, float]:
    """Of the last step that was evaluated, the signs of collapse last; each monitor has a line."""
    lines = [line for line in looks if line["step"] == looks[-1]["step"]]
    found = {name: value for line in lines for name, value in line.items() if name != "step"}
    return dict(sorted(found.items(), key=lambda item: (item[0] in SIGNS, item[0] != "val_loss")))


def _is_final(folder: Path, steps: list[int]) -> bool:
    """Whether a run wrote its encoder after its last checkpoint, as at the end, early or not; or kept a probe."""
    if steps == [0] and (folder / "auto" / "chosen.json").is_file():
        return True
    with contextlib.suppress(OSError, IndexError):
        last = (folder / "checkpoints" / f"step_{steps[-1]:08d}.pt").stat().st_mtime
        return (folder / "encoder.safetensors").stat().st_mtime >= last
    return False


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value from a file is a finite number, with room for sums and rounding."""
    return type(value) in (int, float) and abs(value) <= LARGEST


def read_config(path: Path) -> dict[str, Any]:
    """A run's config; empty if it cannot be read."""
    try:
        config = yaml.safe_load(read_regular(path, MAX_CONFIG, links=False))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return config if isinstance(config, dict) else {}


def _total(step: int, epoch: float | None, config: dict[str, Any]) -> int | None:
    """The steps of the whole schedule; None if the files do not say."""
    schedule = config.get("schedule")
    epochs: Any = schedule.get("epochs") if isinstance(schedule, dict) else None
    if not is_number(epochs) or not epoch or epoch < 0 or not 0 < float(epochs) * step / epoch < 2**63:
        return None
    return max(1, round(epochs * round(step / epoch)))


def _batch_size(config: dict[str, Any]) -> int | None:
    for group in ("optim", "trainer"):  # trainer: in runs of older versions
        value = config[group].get("global_batch_size") if isinstance(config.get(group), dict) else None
        if type(value) is int and value > 0:
            return value
    return None


def _state(lock: Path) -> tuple[str, str]:
    """Whether a run is running, and who runs it. Its lock is held until it ends, and then deleted."""
    try:
        status = os.lstat(lock)
        if (status.st_dev, status.st_ino) in own_locks:
            return "running", f"host {socket.gethostname()}, process {os.getpid()}"
        with open_regular(lock, links=False) as file:
            held = _is_held(file)
            try:
                given = json.loads(file.read(MAX_LOCK))
                process = Process.parse(given)
            except (ValueError, RecursionError):
                return ("running" if held else "unknown"), f"{lock.name} is damaged"
            goes_on = process.is_alive() if process.is_here() else held is not False
    except FileNotFoundError:
        return "stopped", ""
    except OSError as error:
        return "unknown", f"{lock.name} cannot be read: {reason_of(error)}"
    holder = f"host {shown(str(given.get('host'))[:80])}, process {process.pid}"
    return ("running" if goes_on else "killed"), holder


def _is_held(file: IO[bytes]) -> bool | None:
    """Whether another process has a lock on a file; None if the file system has no locks."""
    if fcntl is None:
        return False
    try:
        fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return True if error.errno in HELD else None
    return False
