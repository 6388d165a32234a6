"""The minkowski engine: the backbone's weights run by MinkowskiEngine, as the official code runs its own.

MinkowskiEngine (Choy et al., arXiv 1904.08755) keeps a sparse tensor as a matrix of features, one row per site, with a
matrix of coordinates, and finds neighbours by hashing them. The order of the rows is undefined. It convolves in float32
or float64, so its layers do not use autocast. With several threads, or on a GPU, the order of the neighbours changes,
so results are not the same to the bit.

The coordinates here are (image, column, row). MinkowskiEngine numbers a kernel's offsets with the first coordinate
fastest, so that they are in the order of torch's ``[ky, kx]``: its kernels are timm's weights, reshaped in every call.
"""

import functools
import math
import warnings
from collections.abc import Collection
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from timm.layers.grn import GlobalResponseNorm
from timm.models.convnext import ConvNeXt, ConvNeXtBlock
from torch import Tensor, nn

from fcmae.engines import convnext
from fcmae.engines.compiled import recomputed
from fcmae.kernels import gather_patches
from fcmae.masks.patches import grid_size, visible_indices

INSTALLER = "install_minkowski.sh"


def load(device: str = "cpu") -> ModuleType:
    """MinkowskiEngine. Raises ImportError, in one line, if it is missing or not built for that type of device."""
    try:
        engine = _import()
    except ImportError as error:
        reason = "not installed" if error.name == "MinkowskiEngine" else str(error)
        raise ImportError(f"engine minkowski: {reason} ({_installer()} builds and installs MinkowskiEngine)") from error
    if device == "cuda" and not engine.is_cuda_available():
        raise ImportError("engine minkowski: this MinkowskiEngine is built for the CPU only (trainer.device=cpu)")
    return engine


@functools.cache
def _import() -> ModuleType:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The MinkowskiEngine was compiled with CPU_ONLY")
        import MinkowskiEngine
    return MinkowskiEngine


def _installer() -> Path:
    """The script that installs it: launch/ at the top of a checkout, fcmae/launchers in an installed wheel."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "launchers" / INSTALLER
    return inside if inside.is_file() else package.parent / "launch" / INSTALLER


class Sites(NamedTuple):
    """Where the rows of a feature matrix ``[R, C]`` lie, R = N * V * s * s."""

    key: Any
    """MinkowskiEngine's name for this set of coordinates, within ``manager``."""
    manager: Any
    """Its coordinate manager: hash maps and kernel maps of one forward pass."""
    coordinates: Tensor
    """int32 ``[R, 3]``: image, column and row, in sites of the first stage."""
    images: int
    """N."""


@torch.compiler.disable
def minkowski(
    backbone: ConvNeXt,
    imgs: Tensor,
    mask: Tensor,
    *,
    keep: int,
    patch_size: int,
    grn_scope: str = "image",
    compiled: bool = False,
    recompute_stages: Collection[int] = (),
    all_stages: bool = False,
) -> list[Tensor]:
    """Runs ``backbone`` in MinkowskiEngine. See :data:`fcmae.engines.Engine` for the contract.

    ``compiled`` has no effect: torch.compile cannot compile it. Raises ImportError as :func:`load` does.
    """
    load(imgs.device.type)
    rows, cols = grid_size(imgs.shape[-2], imgs.shape[-1], patch_size)
    index = visible_indices(mask, keep)
    finest = patch_size // convnext.stem(backbone)[0].stride[0]
    x, sites = _stem(*convnext.stem(backbone), imgs, index, rows, cols)
    features = []
    for number, stage in enumerate(convnext.stages(backbone), start=1):
        run_block = recomputed(_block, number in recompute_stages or stage.grad_checkpointing)
        if isinstance(stage.downsample, nn.Sequential):
            x, sites = _downsample(*convnext.downsample(stage.downsample), x, sites)
        for block in convnext.blocks(stage):
            x = run_block(block, x, sites, grn_scope)
        if all_stages or number == len(backbone.stages):
            features.append((x, sites))
    if isinstance(backbone.norm_pre, nn.LayerNorm):
        features[-1] = convnext.layer_norm(x, backbone.norm_pre), sites
    return [_packed(x, sites, rows, cols, keep, finest) for x, sites in features]


def _packed(x: Tensor, sites: Sites, rows: int, cols: int, keep: int, finest: int) -> Tensor:
    """Features ``[R, C]`` in packed order: ``[N, V, s, s, C]``. For ``finest`` see ``size`` of :func:`_positions`."""
    order = _positions(sites.coordinates, rows, cols, finest).argsort()
    size = math.isqrt(len(x) // (sites.images * keep))
    return x[order].view(sites.images, keep, size, size, -1)


def _stem(
    conv: nn.Conv2d, norm: nn.LayerNorm, imgs: Tensor, index: Tensor, rows: int, cols: int
) -> tuple[Tensor, Sites]:
    """Sites of the first stage from the visible patches ``index`` ``[N, V]``: features ``[R, D]`` and where they lie.

    The coordinates come from the mask, not from the pixels: ``MinkowskiEngine.to_sparse`` drops sites that are zero.
    """
    patches = convnext.patchwise_conv(gather_patches(imgs, index, rows, cols), conv)
    coordinates = _coordinates(index, cols, patches.shape[2])
    x = _float32(convnext.layer_norm(patches, norm).flatten(0, 3))
    threads = torch.get_num_threads()
    tensor = load().SparseTensor(x, coordinates)
    torch.set_num_threads(threads)  # a coordinate manager takes as many as there are cores, for all of torch
    return _features_and_sites(tensor, len(imgs))


def _coordinates(index: Tensor, cols: int, size: int) -> Tensor:
    """int32 ``[N * V * size * size, 3]``: image, column and row of every site, packed order."""
    n, v = index.shape
    shape = (n, v, size, size)
    inside = torch.arange(size, device=index.device)
    image = torch.arange(n, device=index.device)[:, None, None, None]
    row = (index // cols * size)[:, :, None, None] + inside[:, None]
    col = (index % cols * size)[:, :, None, None] + inside
    return torch.stack([part.expand(shape).flatten() for part in (image, col, row)], dim=1).int()


def _positions(coordinates: Tensor, rows: int, cols: int, size: int) -> Tensor:
    """Numbers that ascend in packed order (image, patch, row and column in the patch), int64 ``[R]``.

    Args:
        coordinates: of :class:`Sites`.
        rows, cols: of patches in an image.
        size: sites of the first stage a side of a patch.
    """
    image, col, row = coordinates.long().unbind(dim=1)
    patch = (image * rows + row // size) * cols + col // size
    return (patch * size + row % size) * size + col % size


def _downsample(norm: nn.LayerNorm, conv: nn.Conv2d, x: Tensor, sites: Sites) -> tuple[Tensor, Sites]:
    """MinkowskiConvolution with timm's weight ``[out, in, k, k]`` as its kernel ``[k * k, in, out]``."""
    layer = _convolution_layer(conv.kernel_size[0], conv.bias is not None)
    kernel = conv.weight.flatten(2).permute(2, 1, 0)
    return _features_and_sites(_call(layer, kernel, conv.bias, convnext.layer_norm(x, norm), sites), sites.images)


def _block(block: ConvNeXtBlock, x: Tensor, sites: Sites, grn_scope: str) -> Tensor:
    """A ConvNeXt block on features ``[R, C]``, without drop path (off in pretraining)."""
    h = convnext.layer_norm(_depthwise(block.conv_dw, x, sites), block.norm)
    h = block.mlp.act(convnext.linear(h, block.mlp.fc1))
    grn = convnext.grn(block)
    if grn is not None:
        h = _grn(h, grn, sites, grn_scope)
    h = convnext.linear(h, block.mlp.fc2)
    if block.gamma is not None:
        h = h * block.gamma
    return x + h


def _depthwise(conv: nn.Conv2d, x: Tensor, sites: Sites) -> Tensor:
    """A depthwise layer of MinkowskiEngine with timm's weight ``[C, 1, k, k]`` as its kernel ``[k * k, C]``."""
    layer = _depthwise_layer(x.shape[1], conv.kernel_size[0], conv.bias is not None, x.is_cuda)
    return _call(layer, conv.weight.flatten(1).T, conv.bias, x, sites).F


def _call(layer: nn.Module, kernel: Tensor, bias: Tensor | None, x: Tensor, sites: Sites) -> Any:
    """The SparseTensor that a stock layer of MinkowskiEngine makes with these parameters instead of its own."""
    params = {"kernel": kernel.contiguous()} | ({} if bias is None else {"bias": bias[None]})
    tensor = load().SparseTensor(_float32(x), coordinate_map_key=sites.key, coordinate_manager=sites.manager)
    return torch.func.functional_call(layer, params, (tensor,))


def _features_and_sites(tensor: Any, images: int) -> tuple[Tensor, Sites]:
    """The parts of a SparseTensor."""
    return tensor.F, Sites(tensor.coordinate_map_key, tensor.coordinate_manager, tensor.C, images)


@functools.cache
def _convolution_layer(size: int, bias: bool) -> nn.Module:
    """A convolution whose kernel equals its stride, of one channel: the kernel in the call has the width."""
    return _create(load().MinkowskiConvolution, 1, 1, kernel_size=size, stride=size, bias=bias)


@functools.cache
def _depthwise_layer(channels: int, size: int, bias: bool, cuda: bool) -> nn.Module:
    """MinkowskiDepthwiseConvolution, which the ConvNeXt V2 authors' fork has for GPUs, or what all versions have."""
    engine = load()
    fork = getattr(engine, "MinkowskiDepthwiseConvolution", None) if cuda else None
    return _create(fork or engine.MinkowskiChannelwiseConvolution, channels, kernel_size=size, bias=bias)


def _create(layer: type[nn.Module], *args: int, **kwargs: Any) -> nn.Module:
    """A layer for images. Its own parameters are never used, and drawing them leaves the random state alone."""
    with torch.random.fork_rng(devices=()), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* should not be instantiated", DeprecationWarning)  # an autograd function
        return layer(*args, dimension=2, **kwargs)


def _grn(x: Tensor, grn: GlobalResponseNorm, sites: Sites, scope: str) -> Tensor:
    """GRN whose norm is over the rows of each image, by the coordinates' first column, or over all rows."""
    squares = _float32(x).square()
    if scope == "image":
        image = sites.coordinates[:, 0]
        sums = squares.new_zeros(sites.images, x.shape[1]).index_add(0, image, squares)
    else:
        image = torch.zeros_like(sites.coordinates[:, 0])
        sums = squares.sum(dim=0, keepdim=True)
    norm = torch.where(sums > 0, sums, 1).sqrt() * (sums > 0)  # gradient 0, not NaN, at an all-zero channel
    response = (norm / (norm.mean(dim=1, keepdim=True) + grn.eps)).to(x.dtype)
    return x + torch.addcmul(grn.bias.to(x.dtype), grn.weight.to(x.dtype), x * response[image])


def _float32(x: Tensor) -> Tensor:
    """``x`` in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
