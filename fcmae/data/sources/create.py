"""The sources that a data config names."""

from fcmae.config import DataConfig
from fcmae.data.sources.base import Source
from fcmae.data.sources.fashion_mnist import FashionMNIST
from fcmae.data.sources.imagefolder import ImageFolder
from fcmae.data.sources.synthetic import Synthetic
from fcmae.errors import UsageError


def train_source(cfg: DataConfig) -> Source:
    """The training samples of a data config."""
    if cfg.name == "fashion_mnist":
        return FashionMNIST(cfg.path, train=True)
    if cfg.name == "synthetic":
        return Synthetic(cfg.length, cfg.in_chans, cfg.size)
    if cfg.path is None:
        raise UsageError("data.path is not set; give the folder of training images, data.path=FOLDER")
    return ImageFolder(cfg.path)


def val_source(cfg: DataConfig) -> Source:
    """The validation samples of a data config."""
    if cfg.name == "fashion_mnist":
        return FashionMNIST(cfg.path, train=False)
    if cfg.name == "synthetic":
        return Synthetic(cfg.length, cfg.in_chans, cfg.size)
    if cfg.val_path is None:
        raise UsageError("data.val_path is not set; give the folder of validation images, data.val_path=FOLDER")
    return ImageFolder(cfg.val_path)
