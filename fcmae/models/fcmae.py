"""Fully convolutional masked autoencoder (FCMAE; ConvNeXt V2, arXiv 2301.00808, section 3)."""

import functools
import inspect
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import trunc_normal_
from timm.models.convnext import ConvNeXt
from torch import Tensor, nn

from fcmae.config.model import DECODER_WIDTH
from fcmae.engines import (
    GRN_SCOPES,
    check_backbone,
    check_no_drop_path,
    fused,
    get_engine,
    packed,
    region,
    total_stride,
)
from fcmae.engines.fused import check_float8
from fcmae.errors import UsageError
from fcmae.kernels import precompile
from fcmae.masks.patches import grid_size, len_keep, random_mask, upsample_mask, visible_indices
from fcmae.models.backbone import create_backbone, stage_shapes
from fcmae.models.decoder import Decoder, LightDecoder, UNetDecoder
from fcmae.targets import NEEDS, Pixels, Seen, Target, has_own_errors, part

LEARNED = "learned"
"""Instead of a target's weight."""
LOG_VAR = "log_var_"
"""Begins the names of learned weights of targets."""


@dataclass
class FCMAEOutput:
    """What a forward pass returns; ``loss, pred, mask = output`` unpacks it."""

    loss: Tensor
    """The sum of ``parts`` times their weights, float32 scalar; see :class:`FCMAE` for learned weights."""
    preds: dict[str, Tensor]
    """``[N, L, dim]`` by the name of the target, in its scale."""
    mask: Tensor
    """bool ``[N, L]``, True = masked."""
    parts: dict[str, Tensor]
    """The loss of each target by its name, float32 scalars."""

    @property
    def pred(self) -> Tensor:
        """The prediction of the first target."""
        return next(iter(self.preds.values()))

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.loss, self.pred, self.mask))


class FCMAE(nn.Module):
    """A ConvNeXt encoder over visible patches and a decoder that predicts targets at the masked patches.

    Args:
        backbone: a timm ConvNeXt or its name; owns every encoder weight. Its head takes no part in pretraining, and it
            must not drop paths.
        mask_ratio: share of the patches that is masked, in [0, 1).
        mask_patch_size: pixels per side of a mask patch; a multiple of the total stride, which is the default.
        pred_patch_size: pixels per side of a predicted patch; a divisor of the total stride, which is the default. With
            the decoder ``unet`` also a multiple of the first stage's stride.
        targets: what is predicted, by name: a class such as :class:`fcmae.targets.Pixels`, or
            ``functools.partial(Pixels, norm="none")``. ``target_weights`` are their factors in the loss, 1 at first.
            Instead of a number, ``"learned"`` makes the part L of a target count as ``exp(-s) * L + s`` with a
            parameter s, the logarithm of a variance, 0 at first (Kendall et al., arXiv 1705.07115, section 3.2). Set it
            before the optimizer is created.
        decoder: ``light``, which reads the last stage, or ``unet``, which reads all (:mod:`fcmae.models.decoder`).
        decoder_embed_dim: the decoder's width; None = 512 for ``light``, 128 for ``unet``.
        decoder_depth: blocks of ``light``; ``unet`` has one per stage.
        engine: how the backbone runs over the visible patches, see :mod:`fcmae.engines`.
        grn_scope: ``image``, or ``batch`` for parity with the official code.
        backbone_kwargs: ``in_chans``, ``depths`` and other arguments of :func:`fcmae.models.create_backbone`, when
            ``backbone`` is a name.

    L counts patches of ``pred_patch_size`` in ``preds`` and of ``mask_patch_size`` in ``mask``; the two sizes are equal
    by default.
    """

    recompute_stages: Collection[int] = ()
    """Encoder stages, counted from 1, whose activations are recomputed in the backward pass: less memory, more time."""

    def __init__(
        self,
        backbone: str | ConvNeXt = "convnextv2_atto",
        *,
        mask_ratio: float = 0.6,
        mask_patch_size: int | None = None,
        pred_patch_size: int | None = None,
        targets: Mapping[str, Callable[..., Target]] | None = None,
        decoder: str = "light",
        decoder_embed_dim: int | None = None,
        decoder_depth: int = 1,
        engine: str = "packed",
        grn_scope: str = "image",
        **backbone_kwargs: Any,
    ) -> None:
        super().__init__()
        if isinstance(backbone, str):
            backbone = _created(backbone, backbone_kwargs)
        elif backbone_kwargs:
            raise ValueError(f"{', '.join(backbone_kwargs)} must be given where the backbone is created")
        check_backbone(backbone)
        check_no_drop_path(backbone)
        self.patch_size = total_stride(backbone)
        self.mask_patch_size = mask_patch_size or self.patch_size
        self.pred_patch_size = pred_patch_size or self.patch_size
        self.engine = get_engine(engine)
        self._compiled = False
        self.mask_ratio = mask_ratio
        self.grn_scope = grn_scope
        self.backbone = backbone
        self.targets = {
            name: create(patch_size=self.pred_patch_size, in_chans=backbone.in_chans)
            for name, create in (targets or {"pixels": Pixels}).items()
        }
        self.target_weights: dict[str, float | str] = dict.fromkeys(self.targets, 1.0)
        dims = {name: target.dim for name, target in self.targets.items()}
        self.decoder = self._create_decoder(decoder, decoder_embed_dim, decoder_depth, dims)

    def _create_decoder(self, kind: str, width: int | None, depth: int, dims: dict[str, int]) -> Decoder:
        _check_one_of("decoder", kind, tuple(DECODER_WIDTH))
        width, side = width or DECODER_WIDTH[kind], self.pred_patch_size
        widths, strides = stage_shapes(self.backbone)
        if self.patch_size % side or (kind == "unet" and side % strides[0]):
            also = f" and a multiple of {strides[0]}, the stride of its first stage" if kind == "unet" else ""
            raise ValueError(
                f"pred_patch_size must be a divisor of {self.patch_size}, the backbone's total stride{also}; got {side}"
            )
        if kind == "unet":
            return UNetDecoder(widths, strides, width, dims, side // strides[0])
        return LightDecoder(self.backbone.num_features, width, depth, dims, self.patch_size // side)

    def __setattr__(self, name: str, value: Any) -> None:
        """Checks what the constructor checks. ``engine`` may be a name. Raises ValueError."""
        if name == "engine" and isinstance(value, str):
            value = get_engine(value)
        elif name == "mask_ratio" and not 0 <= value < 1:
            raise ValueError(f"mask_ratio must be in [0, 1); got {value}")
        elif name == "mask_patch_size" and (value < 1 or value % self.patch_size):
            raise ValueError(
                f"mask_patch_size must be a multiple of the backbone's total stride, {self.patch_size}; got {value}"
            )
        elif name == "grn_scope":
            _check_one_of(name, value, GRN_SCOPES)
        elif name == "recompute_stages" and not set(value) <= set(range(1, len(self.backbone.stages) + 1)):
            raise ValueError(f"recompute_stages must be stages, 1 to {len(self.backbone.stages)}; got {list(value)}")
        elif name == "target_weights":
            for target, weight in value.items():
                if isinstance(weight, str):
                    _check_one_of(f"target_weights[{target!r}]", weight, (LEARNED,))
                learned = nn.Parameter(torch.zeros(())) if weight == LEARNED else None
                self.register_parameter(LOG_VAR + target, learned)
        super().__setattr__(name, value)

    def forward(
        self,
        imgs: Tensor,
        mask: Tensor | None = None,
        keep: int | None = None,
        weight: Tensor | None = None,
        *,
        valid: Tensor | None = None,
        channels: Tensor | None = None,
        channels_valid: Tensor | None = None,
        label: Tensor | None = None,
    ) -> FCMAEOutput:
        """Predicts the targets at the masked patches of normalised images.

        Args:
            imgs: ``[N, C, H, W]``, sides multiples of ``mask_patch_size``.
            mask: bool ``[N, L]``, True = masked, equally many visible patches in every row; random if None.
            keep: the visible patches in a row of ``mask``. Without it the mask is counted and checked, for which the
                host waits for the device.
            weight: ``[N]``, a factor on the error of each image in the loss.
            valid: which pixels have a value; the others become 0.
            channels, channels_valid, label: what targets need, see :class:`fcmae.targets.Seen`.

        Raises ValueError where a target needs what is not given.
        """
        if valid is not None:
            imgs = torch.where(valid, imgs, 0)
        if channels is not None and channels_valid is not None:
            channels = torch.where(channels_valid, channels, 0)
        seen = Seen(imgs, valid, channels, channels_valid, label)
        for needed in NEEDS:
            if getattr(seen, needed) is None and self.targets_that_need(needed):
                raise ValueError(f"target {self.targets_that_need(needed)[0]} needs {needed}; give {needed}= as well")
        preds, mask, sites = self._predict(imgs, mask, keep)
        parts = {}
        for name, target in self.targets.items():
            compiles = self._compiled and self.training and _compiles(target, seen, preds[name])
            # Target and error in one region, so that the target need not be stored.
            parts[name] = region(part, compiles)(target, seen, preds[name], sites, weight)
        return FCMAEOutput(self._sum(parts), preds, mask, parts)

    def predict(self, imgs: Tensor, mask: Tensor | None = None) -> tuple[dict[str, Tensor], Tensor]:
        """The predictions of :meth:`forward` by the name of the target, and the mask, without a loss."""
        preds, mask, _ = self._predict(imgs, mask, None)
        return preds, mask

    def _predict(self, imgs: Tensor, mask: Tensor | None, keep: int | None) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """The predictions, the mask, and the mask of predicted patches ``[N, L]``."""
        if mask is None:
            mask, keep = self.random_mask(imgs)
        elif keep is None:
            keep = self._count_visible(mask, imgs)
        compiled = self._compiled and self.training
        light = self.decoder if self.engine is packed and isinstance(self.decoder, LightDecoder) else None
        if light is not None and fused.needs_all_kernels(imgs, compiled):
            precompile.also(self._shapes(light, imgs))
        visible = self.engine(
            self.backbone,
            imgs,
            mask,
            keep=keep,
            patch_size=self.mask_patch_size,
            grn_scope=self.grn_scope,
            compiled=compiled,
            recompute_stages=self.recompute_stages if self.training else (),
            all_stages=self.decoder.all_stages,
        )
        rows, cols = grid_size(imgs.shape[-2], imgs.shape[-1], self.mask_patch_size)
        grid = mask.view(-1, rows, cols)
        if light is not None and light.has_kernels(visible, grid):
            preds = light.by_kernels(visible, grid, visible_indices(mask, keep))
        else:
            preds = region(_decode, compiled)(self.decoder, visible, grid, visible_indices(mask, keep))
        hidden = upsample_mask(mask, rows, cols, self.mask_patch_size // self.pred_patch_size)
        return preds, mask, hidden.flatten(1)

    def _shapes(self, decoder: LightDecoder, imgs: Tensor) -> Iterator[precompile.Shape]:
        """What the kernels of the decoder and of the targets are specialised for."""
        if not fused.has_layers(self.backbone, imgs):
            return
        yield from decoder.shapes(imgs, self.patch_size)
        size, pixels = (imgs.shape[1], imgs.shape[2], imgs.shape[3]), precompile.name_of(imgs.dtype)
        for target in self.targets.values():
            if isinstance(target, Pixels) and target.is_one_operation:
                yield precompile.PatchErrorShape(size, pixels, target.patch_size, precompile.dtype_of(imgs))

    def _sum(self, parts: dict[str, Tensor]) -> Tensor:
        terms = []
        for name, value in parts.items():
            weight = self.target_weights[name]
            if isinstance(weight, str):
                log_var = getattr(self, LOG_VAR + name)
                value = (-log_var).exp() * value + log_var
            elif weight != 1:
                value = weight * value
            terms.append(value)
        return functools.reduce(torch.add, terms)

    def targets_that_need(self, what: str) -> list[str]:
        """Names of the targets that need ``channels`` or ``label``."""
        return [name for name, target in self.targets.items() if what in getattr(target, "needs", ())]

    @torch.no_grad()
    def learned_weights(self) -> dict[str, float]:
        """The present weight of each target whose weight is learned. Waits for the device."""
        learned = [name for name, weight in self.target_weights.items() if weight == LEARNED]
        return {name: math.exp(-getattr(self, LOG_VAR + name).item()) for name in learned}

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compiles the network in place, for training: each stage's block once, the decoder, and the loss.

        What runs by kernels of our own anyway (:mod:`fcmae.engines.fused`) is left as it is.

        Takes no options. ``torch.compile(model)`` works too; it compiles one large graph, for minutes.
        """
        if args or kwargs:
            raise ValueError("FCMAE.compile takes no arguments; torch.compile(model, ...) does")
        self._compiled = True

    def len_keep(self, height: int, width: int) -> int:
        """Visible patches of an image of that size."""
        rows, cols = grid_size(height, width, self.mask_patch_size)
        return len_keep(rows * cols, self.mask_ratio)

    def check_float8(self) -> None:
        """Raises UsageError unless the encoder can multiply in float8 (``precision=fp8``)."""
        if self.engine is not packed:
            raise UsageError("precision=fp8 needs engine=packed; with another one set precision=bf16")
        check_float8(self.backbone, self.mask_patch_size)

    def random_mask(self, imgs: Tensor) -> tuple[Tensor, int]:
        """A random mask for ``imgs`` from the device's generator, and its number of visible patches."""
        rows, cols = grid_size(imgs.shape[-2], imgs.shape[-1], self.mask_patch_size)
        keep = len_keep(rows * cols, self.mask_ratio)
        return random_mask(torch.rand(imgs.shape[0], rows * cols, device=imgs.device), keep), keep

    def _count_visible(self, mask: Tensor, imgs: Tensor) -> int:
        rows, cols = grid_size(imgs.shape[-2], imgs.shape[-1], self.mask_patch_size)
        if mask.dtype != torch.bool or mask.shape != (imgs.shape[0], rows * cols):
            raise ValueError(
                f"mask must be torch.bool {[imgs.shape[0], rows * cols]}; got {mask.dtype} {list(mask.shape)}"
            )
        counts = set((~mask).sum(dim=1).tolist())
        if len(counts) != 1 or counts == {0}:
            raise ValueError(
                f"mask must leave the same number of patches visible in every image, at least 1; got {sorted(counts)}"
            )
        return counts.pop()


def _check_one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")


def _created(name: str, arguments: dict[str, Any]) -> ConvNeXt:
    try:
        return create_backbone(name, **arguments)
    except TypeError as error:
        _, unknown, argument = str(error).partition("unexpected keyword argument ")
        if not unknown:
            raise
        own = [each for each in inspect.signature(FCMAE).parameters if each != "backbone_kwargs"]
        raise TypeError(
            f"FCMAE got an {unknown}{argument}; its own are {', '.join(own)}, and the others go to create_backbone"
        ) from error


def _compiles(target: Target, seen: Seen, pred: Tensor) -> bool:
    """Code of others may not compile, and a kernel need not."""
    ours = type(target).__module__.startswith("fcmae.") and getattr(target, "compiles", True)
    return ours and not has_own_errors(target, seen, pred)


def _decode(decoder: Decoder, visible: Sequence[Tensor], mask: Tensor, index: Tensor) -> dict[str, Tensor]:
    return decoder(visible, mask, index)


def init_official(model: FCMAE) -> None:
    """Draws the weights of a model with the decoder ``light`` as the official code does.

    It calls ``trunc_normal_`` without a std and so gets 1 in the encoder's depthwise and linear layers, the stem and
    the decoder's convolutions.
    """
    for name, module in model.named_modules():
        if name.startswith("decoder.blocks") and isinstance(module, nn.Linear):
            module.reset_parameters()  # never touched by the official init
        elif name.startswith("backbone.head") or "downsample" in name:
            continue  # the only convolutions for which the official code does pass std 0.02
        elif isinstance(module, nn.Conv2d | nn.Linear):
            trunc_normal_(module.weight)
