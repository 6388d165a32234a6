"""Decoders: mask tokens in the gaps, and a linear prediction of each target per patch.

``light`` is the paper's (ConvNeXt V2, arXiv 2301.00808, section 3.1): ConvNeXt V2 blocks on the last stage's features.
``unet`` reads the features of all stages.
"""

from collections.abc import Mapping, Sequence

import torch
from timm.models.convnext import ConvNeXtBlock
from torch import Tensor, nn

from fcmae import kernels
from fcmae.engines import convnext
from fcmae.masks.patches import upsample_mask
from fcmae.models.unet import UNet, finer, init_weights, run_block


class LightDecoder(nn.Module):
    """Predicts the targets at every site of the encoder's last stage from the visible sites.

    Args:
        in_dim: D, the encoder's width.
        embed_dim: the decoder's width (512 in the paper).
        depth: the number of blocks (1 in the paper).
        out_dims: values predicted per patch, by the name of the target; each target has a linear head.
        split: patches per side of a site. The head of a site predicts split * split patches.
    """

    all_stages = False

    def __init__(self, in_dim: int, embed_dim: int, depth: int, out_dims: Mapping[str, int], split: int = 1) -> None:
        super().__init__()
        self.split = split
        self.proj = nn.Linear(in_dim, embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(embed_dim))
        self.blocks = nn.Sequential(*(ConvNeXtBlock(embed_dim, use_grn=True, ls_init_value=None) for _ in range(depth)))
        # The map is channels last, and so is the gradient of a convolution's weight that data parallelism exchanges.
        self.blocks.to(memory_format=torch.channels_last)
        self.heads = _add_heads(self, embed_dim, {name: split * split * dim for name, dim in out_dims.items()})
        init_weights(self)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, visible: Sequence[Tensor], mask: Tensor, index: Tensor) -> dict[str, Tensor]:
        """Predicts every patch of the image.

        Args:
            visible: ``[N, V, s, s, D]``, what an engine returns: the features of the last stage.
            mask: bool ``[N, rows, cols]``, True = masked, on the grid of mask patches.
            index: int64 ``[N, V]``, the positions of the visible mask patches on that grid.

        Returns:
            ``[N, L, dim]`` by the name of the target, L patches in row-major order.
        """
        x = _with_mask_tokens(convnext.linear(visible[-1], self.proj), mask, index, self.mask_token)
        for block in self.blocks:
            x = run_block(block, x)
        if self.split == 1:
            return _predict(self, x.flatten(1, 2))
        return {name: finer(pred, self.split).flatten(1, 2) for name, pred in _predict(self, x).items()}


class UNetDecoder(nn.Module):
    """Predicts the targets at every patch from the visible sites of all stages, by a :class:`.unet.UNet`.

    Args:
        dims, strides, width: as :class:`.unet.UNet`.
        out_dims: values predicted per patch, by the name of the target; each target has a linear head.
        merge: sites of the finest stage per side of a patch. A head is the mean over them of linear layers.
    """

    all_stages = True

    def __init__(
        self, dims: Sequence[int], strides: Sequence[int], width: int, out_dims: Mapping[str, int], merge: int
    ) -> None:
        super().__init__()
        self.merge = merge
        self.mask_tokens = nn.ParameterList(nn.Parameter(torch.zeros(width)) for _ in dims)
        self.unet = UNet(dims, strides, width)
        self.heads = _add_heads(self, merge * merge * width, out_dims)
        init_weights(self)
        for token in self.mask_tokens:
            nn.init.normal_(token, std=0.02)

    def forward(self, visible: Sequence[Tensor], mask: Tensor, index: Tensor) -> dict[str, Tensor]:
        """As :meth:`LightDecoder.forward`, with ``visible`` the features of every stage."""
        maps = [
            _with_mask_tokens(self.unet.lateral(level, sites), mask, index, self.mask_tokens[level])
            for level, sites in enumerate(visible)
        ]
        x = self.unet.join(maps)
        x = x.unflatten(2, (-1, self.merge)).unflatten(1, (-1, self.merge)).transpose(2, 3)
        # The mean over the sites of what each predicts, so that a head of many inputs starts and learns as one of few.
        return _predict(self, x.flatten(3).flatten(1, 2) / self.merge**2)


Decoder = LightDecoder | UNetDecoder


def _add_heads(decoder: nn.Module, width: int, out_dims: Mapping[str, int]) -> dict[str, str]:
    """Gives a decoder a linear layer for each target. Returns their names by those of the targets."""
    heads = {name: "pred" if name == "pixels" else f"pred_{name}" for name in out_dims}
    for name, dim in out_dims.items():
        decoder.add_module(heads[name], nn.Linear(width, dim))
    return heads


def _predict(decoder: Decoder, x: Tensor) -> dict[str, Tensor]:
    """What each target's linear layer gives of ``x``."""
    return {name: convnext.linear(x, getattr(decoder, head)) for name, head in decoder.heads.items()}


def _with_mask_tokens(x: Tensor, mask: Tensor, index: Tensor, token: Tensor) -> Tensor:
    """Packed ``[N, V, s, s, D]`` to a map ``[N, rows * s, cols * s, D]`` with the token at masked sites."""
    _, rows, cols = mask.shape
    s = x.shape[2]
    hidden = upsample_mask(mask, rows, cols, s).unsqueeze(1)
    x = kernels.scatter_patches(x, index, rows, cols)
    return torch.where(hidden, token.to(x.dtype).view(1, -1, 1, 1), x).permute(0, 2, 3, 1)
