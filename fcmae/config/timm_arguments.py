"""``model.timm``: arguments of timm's ConvNeXt, checked by name without importing timm."""

from collections.abc import Callable
from typing import Any

from fcmae.config.checks import as_list, check, is_positive, mistake

_SITES = "the engines run over visible patches, so nothing but the depthwise convolutions may look beyond a site"
_HEAD = "it belongs to timm's classifier, which pretraining does not have"
REFUSED = {
    "depths": "set model.depths",
    "dims": "set model.dims",
    "patch_size": "set model.stem_stride or model.strides",
    "in_chans": "set data.in_chans",
    "num_classes": "set model.num_classes in fine-tuning",
    "drop_path_rate": "set model.drop_path_rate in fine-tuning; the engines drop no paths",
    "head_init_scale": "set model.head_init_scale in fine-tuning",
    "head_hidden_size": _HEAD,
    "drop_rate": _HEAD,
    "global_pool": _HEAD,
    "stem_type": f"{_SITES}; timm's other stems overlap patches",
    "output_stride": f"{_SITES}; for finer features set model.strides",
    "norm_layer": "the engines compute LayerNorm only",
    "device": "set trainer.device",
    "dtype": "set precision",
}
"""Arguments of timm that a config must not set, and why."""


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _are_kernels(value: Any, stages: int) -> bool:
    sizes = as_list(value, stages)
    return len(sizes) == stages and all(type(size) is int and size > 0 and size % 2 for size in sizes)


TIMM_ARGUMENTS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "act_layer": (_is_name, "timm's name of an activation"),
    "conv_bias": (_is_bool, "true or false"),
    "conv_mlp": (_is_bool, "true or false"),
    "head_norm_first": (_is_bool, "true or false"),
    "kernel_sizes": (lambda value: True, ""),  # depends on the number of stages
    "ls_init_value": (lambda value: value is None or is_positive(value), "a positive number or null"),
    "norm_eps": (is_positive, "a positive number"),
    "use_grn": (_is_bool, "true or false"),
}
"""Arguments of timm that a config may set, with a check of each and what it expects."""


def check_timm(given: Any, stages: int) -> None:
    """A mistake for each argument that timm's ConvNeXt lacks, that the engines cannot compute, or of another type."""
    if given is None or not check("model.timm", given, isinstance(given, dict), "arguments of timm's ConvNeXt by name"):
        return
    for name, value in given.items():
        key = f"model.timm.{name}"
        if name in REFUSED:
            mistake(f"{key} must not be set: {REFUSED[name]}")
        elif name not in TIMM_ARGUMENTS:
            mistake(f"{key} is unknown; must be one of {', '.join(TIMM_ARGUMENTS)}")
        elif name == "kernel_sizes":
            check(key, value, _are_kernels(value, stages), f"an odd integer, or a list of {stages}, one per stage")
        else:
            is_ok, expected = TIMM_ARGUMENTS[name]
            check(key, value, is_ok(value), expected)
