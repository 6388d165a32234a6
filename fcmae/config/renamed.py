"""Keys that have another name than in earlier versions. This module is the only place that knows the old names."""

from typing import Any

RENAMED = {
    "trainer.global_batch_size": "optim.global_batch_size",
    "trainer.ema_decay": "optim.ema_decay",
    "trainer.precision": "precision",
    "engine.grn_scope": "model.grn_scope",
    "data.workers": "loader.workers",
    "data.prefetch": "loader.prefetch",
    "data.on_error": "loader.on_error",
    "data.max_bad": "loader.max_bad",
    "data.max_pixels": "loader.max_pixels",
    "data.relist": "loader.relist",
    "workers": "loader.workers",
}
"""Full keys, old: new."""
NORM_PIX_LOSS = "model.norm_pix_loss"
"""Every pretraining had this key before there was the group ``target``."""


def renamed(key: str) -> str | None:
    """What to say where a user gives the old name of a key; None for any other key."""
    if key == NORM_PIX_LOSS:
        return f"{key} is now target.pixels.norm; patch stands for true, none for false"
    if key == "data.streaming":
        return (
            "data.streaming is no key: samples are read by index, so that a run resumes exactly, with any number of "
            "ranks; data.path=hf://... or s3://... reads Parquet files from there (loader.cache_size)"
        )
    if key == "pooling":
        return "pooling is now layer; pooled stands for norm"
    return f"{key} is now {RENAMED[key]}" if key in RENAMED else None


def upgraded(config: dict[str, Any]) -> dict[str, Any]:
    """A config that an earlier version wrote, with the names of today. ``config`` stays as it is."""
    config = {name: dict(value) if isinstance(value, dict) else value for name, value in config.items()}
    for old, new in RENAMED.items():
        group, _, name = old.rpartition(".")
        owner = config.get(group) if group else config
        if isinstance(owner, dict) and name in owner:
            value = owner.pop(name)
            group, _, name = new.rpartition(".")
            (config.setdefault(group, {}) if group else config).setdefault(name, value)
    model = config.get("model")
    if isinstance(model, dict) and "norm_pix_loss" in model:
        norm = "patch" if model.pop("norm_pix_loss") else "none"
        config.setdefault("target", {"pixels": {"_target_": "fcmae.targets.Pixels", "norm": norm, "weight": 1.0}})
        config.setdefault("mask", {"_target_": "fcmae.masks.RandomMask"})
    return config
