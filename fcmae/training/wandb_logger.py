"""Weights & Biases; the only file that imports wandb."""

import netrc
import os
import secrets
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from PIL import Image

from fcmae.errors import UsageError
from fcmae.files import replacing
from fcmae.opening import read_regular


def _has_key() -> bool:
    """Whether there is an API key where ``wandb login`` or the user puts it."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


class WandbLogger:
    """A wandb run that continues when its run directory does.

    Args:
        mode: ``auto`` (online with an API key, else offline), ``online`` or ``offline``.
        run_dir: wandb's files go to ``run_dir/wandb``; the run's id is kept there.
    """

    def __init__(self, mode: str, project: str, name: str, run_dir: Path, config: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UsageError("logger.wandb needs the package wandb; install it or set logger.wandb=disabled") from error
        self._image = wandb.Image
        id_file = run_dir / "wandb_id"
        if not os.path.lexists(id_file):
            with replacing(id_file) as file:
                file.write(secrets.token_hex(4).encode())
        run_id = read_regular(id_file, 64, links=False).decode()
        if mode == "auto":
            mode = "online" if _has_key() else "offline"

        def init(online: bool) -> Any:
            return wandb.init(
                project=project,
                name=name,
                id=run_id,
                resume="allow" if online else None,
                dir=run_dir,
                config=config,
                mode="online" if online else "offline",
                settings=wandb.Settings(silent=True),
            )

        try:
            self._run = init(mode == "online")
        except wandb.errors.CommError as error:  # training does not wait for a server
            reason = str(error).splitlines()[0]
            print(f"wandb cannot be reached, so this process logs offline: {reason}", file=sys.stderr, flush=True)
            self._run = init(online=False)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._run.log(metrics, step=step)

    def picture(self, step: int, name: str, image: Image.Image) -> None:
        self._run.log({name: self._image(image)}, step=step)

    def close(self) -> None:
        self._run.finish()
