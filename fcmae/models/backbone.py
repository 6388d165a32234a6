"""The encoder: a timm ConvNeXt that owns its weights in the ordinary dense layout."""

import difflib
from typing import Any

import timm
from timm.models.convnext import ConvNeXt

from fcmae.engines import check_backbone


def create_backbone(
    name: str, *, in_chans: int = 3, num_classes: int = 0, drop_path_rate: float = 0.0, **kwargs: Any
) -> ConvNeXt:
    """A timm ConvNeXt, V1 or V2, with random weights.

    Args:
        name: a timm model name, e.g. ``convnextv2_base``.
        kwargs: passed to timm; ``depths``, ``dims``, ``kernel_sizes``, and ``patch_size``, timm's name of the stem's
            stride: 4 and 2 give a total stride of 32 (timm downsamples once more after a stem of stride 2), 1 gives 8.

    Raises ValueError for an unknown name or a model that cannot run over visible patches.
    """
    names = timm.list_models("convnext*")
    if name not in names:
        close = difflib.get_close_matches(name, names, n=4)
        hint = f"did you mean {' or '.join(close)}?" if close else "timm.list_models('convnext*') lists what is"
        raise ValueError(f"model.backbone is {name!r}, not a ConvNeXt known to timm {timm.__version__}; {hint}")
    backbone = timm.create_model(
        name, in_chans=in_chans, num_classes=num_classes, drop_path_rate=drop_path_rate, **kwargs
    )
    check_backbone(backbone)
    assert isinstance(backbone, ConvNeXt)
    return backbone
