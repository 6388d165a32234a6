"""Checkpoints: everything that a run needs to continue, in files that exist whole or not at all.

A file is what ``torch.save`` writes, followed by 40 bytes: :data:`MAGIC` and the SHA-256 of everything before it.
``torch.load`` reads it too (a zip archive may be followed by other bytes), but does not notice a flipped bit.
"""

import contextlib
import gc
import hashlib
import os
import pickle
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from fcmae.checkpoints import encoder, torch_file
from fcmae.config import check_plain, upgraded
from fcmae.errors import CheckpointError, ConfigError, reason_of
from fcmae.files import HashingWriter, delete_strays, replacing, set_aside, sync_folder
from fcmae.opening import open_regular, own_folder
from fcmae.version import versions

FORMAT = 2
MAGIC = b"fcmae256"
TRAILER_BYTES = len(MAGIC) + hashlib.sha256().digest_size
PATTERN = re.compile(r"step_(\d+)\.pt")

State = dict[str, Any]


def nothing() -> None:
    """The default of ``alive``."""


def write_atomically(path: Path, state: State, alive: Callable[[], object] = nothing) -> None:
    """Saves ``state`` and its checksum. Raises OSError, with the old file in place, e.g. if the disk is full.

    ``alive`` is called whenever a part is written.
    """
    with replacing(path) as file:
        _save_with_checksum(state, file, alive)


def _save_with_checksum(state: State, file: IO[bytes], alive: Callable[[], object] = nothing) -> None:
    writer = HashingWriter(file, alive)
    try:
        torch.save(state, writer)  # type: ignore[arg-type]  # it calls write and flush
    except RuntimeError as error:
        raise writer.error or error from error
    gc.collect(1)  # it leaves a class of its own in a cycle each time, which a full collection comes for too rarely
    file.write(MAGIC + writer.digest.digest())


def _verify(file: IO[bytes], alive: Callable[[], object]) -> None:
    """Reads the file once and compares its checksum. Raises ValueError if it is not what was written."""
    size = file.seek(0, os.SEEK_END) - TRAILER_BYTES
    file.seek(max(0, size))
    trailer = file.read()
    if not trailer.startswith(MAGIC):
        raise ValueError("it is cut off, or was not written by fcmae")
    file.seek(0)
    digest = hashlib.sha256()
    while size > 0:
        block = file.read(min(size, 2**24))
        digest.update(block)
        size -= len(block)
        alive()
    if digest.digest() != trailer[len(MAGIC) :]:
        raise ValueError("its checksum is wrong, so its content changed after it was written")
    file.seek(0)


def read(
    path: Path, map_location: str | torch.device = "cpu", alive: Callable[[], object] = nothing, mmap: bool = False
) -> State:
    """The state in a checkpoint or encoder file; no code in it is executed. Raises CheckpointError naming the file.

    Args:
        alive: called whenever a part is read.
        mmap: leave tensors on the disk until they are used, for callers that use only some of them.
    """

    if path.suffix == encoder.SUFFIX:
        return encoder.read(path)

    def load() -> State:
        with open_regular(path) as file:
            _verify(file, alive)
            if not mmap:
                return torch_file.load(file, map_location)
        return torch_file.load_mapped(path, map_location)

    return _checked(path, load)


def _checked(path: Path, load: Callable[[], State]) -> State:
    """What ``load`` reads from ``path``. Raises CheckpointError naming the file."""
    try:
        state = load()
    except FileNotFoundError as error:
        raise CheckpointError(f"no checkpoint {path}") from error
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, ValueError, KeyError) as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {reason_of(error)}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of fcmae (format {FORMAT})")
    known = {name: state[name] for name in ENTRIES if state.get(name) is not None}
    wrong = [name for name, value in known.items() if not ENTRIES[name](value)]
    wrong += [name for name in ("step", "versions") if name in state and name not in known]
    if wrong:
        raise CheckpointError(f"{path} is not a checkpoint of fcmae: its entry {wrong[0]!r} has another type")
    try:
        check_plain(known.get("config"))
    except ConfigError as error:
        raise CheckpointError(f"the config in {path} is refused: {'; '.join(error.mistakes)}") from error
    return {**state, "config": upgraded(known["config"])} if "config" in known else state


def _is_weights(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())


ENTRIES: dict[str, Callable[[Any], bool]] = {
    "task": lambda value: isinstance(value, str),
    "step": lambda value: type(value) is int and 0 <= value < 2**63,
    "config": lambda value: isinstance(value, dict),
    "objective": lambda value: isinstance(value, dict),
    "model": _is_weights,
    "ema": _is_weights,
    "classes": lambda value: isinstance(value, list) and all(type(name) is str for name in value),
    "versions": lambda value: isinstance(value, dict) and all(type(t) is str for pair in value.items() for t in pair),
}
"""The types of a checkpoint's entries, where there are any."""


def checksum(path: Path) -> str:
    """The SHA-256 in hexadecimal: as a checkpoint states it, which :func:`read` verifies; computed from the content of
    an encoder file.

    Raises CheckpointError naming the file.
    """
    digest = hashlib.sha256()
    try:
        with open_regular(path) as file:
            if path.suffix != encoder.SUFFIX:
                file.seek(-digest.digest_size, os.SEEK_END)
                return file.read().hex()
            while block := file.read(2**24):
                digest.update(block)
            return digest.hexdigest()
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error}") from error


def step_of(path: Path) -> int:
    """The number of optimizer steps done when a checkpoint was written, from its name."""
    match = PATTERN.fullmatch(path.name)
    assert match is not None
    return int(match[1])


class CheckpointDir:
    """The checkpoints of one run, ``step_00000123.pt`` after 123 optimizer steps.

    The newest ``keep`` are kept, and for good the milestones, after multiples of ``keep_every`` steps. ``alive`` is
    called whenever a part of a file is read or written.
    """

    def __init__(
        self, run_dir: Path, keep: int = 2, keep_every: int | None = None, alive: Callable[[], object] = nothing
    ) -> None:
        self.folder = run_dir / "checkpoints"
        self.keep = keep
        self.keep_every = keep_every
        self.alive = alive

    def paths(self) -> list[Path]:
        """The checkpoint files, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(p for p in self.folder.iterdir() if PATTERN.fullmatch(p.name))

    def path(self, step: int) -> Path:
        """The file for the state after ``step`` optimizer steps."""
        return self.folder / f"step_{step:08d}.pt"

    def is_milestone(self, step: int) -> bool:
        """Whether the checkpoint of ``step`` is kept for good."""
        return self.keep_every is not None and step % self.keep_every == 0

    def sweep(self) -> None:
        """Deletes temporary files that a killed run left. Only for the one process that writes in the run directory."""
        delete_strays(self.folder.parent)

    def set_aside(self, step: int, say: Callable[[str], object]) -> None:
        """Renames the checkpoints after ``step``, from which a run continues.

        They are damaged, or belong to a run that started again. Under their names they would count as the newest.
        """
        for path in self.paths():
            if step_of(path) > step:
                set_aside(path, say)

    def save(self, state: State, keep_steps: Collection[int] = ()) -> Path:
        """Writes ``state``, then deletes all checkpoints but the newest ``keep``, ``keep_steps`` and the milestones.

        Raises OSError, with the older checkpoints as they were.
        """
        is_new = not self.folder.is_dir()
        own_folder(self.folder)
        if is_new:
            sync_folder(self.folder.parent)
        path = self.path(state["step"])
        write_atomically(path, {"format": FORMAT, "versions": versions(), **state}, self.alive)
        for old in self.paths()[: -self.keep]:
            step = step_of(old)
            if step not in keep_steps and not self.is_milestone(step):
                old.unlink(missing_ok=True)
        return path

    def best(self) -> dict[str, Any] | None:
        """The ``step`` and ``score`` of the best evaluation by the newest readable checkpoint, if its file exists."""
        for path in reversed(self.paths()):
            with contextlib.suppress(CheckpointError):
                best = _best_of(header(path))
                return best if best is not None and self.path(best["step"]).is_file() else None
        return None

    def load_latest(self, warn: Callable[[str], object], map_location: str | torch.device = "cpu") -> State | None:
        """The newest readable state, or None without a checkpoint. ``warn`` gets a line for each unreadable one.

        Raises CheckpointError if there are checkpoints and none is readable.
        """
        paths = self.paths()
        for path in reversed(paths):
            try:
                return read(path, map_location, self.alive)
            except CheckpointError as error:
                warn(f"{error}; trying the one before")
        if paths:
            raise CheckpointError(f"none of the {len(paths)} checkpoints in {self.folder} can be read")
        return None


def header(path: Path) -> State:
    """The content of a checkpoint file, unverified; its tensors stay on the disk until they are used.

    Raises CheckpointError naming the file.
    """
    if path.suffix == encoder.SUFFIX:
        return encoder.read(path, weights=False)
    return _checked(path, lambda: torch_file.load_mapped(path))


def resolve(path: str | os.PathLike[str]) -> Path:
    """The checkpoint file that ``path`` names.

    Args:
        path: a checkpoint file; or a run's directory, ``RUN``: the best checkpoint where one was kept, else the newest;
            or ``RUN@best``, ``RUN@last`` or ``RUN@STEP``.

    Raises CheckpointError.
    """
    run, which = _split(os.fspath(path))
    if run.is_file() and which is None:
        return run
    if not run.is_dir():
        raise CheckpointError(f"no checkpoint or run directory {run}")
    checkpoints = CheckpointDir(run)
    if run.name == "checkpoints" and not checkpoints.paths():
        checkpoints = CheckpointDir(run.parent)
    steps = {step_of(file): file for file in checkpoints.paths()}
    if not steps:
        raise CheckpointError(f"{run} has no checkpoint; looked for checkpoints/step_*.pt; fcmae ls FOLDER lists runs")
    if which in ("best", None):
        best = checkpoints.best()
        if best is None and which == "best":
            raise CheckpointError(f"{run} has kept no best checkpoint; {run}@last is step {max(steps)}")
        step = max(steps) if best is None else best["step"]
    else:
        step = max(steps) if which == "last" else int(which)
    if step not in steps:
        raise CheckpointError(f"{run} has no checkpoint of step {which}; it has steps {', '.join(map(str, steps))}")
    return steps[step]


def run_of(file: Path) -> Path | None:
    """The run that a checkpoint is of, by its folder; None if it is in none."""
    return file.parent.parent if file.parent.name == "checkpoints" else None


def is_ours(path: Path) -> bool:
    """Whether a file is a checkpoint or an encoder file of fcmae, intact or not, rather than of another library."""
    if PATTERN.fullmatch(path.name):
        return True
    try:
        with open_regular(path) as file:
            if path.suffix == encoder.SUFFIX:
                return encoder.is_encoder(path)
            start = file.seek(0, os.SEEK_END) - TRAILER_BYTES
            file.seek(max(0, start))
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return True  # reading it says why


def identity(path: str | None) -> str | None:
    """An identifier of weights: the checksum of one of our checkpoints, else the name."""
    if path is None:
        return None
    try:
        return checksum(Path(path)) if is_ours(Path(path)) else path
    except CheckpointError:
        return path


def _split(path: str) -> tuple[Path, str | None]:
    """``RUN@WHICH`` as two; a path that exists is one."""
    run, at, which = path.rpartition("@")
    known = which in ("best", "last") or (which.isascii() and which.isdecimal())
    return (Path(run), which) if at and known and not os.path.lexists(path) else (Path(path), None)


def _best_of(state: State) -> dict[str, Any] | None:
    """The ``step`` and ``score`` of the best evaluation so far. Weights without a run have none."""
    best = state.get("best")
    known = isinstance(best, dict) and type(best.get("step")) is int and isinstance(best.get("score"), (int, float))
    return best if known else None


def describe(path: Path, state: State) -> str:
    """The line that says which checkpoint a command takes."""
    step, best = state.get("step"), _best_of(state)
    if step is None:
        return f"checkpoint {path}"
    which = ""
    if best is not None:
        score = f"score {best['score']:.4g}"
        same = best["step"] == step
        which = f", {score}, the best so far" if same else f"; the best: step {best['step']}, {score}"
    return f"checkpoint {path} (step {step}{which})"
