"""Where a run logs: metrics.jsonl, a progress bar or lines, and by config TensorBoard, wandb and your own sinks."""

import contextlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from fcmae.config import LoggerConfig
from fcmae.errors import reason_of
from fcmae.files import json_lines, json_text, replacing
from fcmae.imports import needed
from fcmae.loggers.progress import Progress
from fcmae.loggers.report_page import ReportPage
from fcmae.loggers.wandb import WandbLogger, wandb_mode
from fcmae.messages import say
from fcmae.opening import open_regular, open_to_append, own_folder
from fcmae.plugins import create


class Sink(Protocol):
    """Somewhere metrics and pictures go.

    A class of your own (``logger.sinks``) is created on the first rank, with its arguments from the config and
    ``run_dir``, the run's folder, and ``start_step``, the steps that were done before.
    """

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Takes the metrics after ``step`` optimizer steps, by name."""

    def picture(self, step: int, name: str, image: Image.Image) -> None:
        """Takes a picture such as the reconstructions of pretraining."""

    def close(self) -> None:
        """The run ends."""


EVENTS_FILE = "events.jsonl"
"""A line for each process that trained: when and where it began, at which step, with which versions; and warnings."""


class MetricsFile:
    """metrics.jsonl: one JSON object per line, each with its ``step``; warnings; pictures in reconstructions/."""

    def __init__(self, run_dir: Path, start_step: int) -> None:
        self.run_dir = run_dir
        path = run_dir / "metrics.jsonl"
        content, names = b"", 1
        if os.path.lexists(path):
            with open_regular(path, links=False) as file:
                content = file.read()
                names = os.fstat(file.fileno()).st_nlink
        kept = _up_to(content, start_step)
        if kept != content or names > 1:  # a backup made of hard links stays as it is
            with replacing(path) as new:
                new.write(kept)
        self.file = open_to_append(path)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.file.write(json_text({"step": step, **metrics}) + "\n")
        self.file.flush()

    def picture(self, step: int, name: str, image: Image.Image) -> None:
        folder = own_folder(self.run_dir / "reconstructions")
        with replacing(folder / f"{name}_{step:08d}.png") as file:
            image.save(file, "PNG")

    def warn(self, step: int, line: str) -> None:
        with open_to_append(self.run_dir / EVENTS_FILE) as file:
            file.write(json.dumps({"time": time.time(), "step": step, "warning": line}) + "\n")

    def close(self) -> None:
        self.file.close()


def _up_to(content: bytes, step: int) -> bytes:
    """The lines of a metrics file that a run resumed at ``step`` will not write again."""
    lines = ((line, value.get("step")) for line, value in json_lines(content))
    return b"".join(line + b"\n" for line, at in lines if type(at) is int and at <= step)


class TensorBoard:
    """TensorBoard event files in the run directory."""

    def __init__(self, run_dir: Path) -> None:
        with needed("logger.tensorboard needs the package tensorboard: pip install tensorboard"):
            from torch.utils.tensorboard import SummaryWriter
        self.writer = SummaryWriter(str(own_folder(run_dir / "tensorboard")))

    def log(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, image: Image.Image) -> None:
        self.writer.add_image(name, np.asarray(image), step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


def create_sinks(cfg: LoggerConfig, name: str, config: dict[str, Any], run_dir: Path, start_step: int) -> list[Sink]:
    """The files and services that the config asks for. Only for the first rank. Raises UsageError."""
    more = {"run_dir": run_dir, "start_step": start_step}
    own: list[Sink] = [create(given, f"logger.sinks.{key}", Sink, **more) for key, given in cfg.sinks.items()]
    sinks: list[Sink] = [MetricsFile(run_dir, start_step), *own]
    if cfg.tensorboard:
        sinks.append(TensorBoard(run_dir))
    if cfg.report:
        sinks.append(ReportPage(run_dir))
    mode = wandb_mode(cfg)
    if mode != "disabled":
        sinks.append(WandbLogger(mode, cfg, name, run_dir, config))
    return sinks


class RunLogger:
    """Passes metrics and pictures to every sink; on ranks other than the first there are none."""

    def __init__(self, sinks: list[Sink], progress: Progress) -> None:
        self.sinks = [*sinks, progress]
        self.progress = progress
        self._told: set[str] = set()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._each(lambda sink: sink.log(step, metrics))

    def picture(self, step: int, name: str, image: Image.Image) -> None:
        self._each(lambda sink: sink.picture(step, name, image))

    def warn(self, step: int, line: str) -> None:
        """Prints what is wrong, and gives it to the sinks that take warnings: those with a method ``warn``."""
        say(line)
        self._each(lambda sink: getattr(sink, "warn", lambda *_: None)(step, line))

    def artifact(self, file: Path) -> None:
        """Gives a file that the run ends with to the sinks that take files: those with a method ``artifact``."""
        if file.is_file():
            self._each(lambda sink: getattr(sink, "artifact", lambda _: None)(file))

    def close(self) -> None:
        self._each(lambda sink: sink.close())

    def _each(self, write: Callable[[Sink], None]) -> None:
        """An error of a sink, such as a full disk or a dead process of wandb, is printed once and stops nothing."""
        for sink in self.sinks:
            try:
                write(sink)
            except Exception as error:
                reason = f"{type(sink).__name__} could not write: {reason_of(error)}"
                if reason not in self._told:
                    self._told.add(reason)
                    with contextlib.suppress(OSError):  # stderr may be gone as well
                        say(reason)
