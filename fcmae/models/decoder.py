"""The light decoder: mask tokens in the gaps, ConvNeXt V2 blocks, a linear prediction (arXiv 2301.00808, 3.1)."""

from collections.abc import Mapping

import torch
from timm.models.convnext import ConvNeXtBlock
from torch import Tensor, nn

from fcmae import kernels
from fcmae.engines import convnext


class Decoder(nn.Module):
    """Predicts the targets at every site of the encoder's last stage from the visible sites.

    Args:
        in_dim: D, the encoder's width.
        embed_dim: the decoder's width (512 in the paper).
        depth: the number of blocks (1 in the paper).
        out_dims: values predicted per site, by the name of the target; each target has a linear head.
    """

    def __init__(self, in_dim: int, embed_dim: int, depth: int, out_dims: Mapping[str, int]) -> None:
        super().__init__()
        self.proj = nn.Linear(in_dim, embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(embed_dim))
        self.blocks = nn.Sequential(*(ConvNeXtBlock(embed_dim, use_grn=True, ls_init_value=None) for _ in range(depth)))
        # The map is channels last, and so is the gradient of a convolution's weight that data parallelism exchanges.
        self.blocks.to(memory_format=torch.channels_last)
        self.heads = {name: "pred" if name == "pixels" else f"pred_{name}" for name in out_dims}
        for name, dim in out_dims.items():
            self.add_module(self.heads[name], nn.Linear(embed_dim, dim))

    def forward(self, visible: Tensor, mask: Tensor, index: Tensor) -> dict[str, Tensor]:
        """Predicts every site of the grid.

        Args:
            visible: ``[N, V, s, s, D]``, the encoder's output.
            mask: bool ``[N, rows * s, cols * s]``, True = masked, on the grid of sites.
            index: int64 ``[N, V]``, the positions of the visible patches on the grid of rows x cols patches.

        Returns:
            ``[N, L, dim]`` by the name of the target, L = rows * s * cols * s sites in row-major order.
        """
        x = convnext.linear(visible, self.proj)
        s = x.shape[2]
        x = kernels.scatter_patches(x, index, mask.shape[1] // s, mask.shape[2] // s)
        x = torch.where(mask.unsqueeze(1), self.mask_token.to(x.dtype).view(1, -1, 1, 1), x).permute(0, 2, 3, 1)
        for block in self.blocks:
            assert isinstance(block, ConvNeXtBlock)
            h = block.conv_dw(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            x = x + convnext.pointwise(block, h, grn_scope="image")
        x = x.flatten(1, 2)
        return {name: convnext.linear(x, getattr(self, head)) for name, head in self.heads.items()}
