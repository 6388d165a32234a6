"""Groups ``model`` and ``engine``: the network and how it runs over visible patches."""

import math
from dataclasses import dataclass, field
from typing import Any

from fcmae.config.checks import check, check_one_of, check_positive
from fcmae.config.timm_arguments import check_timm

STAGES, TOTAL = range(3, 6), range(4, 65)
"""Numbers of stages and total strides that a network may have."""
DECODER_WIDTH = {"light": 512, "unet": 128}
"""The decoders, and the width of each by default."""
TIMM_TOTAL_STRIDE = {4: 32, 2: 32, 1: 8}
"""By the stem's stride: timm downsamples once more after a stem of 2."""


@dataclass
class BackboneConfig:
    """Group ``model``, what both tasks share: the timm ConvNeXt."""

    backbone: str = "convnextv2_atto"
    """A timm model name."""
    depths: list[int] | None = None
    """Blocks in each stage; None = the named model's."""
    dims: list[int] | None = None
    """Width of each stage; None = the named model's."""
    stem_stride: int = 4
    """timm's ``patch_size``; 4 gives the total stride 32, 1 gives 8."""
    strides: list[int] | None = None
    """Stride of the stem and before each later stage: three to five numbers, one per stage, whose product is the total
    stride, 4 to 64; [2,2,2,2] gives 16. None = timm's: stem_stride, then 2 each (and 2 before the first stage after a
    stem of 2). Otherwise stem_stride is ignored. With three or five stages depths and dims must be given."""
    timm: Any = None
    """Other arguments of timm's ConvNeXt by name: ``act_layer``, ``conv_bias``, ``conv_mlp``, ``head_norm_first``,
    ``kernel_sizes``, ``ls_init_value``, ``norm_eps``, ``use_grn`` (docs/network.md). None = the named model's."""

    def __post_init__(self) -> None:
        strides, stages = self.strides, 4
        if strides is not None:
            ok = len(strides) in STAGES and all(0 < stride <= 8 for stride in strides) and self.total_stride in TOTAL
            allowed = "three to five strides of 1 to 8, one per stage, with a product from 4 to 64, or null"
            stages = len(strides) if check("model.strides", strides, ok, allowed) else 4
        for name in ("depths", "dims"):
            value = getattr(self, name)
            ok = stages == 4 if value is None else len(value) == stages and min(value) > 0
            null = ", or null" * (stages == 4)
            check(f"model.{name}", value, ok, f"{stages} positive integers, one per stage{null}")
        check_timm(self.timm, stages)
        check("model.stem_stride", self.stem_stride, self.stem_stride in (1, 2, 4), "1, 2 or 4")

    @property
    def first_stride(self) -> int:
        """Pixels per side that one site of the first stage stands for. timm downsamples once more after a stem of 2."""
        if self.strides:
            return self.strides[0]
        return 4 if self.stem_stride == 2 else self.stem_stride

    @property
    def total_stride(self) -> int:
        """Pixels per side that one site of the last stage stands for."""
        return TIMM_TOTAL_STRIDE[self.stem_stride] if self.strides is None else math.prod(self.strides)

    def backbone_kwargs(self) -> dict[str, Any]:
        """The arguments for timm that differ from the named model's."""
        kwargs = {"depths": self.depths, "dims": self.dims, "patch_size": self.stem_stride, "strides": self.strides}
        return {**{name: value for name, value in kwargs.items() if value is not None}, **(self.timm or {})}


@dataclass
class FCMAEConfig(BackboneConfig):
    """Group ``model`` in pretraining."""

    mask_ratio: float = 0.6
    """Share of the mask patches of each image that is masked."""
    mask_patch_size: int | None = None
    """Pixels per side; a multiple of the total stride, which is the default."""
    pred_patch_size: int | None = None
    """Pixels per side of a predicted patch; a divisor of the total stride, which is the default. With decoder=unet also
    a multiple of the stride of the first stage's sites."""
    decoder: str = "light"
    """``light``: blocks on the last stage's features (the paper's); ``unet``: a U-Net on the features of all stages,
    which segmentation can take over (docs/network.md)."""
    decoder_embed_dim: int | None = None
    """Width of the decoder; None = 512 for ``light``, 128 for ``unet``."""
    decoder_depth: int = 1
    """Blocks of the decoder ``light``; ``unet`` has one per stage."""
    grn_scope: str = "image"
    """GRN's norm over the visible sites of each ``image``, or of the micro-batch (``batch``, as the official code)."""
    init: str = "timm"
    """Initial weights: ``timm``, of std 0.02, or ``official``, the official code's (docs/numerics.md)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check("model.mask_ratio", self.mask_ratio, 0 < self.mask_ratio < 1, "a number in (0, 1)")
        check_positive("model.mask_patch_size", self.mask_patch_size)
        check_positive("model.pred_patch_size", self.pred_patch_size)
        check_one_of("model.decoder", self.decoder, tuple(DECODER_WIDTH))
        check_positive("model.decoder_embed_dim", self.decoder_embed_dim)
        check_positive("model.decoder_depth", self.decoder_depth)
        check_one_of("model.grn_scope", self.grn_scope, ("image", "batch"))
        check_one_of("model.init", self.init, ("timm", "official"))
        if self.decoder == "unet":
            check("model.decoder_depth", self.decoder_depth, self.decoder_depth == 1, "1 with model.decoder=unet")
            check("model.init", self.init, self.init == "timm", "timm with model.decoder=unet, which is not official")


@dataclass
class ClassifierConfig(BackboneConfig):
    """Group ``model`` in fine-tuning."""

    num_classes: int | None = None
    """None = as many as the training data has."""
    drop_path_rate: float = 0.0
    """Probability that the last block is left out for a sample (stochastic depth); it rises linearly from 0."""
    head_init_scale: float = 1.0
    """Factor on the classifier's initial weights and bias; 0.001 times timm's std of 0.02 is the paper's 2e-5."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check("model.num_classes", self.num_classes, self.num_classes is None or self.num_classes > 1, "2 or more")
        check("model.drop_path_rate", self.drop_path_rate, 0 <= self.drop_path_rate < 1, "a number in [0, 1)")
        check_positive("model.head_init_scale", self.head_init_scale)


@dataclass
class EngineConfig:
    """Group ``engine``: how the backbone runs over visible patches."""

    name: str = "packed"
    """``packed``, ``masked`` or ``minkowski`` (docs/engines.md); all compute the same."""
    recompute_stages: list[int] = field(default_factory=list)
    """Stages, from 1, whose activations are recomputed instead of kept; `fcmae bench step` prints the cost."""

    def __post_init__(self) -> None:
        ok = set(self.recompute_stages) <= set(range(1, max(STAGES) + 1))
        check("engine.recompute_stages", self.recompute_stages, ok, "numbers of stages, from 1")
        check_one_of("engine.name", self.name, ("packed", "masked", "minkowski"))


@dataclass
class ClassifierEngineConfig:
    """Group ``engine`` in fine-tuning: how the classifier runs over whole images."""

    name: str = "dense"
    """``dense``: on the kernels of the packed engine; ``timm``: timm's own forward."""
    recompute_stages: list[int] = field(default_factory=list)
    """Stages, from 1, whose activations ``dense`` recomputes instead of keeping them."""

    def __post_init__(self) -> None:
        ok = set(self.recompute_stages) <= set(range(1, max(STAGES) + 1) if self.name == "dense" else ())
        check("engine.recompute_stages", self.recompute_stages, ok, "numbers of stages, from 1; none with engine=timm")
        check_one_of("engine.name", self.name, ("dense", "timm"))
