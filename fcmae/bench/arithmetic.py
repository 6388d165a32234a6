"""Floating-point operations and bytes of a training step, as if only visible sites were computed."""

from torch import nn

from fcmae import precision
from fcmae.engines import convnext
from fcmae.models import FCMAE
from fcmae.models.backbone import stage_shapes
from fcmae.models.decoder import Decoder, LightDecoder


def visible_matmul_flops(model: FCMAE, keep: int, num_patches: int) -> float:
    """Floating-point operations of the linear layers in a step, an image, if only visible sites are computed.

    A multiply-add is two; a forward pass costs one product, a backward pass two. The decoder works on all sites.
    """
    sites = keep * (model.mask_patch_size / convnext.stem(model.backbone)[0].stride[0]) ** 2
    products = sites * convnext.stem(model.backbone)[0].weight.numel()
    for stage in convnext.stages(model.backbone):
        if isinstance(stage.downsample, nn.Sequential):
            conv = convnext.downsample(stage.downsample)[1]
            sites /= conv.stride[0] ** 2
            products += sites * conv.weight.numel()
        for block in convnext.blocks(stage):
            products += sites * (block.mlp.fc1.weight.numel() + block.mlp.fc2.weight.numel())
    return 3 * 2 * (products + decoder_products(model, keep, num_patches))


def decoder_products(model: FCMAE, keep: int, num_patches: int) -> float:
    """Multiply-adds of the decoder's linear layers, which work on all sites, but for those before the mask tokens."""

    def sites(stride: int) -> float:
        return num_patches * (model.mask_patch_size / stride) ** 2

    decoder, strides = model.decoder, stage_shapes(model.backbone)[1]
    of_visible: list[tuple[int, nn.Module]]
    of_all: list[tuple[int, nn.Module]]
    if isinstance(decoder, LightDecoder):
        of_visible = [(strides[-1], decoder.proj)]
        of_all = [(strides[-1], layers) for layers in (decoder.blocks, *_heads(decoder))]
    else:
        unet = decoder.unet
        of_visible = [*zip(strides, unet.laterals, strict=True)]
        of_all = [*zip(strides, unet.blocks, strict=True), *zip(strides[1:], unet.ups, strict=True)]
        of_all += [(model.pred_patch_size, head) for head in _heads(decoder)]
    products = sum(sites(stride) * _weights(layers) for stride, layers in of_all)
    return products + keep / num_patches * sum(sites(stride) * _weights(layer) for stride, layer in of_visible)


def _weights(layers: nn.Module) -> int:
    return sum(layer.weight.numel() for layer in layers.modules() if isinstance(layer, nn.Linear))


def _heads(decoder: Decoder) -> list[nn.Module]:
    return [getattr(decoder, head) for head in decoder.heads.values()]


def depthwise_traffic(model: FCMAE, batch_size: int, image_size: int, name: str) -> int:
    """Bytes that the encoder's depthwise convolutions have to move in a step: forward, input and weight gradient each
    read or write two arrays of the visible sites."""
    keep = model.len_keep(image_size, image_size)
    size = precision.dtype_of(name).itemsize
    side, total = model.mask_patch_size // convnext.stem(model.backbone)[0].stride[0], 0
    for stage in convnext.stages(model.backbone):
        if isinstance(stage.downsample, nn.Sequential):
            side //= convnext.downsample(stage.downsample)[1].stride[0]
        for block in convnext.blocks(stage):
            total += 3 * 2 * batch_size * keep * side**2 * block.conv_dw.weight.shape[0] * size
    return total
