"""Groups ``data`` and ``augment``: where samples come from and how they become tensors."""

import math
import os
from dataclasses import dataclass, field
from typing import Any

from fcmae.config.channels import Layout, layout, no_data
from fcmae.config.checks import (
    as_list,
    check,
    check_class,
    check_not_negative,
    check_one_of,
    check_positive,
    check_ratio,
)
from fcmae.config.normalize import CLIPPING, NORMALIZE, bounds, fixed_scale
from fcmae.errors import counted
from fcmae.plugins import is_named

MAX_SIDE = 2**14
"""Pixels."""
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
DTYPES = ("uint", "float32")
SOURCES = ("imagefolder", "webdataset", "hf", "table", "array", "coco", "fashion_mnist", "synthetic")


def are_same_places(one: Any, other: Any) -> bool:
    """Whether two paths, or lists of some, name the same files or folders in the same order."""
    first, second = ([os.path.realpath(str(path)) for path in as_list(given)] for given in (one, other))
    return first == second


@dataclass
class DataConfig:
    """Group ``data``: where samples come from and how they become tensors."""

    name: str = "imagefolder"
    """The kind of source that ``path`` and ``val_path`` name."""
    path: Any = None
    """Training images. imagefolder: a folder, or a list of some; webdataset: tar files, as a folder of them, a pattern
    such as ``train-{0000..0146}.tar``, URLs of these, ``pipe:COMMAND``, or a list; hf: a folder, a name on the hub, or
    a URL of Parquet files; table: a
    .txt, .csv, .tsv or .parquet file; array: a Zarr folder, an HDF5 or .npy file, a pattern, or a list; coco: the
    folder of the images that data.annotations lists; fashion_mnist: the folder with the four .gz files, or None to look
    for them."""
    val_path: Any = None
    """Validation images, in the same way; hf, coco, a table with a column ``split``: None = the same as ``path``;
    fashion_mnist has its own."""
    annotations: str | None = None
    """coco: the COCO JSON file that lists the training images, with the boxes and masks of their objects
    (docs/detection.md)."""
    val_annotations: str | None = None
    """coco: the annotations of the validation images."""
    source: Any = None
    """A training source of your own instead of ``name``: ``_target_``, a class, and the arguments to call it with."""
    val_source: Any = None
    """A validation source of your own, in the same way."""
    target_path: Any = None
    """Target maps for objective=segment or translate: a folder, or one per folder of ``path``, with a file for each
    image under the same relative name; the ending may differ (docs/dense.md)."""
    val_target_path: Any = None
    """Maps of the validation images, in the same way. Must be given if ``val_path`` differs from ``path``, whose maps
    are taken otherwise."""
    split: str = "train"
    """hf, table: the training split."""
    val_split: str = "validation"
    """hf, table: the validation split."""
    image_column: str | None = None
    """hf, table: the column of images; None = hf: the only one of that kind; table: image, path, file or filename."""
    label_column: Any = None
    """hf, table: the column of labels: ClassLabel, integers or strings; None = the only ClassLabel, if there is one.
    table: or a list of columns of numbers, which may be empty, for objective=multilabel or objective=regress. array:
    the name of a 1-d array of classes or numbers in the same file, or of a .npy file beside it."""
    target_column: str | None = None
    """table: the column of the files with target maps, as ``target_path``."""
    root: str | None = None
    """table: the folder to which its paths are relative and which they may not leave; None = the table's own."""
    extensions: Any = None
    """imagefolder, webdataset: the endings of image files, a list such as [.jpg,.scan]; "" = names without one; "*" =
    all files. None = the endings of the formats that are read (docs/pixels.md)."""
    keys: str = "auto"
    """webdataset: where the names of samples end: ``first_dot`` or ``last_dot`` of the files' names; ``auto`` = at the
    first, unless names themselves have dots (docs/data.md)."""
    dataset: str | None = None
    """array: the array's name in an HDF5 file or a Zarr group; None = the only one, of OME-Zarr the largest
    resolution."""
    axes: str | None = None
    """array: a letter per axis: N or T images, C channels, Z planes, H or Y, W or X. None = OME-Zarr's own; else HW,
    NHW, NCHW or NZCHW, by their number."""
    planes: list[int] | None = None
    """array: the planes (Z) that are read; None = all."""
    planes_as: str = "channels"
    """array: ``channels`` folds the planes into the channels, all planes of the first channel first; ``samples`` makes
    each plane an image."""
    config_name: str | None = None
    """hf: the configuration ("subset") of data.path; None = the default."""
    revision: str | None = None
    """hf: the branch, tag or commit of data.path on the hub."""
    in_chans: int = 3
    """Channels: 1 grey, 3 RGB, 4 RGBA, which image files are converted to; others as the files have them."""
    channels: Any = None
    """Where the channels lie in the files, counted from 0; None = the files have data.in_chans. A list: those that the
    network gets. Pretraining: or a mapping with ``input``, this list; ``target``, channels that only targets get, with
    their ``mean`` and ``std``; ``classes``, such channels of class numbers; ``of``, the channels of a file if it has
    more (docs/data.md)."""
    bit_depth: int = 8
    """Bits per channel that the images use, 8 to 16. Above 8, pixels keep 16 bits until they are on the device."""
    dtype: str = "uint"
    """How pixels reach the device. ``uint``: uint8, or uint16 with a bit_depth above 8; 1 is white. ``float32``: in the
    units of the files, which may have uint8, uint16, int16, int32, float16 or float32."""
    image_size: Any = 224
    """Pixels per side, or [height, width]."""
    normalize: str = "dataset"
    """How pixels are normalised, per channel. ``dataset``: by ``mean`` and ``std``. ``image``: each image by its own
    mean and standard deviation over the pixels with a value. ``window``: clipped to ``low`` and ``high``, which become
    -1 and 1. ``percentile``: the same, with percentiles as ``fcmae prepare data.stats=true`` prints them. ``none``: not
    at all (docs/pixels.md)."""
    low: Any = None
    """normalize=window, percentile: what becomes -1, in the units of ``mean``: a number, or a list with one per
    channel."""
    high: Any = None
    """normalize=window, percentile: what becomes 1, likewise."""
    mean: list[float] = field(default_factory=lambda: list(IMAGENET_MEAN))
    """Mean of pixel values, one number per channel: in 0..1, with dtype=float32 in the units of the files. Empty, like
    ``std``, for a source of your own with pixels that are float32 and normalised already; so is the default for other
    channels than three, and with dtype=float32. Other values of ``normalize`` than dataset set both."""
    std: list[float] = field(default_factory=lambda: list(IMAGENET_STD))
    """Standard deviation of pixel values, one number per channel, in the units of ``mean``."""
    nodata: Any = None
    """What the files store for pixels without a value: a number, nan, or a list with one per channel (null = all have
    one). NaN of float32 is then meant, too. The network gets the mean instead; pretraining leaves such pixels out of
    the loss (docs/data.md)."""
    fit: str = "crop"
    """``crop``: crops are resized to data.image_size. ``pad``: they have that size in the image itself, enlarged as
    data.crop_zoom says in training, at a random place (in evaluation the middle); where the image is smaller, pixels
    without a value follow at the right and the bottom (docs/data.md)."""
    pad: int = 0
    """Pixels added on each side before anything else."""
    crop_scale: list[float] = field(default_factory=lambda: [0.2, 1.0])
    """Share of the area that a training crop covers."""
    crop_ratio: list[float] = field(default_factory=lambda: [3 / 4, 4 / 3])
    """Aspect ratio (width / height) of a training crop before it is resized."""
    crop_zoom: list[float] | None = None
    """Training crops at the images' own resolution, enlarged by a factor from [least, most], instead of crop_scale and
    crop_ratio; an image smaller than the crop is enlarged to fit, or with fit=pad padded."""
    scale_jitter: list[float] | None = None
    """objective=detect: training images are resized to fit data.image_size times a factor from [least, most], and cut
    where they are larger then. None = a factor of 1."""
    windows_per_image: int = 1
    """Pretraining: how often an epoch takes a crop of each image, for large images and data.fit=pad or crop_zoom."""
    foreground: Any = None
    """Crops with enough pixels whose mean over the channels, in the units of ``mean``, is above or below a value:
    ``{above: 0.2, share: 0.1}``, ``below`` instead, or both; ``tries`` crops are drawn, 10 by default, and that with
    the most is taken if none has enough. None = any crop."""
    hflip: float = 0.5
    """Probability that a training crop is mirrored left to right."""
    vflip: float = 0.0
    """Probability that a training crop is mirrored top to bottom, where images have no upright."""
    rot90: bool = False
    """Turn training crops by 0, 90, 180 or 270 degrees, each as often; needs a square image_size."""
    transforms: list[Any] = field(default_factory=list)
    """Further transforms of training crops, before normalisation: a list of ``_target_``, a class, and its arguments
    (docs/plugins.md)."""
    exact_decode: bool = False
    """Decode whole JPEGs even where a half, a quarter or an eighth of their size is enough for a training crop."""
    crops_per_image: int = 1
    """Pretraining: crops taken from each image that is read, for the same step, each with its own mask. An epoch still
    has as many samples as there are images."""
    cache: str | None = None
    """``ram``: all images are decoded at the start into memory that the processes of a machine share. Pretraining:
    ``gpu`` also keeps training images on the device, which cuts, resizes and mirrors the crops
    (docs/data_speed.md). Images are decoded whole, as with data.exact_decode=true."""
    decode_on: str = "cpu"
    """Pretraining: ``gpu`` decodes JPEGs by nvJPEG, whose pixels differ a little."""
    crop_pct: float = 0.875
    """Evaluation below 384 px: the short side is resized to image_size / crop_pct and the centre cropped; the aspect
    ratio is kept. From 384 px on the image is resized straight to image_size, as the official code does."""
    window_overlap: float = 0.5
    """Evaluation with target maps: share of a window of image_size that the next one covers too, from 0 to 0.9."""
    labels_per_class: int | None = None
    """Train on this many labelled images per class, chosen by the seed; None = all."""
    num_images: int | None = None
    """Fine-tuning: train on this many images, chosen by the seed; None = all."""
    sampling: str = "uniform"
    """Fine-tuning: ``uniform`` = every image once per epoch; ``balanced`` = every class equally often."""
    length: int = 1024
    """Images in the synthetic source."""

    @property
    def val_maps_key(self) -> str:
        """The key of the validation images' maps: other images than those of ``path`` have other maps."""
        same = self.val_path is None or are_same_places(self.val_path, self.path)
        return "target_path" if same and self.val_target_path is None else "val_target_path"

    def __post_init__(self) -> None:
        check_one_of("data.name", self.name, SOURCES)
        for name in ("path", "val_path", "target_path", "val_target_path"):
            setattr(self, name, _paths(f"data.{name}", getattr(self, name)))
        check_one_of("data.keys", self.keys, ("auto", "first_dot", "last_dot"))
        self.extensions = _endings(self.extensions)
        self.label_column = _columns(self.name, self.label_column)
        check_one_of("data.planes_as", self.planes_as, ("channels", "samples"))
        ok = self.planes is None or (self.planes and all(plane >= 0 for plane in self.planes))
        ok = bool(ok) and (self.planes is None or len(set(self.planes)) == len(self.planes))
        check("data.planes", self.planes, ok, "a list of different planes, counted from 0, or null")
        for name in ("source", "val_source"):
            check_class(f"data.{name}", getattr(self, name))
        sides = as_list(self.image_size, 2)
        ok = len(sides) == 2 and all(type(side) is int and 0 < side <= MAX_SIDE for side in sides)
        ok = check("data.image_size", self.image_size, ok, f"an integer from 1 to {MAX_SIDE}, or [height, width]")
        self.image_size = (sides[0], sides[1]) if ok else (224, 224)
        check_positive("data.in_chans", self.in_chans)
        grey = self.name != "fashion_mnist" or layout(self.channels, self.in_chans).of in (1, 3)
        check("data.in_chans", self.in_chans, grey, "1 or 3 with data=fashion_mnist, whose images are grey")
        check("data.bit_depth", self.bit_depth, 8 <= self.bit_depth <= 16, "from 8 to 16")
        check_one_of("data.dtype", self.dtype, DTYPES)
        ok = self.bit_depth == 8 or self.dtype == "uint"
        check("data.bit_depth", self.bit_depth, ok, "8 with data.dtype=float32, which has no largest value")
        self._check_normalisation()
        ok = len(self.crop_scale) == 2 and 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1
        check("data.crop_scale", self.crop_scale, ok, "[least, most] with 0 < least <= most <= 1")
        for name, null in (("crop_ratio", ""), ("crop_zoom", ", or null"), ("scale_jitter", ", or null")):
            value = getattr(self, name)
            ok = value is None or (len(value) == 2 and 0 < value[0] <= value[1] < math.inf)
            check(f"data.{name}", value, ok, f"[least, most] with 0 < least <= most{null}")
        ok = self.foreground is None or _is_foreground(self.foreground)
        expected = "{above: VALUE, share: SHARE}, or below or both, perhaps with tries from 1 to 100"
        check("data.foreground", self.foreground, ok, expected)
        check_ratio("data.hflip", self.hflip)
        check_ratio("data.vflip", self.vflip)
        ok = not self.rot90 or self.size[0] == self.size[1]
        check("data.rot90", self.rot90, ok, f"false with data.image_size={list(self.size)}, which is not square")
        check("data.crop_pct", self.crop_pct, 0 < self.crop_pct <= 1, "a number in (0, 1]")
        check("data.window_overlap", self.window_overlap, 0 <= self.window_overlap <= 0.9, "a number from 0 to 0.9")
        check_not_negative("data.pad", self.pad)
        check_one_of("data.decode_on", self.decode_on, ("cpu", "gpu"))
        ok = all(map(is_named, self.transforms))
        check("data.transforms", self.transforms, ok, "a list of _target_: PACKAGE.CLASS and its arguments")
        plain = self.in_chans == 3 and self.bit_depth == 8 and self.pad == 0 and not self.transforms
        plain = plain and self.channels is None and self.nodata is None and self.fit == "crop" and self.dtype == "uint"
        plain = plain and self.foreground is None and self.normalize != "image"
        others = "pad=0, channels=null, nodata=null, fit=crop, foreground=null, transforms=[] and normalize not image"
        expected = f"cpu unless in_chans=3, bit_depth=8, dtype=uint, {others}"
        check("data.decode_on", self.decode_on, self.decode_on == "cpu" or plain, expected)
        check("data.cache", self.cache, self.cache in (None, "ram", "gpu"), "null, ram or gpu")
        suits = not self.transforms and self.nodata is None and self.fit == "crop"
        suits = suits and self.foreground is None and self.decode_on == "cpu" and self.windows_per_image == 1
        suits = suits and not layout(self.channels, self.in_chans).extra and self.normalize != "image"
        expected = (
            "null or ram unless transforms=[], nodata=null, fit=crop, foreground=null, decode_on=cpu, "
            "windows_per_image=1, normalize not image, and channels names none for targets"
        )
        check("data.cache", self.cache, self.cache != "gpu" or suits, expected)
        check("data.cache", self.cache, self.cache is None or self.name != "coco", "null with data.name=coco")
        self._check_no_data()
        check_one_of("data.sampling", self.sampling, ("uniform", "balanced"))
        for name in ("crops_per_image", "windows_per_image", "labels_per_class", "num_images", "length"):
            check_positive(f"data.{name}", getattr(self, name))

    def _check_no_data(self) -> None:
        check_one_of("data.fit", self.fit, ("crop", "pad"))
        alone = self.nodata is None and self.fit == "crop"
        check("data.pad", self.pad, self.pad == 0 or alone, "0 with data.nodata and data.fit=pad")
        marks = no_data("data.nodata", self.nodata, self.in_chans)
        if marks is None:
            return
        self.nodata = marks if isinstance(self.nodata, (list, tuple)) else marks[0]
        if self.source is None and self.val_source is None and self.dtype == "uint":
            most = 2**self.bit_depth - 1
            ok = all(value is None or (type(value) in (int, float) and value in range(most + 1)) for value in marks)
            check("data.nodata", self.nodata, ok, f"an integer from 0 to {most} (data.bit_depth={self.bit_depth})")

    def _check_normalisation(self) -> None:
        check_one_of("data.normalize", self.normalize, NORMALIZE)
        given = bounds(self.normalize, self.low, self.high, self.in_chans)
        if self.normalize != "dataset":
            before = list(self.mean), list(self.std)
            self.mean, self.std = fixed_scale(self.normalize, given, self.in_chans)
            ok = (self.clips and not given) or before in (
                (IMAGENET_MEAN, IMAGENET_STD),
                ([], []),
                (self.mean, self.std),
            )
            check("data.mean", before[0], ok, f"unset, as data.std, with data.normalize={self.normalize}")
            return
        own = self.source is not None or self.val_source is not None
        photos = self.dtype == "uint" and (self.in_chans == 3 or not own)
        if not photos and (self.mean, self.std) == (IMAGENET_MEAN, IMAGENET_STD):
            self.mean, self.std = [], []
        if own and not self.mean and not self.std:
            return
        for name, least, what in (("mean", -math.inf, "number"), ("std", 0, "positive number")):
            value = getattr(self, name)
            ok = len(value) == self.in_chans and all(least < x < math.inf for x in value)
            hint = f"data.in_chans={self.in_chans}; fcmae prepare data.stats=true prints them"
            check(f"data.{name}", value, ok, f"{counted(self.in_chans, what)}, one per channel ({hint})")

    @property
    def clips(self) -> bool:
        """Whether normalised pixels are clipped to -1 and 1."""
        return self.normalize in CLIPPING

    @property
    def layout(self) -> Layout:
        """Which channels of the files are read."""
        return layout(self.channels, self.in_chans)

    @property
    def marks(self) -> list[Any] | None:
        """What marks a pixel without a value in each of the network's channels; None = nothing does."""
        return no_data("data.nodata", self.nodata, self.in_chans)

    @property
    def may_be_nan(self) -> set[int]:
        """Channels of an image that may hold NaN."""
        read = self.layout
        given = range(self.in_chans) if read.input is None else read.input
        return {*(given if self.marks else ()), *(read.extra if read.nodata else ())}

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of an image in pixels."""
        height, width = self.image_size
        return height, width


def _is_foreground(given: Any) -> bool:
    """Whether it can be ``data.foreground``."""
    if not isinstance(given, dict) or not {"share"} < set(given) <= {"above", "below", "share", "tries"}:
        return False
    numbers = all(type(value) in (int, float) and math.isfinite(value) for value in given.values())
    tries = given.get("tries", 1)
    bounds = {"above", "below"} & set(given)
    return numbers and bool(bounds) and 0 < given["share"] <= 1 and type(tries) is int and 1 <= tries <= 100


def _endings(value: Any) -> list[str] | None:
    """In lower case."""
    values = list(value) if isinstance(value, (list, tuple)) else value
    ok = values is None or (isinstance(values, list) and bool(values))
    ok = ok and all(isinstance(x, str) and (x in ("", "*") or x[:1] == ".") for x in values or [])
    check("data.extensions", value, ok, 'a list of endings such as [.jpg,.scan], of "" or of "*", or null')
    return [x.lower() for x in values] if ok and values is not None else None


def _columns(name: str, value: Any) -> str | list[str] | None:
    """A column, or of a table several."""
    several = isinstance(value, (list, tuple))
    ok = value is None or isinstance(value, str)
    ok = ok or (several and name == "table" and bool(value) and all(isinstance(column, str) for column in value))
    ok = ok and not (several and len(set(value)) < len(value))
    check("data.label_column", value, ok, "a column's name, of a table also a list of different ones, or null")
    return list(value) if several else value


def _paths(key: str, value: Any) -> str | list[str] | None:
    """A path or several as text, numbers too, which YAML makes of names such as 2024."""
    parts = as_list(value)
    ok = bool(parts) and all(isinstance(part, (str, int)) and not isinstance(part, bool) for part in parts)
    ok = ok and all(str(part) for part in parts)
    check(key, value, value is None or ok, "a path, or a list of paths")
    if value is None:
        return None
    return [str(part) for part in parts] if isinstance(value, (list, tuple)) else str(value)


@dataclass
class AugmentConfig:
    """Group ``augment``: changes of images and labels in fine-tuning beyond crop and flip, by timm."""

    auto_augment: str | None = None
    """A timm policy, the paper's is ``rand-m9-mstd0.5-inc1``."""
    random_erasing: float = 0.0
    """Probability that a rectangle of an image is replaced by noise."""
    mixup: float = 0.0
    """Mixing pairs of images and labels: alpha of the beta distribution of the shares; 0 = none."""
    cutmix: float = 0.0
    """Pasting a rectangle of another image, labels in proportion: alpha, likewise; with both one is drawn per batch."""
    label_smoothing: float = 0.0
    """Share of a label that is spread over all classes."""
    on: str = "cpu"
    """Where auto_augment, random_erasing and the normalisation of pixels run. ``cpu``: in loader workers, by Pillow.
    ``gpu``: in batches on the training device, with the same random numbers (docs/data_speed.md)."""

    def __post_init__(self) -> None:
        check_one_of("augment.on", self.on, ("cpu", "gpu"))
        for name in ("random_erasing", "label_smoothing"):
            check_ratio(f"augment.{name}", getattr(self, name))
        for name in ("mixup", "cutmix"):
            check_not_negative(f"augment.{name}", getattr(self, name))
