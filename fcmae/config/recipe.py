"""Which config keys must not change when a run resumes: the recipe."""

from collections.abc import Mapping
from typing import Any

from fcmae.config.plain import without_places
from fcmae.errors import UsageError
from fcmae.precision import AUTO

HOW_IT_RUNS = ("engine", "trainer", "loader", "monitor", "logger")
"""Groups whose keys do not change the result, except for the order of summation. All other keys are the recipe."""
PLACES = frozenset(
    {
        *("name", "init_from", "init_channels", "init_decoder"),
        *("data.path", "data.val_path", "data.val_source", "data.val_split"),
        *("data.target_path", "data.val_target_path", "data.annotations", "data.val_annotations"),
    }
)
"""Keys outside these groups that may change, too: the same images may lie elsewhere, and a run with a checkpoint does
not read its initial weights again."""
WHOLE = (
    *("data.source", "data.val_source", "data.channels", "data.foreground"),
    *("mask", "target", "objective", "model.timm"),
)
"""Keys whose values are compared as a whole: their content depends on the class that they name."""
ALLOW = "trainer.allow_changed_recipe=true to continue with these"
MICRO_BATCH = "samples of a micro-batch, whose statistics model.grn_scope=batch takes"
"""Also part of the recipe then."""


def check_recipe(
    old: dict[str, Any],
    new: dict[str, Any],
    numbers: Mapping[str, tuple[Any, Any]] | None = None,
    offer: str = ALLOW,
) -> None:
    """Compares a checkpoint's config with the one to resume with, and ``numbers`` that are in neither, where known.

    Args:
        offer: for the message, what to do to use the new values.

    Raises UsageError with a line for each key of the recipe that changed. A key that only one of them has, because
    another version wrote the checkpoint, is not compared.
    """
    changed = changes(old, new)
    for name, (given, value) in (numbers or {}).items():
        if None not in (given, value) and given != value:
            changed.append(f"  {name}: {given} -> {value}")
    if changed:
        budget = _flat(old).get("trainer.budget")
        by_time = budget is not None and any(line.startswith("  schedule.") for line in changed)
        again = f" (trainer.budget={budget} gives those of its schedule)" if by_time else ""
        raise UsageError(
            f"the recipe differs from the run's so far; give its values again{again}, hydra.run.dir=ANOTHER for a new "
            f"run, or {offer}:\n" + "\n".join(changed)
        )


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """A line for each key of the recipe that differs."""
    before, now = _flat(old), _flat(new)
    return [
        line
        for key, value in now.items()
        if is_recipe(key) and key in before and before[key] not in (value, AUTO)  # AUTO: imported weights
        for line in _changes(key, before[key], value)
    ]


def _changes(key: str, old: Any, new: Any) -> list[str]:
    """A line for each value that differs; of targets, an argument or a target that only one of them has is None."""
    if key.split(".")[0] == "target" and isinstance(old, dict) and isinstance(new, dict):
        old, new = without_places(old), without_places(new)
        names = dict.fromkeys([*old, *new])
        return [line for name in names for line in _changes(f"{key}.{name}", old.get(name), new.get(name))]
    return [] if old == new else [f"  {key}: {old!r} -> {new!r}"]


def is_recipe(key: str) -> bool:
    """Whether a full key must stay the same when a run resumes."""
    return key.partition(".")[0] not in HOW_IT_RUNS and key not in PLACES


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Full keys and plain values; sequences are tuples, whatever they were."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict) and prefix + name not in WHOLE:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = tuple(value) if isinstance(value, (list, tuple)) else value
    return flat
