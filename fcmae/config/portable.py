"""What of a config may leave the machine that trained: no paths, no arguments of the user's own classes."""

from typing import Any

from fcmae.plugins import is_named, is_ours

LOCAL = ("name", "init_from", "init_channels", "logger")
"""Keys that say nothing of the weights, but of whose they are."""
LOCAL_DATA = (
    "path",
    "val_path",
    "source",
    "val_source",
    "transforms",
    "split",
    "val_split",
    "image_column",
    "label_column",
)


def portable(config: dict[str, Any]) -> dict[str, Any]:
    """The config that an export or an encoder file holds: a key that is missing has its default."""
    kept = {key: value for key, value in config.items() if key not in LOCAL and _is_portable(key, value)}
    return {**kept, "data": {key: value for key, value in config["data"].items() if key not in LOCAL_DATA}}


def _is_portable(key: str, value: Any) -> bool:
    if key == "target":
        return all(map(is_ours, value.values()))
    return not is_named(value) or is_ours(value)


def without_arguments(config: dict[str, Any]) -> dict[str, Any]:
    """The config with the user's own classes by their names alone: an argument may be a password."""
    if is_named(config):
        return config if is_ours(config) else {"_target_": config["_target_"]}
    return {key: without_arguments(value) if isinstance(value, dict) else value for key, value in config.items()}
