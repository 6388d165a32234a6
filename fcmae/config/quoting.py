"""Paths in Hydra's overrides: what a shell hands on is taken as it is, where Hydra's grammar would ask for quotes."""

import os

PATHS = (
    "data.path",
    "data.val_path",
    "init_from",
    "checkpoint",
    "out",
    "labels",
    "per_class",
    "confusion",
    "cache",
    "hydra.run.dir",
    "hydra.sweep.dir",
)
"""Keys that hold one path, or several."""


def quoted(overrides: list[str]) -> list[str]:
    """Overrides for Hydra, of which paths with signs that its grammar keeps for itself are quoted, and ~ expanded."""
    return [_quoted(override) for override in overrides]


def _quoted(override: str) -> str:
    key, equals, value = override.partition("=")
    if not equals or key.lstrip("+") not in PATHS or _is_known(override, value):
        return override
    if value.startswith("[") and value.endswith("]"):
        parts = ",".join(_in_quotes(part.strip()) for part in value[1:-1].split(","))
        return f"{key}=[{parts}]"
    return f"{key}={_in_quotes(value)}"


def _in_quotes(path: str) -> str:
    if len(path) > 1 and path[0] == path[-1] in ("'", '"'):
        return path
    escaped = os.path.expanduser(path).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def _is_known(override: str, value: str) -> bool:
    """Whether Hydra's grammar takes an override for what it is: a word, a list, or a sweep that is no path."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        parsed = OverridesParser.create().parse_override(override)
    except HydraException:
        return False
    return not (parsed.is_sweep_override() and os.path.exists(value))
