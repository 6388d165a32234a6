"""What of a config may leave the machine that trained: no paths, no arguments of a source of the user's own."""

from typing import Any

LOCAL = ("name", "init_from", "init_channels", "logger")
"""Keys that say nothing of the weights, but of whose they are."""
LOCAL_DATA = ("path", "val_path", "source", "val_source", "split", "val_split", "image_column", "label_column")


def portable(config: dict[str, Any]) -> dict[str, Any]:
    """The config that an export or an encoder file holds: a key that is missing has its default."""
    kept = {key: value for key, value in config.items() if key not in LOCAL}
    return {**kept, "data": {key: value for key, value in config["data"].items() if key not in LOCAL_DATA}}


def without_arguments(config: dict[str, Any]) -> dict[str, Any]:
    """The config with sources of the user's own by the names of their classes alone: an argument may be a password."""
    data = {
        key: {"_target_": value["_target_"]} if key in ("source", "val_source") and value is not None else value
        for key, value in config.get("data", {}).items()
    }
    return {**config, "data": data} if data else config
