"""Groups ``model`` and ``engine``: the network and how it runs over visible patches."""

from dataclasses import dataclass, field
from typing import Any

from fcmae.config.checks import check, check_one_of, check_positive


@dataclass
class BackboneConfig:
    """Group ``model``, what both tasks share: the timm ConvNeXt."""

    backbone: str = "convnextv2_atto"
    """A timm model name."""
    depths: list[int] | None = None
    """Blocks in each of the four stages; None = the named model's."""
    dims: list[int] | None = None
    """Width of each of the four stages; None = the named model's."""
    stem_stride: int = 4
    """timm's ``patch_size``; 4 gives the total stride 32, 1 gives 8."""

    def __post_init__(self) -> None:
        for name in ("depths", "dims"):
            value = getattr(self, name)
            ok = value is None or (len(value) == 4 and min(value) > 0)
            check(f"model.{name}", value, ok, "four positive integers, one a stage, or null")
        check("model.stem_stride", self.stem_stride, self.stem_stride in (1, 2, 4), "1, 2 or 4")

    def backbone_kwargs(self) -> dict[str, Any]:
        """The arguments for timm that differ from the named model's."""
        kwargs = {"depths": self.depths, "dims": self.dims, "patch_size": self.stem_stride}
        return {name: value for name, value in kwargs.items() if value is not None}


@dataclass
class FCMAEConfig(BackboneConfig):
    """Group ``model`` in pretraining."""

    mask_ratio: float = 0.6
    """Share of the mask patches of each image that is masked."""
    mask_patch_size: int | None = None
    """Pixels a side; a multiple of the total stride, which is the default."""
    decoder_embed_dim: int = 512
    """Width of the decoder."""
    decoder_depth: int = 1
    """Blocks of the decoder."""
    grn_scope: str = "image"
    """GRN's norm over the visible sites of each ``image``, or of the micro-batch (``batch``, as the official code)."""
    init: str = "timm"
    """Initial weights: ``timm``, of standard deviation 0.02, or ``official``, the official code's (docs/faq.md)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check("model.mask_ratio", self.mask_ratio, 0 < self.mask_ratio < 1, "a number in (0, 1)")
        check_positive("model.mask_patch_size", self.mask_patch_size)
        check_positive("model.decoder_embed_dim", self.decoder_embed_dim)
        check_positive("model.decoder_depth", self.decoder_depth)
        check_one_of("model.grn_scope", self.grn_scope, ("image", "batch"))
        check_one_of("model.init", self.init, ("timm", "official"))


@dataclass
class ClassifierConfig(BackboneConfig):
    """Group ``model`` in fine-tuning."""

    num_classes: int | None = None
    """None = as many as the training data has."""
    drop_path_rate: float = 0.0
    """Probability that the last block is left out for a sample (stochastic depth); it rises linearly from 0."""
    head_init_scale: float = 1.0
    """Factor on the initial weights and bias of the classifier; 0.001 of timm's std 0.02 is the paper's 2e-5."""

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
    """Stages, 1 to 4, whose activations are recomputed instead of kept; `fcmae bench step` prints the cost."""

    def __post_init__(self) -> None:
        ok = set(self.recompute_stages) <= {1, 2, 3, 4}
        check("engine.recompute_stages", self.recompute_stages, ok, "some of 1, 2, 3, 4")
        check_one_of("engine.name", self.name, ("packed", "masked", "minkowski"))


@dataclass
class ClassifierEngineConfig:
    """Group ``engine`` in fine-tuning: how the classifier runs over whole images."""

    name: str = "dense"
    """``dense``: on the kernels of the packed engine; ``timm``: timm's own forward."""
    recompute_stages: list[int] = field(default_factory=list)
    """Stages, 1 to 4, whose activations ``dense`` recomputes instead of keeping them."""

    def __post_init__(self) -> None:
        ok = set(self.recompute_stages) <= ({1, 2, 3, 4} if self.name == "dense" else set())
        check("engine.recompute_stages", self.recompute_stages, ok, "some of 1, 2, 3, 4; none with engine=timm")
        check_one_of("engine.name", self.name, ("dense", "timm"))
