"""What of a config is the recipe: on resuming, it is what it was."""

from collections.abc import Mapping
from typing import Any

from fcmae.errors import UsageError
from fcmae.precision import AUTO

HARMLESS = frozenset(
    {
        # names and places
        "name",
        "init_from",
        "init_channels",
        "data.path",
        "data.val_path",
        "data.val_source",
        "data.val_split",
        "data.relist",
        # how it is computed, not what: equal up to the order of summation
        "data.workers",
        "data.prefetch",
        "engine.name",
        "engine.recompute_stages",
        "trainer.micro_batch_size",
        "trainer.compile",
        "trainer.cuda_graph",
        "trainer.device",
        "trainer.deterministic",
        # when something is written, and when a run ends early
        "trainer.log_every",
        "trainer.checkpoint_every_epochs",
        "trainer.keep_checkpoints",
        "trainer.keep_every_epochs",
        "trainer.eval_every_epochs",
        "trainer.resume",
        "trainer.max_steps",
        "trainer.max_hours",
        "trainer.allow_changed_recipe",
        # what happens when something goes wrong
        "data.on_error",
        "data.max_bad",
        "data.max_pixels",
        "trainer.on_save_error",
        "trainer.on_nonfinite",
        "trainer.max_skipped",
        "trainer.hang_timeout",
    }
)
"""Keys that may change on resuming, besides all of :data:`HARMLESS_GROUPS`. Every other key is part of the recipe."""
HARMLESS_GROUPS = ("logger.", "monitor.")


MICRO_BATCH = "samples of a micro-batch, whose statistics engine.grn_scope=batch takes"
"""What else is part of the recipe then."""
WHOLE = ("data.source", "data.val_source", "mask", "objective")
"""Keys whose values are compared as one: what is in them depends on the class that they name."""


def check_recipe(
    old: dict[str, Any], new: dict[str, Any], numbers: Mapping[str, tuple[int | None, int | None]] | None = None
) -> None:
    """Compares a checkpoint's config with the one to go on with, and ``numbers`` that are in neither, where known.

    Raises UsageError with a line for each key of the recipe that changed. A key that only one of them knows, because
    another version wrote the checkpoint, is left alone.
    """
    before, now = _flat(old), _flat(new)
    changed = [
        f"  {key}: {before[key]!r} -> {value!r}"
        for key, value in now.items()
        if key in before
        and before[key] not in (value, AUTO)  # AUTO: imported weights, which nothing was computed in
        and key not in HARMLESS
        and not key.startswith(HARMLESS_GROUPS)
    ]
    for name, (given, value) in (numbers or {}).items():
        if None not in (given, value) and given != value:
            changed.append(f"  {name}: {given} -> {value}")
    if changed:
        raise UsageError(
            "the recipe differs from the run's so far; give its values again, or "
            "trainer.allow_changed_recipe=true to go on with these:\n" + "\n".join(changed)
        )


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Full keys and plain values; sequences are tuples, whatever they were."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict) and prefix + name not in WHOLE:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = tuple(value) if isinstance(value, (list, tuple)) else value
    return flat
