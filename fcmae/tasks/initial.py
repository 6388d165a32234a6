"""What a fine-tuning run begins with: the weights, and the values of the keys that the user leaves unset."""

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from timm.models.convnext import ConvNeXt

from fcmae.checkpoints import checkpoint, encoder
from fcmae.config import FinetuneConfig
from fcmae.config.unset import UNSET
from fcmae.errors import CheckpointError, ConfigError
from fcmae.models.build import check_backbone_size, known_of, load_state, unsaid

Values = dict[str, dict[str, Any]]
"""Group: key: value."""
FIXED = ("model.backbone", "model.depths", "model.dims", "model.stem_stride", "data.in_chans", "data.mean", "data.std")
"""Keys without which the weights of ``init_from`` are of no use; others may differ from it."""


@dataclass(frozen=True)
class Start:
    """What a run begins with, the same on all ranks."""

    path: Path | None = None
    """The checkpoint whose backbone is loaded; None for random weights, or where the run's own state is loaded."""
    known: Values = field(default_factory=dict)
    """What the checkpoint says of network and images; of the run's own where there is one."""
    notes: list[str] = field(default_factory=list)
    """What the user should know about the checkpoint, a line each."""


def find_start(cfg: FinetuneConfig, run_dir: Path | None = None) -> Start:
    """Where ``cfg`` begins: the run's own checkpoint, for which ``init_from`` is not looked at, else ``init_from``.

    Reads no weights. Raises CheckpointError.
    """
    own = checkpoint.CheckpointDir(run_dir).paths() if run_dir is not None and cfg.trainer.resume else []
    for path in reversed(own):
        with contextlib.suppress(CheckpointError):
            return Start(known=_unset(known_of(checkpoint.header(path), path)))
    if own or cfg.init_from is None:
        return Start()  # none of its own can be read: resuming says so
    path = checkpoint.resolve(cfg.init_from)
    state = checkpoint.header(path)
    known = known_of(state, path)
    check_backbone_size(known, state["model"], path)
    notes = [f"init_from: {checkpoint.describe(path, state)}"]
    if "classes" in state:
        notes.append(f"{path} is a classifier of {len(state['classes'])} classes; its head is not used")
    pad = known["data"].get("pad", cfg.data.pad)
    if pad != cfg.data.pad:
        notes.append(f"data.pad is {cfg.data.pad}; {path} was trained with {pad}")
    if unsaid(state):
        notes.append(f"{path} does not say {', '.join(unsaid(state))}")
    return Start(path, _unset(known), notes)


def _unset(known: Values) -> Values:
    """Of the keys that may be unset, those that are known."""
    return {
        group: {name: known[group][name] for name in names if name in known[group]} for group, names in UNSET.items()
    }


def settle(cfg: FinetuneConfig, start: Start) -> tuple[FinetuneConfig, list[str]]:
    """``cfg`` with a value for every key, and what the user should know, a line each.

    Raises ConfigError naming the keys that contradict ``init_from``.
    """
    if start.path is None:
        return cfg.settled(start.known), []
    taken: list[str] = []
    wrong: list[str] = []
    others: list[str] = []
    for group, values in start.known.items():
        for name, theirs in values.items():
            key, ours = f"{group}.{name}", getattr(getattr(cfg, group), name)
            if ours is None:
                taken += [f"{key}={_plain(theirs)}"] if theirs is not None else []
            elif theirs is not None and ours != theirs:
                fixed = key in FIXED
                has = "has" if fixed else "was trained with"
                (wrong if fixed else others).append(f"{key} is {_plain(ours)}; {start.path} {has} {_plain(theirs)}")
    if wrong:
        raise ConfigError("; ".join(wrong))
    return cfg.settled(start.known), [
        *start.notes,
        *([f"taken from init_from: {' '.join(taken)}"] if taken else []),
        *others,
    ]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def load_backbone(model: ConvNeXt, path: Path) -> None:
    """Loads the backbone of a checkpoint, strictly; the classifier keeps its initial weights.

    Raises CheckpointError naming the keys that do not fit.
    """
    state = checkpoint.read(path, mmap=True)  # the optimizer's moments stay on the disk
    load_state(model, encoder.backbone_weights(state), path, except_prefix="head.fc.")
