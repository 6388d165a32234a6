"""Overrides as users write them, where Hydra asks for quotes around paths and ``++`` before keys that are new."""

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


OPEN = ("mask", "target", "objective", "data.source", "data.val_source", "logger.sinks")
"""Keys that hold a class ``_target_`` and its arguments, which no schema knows."""


def quoted(overrides: list[str]) -> list[str]:
    """Overrides for Hydra: special characters in paths are quoted, ~ is expanded, arguments of a class may be added."""
    return [_quoted(override) for override in overrides]


def _quoted(override: str) -> str:
    key, equals, value = override.partition("=")
    if key.startswith(tuple(f"{name}." for name in OPEN)) or (key in OPEN and value.startswith("{")):
        return f"++{override}"
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
