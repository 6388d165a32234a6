"""Weights & Biases; the only file that imports wandb."""

import csv
import json
import netrc
import os
import secrets
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from PIL import Image

from fcmae.config import LoggerConfig, without_arguments
from fcmae.data.pixels.formats import open_picture
from fcmae.errors import UsageError
from fcmae.files import defined, replacing
from fcmae.messages import print_once, say
from fcmae.opening import read_regular
from fcmae.status import read_config, read_status

ID_FILE = "wandb_id"
"""In a run directory: the id of its wandb run."""
MAX_RESULTS = 2**26
"""Bytes of a file of results."""
KEYS = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")


def wandb_mode(cfg: LoggerConfig) -> str:
    """``online``, ``offline`` or ``disabled``, as the config says, or with ``auto`` wandb's own settings, or a key.

    Raises UsageError if wandb is missing although the config asks for it, if it has no API key although it is to be
    online, or if its environment variables or settings files are wrong.
    """
    if cfg.wandb == "disabled" or (cfg.wandb == "auto" and os.environ.get("WANDB_MODE") == "disabled"):
        return "disabled"
    try:
        import wandb

        settings = wandb.setup().settings
    except ImportError as error:
        if cfg.wandb == "auto":
            print_once("wandb is not installed, so it logs nothing (logger.wandb=disabled leaves this line out)")
            return "disabled"
        raise UsageError(f"logger.wandb is {cfg.wandb}, but wandb is not installed: pip install wandb") from error
    except Exception as error:  # e.g. pydantic's, of WANDB_MODE=foo
        raise UsageError(f"wandb does not accept its settings (WANDB_* or wandb/settings): {_line(error)}") from error
    mode, asked = cfg.wandb, f"logger.wandb={cfg.wandb}"
    if mode == "auto":
        asked = "WANDB_MODE"
        mode = {"dryrun": "offline", "run": "online"}.get(settings.mode, settings.mode)
        if mode == "online" and "WANDB_MODE" not in os.environ:
            mode = "online" if _has_key(settings.base_url) else "offline"
    if mode not in ("offline", "disabled") and not _has_key(settings.base_url):
        raise UsageError(
            f"{asked} needs an API key of {settings.base_url}: run `wandb login`, set WANDB_API_KEY, or set "
            "logger.wandb=offline"
        )
    return mode


def _has_key(server: str) -> bool:
    """Whether there is an API key where ``wandb login`` or the user puts it."""
    if any(os.environ.get(name) for name in KEYS):
        return True
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(urlparse(server).hostname or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False


class WandbLogger:
    """A wandb run that continues when its run directory does, online and offline.

    Its id is kept in the run directory, and wandb's files go to ``run_dir/wandb``. Every process of an offline run
    leaves a folder there. They have one id, and ``resume`` is recorded in each, so that ``wandb sync`` appends them to
    one run. WANDB_PROJECT, WANDB_NAME, WANDB_RUN_ID, WANDB_RESUME, WANDB_DIR and WANDB_SILENT come before ours, where
    the config does not name another project.

    Args:
        mode: what :func:`wandb_mode` returned, not ``disabled``.
        name: the display name.
        config: shown with the run.
    """

    def __init__(self, mode: str, cfg: LoggerConfig, name: str, run_dir: Path, config: dict[str, Any]) -> None:
        import wandb

        given = wandb.setup().settings
        self._image, self._artifact, self._table = wandb.Image, wandb.Artifact, wandb.Table
        self._uploads = cfg.artifact
        arguments: dict[str, Any] = {"config": without_arguments(config), "mode": mode}
        if not given.project or cfg.project != LoggerConfig().project:
            arguments["project"] = cfg.project
        if not given.run_name:
            arguments["name"] = name
        if not given.run_id:
            arguments["id"] = _run_id(run_dir / ID_FILE)
        if not given.resume:
            arguments["resume"] = "allow"
        for name in ("entity", "group", "tags", "notes", "job_type"):
            if getattr(cfg, name):
                arguments[name] = getattr(cfg, name)
        if "WANDB_DIR" not in os.environ:
            arguments["dir"] = run_dir
        if "WANDB_SILENT" not in os.environ:
            arguments["settings"] = wandb.Settings(silent=True)
        try:
            self._run = wandb.init(**arguments)
        except wandb.errors.CommError as error:  # training does not wait for a server
            say(f"wandb cannot be reached, so this process logs offline: {_line(error)}")
            mode = arguments["mode"] = "offline"
            self._run = wandb.init(**arguments)
        except wandb.errors.Error as error:
            raise UsageError(f"wandb cannot be started: {_line(error)}") from error
        if arguments["mode"] == "offline":
            folder = Path(self._run.settings.sync_dir).parent
            say(f"wandb logs offline; to upload all processes of this run: wandb sync {folder}")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._run.log(metrics, step=self._at(step))

    def picture(self, step: int, name: str, image: Image.Image) -> None:
        self._run.log({name: self._image(image, caption=f"{name}, step {step}")}, step=self._at(step))

    def artifact(self, file: Path) -> None:
        """Uploads the encoder of a run that is done, with ``logger.artifact``."""
        if self._uploads:
            artifact = self._artifact(f"encoder-{self._run.id}", type="model")
            artifact.add_file(str(file))
            self._run.log_artifact(artifact)

    def close(self) -> None:
        self._run.finish()

    def _at(self, step: int) -> int:
        """wandb would drop what a process that resumed online logs for steps that it knows, such as an evaluation."""
        return max(step, self._run.starting_step)

    def report(self, step: int, folder: Path) -> None:
        """Logs what ``fcmae evaluate`` wrote into a folder, all under the folder's name."""
        logged = defined(json.loads(read_regular(folder / "metrics.json", MAX_RESULTS)))
        table = folder / "per_class.csv"
        if table.is_file():
            header, *rows = csv.reader(read_regular(table, MAX_RESULTS).decode().splitlines())
            numbers = [[row[0], *(float(cell) if cell else None for cell in row[1:])] for row in rows]
            logged["per_class"] = self._table(columns=list[Any](header), data=numbers)
        for path in sorted(folder.glob("*.png")):
            with path.open("rb") as file, open_picture(file) as picture:
                caption = f"{path.stem.replace('_', ' ')}, step {step}"
                logged[path.stem] = self._image(picture.convert("RGB"), caption=caption)
        self._run.log({f"{folder.name}/{name}": value for name, value in logged.items()}, step=self._at(step))


def check_report(run_dir: Path, report: str | None) -> None:
    """Raises UsageError unless a report can be added to the wandb run of a run."""
    if report is None:
        raise UsageError("wandb must be false with report=null, which makes nothing to log")
    if not (run_dir / ID_FILE).is_file():
        raise UsageError(f"wandb must be false: {run_dir} was not logged to wandb (it has no {ID_FILE})")
    if wandb_mode(LoggerConfig()) == "disabled":
        raise UsageError("wandb must be false: it is not installed or disabled (WANDB_MODE)")


def log_report(run_dir: Path, folder: Path) -> None:
    """Adds a report to the wandb run of a run, at the last step that the run logged. Raises UsageError."""
    config, status = read_config(run_dir / "config.yaml"), read_status(run_dir)
    given = config.get("logger") or {}
    cfg = LoggerConfig(**{name: given[name] for name in ("project", "entity") if given.get(name)})
    sink = WandbLogger(wandb_mode(cfg), cfg, status.task, run_dir, {})
    sink.report(max(status.step or 0, status.scored_at or 0), folder)
    sink.close()


def _run_id(file: Path) -> str:
    if not os.path.lexists(file):
        with replacing(file) as new:
            new.write(secrets.token_hex(4).encode())
    return read_regular(file, 64, links=False).decode()


def _line(error: Exception) -> str:
    return " ".join(str(error).split("\n")[:3]) or repr(error)
