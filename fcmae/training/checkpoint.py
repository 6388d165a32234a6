"""Checkpoints: what a run needs to continue, in files that are there whole or not at all."""

import contextlib
import os
import pickle
import re
import sys
from pathlib import Path
from typing import Any

import timm
import torch

from fcmae.errors import CheckpointError

FORMAT = 1
PATTERN = re.compile(r"step_(\d+)\.pt")

State = dict[str, Any]


def versions() -> dict[str, str]:
    """What wrote a checkpoint."""
    from fcmae import __version__

    return {
        "fcmae": __version__,
        "torch": str(torch.__version__),
        "timm": timm.__version__,
        "python": sys.version.split()[0],
    }


def write_atomically(path: Path, state: State) -> None:
    """Saves ``state`` so that ``path`` is either the old file or the whole new one, also after a power cut."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read(path: Path, map_location: str | torch.device = "cpu") -> State:
    """The state in a checkpoint file; no code in it is executed. Raises CheckpointError naming the file."""
    try:
        state = torch.load(path, map_location=map_location, weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"no checkpoint {path}") from error
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, ValueError, KeyError) as error:
        reason = str(error).split("\n")[0]
        raise CheckpointError(f"checkpoint {path} cannot be read: {reason}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of fcmae (format {FORMAT})")
    return state


class CheckpointDir:
    """The checkpoints of one run, ``step_00000123.pt`` after 123 optimizer steps."""

    def __init__(self, run_dir: Path, keep: int = 2) -> None:
        self.folder = run_dir / "checkpoints"
        self.keep = keep

    def paths(self) -> list[Path]:
        """The checkpoint files, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(p for p in self.folder.iterdir() if PATTERN.fullmatch(p.name))

    def save(self, state: State) -> Path:
        """Writes ``state``, then deletes all but the newest ``keep``."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step_{state['step']:08d}.pt"
        write_atomically(path, {"format": FORMAT, "versions": versions(), **state})
        for old in self.paths()[: -self.keep]:
            with contextlib.suppress(FileNotFoundError):
                old.unlink()
        return path

    def load_latest(self, warn: Any, map_location: str | torch.device = "cpu") -> State | None:
        """The newest readable state, or None without a checkpoint. Each unreadable one is told to ``warn`` in a line.

        Raises CheckpointError if there are checkpoints and none is readable.
        """
        paths = self.paths()
        for path in reversed(paths):
            try:
                return read(path, map_location)
            except CheckpointError as error:
                warn(f"{error}; trying the one before")
        if paths:
            raise CheckpointError(f"none of the {len(paths)} checkpoints in {self.folder} can be read")
        return None


def resolve(path: str | Path) -> Path:
    """A checkpoint file from its path or its run's directory (the newest). Raises CheckpointError."""
    path = Path(path)
    if path.is_dir():
        found = CheckpointDir(path).paths() or CheckpointDir(path.parent).paths() * (path.name == "checkpoints")
        if not found:
            raise CheckpointError(f"{path} has no checkpoint; looked for checkpoints/step_*.pt")
        return found[-1]
    if not path.is_file():
        raise CheckpointError(f"no checkpoint or run directory {path}")
    return path
