"""A run's directory: what it must not hold already, and its config."""

from pathlib import Path
from typing import Any

import yaml

from fcmae.checkpoints.checkpoint import CheckpointDir
from fcmae.checkpoints.encoder import ENCODER_FILE
from fcmae.checkpoints.resume import say
from fcmae.config import RunConfig
from fcmae.errors import UsageError
from fcmae.files import replacing, set_aside
from fcmae.loggers.wandb import ID_FILE
from fcmae.opening import read_regular

CONFIG_FILE = "config.yaml"
MAX_CONFIG = 2**20
"""Bytes of a config file."""
RESULTS = (CONFIG_FILE, "metrics.jsonl", ENCODER_FILE, "reconstructions")
"""What a run that is begun anew would overwrite; checkpoints are numbered."""


def check_folder(cfg: RunConfig, run_dir: Path) -> None:
    """Raises UsageError for a folder with files of others, or one among the images, where it would be trained on."""
    found = [name for name in RESULTS if (run_dir / name).exists()]
    if found and not _is_ours(run_dir):
        give = "give a new folder, an empty one, or a run"
        raise UsageError(f"hydra.run.dir={run_dir} has {found[0]}, which fcmae did not write; {give}")
    if cfg.data.name != "imagefolder" or cfg.data.source is not None:
        return
    for key in ("path", "val_path"):
        paths = getattr(cfg.data, key) or []
        for path in [paths] if isinstance(paths, str) else paths:
            if run_dir.resolve().is_relative_to(Path(path).resolve()):
                why = "where its pictures would count as images"
                raise UsageError(f"hydra.run.dir={run_dir} must not be in data.{key}={path}, {why}")


def _is_ours(run_dir: Path) -> bool:
    """A run writes its config before anything else, but that may be gone."""
    if CheckpointDir(run_dir).paths():
        return True
    try:
        content = yaml.safe_load(read_regular(run_dir / CONFIG_FILE, MAX_CONFIG, links=False))
    except (OSError, ValueError, yaml.YAMLError):
        return False
    return isinstance(content, dict) and {"data", "model", "schedule", "trainer"} <= content.keys()


def set_results_aside(run_dir: Path) -> None:
    """Renames what a run left that is now begun anew."""
    for name in (*RESULTS, ID_FILE):
        if (run_dir / name).exists():
            set_aside(run_dir / name, say)


def write_config(run_dir: Path, config: dict[str, Any]) -> None:
    """Writes ``config.yaml``, whole. Raises OSError."""
    from omegaconf import OmegaConf

    run_dir.mkdir(parents=True, exist_ok=True)
    with replacing(run_dir / CONFIG_FILE) as file:
        file.write(OmegaConf.to_yaml(OmegaConf.create(config)).encode())
