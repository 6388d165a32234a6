"""Creates the sources of a data config."""

from typing import Any

from fcmae.config import DataConfig, LoaderConfig, not_set
from fcmae.config.checks import as_list
from fcmae.data.pixels.decode import PixelFormat
from fcmae.data.pixels.formats import EXTENSIONS
from fcmae.data.remote.access import Access
from fcmae.data.sources.base import Source
from fcmae.data.sources.coco import CocoImages, CocoObjects
from fcmae.data.sources.fashion_mnist import FashionMNIST
from fcmae.data.sources.imagefolder import ImageFolder
from fcmae.data.sources.own import create_own, gives_float
from fcmae.data.sources.synthetic import Synthetic
from fcmae.data.sources.table import TableImages
from fcmae.data.sources.tar_names import Rule
from fcmae.data.sources.webdataset import WebDataset
from fcmae.errors import ConfigError, UsageError
from fcmae.urls import is_remote


def train_source(cfg: DataConfig, loader: LoaderConfig | None = None) -> Source:
    """The training samples of a data config. Raises UsageError."""
    return _create(cfg, loader or LoaderConfig(), train=True)


def val_source(cfg: DataConfig, loader: LoaderConfig | None = None) -> Source:
    """The validation samples of a data config. Raises UsageError."""
    return _create(cfg, loader or LoaderConfig(), train=False)


def _create(cfg: DataConfig, loader: LoaderConfig, train: bool) -> Source:
    source = _read(cfg, loader, train)
    if cfg.cache is None:
        return source
    from fcmae.data.decoding import decoded  # which needs the loader, and that much else

    return decoded(source, PixelFormat.of(cfg, loader.max_pixels))


def _read(cfg: DataConfig, loader: LoaderConfig, train: bool) -> Source:
    prefix = "" if train else "val_"
    own, path = (cfg.source, cfg.path) if train else (cfg.val_source, cfg.val_path)
    if own is not None and path is not None:
        raise ConfigError(f"data.{prefix}source and data.{prefix}path={path} are both set; give one of them")
    other = cfg.val_source if train else cfg.source
    if own is not None or (other is not None and path is None):
        to = PixelFormat.of(cfg, loader.max_pixels)
        source = create_own(own, f"data.{prefix}source", to)
        if not cfg.mean and cfg.normalize != "image" and gives_float(source) is False:
            raise ConfigError(
                f"data.mean and data.std are not set, but data.{prefix}source does not give float32; give both, one "
                "number per channel (fcmae prepare data.stats=true prints them)"
            )
        return source
    if cfg.name == "synthetic":
        return Synthetic(cfg.length, cfg.layout.of, cfg.size)
    if cfg.name == "fashion_mnist":
        return FashionMNIST(_one(cfg.path, "data.path", cfg.name), train, cfg.layout.of)
    same = train or (
        cfg.name in ("hf", "table", "coco") and cfg.val_path is None
    )  # a data set of which another split is read
    name, path = ("path", cfg.path) if same else ("val_path", cfg.val_path)
    if path is None:
        raise UsageError(not_set(cfg.name, name))
    if cfg.name in ("hf", "table", "coco"):
        path = _one(path, f"data.{name}", cfg.name)
    try:
        return _open(cfg, loader, path, train)
    except ConfigError:  # names its key
        raise
    except UsageError as error:
        raise UsageError(f"data.{name}: {error}") from error


def _open(cfg: DataConfig, loader: LoaderConfig, path: Any, train: bool) -> Source:
    if cfg.name == "webdataset":
        rule = Rule(tuple(cfg.extensions or EXTENSIONS), cfg.keys)
        return WebDataset(path, loader.on_error == "skip", loader.relist, _access(path, loader), rule)
    if cfg.name == "hf":
        from fcmae.data.sources.huggingface import HuggingFace

        which = (cfg.config_name, cfg.revision) if path == cfg.path else (None, None)
        part = cfg.split if train else cfg.val_split
        return HuggingFace(path, part, cfg.image_column, cfg.label_column, *which, access=_access(path, loader))
    if cfg.name == "coco":
        return CocoImages(_annotations(cfg, train), path, annotations_key(train))
    if cfg.name == "table":
        split, alone = cfg.split if train else cfg.val_split, cfg.val_path not in (None, cfg.path)
        table = TableImages(path, cfg.root, cfg.image_column, cfg.label_column, split, cfg.target_column, alone)
        if not train and cfg.val_path is None and not table.is_split:  # training images would be measured
            raise UsageError(
                f"{path} has no column split, which would say what rows are for validation; give data.val_path=TABLE"
            )
        return table
    if cfg.name == "array":
        from fcmae.data.sources.array import ArrayImages

        to, read, planes = PixelFormat.of(cfg, loader.max_pixels), cfg.layout, (cfg.planes, cfg.planes_as)
        needed = None if read.input is None else [*read.input, *read.extra]
        share = cfg.cache is None
        return ArrayImages(
            path, to, cfg.dataset, cfg.axes, *planes, needed, cfg.label_column, loader.retry_seconds, share
        )
    return ImageFolder(path, loader.relist, cfg.extensions or EXTENSIONS)


def _access(path: Any, loader: LoaderConfig) -> Access | None:
    return Access.of(loader) if any(is_remote(str(one)) for one in as_list(path)) else None


def _one(path: Any, key: str, name: str) -> Any:
    if isinstance(path, list):
        raise UsageError(f"{key} must be one path with data.name={name}; got {path}")
    return path


def annotations_key(train: bool) -> str:
    """The key that names the COCO JSON file."""
    return "data.annotations" if train else "data.val_annotations"


def _annotations(cfg: DataConfig, train: bool) -> str:
    file = cfg.annotations if train else cfg.val_annotations
    if file is None:
        key = annotations_key(train)
        raise ConfigError(f"{key} is not set; give the COCO JSON file of the images, {key}=FILE.json")
    return file


def boxed_source(cfg: DataConfig, loader: LoaderConfig, train: bool) -> CocoObjects:
    """The images of a COCO JSON file with their objects. Raises UsageError naming what is missing or wrong."""
    if cfg.name != "coco" or cfg.source is not None or cfg.val_source is not None:
        raise ConfigError(f"data.name must be coco with objective=detect, without a source of your own; got {cfg.name}")
    name = "path" if train or cfg.val_path is None else "val_path"
    folder = getattr(cfg, name)
    if folder is None:
        raise UsageError(not_set(cfg.name, name))
    folder = _one(folder, f"data.{name}", cfg.name)
    return CocoObjects(_annotations(cfg, train), folder, annotations_key(train), loader.on_error == "skip")
