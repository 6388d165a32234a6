"""``fcmae.save``: a model that was trained in a loop of the user's own, as a checkpoint."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timm.models.convnext import ConvNeXt

from fcmae.checkpoints import encoder
from fcmae.config import ClassifierConfig, DataConfig, FCMAEConfig, FinetuneConfig, PretrainConfig, to_dict
from fcmae.errors import UsageError
from fcmae.interchange.network import Given, Imported, Structure
from fcmae.models import FCMAE
from fcmae.models.decoder import Decoder, UNetDecoder
from fcmae.plugins import class_name
from fcmae.targets import Pixels


def save(
    model: FCMAE | ConvNeXt,
    path: str | Path,
    *,
    image_size: int | tuple[int, int] = 224,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    bit_depth: int = 8,
    classes: Sequence[str] | None = None,
) -> None:
    """Writes a checkpoint that ``fcmae.load``, every command and ``init_from`` read. It holds no optimizer.

    Args:
        model: an FCMAE, or a timm ConvNeXt that is a classifier.
        path: the file to write, such as ``model.pt``; one that is there is replaced.
        image_size: of the training images, in pixels: the side, or (height, width).
        mean, std: of pixel values in 0..1, one number per channel; None = ImageNet's, for three channels only.
        bit_depth: bits per channel that the images use, 8 to 16.
        classes: a classifier's names of classes; None = 0, 1, 2, ...

    Raises UsageError for a model that a checkpoint cannot hold.
    """
    backbone = model.backbone if isinstance(model, FCMAE) else model
    if not isinstance(backbone, ConvNeXt) or (backbone is model and not backbone.num_classes):
        raise UsageError(f"model must be an FCMAE or a timm ConvNeXt with a classifier; got {type(model).__name__}")
    normalised: dict[str, Any] = {
        name: list(value) for name, value in (("mean", mean), ("std", std)) if value is not None
    }
    if backbone.in_chans != 3 and len(normalised) < 2:
        raise UsageError(f"mean and std must be given for a model of {backbone.in_chans} channels")
    data = DataConfig(in_chans=backbone.in_chans, image_size=image_size, bit_depth=bit_depth, **normalised)
    network = Structure.of(backbone).backbone_config(_architecture(backbone))
    weights = {key: value.detach().cpu() for key, value in model.state_dict().items() if "backbone.head.fc." not in key}
    if isinstance(model, FCMAE):
        imported = Imported(_pretrain_config(model, data, network), weights)
    else:
        cfg = FinetuneConfig(data=data, model=ClassifierConfig(**network))
        imported = Imported(cfg, weights, Given(list(classes) if classes else None).names(backbone.num_classes))
    imported.write(Path(path), "fcmae.save")


def save_backbone(backbone: ConvNeXt, path: Path | None) -> dict[str, Any]:
    """Writes a timm ConvNeXt without its classifier as an encoder file, for ``init_from``; None writes nothing.

    Returns:
        The keys of group ``model`` that build this network.

    Raises WeightsError for a network that the config cannot describe.
    """
    network = Structure.of(backbone).backbone_config(_architecture(backbone))
    cfg = PretrainConfig(data=DataConfig(in_chans=backbone.in_chans), model=FCMAEConfig(**network))
    if path is not None:
        weights = {name: value for name, value in backbone.state_dict().items() if not name.startswith("head.fc.")}
        encoder.write(path, {"config": to_dict(cfg), "step": 0, "model": weights})
    return network


def _architecture(backbone: ConvNeXt) -> str | None:
    """The name that timm created it by."""
    description: Any = backbone.pretrained_cfg
    return (description or {}).get("architecture")


def _decoder_config(decoder: Decoder) -> dict[str, Any]:
    if isinstance(decoder, UNetDecoder):
        return {"decoder": "unet", "decoder_embed_dim": decoder.unet.width}
    return {"decoder_embed_dim": decoder.proj.out_features, "decoder_depth": len(decoder.blocks)}


def _pretrain_config(model: FCMAE, data: DataConfig, network: dict[str, Any]) -> PretrainConfig:
    cfg = FCMAEConfig(
        **network,
        mask_ratio=model.mask_ratio,
        mask_patch_size=model.mask_patch_size,
        pred_patch_size=model.pred_patch_size,
        **_decoder_config(model.decoder),
        grn_scope=model.grn_scope,
    )
    target = {}
    for name, made in model.targets.items():
        if type(made) is not Pixels:
            raise UsageError(f"target {name} must be of fcmae.targets.Pixels to be saved; got {class_name(made)}")
        weight = model.target_weights[name]
        target[name] = {"_target_": "fcmae.targets.Pixels", "norm": made.norm, "loss": made.loss_name, "weight": weight}
    return PretrainConfig(data=data, model=cfg, target=target)
