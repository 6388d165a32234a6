"""What is exported and imported: a ConvNeXt's structure, the network of a checkpoint, the check of what was written."""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.models.convnext import ConvNeXt
from torch import Tensor, nn

from fcmae.checkpoints import checkpoint
from fcmae.checkpoints.checkpoint import State
from fcmae.config import (
    ClassifierConfig,
    DataConfig,
    FCMAEConfig,
    FinetuneConfig,
    PretrainConfig,
    RunConfig,
    from_dict,
    to_dict,
)
from fcmae.engines.convnext import blocks, grn, is_gelu, stages, stem
from fcmae.errors import WeightsError
from fcmae.interchange.weights import StateDict
from fcmae.models import FCMAE
from fcmae.models.backbone import strides_of
from fcmae.models.build import build_classifier, build_fcmae, check_size, config_of, encoder_of, is_classifier, model_of
from fcmae.plugins import is_ours
from fcmae.version import versions

# The models known to timm: (depths, first width), each stage twice as wide as the one before.
_V1_SIZES = {
    "atto": ((2, 2, 6, 2), 40),
    "femto": ((2, 2, 6, 2), 48),
    "pico": ((2, 2, 6, 2), 64),
    "nano": ((2, 2, 8, 2), 80),
    "tiny": ((3, 3, 9, 3), 96),
    "small": ((3, 3, 27, 3), 96),
    "base": ((3, 3, 27, 3), 128),
    "large": ((3, 3, 27, 3), 192),
}
SIZES: dict[str, tuple[tuple[int, ...], int]] = {
    **{f"convnextv2_{size}": value for size, value in _V1_SIZES.items()},
    "convnextv2_huge": ((3, 3, 27, 3), 352),
    **{f"convnext_{size}": value for size, value in _V1_SIZES.items()},
    "convnext_xlarge": ((3, 3, 27, 3), 256),
}
GENERIC = {1: "convnext_tiny", 2: "convnextv2_atto"}
"""The timm model that stands for any other depths and dims, by version."""


def instead(model: ConvNeXt) -> str:
    """What to do where another library cannot build a network."""
    timm = "timm or " if _are_timms(stem(model)[0].stride[0], strides_of(model)) else ""
    return f"export it to {timm}onnx, or use encoder.safetensors and fcmae.load"


def _are_timms(stem_stride: int, strides: Sequence[int]) -> bool:
    return list(strides) == [min(4, stem_stride**2), 2, 2, 2]


@dataclass(frozen=True)
class Structure:
    """What other libraries call the config of a ConvNeXt; ``version`` 2 has GRN, 1 has LayerScale."""

    version: int
    in_chans: int
    stem_stride: int
    strides: tuple[int, ...]
    """Of the stem, with a downsampling before the first stage, and before each later stage."""
    depths: tuple[int, ...]
    dims: tuple[int, ...]
    num_classes: int

    @classmethod
    def of(cls, model: ConvNeXt, depthwise_bias: bool = True) -> "Structure":
        """The structure of a timm ConvNeXt, for a library with or without biases in its depthwise convolutions.

        Raises WeightsError naming the layer, if it has one that only timm has.
        """
        for name, module in model.named_modules():
            if isinstance(module, nn.LayerNorm) and module.eps != 1e-6:
                raise WeightsError(f"{name} has eps {module.eps}; other libraries compute with 1e-06: {instead(model)}")
        for block in (block for stage in stages(model) for block in blocks(stage)):
            if block.conv_dw.kernel_size != (7, 7) or not is_gelu(block.mlp.act):
                raise WeightsError(
                    f"a block has {block.conv_dw} and {block.mlp.act}; other libraries have 7 x 7 and exact GELU: "
                    f"{instead(model)}"
                )
            if depthwise_bias and block.conv_dw.bias is None:
                raise WeightsError(f"a convolution has no bias; other libraries have one: {instead(model)}")
            if (block.gamma is None) == (grn(block) is None):
                raise WeightsError(
                    f"a block has both or none of GRN and layer scale; other libraries have one: {instead(model)}"
                )
        if not isinstance(model.norm_pre, nn.Identity) or not isinstance(model.head.pre_logits, nn.Identity):
            raise WeightsError(
                f"the head is not norm and linear layer after the pooling; other libraries have these: {instead(model)}"
            )
        first = [next(iter(blocks(stage))) for stage in stages(model)]
        return cls(
            version=1 if grn(first[0]) is None else 2,
            in_chans=model.in_chans,
            stem_stride=stem(model)[0].stride[0],
            strides=tuple(strides_of(model)),
            depths=tuple(len(stage.blocks) for stage in stages(model)),
            dims=tuple(block.conv_dw.out_channels for block in first),
            num_classes=model.num_classes,
        )

    @property
    def is_timms(self) -> bool:
        """Whether timm builds it by a name, depths, dims and patch_size."""
        return _are_timms(self.stem_stride, self.strides)

    def backbone_config(self, name: str | None = None) -> dict[str, Any]:
        """The values of a BackboneConfig: timm's name of this size or ``name``, the rest only where it differs."""
        depths, dims = list(self.depths), list(self.dims)
        strides = {"stem_stride": self.stem_stride} if self.is_timms else {"strides": list(self.strides)}
        for known, (known_depths, width) in SIZES.items():
            same_version = known.startswith("convnextv2_") == (self.version == 2)
            same_size = self.depths == known_depths and self.dims == tuple(width << stage for stage in range(4))
            if same_version and same_size and name in (None, known):
                return {"backbone": known, **strides}
        return {"backbone": name or GENERIC[self.version], "depths": depths, "dims": dims, **strides}


@dataclass(frozen=True)
class Network:
    """The network of a checkpoint.

    ``model`` is the backbone or, with ``classes``, the classifier; in evaluation mode, on the CPU. ``fcmae`` is the
    pretraining model around it. ``state`` is the checkpoint ``path``.
    """

    model: ConvNeXt
    cfg: RunConfig
    classes: list[str]
    fcmae: FCMAE | None
    state: State
    path: Path

    @classmethod
    def read(cls, path: str | Path, ema: bool = True) -> "Network":
        """From a checkpoint or a run's directory. ``ema``: the averaged weights, where the run kept some.

        Calls no class of the user's own that the checkpoint names: of pretraining with such a target there is no
        ``fcmae``.
        """
        file = checkpoint.resolve(path)
        state = checkpoint.read(file)
        cfg = config_of(state, file)
        if isinstance(cfg, PretrainConfig) and state["task"] == "pretrain" and all(map(is_ours, cfg.target.values())):
            fcmae = model_of(state, file, ema)
            assert isinstance(fcmae, FCMAE)
            return cls(fcmae.backbone, cfg, [], fcmae, state, file)
        classes = state.get("classes") or [] if isinstance(cfg, FinetuneConfig) and is_classifier(cfg) else []
        return cls(encoder_of(state, file, ema), cfg, classes, None, state, file)

    @property
    def backbone_config(self) -> FCMAEConfig | ClassifierConfig:
        """Group ``model`` of its config."""
        assert isinstance(self.cfg, PretrainConfig | FinetuneConfig)
        return self.cfg.model

    @property
    def weights(self) -> StateDict:
        """The state dict of ``model``."""
        return self.model.state_dict()

    @torch.inference_mode()
    def outputs(self, imgs: Tensor, model: nn.Module | None = None) -> dict[str, Tensor]:
        """``features`` ``[N, D, h, w]`` of the last stage, ``pooled`` ``[N, D]``, a classifier's ``logits`` ``[N, K]``.

        Those of ``model`` if given, a timm ConvNeXt that should be the same.
        """
        twin = self.model if model is None else model
        assert isinstance(twin, ConvNeXt)
        features = twin.forward_features(imgs)
        outputs = {"features": features, "pooled": twin.forward_head(features, pre_logits=True)}
        if self.classes:
            outputs["logits"] = twin.forward_head(features)
        return outputs

    def compared(self, library: str, theirs: dict[str, Tensor]) -> "Check":
        """What another library makes of :meth:`fixed_input`, under names of :meth:`outputs`, against ours."""
        ours = self.outputs(self.fixed_input())
        return Check(library, difference((theirs[name], ours[name]) for name in theirs))

    def fixed_input(self) -> Tensor:
        """Two normalised images ``[2, C, H, W]`` of noise, always the same."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn(2, self.model.in_chans, *self.cfg.data.size, generator=generator)


@dataclass(frozen=True)
class Check:
    """What another library made of an export.

    ``error``: the largest difference from our outputs on a fixed input, as a share of the largest magnitude in that
    output or of 1; None with the reason in ``library`` if it was not checked.
    """

    library: str
    error: float | None

    def __str__(self) -> str:
        if self.error is None:
            return f"not checked: {self.library}"
        return f"checked with {self.library}: largest difference {self.error:.1e}"


def difference(pairs: Iterable[tuple[Tensor, Tensor]], least: float = 1.0) -> float:
    """The largest difference in (theirs, ours), as a share of the largest magnitude in ours, or of ``least``."""
    shares = ((theirs.float() - ours).abs().max() / ours.abs().max().clamp(min=least) for theirs, ours in pairs)
    return max(share.item() for share in shares)


@dataclass(frozen=True)
class Imported:
    """A checkpoint's contents made from another library's files. ``weights`` are those of the network of ``cfg``."""

    cfg: PretrainConfig | FinetuneConfig
    weights: StateDict
    classes: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    """What differs in the other library or could not be known, a line each."""

    def write(self, path: Path, library: str) -> None:
        """Writes the checkpoint and loads it again, strictly."""
        state: State = {
            "format": checkpoint.FORMAT,
            "versions": versions(),
            "imported_from": library,
            "task": "pretrain" if isinstance(self.cfg, PretrainConfig) else "finetune",
            "config": to_dict(self.cfg),
            "step": 0,
            "model": self.weights,
            "ema": None,
        }
        if isinstance(self.cfg, FinetuneConfig):
            state["classes"] = self.classes
        model_of(state, path)
        checkpoint.write_atomically(path, state)


@dataclass(frozen=True)
class Given:
    """What the user said about weights whose files do not say it; None = not said."""

    classes: list[str] | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    image_size: int | None = None
    any_channels: bool = False
    """Assume 0.5 where nobody says how other channels than three are normalised."""

    def data(self, in_chans: int, known: dict[str, Any] | None = None) -> DataConfig:
        """The data config: ``known`` from the files, else what the user said, else ImageNet's for three channels.

        Raises WeightsError if nobody says how other channels are normalised.
        """
        said = {name: getattr(self, name) for name in ("mean", "std", "image_size")}
        values = {**(known or {}), **{name: value for name, value in said.items() if value is not None}}
        if self.any_channels and in_chans != 3:
            values = {"mean": [0.5] * in_chans, "std": [0.5] * in_chans, **values}
        if in_chans != 3 and not {"mean", "std"} <= values.keys():
            raise WeightsError(
                f"the files do not say how their {in_chans} channels are normalised; give --mean and --std"
            )
        return from_dict(DataConfig, {**values, "in_chans": in_chans}, prefix="data")

    def names(self, num_classes: int, known: list[str] | None = None) -> list[str]:
        """The names of ``num_classes`` classes: the user's, else ``known``, else 0, 1, ... Raises WeightsError."""
        names = self.classes or known or [str(index) for index in range(num_classes)]
        if len(names) != num_classes:
            raise WeightsError(f"there are {len(names)} class names for {num_classes} classes")
        return list(names)


def empty_classifier(cfg: FinetuneConfig, weights: StateDict, path: Path) -> StateDict:
    """The names and shapes of the weights of a classifier for ``weights``, or of a backbone with its untrained norm.

    Raises CheckpointError if the config is of a larger network than the weights of ``path`` are for.
    """
    build = partial(build_classifier, cfg.model, cfg.data.in_chans, count_classes(weights), cfg.seed)
    check_size(build, cfg.model, weights, path)
    return build().state_dict()


def count_classes(weights: StateDict) -> int:
    """The classes of a classifier by the weights of its last layer, under the name of any library; else 0."""
    return max(len(weights.get(name, ())) for name in ("head.fc.weight", "head.weight", "classifier.weight"))


def empty_fcmae(cfg: PretrainConfig, weights: StateDict, path: Path) -> StateDict:
    """The names and shapes of a pretraining model's weights. Raises CheckpointError as :func:`empty_classifier`."""
    check_size(partial(build_fcmae, cfg), cfg.model, weights, path)
    return build_fcmae(cfg).state_dict()
