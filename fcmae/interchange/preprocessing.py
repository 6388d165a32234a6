"""What an export's model card says about making the network's input, where the other library's transform does not."""

from typing import Any

from fcmae.config import DataConfig
from fcmae.config.normalize import CLIPPING
from fcmae.data.pixels.jpeg import IMAGE_MODES
from fcmae.data.pixels.transforms import WARP_FROM
from fcmae.errors import WeightsError

LIBRARIES = {"timm": "timm's create_transform", "transformers": "The image processor"}


EXTRA = ("bit_depth", "pad", "crop_pct")
"""Keys of our data config that other libraries lack; their config.json has them under ``fcmae``."""
RARE = {
    **{"dtype": "uint", "channels": None, "nodata": None, "fit": "crop"},
    **{"normalize": "dataset", "low": None, "high": None},
}
"""More such keys, which are there where they have other values than these."""


def mean_and_std(data: DataConfig) -> tuple[list[float], list[float]]:
    """Of the channels; 0 and 1 where the pixels are normalised already."""
    return data.mean or [0.0] * data.in_chans, data.std or [1.0] * data.in_chans


def extra(data: DataConfig) -> dict[str, Any]:
    """What an export's config.json holds under the key ``fcmae``."""
    read = data.layout
    values = {**vars(data), "channels": data.channels and {"input": read.input, "of": read.of}}
    return {name: values[name] for name in (*EXTRA, *RARE) if name not in RARE or values[name] != RARE[name]}


def read_extra(config: dict[str, Any]) -> dict[str, Any]:
    """The values of :func:`extra` in a config.json, if it is one of ours."""
    known = config.get("fcmae")
    return {name: known[name] for name in (*EXTRA, *RARE) if name in known} if isinstance(known, dict) else {}


def check_normalisation(data: DataConfig, to: str) -> None:
    """Raises WeightsError if the preprocessing of library ``to`` cannot say how these images are normalised.

    A number of channels or bits that it cannot read is noticed; values that are off are not.
    """
    if to in LIBRARIES and data.normalize in ("image", *CLIPPING):
        what = "has one mean and deviation for all images" if data.normalize == "image" else "does not clip pixels"
        raise WeightsError(
            f"{LIBRARIES[to]} {what} (data.normalize={data.normalize}); export it --to onnx, official or viscy, or use "
            "encoder.safetensors and fcmae.load"
        )


def shortcoming(data: DataConfig, to: str) -> str:
    """In which way the transform of library ``to`` differs from our evaluation; nothing if it does the same."""
    if to not in LIBRARIES:
        return ""
    reasons = []
    if not data.mean and data.normalize != "image":
        reasons.append("normalises pixels, these are normalised already")
    if data.dtype != "uint":
        reasons.append("reads 8 bits per channel, these images are float32 in their own units")
    elif data.bit_depth != 8:
        reasons.append(f"reads 8 bits per channel, these images use {data.bit_depth}")
    if to == "timm" and data.in_chans not in (1, 3):
        reasons.append(f"reads grey or RGB images, these have {data.in_chans} channels")
    if data.channels is not None:
        reasons.append(f"does not choose channels {data.layout.input} (data.channels)")
    if data.nodata is not None:
        reasons.append(f"does not replace pixels without a value (data.nodata={data.nodata})")
    if data.pad or data.fit == "pad":
        reasons.append(f"does not pad (data.pad={data.pad})" if data.pad else "does not pad (data.fit=pad)")
    if to == "transformers" and data.size[0] != data.size[1] and max(data.size) < WARP_FROM:
        reasons.append("does not keep the aspect ratio for a size that is not square")
    return f"{LIBRARIES[to]} {'; '.join(reasons)}. Use these steps instead." if reasons else ""


def steps(data: DataConfig) -> str:
    """Python code that makes the input ``imgs`` of a file's ``pixels`` as our evaluation does, but for its rounding."""
    height, width = data.size
    lines = ["import numpy as np", "import torch", "from torchvision.transforms.v2 import InterpolationMode"]
    lines += ["from torchvision.transforms.v2 import functional as F", ""]
    count, whole = data.layout.of, data.dtype == "uint"
    if whole and data.bit_depth == 8 and count in IMAGE_MODES:
        lines.insert(2, "from PIL import Image")
        mode = IMAGE_MODES[count]
        lines.append(f'pixels = np.atleast_3d(Image.open("FILE").convert("{mode}")).transpose(2, 0, 1)')
    else:
        what = f"of {data.bit_depth} bits as integers" if whole else "in their own units"
        lines.append(f"# {count} channels {what} [C, H, W]; TIFF: tifffile.imread")
        lines.append('pixels = np.load("FILE.npy")')
    if data.channels is not None:
        lines.append(f"pixels = pixels[{data.layout.input}]")
    if data.marks is not None:
        lines.append(f"missing = torch.from_numpy({_missing(data)})[None]")
    scale = f" / {2**data.bit_depth - 1}" if whole else ""
    lines.append(f"imgs = torch.from_numpy(pixels.astype(np.float32))[None]{scale}")
    mean, fixed = f"torch.tensor({list(data.mean)})[:, None, None]", f"{list(data.mean)}, {list(data.std)}"
    clip = ".clamp(-1, 1)" * data.clips
    if data.normalize == "image":
        lines.append("channels = imgs[0].flatten(1).double()")
        if data.marks is not None:
            lines.append("channels = channels.masked_fill(missing[0].flatten(1), torch.nan)")
        lines.append("mean = channels.nanmean(1)")
        lines.append("std = (channels - mean[:, None]).square().nanmean(1).sqrt()")
        mean, fixed = "mean.float()[:, None, None]", "mean.tolist(), std.tolist()"
    if data.marks is not None:
        white = (255 if data.bit_depth == 8 else 65535) if whole else 0
        if white and data.normalize != "image":  # as stored
            mean = f"torch.tensor({[round(white * value) / white for value in data.mean]})[:, None, None]"
        lines.append(f"imgs = torch.where(missing, {mean}, imgs)")
    if data.fit == "pad":
        lines += [
            f"top, left = (max(0, side - most) // 2 for side, most in zip(imgs.shape[2:], [{height}, {width}]))",
            f"window = imgs[..., top : top + {height}, left : left + {width}]",
            f"imgs = {mean} * torch.ones(1, 1, {height}, {width})",
            "imgs[..., : window.shape[2], : window.shape[3]] = window",
            f"imgs = F.normalize(imgs, {fixed}){clip}",
        ]
        return "\n".join(lines)
    if data.marks is not None:
        lines += _resized_with_holes(data, mean)
        lines.append(f"imgs = F.normalize(imgs, {fixed}){clip}")
        return "\n".join(lines)
    if data.pad:
        lines.append(f"imgs = F.pad(imgs, [{data.pad}])")
    if max(data.size) >= WARP_FROM:
        lines.append(f"size = [{height}, {width}]")
    else:
        resized = [int(side / data.crop_pct) for side in data.size]
        lines.append(f"scale = max({resized[0]} / imgs.shape[2], {resized[1]} / imgs.shape[3])")
        rounding = "int" if height == width else "round"
        lines.append(f"size = [{rounding}(scale * side + 1e-6) for side in imgs.shape[2:]]")
    lines += [
        f"imgs = F.resize(imgs, size, InterpolationMode.BICUBIC, antialias=True){'.clamp(0, 1)' * whole}",
        f"imgs = F.center_crop(imgs, [{height}, {width}])",
        f"imgs = F.normalize(imgs, {fixed}){clip}",
    ]
    return "\n".join(lines)


def _resized_with_holes(data: DataConfig, mean: str) -> list[str]:
    """Python code that crops and resizes, and replaces what is resized from pixels without a value, too."""
    height, width = data.size
    lines = [
        "def reads(missing, dim, side):  # whether the filter reads a missing pixel",
        "    before = missing.shape[dim]",
        "    if before == side:",
        "        return missing",
        "    centre = before / side * (torch.arange(side, dtype=torch.float64) + 0.5)",
        "    reach = 2 * max(before / side, 1)",
        "    first, end = (centre - reach + 0.5).long().clamp(min=0), (centre + reach + 0.5).long().clamp(max=before)",
        "    counts = torch.nn.functional.pad(missing.movedim(dim, -1).cumsum(-1), (1, 0))",
        "    return (counts[..., end] > counts[..., first]).movedim(-1, dim)",
        "",
    ]
    if max(data.size) < WARP_FROM:
        lines += [
            f"scale = {data.crop_pct} * min(imgs.shape[2] / {height}, imgs.shape[3] / {width})",
            f"rows, cols = max(1, round(scale * {height})), max(1, round(scale * {width}))",
            "top, left = (imgs.shape[2] - rows) // 2, (imgs.shape[3] - cols) // 2",
            "imgs, missing = (x[..., top : top + rows, left : left + cols] for x in (imgs, missing))",
        ]
    limits = ".clamp(0, 1)" * (data.dtype == "uint")
    return [
        *lines,
        f"imgs = F.resize(imgs, [{height}, {width}], InterpolationMode.BICUBIC, antialias=True){limits}",
        f"missing = reads(reads(missing, 2, {height}), 3, {width})",
        f"imgs = torch.where(missing, {mean}, imgs)",
    ]


def _missing(data: DataConfig) -> str:
    """Python code for the pixels without a value."""
    marks = data.marks or []
    if data.dtype == "uint":
        marks = [-1 if mark in (None, "nan") else mark for mark in marks]
        return f"pixels == np.array({marks})[:, None, None]"
    numbers = ", ".join("np.nan" if mark in (None, "nan") else repr(mark) for mark in marks)
    return f"np.isnan(pixels) | (pixels == np.array([{numbers}])[:, None, None])"
