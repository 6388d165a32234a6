"""Decoders: mask tokens in the gaps, and a linear prediction of each target per patch.

``light`` is the paper's (ConvNeXt V2, arXiv 2301.00808, section 3.1): ConvNeXt V2 blocks on the last stage's features.
``unet`` reads the features of all stages.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from timm.models.convnext import ConvNeXtBlock
from torch import Tensor, nn

from fcmae import kernels
from fcmae.engines import convnext, fused, tiles
from fcmae.kernels import precompile
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
        return {name: self._patches(pred) for name, pred in _predict(self, x).items()}

    def _patches(self, pred: Tensor) -> Tensor:
        """What a head gives of a map, ``[N, h, w, split * split * dim]``, to ``[N, L, dim]``."""
        return pred.flatten(1, 2) if self.split == 1 else finer(pred, self.split).flatten(1, 2)

    def by_kernels(self, visible: Sequence[Tensor], mask: Tensor, index: Tensor) -> dict[str, Tensor]:
        """As :meth:`forward`, by operations of our own; for features for which :meth:`has_kernels` holds."""
        from fcmae.kernels import layers  # needs Triton

        sites, (images, rows, cols) = visible[-1], mask.shape
        layout = tiles.best(rows * sites.shape[2], cols * sites.shape[2])
        count, places = images * layout.height * layout.width, tiles.places(index, rows, cols, sites.shape[2], layout)
        x = layers.linear(sites.flatten(0, 3), self.proj.weight, self.proj.bias)
        x = layers.with_tokens(x, self.mask_token, places, count).view(images, -1, layout.side, layout.side, x.shape[1])
        where = tiles.all_visible(images, layout, x.device)
        for block, copies in fused.with_copies(self.blocks, x):
            assert copies is not None
            x = fused.run(block, x, copies, where, "image")
        x = tiles.untiled(x, layout)
        heads = {name: getattr(self, head) for name, head in self.heads.items()}
        return {name: self._patches(layers.linear(x, head.weight, head.bias)) for name, head in heads.items()}

    def has_kernels(self, visible: Sequence[Tensor], mask: Tensor) -> bool:
        """Whether all of it runs as operations on the features ``visible``: 16 bits, on a GPU."""
        sites = visible[-1]
        side = tiles.best(mask.shape[1] * sites.shape[2], mask.shape[2] * sites.shape[2]).side
        tile = sites.new_empty(0, 1, side, side, self.proj.out_features)
        whole = (isinstance(block, ConvNeXtBlock) and fused.is_whole(block, tile) for block in self.blocks)
        return len(self.blocks) > 0 and all(whole)

    def shapes(self, imgs: Tensor, stride: int) -> Iterator[precompile.Shape]:
        """What the kernels for images ``[N, C, H, W]`` are specialised for; ``stride``: pixels per side of a site."""
        height, width, side = tiles.best(imgs.shape[2] // stride, imgs.shape[3] // stride)
        dtype, rows, cols = precompile.dtype_of(imgs), height // side, width // side
        for block in self.blocks[:1]:  # all are alike, and there may be none
            assert isinstance(block, ConvNeXtBlock)
            channels, _, kernel, _ = block.conv_dw.weight.shape
            yield precompile.DepthwiseShape((rows, cols), rows * cols, side, channels, kernel, dtype)
            yield precompile.SumsShape(kernel)
            yield precompile.NormShape(channels, dtype)
            yield precompile.GeluGrnShape(height * width, block.mlp.fc1.weight.shape[0], dtype)
            yield precompile.ResidualShape(channels, dtype, drops=False)


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
