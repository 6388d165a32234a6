"""Configs that come from a file or go into one: what they may hold."""

from typing import Any

from fcmae.errors import ConfigError
from fcmae.plugins import is_named, is_ours

MAX_DEPTH = 16
MAX_VALUES = 20_000
MAX_CHARACTERS = 2**16
MAX_INTEGER = 2**64
LOCAL = ("name", "init_from", "init_channels", "logger")
"""Keys that say nothing of the weights, but of whose they are."""
LOCAL_DATA = (
    "path",
    "val_path",
    "source",
    "val_source",
    "annotations",
    "val_annotations",
    "transforms",
    "split",
    "val_split",
    "image_column",
    "label_column",
)
PLACES_OF_TARGETS = ("checkpoint", "run")
"""Where a target that records the checksum of what lies there finds it."""


def check_plain(values: Any, prefix: str = "") -> None:
    """Raises ConfigError naming the full key, unless ``values`` are nested dicts and lists of plain values, not too
    many, without an interpolation ``${...}``, by which a file could read this machine's environment.
    """
    left, count = [(prefix, values, 0)], 0
    while left:
        key, value, depth = left.pop()
        count += 1
        too_many = count + len(left) > MAX_VALUES
        problem = f"the config has more than {MAX_VALUES} values" if too_many else _problem(value, depth)
        if problem:
            raise ConfigError(f"{key or 'the config'}: {problem}")
        if isinstance(value, dict):
            if any(type(name) is not str or _problem(name, 0) for name in value):
                raise ConfigError(f"{key or 'the config'}: a key must be a text of at most {MAX_CHARACTERS} characters")
            left += [(f"{key}.{name}" if key else name, item, depth + 1) for name, item in value.items()]
        elif isinstance(value, (list, tuple)):
            left += [(key, item, depth + 1) for item in value]


def _problem(value: Any, depth: int) -> str:
    """Why a value must not be in a config; nothing if it may."""
    if type(value) not in (dict, list, tuple, str, int, float, bool, type(None)):
        return f"must be a plain value; got a {type(value).__name__}"
    if depth > MAX_DEPTH:
        return f"is nested more than {MAX_DEPTH} levels deep"
    if isinstance(value, str) and "${" in value:
        return f"must not be an interpolation; got {value[:40]!r}"
    if isinstance(value, str) and len(value) > MAX_CHARACTERS:
        return f"must have at most {MAX_CHARACTERS} characters; got {len(value)}"
    if isinstance(value, int) and abs(value) >= MAX_INTEGER:
        return "must be an integer of at most 64 bits"
    return ""


def portable(config: dict[str, Any]) -> dict[str, Any]:
    """The config that an export or an encoder file holds: a key that is missing has its default."""
    kept = {key: value for key, value in config.items() if key not in LOCAL and _is_portable(key, value)}
    if "target" in kept:
        kept["target"] = {name: without_places(given) for name, given in kept["target"].items()}
    return {**kept, "data": {key: value for key, value in config["data"].items() if key not in LOCAL_DATA}}


def without_places(target: dict[str, Any]) -> dict[str, Any]:
    """A target without the places of what its checksum identifies."""
    return {key: value for key, value in target.items() if "sha256" not in target or key not in PLACES_OF_TARGETS}


def _is_portable(key: str, value: Any) -> bool:
    if key == "target":
        return all(map(is_ours, value.values()))
    return not is_named(value) or is_ours(value)


def without_arguments(config: dict[str, Any]) -> dict[str, Any]:
    """The config with the user's own classes by their names alone: an argument may be a password."""
    if is_named(config):
        return config if is_ours(config) else {"_target_": config["_target_"]}
    return {key: without_arguments(value) if isinstance(value, dict) else value for key, value in config.items()}
