"""A backbone with a head that reads the feature maps of all stages."""

from typing import Any

from timm.models.convnext import ConvNeXt
from torch import Tensor, nn

from fcmae.engines.dense import dense
from fcmae.errors import ConfigError


class Headed(nn.Module):
    """Weights are named ``backbone.*``, as timm does, and ``head.*``.

    Args:
        backbone: without a classifier; its own head takes no part.
        head: takes the list of the maps ``[N, D, h, w]`` of all stages.
    """

    def __init__(self, backbone: ConvNeXt, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        backbone.head.requires_grad_(False)

    def forward(self, imgs: Tensor) -> Any:
        """What the head gives for normalised images ``[N, C, H, W]``."""
        return self.head(self.backbone.forward_intermediates(imgs, norm=True, intermediates_only=True))


def dense_outputs(model: nn.Module, imgs: Tensor, **how: Any) -> Any:
    """What a network of fine-tuning gives for normalised images, on the kernels of :mod:`fcmae.engines.dense`.

    Args:
        how: arguments of :func:`fcmae.engines.dense.dense`.
    """
    maps = dense(backbone_of(model), imgs, **how)
    if isinstance(model, Headed):
        return model.head(maps)
    assert isinstance(model, ConvNeXt)
    return model.forward_head(maps[-1])


def backbone_of(model: nn.Module) -> ConvNeXt:
    """The timm ConvNeXt in a model of either task."""
    backbone = getattr(model, "backbone", model)
    assert isinstance(backbone, ConvNeXt)
    return backbone


def freeze(model: nn.Module, what: str) -> None:
    """Excludes weights from training.

    Args:
        what: ``none``; ``encoder``, all but the head's; ``stages:N``, the stem and the first N stages.

    Raises ConfigError if there are fewer stages.
    """
    if what == "none":
        return
    backbone = backbone_of(model)
    count = len(backbone.stages) if what == "encoder" else int(what.removeprefix("stages:"))
    if count > len(backbone.stages):
        raise ConfigError(f"freeze must name one of {len(backbone.stages)} stages; got {what!r}")
    for module in (backbone.stem, *list(backbone.stages)[:count], *([backbone.norm_pre] if what == "encoder" else [])):
        module.requires_grad_(False)
