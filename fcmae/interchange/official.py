"""State dicts of the official ConvNeXt V2 code (facebookresearch/ConvNeXt-V2) to and from ours.

The official code has two layouts of the encoder: ``sparse``, the pretraining checkpoint made of MinkowskiEngine
layers, and ``dense``, the published ``*_fcmae.pt`` files and classifiers. Both hold what a timm ConvNeXt holds.
"""

import re

from torch import Tensor

StateDict = dict[str, Tensor]

# (ours, official) for the names within a backbone; the first match wins.
_NAMES = (
    (r"stem\.(\d)\.", r"downsample_layers.0.\1."),
    (r"stages\.(\d+)\.downsample\.(\d)\.", r"downsample_layers.\1.\2."),
    (r"stages\.(\d+)\.blocks\.(\d+)\.conv_dw\.", r"stages.\1.\2.dwconv."),
    (r"stages\.(\d+)\.blocks\.(\d+)\.mlp\.fc(\d)\.", r"stages.\1.\2.pwconv\3."),
    (r"stages\.(\d+)\.blocks\.(\d+)\.mlp\.grn\.weight", r"stages.\1.\2.grn.gamma"),
    (r"stages\.(\d+)\.blocks\.(\d+)\.mlp\.grn\.bias", r"stages.\1.\2.grn.beta"),
    (r"stages\.(\d+)\.blocks\.(\d+)\.", r"stages.\1.\2."),
    (r"head\.norm\.", r"norm."),
    (r"head\.fc\.", r"head."),
)


def dense_name(name: str) -> str:
    """The official dense name of a backbone parameter, ``stem.0.weight`` to ``downsample_layers.0.0.weight``."""
    for ours, official in _NAMES:
        renamed, matched = re.subn(f"^{ours}", official, name)
        if matched:
            return renamed
    raise ValueError(f"{name!r} is not a parameter of a ConvNeXt backbone")


def sparse_name(name: str) -> str:
    """The official sparse name of a backbone parameter, without the prefix ``encoder.``."""
    dense = dense_name(name)
    if dense.startswith("downsample_layers.0"):
        return dense  # the stem is an ordinary convolution there too
    dense = re.sub(r"(pwconv\d)\.", r"\1.linear.", dense)
    dense = re.sub(r"(stages\.\d+\.\d+\.norm|downsample_layers\.\d+\.0)\.", r"\1.ln.", dense)
    return re.sub(r"(dwconv|downsample_layers\.\d+\.1)\.weight", r"\1.kernel", dense)


def _decoder_name(name: str) -> str:
    """The official name of a parameter of our decoder."""
    if name.startswith("blocks."):
        _, index, rest = name.split(".", 2)
        return dense_name(f"stages.0.blocks.{index}.{rest}").replace("stages.0.", "decoder.", 1)
    return name


def _from_official_value(official: Tensor, like: Tensor) -> Tensor:
    """An official tensor in the shape of ours.

    MinkowskiEngine stores kernels as [k * k, (in,) out] with the x offset fastest-varying last: viewed as
    [k, k, in, out] they are indexed [ix, iy].
    """
    if like.ndim == 4 and official.ndim in (2, 3) and official.shape[0] == like.shape[2] * like.shape[3]:
        k = like.shape[-1]
        # depthwise [k*k, C] has one input channel for each output
        kernel = official.view(k, k, 1, -1) if official.ndim == 2 else official.view(k, k, *official.shape[1:])
        return kernel.permute(3, 2, 1, 0).contiguous()
    return official.reshape(like.shape) if official.numel() == like.numel() else official


def _to_official_value(name: str, value: Tensor) -> Tensor:
    """Our tensor in the shape of the official pretraining checkpoint, ``name`` being its name there."""
    if name.endswith(".kernel"):
        kernel = value.permute(3, 2, 1, 0)  # [ix, iy, in, out]
        flat = kernel.reshape(-1, *kernel.shape[2:])
        return (flat[:, 0] if "dwconv" in name else flat).contiguous()
    if name.startswith("encoder.") and (".grn." in name or re.search(r"(dwconv|layers\.[1-9]\d*\.1)\.bias", name)):
        return value.view(1, -1)
    if ".grn." in name:
        return value.view(1, 1, 1, -1)
    if name == "mask_token":
        return value.view(1, -1, 1, 1)
    if name in ("proj.weight", "pred.weight"):
        return value[:, :, None, None]
    if "pwconv" in name and name.endswith("weight"):
        return value.flatten(1)  # timm's small models have 1 x 1 convolutions here
    return value


def pretraining_names(ours: StateDict) -> dict[str, str]:
    """Our FCMAE parameter names to the official pretraining checkpoint's; the backbone's head is not in it."""
    names = {}
    for name in ours:
        if name.startswith("backbone.head."):
            continue
        part, rest = name.split(".", 1)
        names[name] = f"encoder.{sparse_name(rest)}" if part == "backbone" else _decoder_name(rest)
    return names


def from_pretraining(official: StateDict, like: StateDict) -> StateDict:
    """An official pretraining state dict (sparse layout) as one of ours.

    Args:
        official: ``encoder.*``, ``decoder.*``, ``proj.*``, ``mask_token``, ``pred.*``.
        like: the state dict of the FCMAE to load into; gives names, shapes and the head, which is kept.

    Raises ValueError naming the keys that are missing, left over, or of another shape.
    """
    return _translate(official, like, pretraining_names(like))


def to_pretraining(ours: StateDict) -> StateDict:
    """The inverse of :func:`from_pretraining`."""
    return {theirs: _to_official_value(theirs, ours[name]) for name, theirs in pretraining_names(ours).items()}


def from_classifier(official: StateDict, like: StateDict) -> StateDict:
    """An official dense classifier, or ``*_fcmae.pt`` if ``like`` has no head, as a timm ConvNeXt's state dict.

    Raises ValueError naming the keys that are missing, left over, or of another shape.
    """
    return _translate(official, like, {name: dense_name(name) for name in like})


def _translate(official: StateDict, like: StateDict, names: dict[str, str]) -> StateDict:
    missing = sorted(set(names.values()) - set(official))
    unexpected = sorted(set(official) - set(names.values()))
    if missing or unexpected:
        raise ValueError(
            f"the official state dict does not fit the model: missing {missing or 'none'}, "
            f"unexpected {unexpected or 'none'}"
        )
    ours = dict(like)
    wrong = []
    for name, theirs in names.items():
        ours[name] = _from_official_value(official[theirs], like[name])
        if ours[name].shape != like[name].shape:
            wrong.append(f"{theirs} {list(official[theirs].shape)} for {list(like[name].shape)}")
    if wrong:
        raise ValueError(f"the official state dict has tensors of other shapes than the model: {', '.join(wrong)}")
    return ours
