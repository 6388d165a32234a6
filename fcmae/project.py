"""``fcmae init``: a folder to start from, with a config for the user's images, a README and a SLURM script."""

import os
import re
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from fcmae.config import conf_dir, to_dict
from fcmae.config.own import size_of
from fcmae.config.prepare import PreparedDataConfig
from fcmae.data.sources import train_source
from fcmae.doctor.dataset import configs, examine
from fcmae.doctor.suggest import suggested
from fcmae.errors import DiskError, UsageError, reason_of, shown

LOOKED_AT = 200
"""Images that the settings are suggested by, evenly spread."""
BY_RECIPE = ("data.image_size", "model.")
"""Suggested keys that the recipe sets itself."""

CONFIG = """\
# @package _global_
# fcmae pretrain --config-dir conf experiment=project hydra.run.dir=runs/pretrain
# {count:,} images. Settings that are not here follow from their number and size (own/{size}); the command
# `fcmae pretrain --config-dir conf experiment=project --cfg job --resolve` prints all of them.
# Remove a # to set a key. docs/config.md has all keys.
defaults:
  - /experiment/own/{size}
  - _self_

name: {name}
data:
{data}
  # vflip: 0.5         # images without an upright (cells, tiles, parts): flip them,
  # rot90: true        # and turn them
  # fit: pad           # images whose scale matters: do not resize crops
  # val_path: FOLDER   # held-out images: their loss chooses the best checkpoint
# model:
  # backbone: convnextv2_tiny   # a larger network
# trainer:
  # budget: 8h                  # as many epochs as fit into the time
"""
README = """\
# {name}

Run these commands in this folder. The settings are in `conf/experiment/project.yaml`.

```
fcmae pretrain --config-dir conf experiment=project trainer.budget=5min hydra.run.dir=runs/try   # a first look
fcmae report runs/try --out report.html                                       # curves, pictures and settings
fcmae pretrain --config-dir conf experiment=project hydra.run.dir=runs/pretrain
fcmae finetune recipe=auto init_from=runs/pretrain data.path=LABELLED/train hydra.run.dir=runs/finetune
fcmae evaluate checkpoint=runs/finetune data.val_path=LABELLED/val
```

`fcmae status runs/pretrain`, in another terminal, prints step, loss, speed and time left. Ctrl-C stops a run with a
checkpoint; the same command continues it. `LABELLED` is a folder with a subfolder per class in `train` and in `val`;
with thousands of labelled images leave out `recipe=auto`. Several GPUs: type
`torchrun --nproc_per_node=GPUS -m fcmae.cli` instead of `fcmae`. On SLURM, with one GPU:

```
sbatch --ntasks-per-node=1 --gpus-per-node=1 job.sbatch pretrain \\
    --config-dir conf experiment=project hydra.run.dir=runs/pretrain
```
"""


def create(folder: str, overrides: Sequence[str]) -> list[str]:
    """Looks at the images of a data config and writes the folder.

    Returns:
        Lines for the user: what was chosen, and what to type next.

    Raises UsageError if the folder is not empty or no image can be read; DiskError if it cannot be written.
    """
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"{folder} exists; name a folder that is new or empty")
    if not any(override.startswith(("data.path=", "data.source")) for override in overrides):
        raise UsageError("data.path is not set; give data.path=FOLDER, the folder of training images")
    data, loader = configs(overrides)
    source = train_source(data, loader)
    count = len(source)
    looked = range(0, count, max(1, count // LOOKED_AT))
    survey = examine(source, list(looked), loader.max_pixels, data.nodata)
    seen, nodata = survey.seen, survey.nodata if data.nodata is None else None
    if not seen:
        raise UsageError(
            f"data.path={data.path}: none of {len(looked)} images can be read; see fcmae doctor data.path="
        )
    size = size_of(count)
    name = re.sub(r"[^\w.-]+", "_", target.resolve().name)  # it goes into YAML and Markdown
    lines, chosen = _data(data, overrides, suggested(seen, data.bit_depth, nodata))
    experiment = target / "conf" / "experiment" / "project.yaml"
    try:
        experiment.parent.mkdir(parents=True)
        experiment.write_text(CONFIG.format(count=count, size=size, name=name, data=lines))
        (target / "README.md").write_text(README.format(name=name))
        shutil.copy(_script(), target / "job.sbatch")
    except OSError as error:
        raise DiskError(f"{shown(folder)} cannot be written: {reason_of(error)}; name a folder elsewhere") from error
    return [
        f"{count:,} images: {', '.join([f'experiment=own/{size}', *chosen])}",
        f"next: cd {shlex.quote(folder)}; fcmae pretrain --config-dir conf experiment=project trainer.budget=5min "
        "hydra.run.dir=runs/try    # README.md has more commands",
    ]


def _data(data: PreparedDataConfig, overrides: Sequence[str], keys: Sequence[tuple[str, str]]) -> tuple[str, list[str]]:
    """Lines of group ``data``: what was given, then what is suggested, with the reasons; and the suggestions."""
    default = to_dict(PreparedDataConfig())
    named = {"name", *(re.split("[.=]", override)[1] for override in overrides if override.startswith("data."))}
    given: dict[str, Any] = {
        key: value for key, value in to_dict(data).items() if key in named and value != default[key]
    }
    for key in ("path", "val_path"):
        if isinstance(given.get(key), str) and os.path.exists(given[key]):
            given[key] = os.path.abspath(given[key])
    lines = [f"  {line}" for line in OmegaConf.to_yaml(OmegaConf.create(given)).splitlines()]
    chosen = []
    for overrides, why in keys:
        for override in overrides.split():
            key, _, value = override.partition("=")
            if (
                not key.startswith(BY_RECIPE)
                and key.removeprefix("data.") not in given
                and override != "data.in_chans=3"
            ):
                lines.append(f"  {key.removeprefix('data.')}: {value}  # {why}")
                chosen.append(override)
    return "\n".join(lines), chosen


def _script() -> Path:
    """launch/ at the top of a checkout, fcmae/launchers in an installed wheel."""
    folders = (conf_dir().parent / "launch", conf_dir().parent / "launchers")
    return next(folder for folder in folders if folder.is_dir()) / "slurm" / "srun.sbatch"
