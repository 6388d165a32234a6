"""``experiment=own/small``, ``medium`` and ``large``: pretraining settings by the number and the size of the images.

The rules are functions of plain numbers. The files of ``conf/experiment/own`` name them as ``${own:KEY,SIZE}``, so a
key that the user sets is taken instead, and what follows from it follows: the rate from the batch, the strides from the
image size. docs/own_recipes.md has them as a table.
"""

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from fcmae import ranks
from fcmae.config.checks import mistake
from fcmae.errors import ImageError, counted
from fcmae.imports import load
from fcmae.messages import print_once_rank0

SIDE, MULTIPLE = 224, 32
"""Pixels per side of larger images, and what smaller sizes are multiples of."""
PATCHES = 36
"""With fewer patches half of them stay visible instead of 40 %."""
LONG = 3
"""A ratio of sides from which boxes of 20 to 100 % of the area rarely fit: the sampler would take the same central box
for 15 % of the crops at 3, half of them at 4, and all at 7."""
LEAST_SHARE, DRAWN = 0.2, {"crop_scale": [0.2, 1.0], "crop_ratio": [3 / 4, 4 / 3], "fit": "crop"}
"""Of the largest box of a long image a crop covers so much; only where these keys have their defaults."""
CROPS = 4
"""Crops per image where decoding an image takes longer than training on a crop."""
LR, LR_BATCH, LEAST_LR, MOST_LR = 1.5e-3, 256, 5e-4, 2.4e-3
"""The rate for a batch; it grows with the root of the batch, within limits."""
WARMUP = 0.05
"""Share of the epochs."""
MOST_EPOCHS = 2000.0
FEW_IMAGES = 32
CPU_SAMPLES, CPU_BATCH = 200_000, 16
"""On a CPU: about an hour with Atto at 224 px on 2 cores. There a small batch costs no more per image, and a short run
has more steps."""


class Size(NamedTuple):
    """A class of data sets."""

    least: int
    """Images that such a data set has, at least."""
    samples: int
    """Crops that a GPU trains on."""
    batch: int
    """At most."""


SIZES = {
    "small": Size(0, 2_000_000, 256),
    "medium": Size(20_000, 20_000_000, 1024),
    "large": Size(300_000, 200_000_000, 4096),
}


class Facts(NamedTuple):
    """What the rules start from."""

    images: int
    height: int
    width: int
    """Pixels, the median over some images."""
    gpu: bool
    windows: int = 1
    """``data.windows_per_image``."""

    @property
    def crops(self) -> int:
        """Of an epoch."""
        return self.images * self.windows

    @property
    def text(self) -> str:
        each = f" of {self.windows:,} windows" if self.windows > 1 else ""
        return counted(self.images, "image") + each

    @property
    def shorter(self) -> int:
        return min(self.height, self.width)


def size_of(images: int) -> str:
    """The class of a data set of so many images."""
    return [name for name, size in SIZES.items() if images >= size.least][-1]


def image_size(shorter: int) -> int:
    """The median of the shorter sides, rounded down to a multiple of 32 px: from 32 to 224."""
    return min(SIDE, max(MULTIPLE, shorter // MULTIPLE * MULTIPLE))


def strides(side: int) -> list[int] | None:
    """A total stride of 32 from 160 px on, of 16 from 96 px on, else of 8 (docs/network.md)."""
    return None if side >= 160 else [2, 2, 2, 2] if side >= 96 else [1, 2, 2, 2]


def mask_ratio(patches: int) -> float:
    """0.6, the paper's; 0.5 of few patches, so that enough of them stay visible."""
    return 0.6 if patches >= PATCHES else 0.5


def batch(facts: Facts, size: str) -> int:
    """The power of two below a quarter of the images or windows, at least 32 if there are as many, and at most that of
    the size, on a CPU 16."""
    most = SIZES[size].batch if facts.gpu else CPU_BATCH
    return min(most, _power_of_two(max(min(32, facts.crops), facts.crops // 4)))


def _power_of_two(number: int) -> int:
    return 1 << (max(1, number).bit_length() - 1)


def is_long(facts: Facts) -> bool:
    """Whether one side is at least 3 times the other."""
    return max(facts.height, facts.width) >= LONG * facts.shorter


def crop_zoom(facts: Facts, size: tuple[int, int]) -> list[float] | None:
    """Of long images: crops at random places, of 20 to 100 % of the largest box with the shape of ``size``; else None.

    Args:
        size: height and width of a crop, ``data.image_size``.
    """
    if not is_long(facts):
        return None
    least = max(size[0] / facts.height, size[1] / facts.width)
    return [float(f"{factor:.3g}") for factor in (least, least / math.sqrt(LEAST_SHARE))]


def whole(facts: Facts) -> list[int]:
    """A ``data.image_size`` that shows a long image as a whole: its shorter side as always, the other in proportion."""
    side = image_size(facts.shorter)
    return [max(side, round(side * each / facts.shorter / MULTIPLE) * MULTIPLE) for each in (facts.height, facts.width)]


def crops_per_image(facts: Facts, batch_size: int) -> int:
    """4 on a GPU for images whose shorter side has 160 px or more, in batches of at least 64; else 1."""
    slow = facts.gpu and facts.shorter >= 160
    return CROPS if slow and batch_size >= 64 and batch_size % CROPS == 0 else 1


def lr(batch_size: int) -> float:
    """1.5e-3 for a batch of 256, growing with the root of the batch, from 5e-4 to 2.4e-3."""
    return float(f"{min(MOST_LR, max(LEAST_LR, LR * math.sqrt(batch_size / LR_BATCH))):.2g}")


def epochs(facts: Facts, size: str) -> float:
    """The size's budget of samples, on a CPU 200,000, over the crops of an epoch; at least 1 and at most 2,000."""
    samples = SIZES[size].samples if facts.gpu else min(SIZES[size].samples, CPU_SAMPLES)
    return float(min(MOST_EPOCHS, max(1, round(samples / facts.crops))))


def warmup(length: float) -> float:
    """5 % of the epochs."""
    return round(WARMUP * length, 4)


def recommend(facts: Facts, size: str) -> dict[str, Any]:
    """Every key that a size sets by the facts, and its value."""
    side = image_size(facts.shorter)
    stride = math.prod(strides(side) or [4, 2, 2, 2])
    size_of_batch, length = batch(facts, size), epochs(facts, size)
    return {
        "data.image_size": side,
        "data.crop_zoom": crop_zoom(facts, (side, side)),
        "data.crops_per_image": crops_per_image(facts, size_of_batch),
        "model.strides": strides(side),
        "model.mask_ratio": mask_ratio((side // stride) ** 2),
        "optim.global_batch_size": size_of_batch,
        "optim.lr": lr(size_of_batch),
        "schedule.epochs": length,
        "schedule.warmup_epochs": warmup(length),
    }


def resolve(key: str, size: str, *, _root_: Any) -> Any:
    """The value of ``${own:KEY,SIZE}`` in a composed config; None in a part of one, which OmegaConf asks for too."""
    if not {"data", "model", "optim", "schedule", "trainer"} <= set(_root_) or "device" not in _root_.trainer:
        return None
    facts = facts_of(_root_, size)
    rules: Mapping[str, Callable[[], Any]] = {
        "image_size": lambda: image_size(facts.shorter),
        "crop_zoom": lambda: crop_zoom(facts, _sides(_root_)) if _drawn(_root_) else None,
        "strides": lambda: strides(min(_sides(_root_))),
        "mask_ratio": lambda: mask_ratio(_patches(_root_)),
        "batch": lambda: batch(facts, size),
        "crops": lambda: crops_per_image(facts, _root_.optim.global_batch_size),
        "lr": lambda: lr(_root_.optim.global_batch_size),
        "epochs": lambda: epochs(facts, size),
        "warmup": lambda: warmup(_root_.schedule.epochs),
        "tenth": lambda: _root_.schedule.epochs / 10,
    }
    return rules[key]()


def _sides(root: Any) -> tuple[int, int]:
    side = root.data.image_size
    return (side, side) if isinstance(side, int) else (side[0], side[1])


def _drawn(root: Any) -> bool:
    """Whether crops are drawn by ``data.crop_scale`` and ``data.crop_ratio``, which nobody has set."""
    return all(root.data[key] == value for key, value in DRAWN.items())


def _patches(root: Any) -> int:
    height, width = _sides(root)
    given = root.model.strides
    stride = root.model.mask_patch_size or (math.prod(given) if given else 8 if root.model.stem_stride == 1 else 32)
    return (height // stride) * (width // stride)


def facts_of(root: Any, size: str) -> Facts:
    """The facts of a composed config's training images, or of a typical data set if the folder cannot be listed.

    A command reports such a folder later. Images that cannot be read are a mistake here, but not with several ranks:
    the files may be missing on one machine only, which the ranks find out together later.
    """
    from omegaconf import OmegaConf

    data = OmegaConf.to_container(root.data, resolve=False)
    assert isinstance(data, dict)
    known = {str(name): value for name, value in data.items() if "${own:" not in str(value)}
    gpu, found = _has_gpu(root.trainer.device), None
    try:
        found = _measured(json.dumps(known))
    except ImageError as error:
        if ranks.detect().size == 1:
            mistake(str(error))
    if found is None:
        return Facts(max(2000, SIZES[size].least), SIDE, SIDE, gpu)
    facts = Facts(*found, gpu, max(1, root.data.windows_per_image))
    _tell(root, facts, size)
    return facts


@functools.cache
def _has_gpu(device: str) -> bool:
    return device != "cpu" and bool(load("torch.cuda:is_available")())


@functools.cache
def _measured(data: str) -> tuple[int, int, int] | None:
    found: tuple[int, int, int] | None = load("fcmae.data.facts:measure")(json.loads(data))
    return found


def _tell(root: Any, facts: Facts, size: str) -> None:
    """Prints once what a config takes; nothing where its values have mistakes, which are reported later."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    keys = list(recommend(facts, size))
    parts = [key.split(".") for key in keys]
    given = str((facts, size, [root[group]._get_node(name)._value() for group, name in parts]))
    if given in _told:
        return
    _told.add(given)  # before the values are asked for, which ask for the facts again
    try:
        values = " ".join(f"{key}={_text(OmegaConf.select(root, key))}" for key in keys)
    except (OmegaConfBaseException, TypeError, ValueError):
        return
    where = "a GPU" if facts.gpu else "a CPU"
    print_once_rank0(f"own/{size}: {facts.text}, about {facts.height} x {facts.width} px, on {where}: {values}")
    if is_long(facts) and isinstance(root.data.image_size, int) and root.data.fit == "crop":
        side, shown = root.data.image_size, ",".join(map(str, whole(facts)))
        print_once_rank0(
            f"own/{size}: these images are long: evaluation and fine-tuning see the middle {side} x {side} px alone; "
            f"data.image_size=[{shown}] shows whole images (docs/own_recipes.md)"
        )
    fits = size_of(facts.crops)
    if fits != size:
        print_once_rank0(f"own/{size}: experiment=own/{fits} is made for {facts.text}")
    if facts.crops < FEW_IMAGES:
        print_once_rank0(
            f"own/{size}: {facts.text}: a network memorises so few; add images or start from published weights, such "
            "as init_from=timm:convnextv2_atto.fcmae"
        )


_told: set[str] = set()


def _text(value: Any) -> str:
    if isinstance(value, Sequence):
        return f"[{','.join(map(str, value))}]"
    return "null" if value is None else f"{value:g}"
