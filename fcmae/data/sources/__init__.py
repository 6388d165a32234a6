"""Sources of images and labels: a module per kind. :mod:`fcmae.data.sources.base` has their interface."""

from fcmae.data.sources.base import (
    Sample,
    Source,
    Subset,
    Windows,
    few_labels,
    require_labels,
    some_images,
    with_classes,
)
from fcmae.data.sources.create import train_source, val_source
from fcmae.data.sources.fashion_mnist import FashionMNIST
from fcmae.data.sources.imagefolder import ImageFolder
from fcmae.data.sources.own import gives_float
from fcmae.data.sources.synthetic import Synthetic
from fcmae.data.sources.webdataset import WebDataset

__all__ = [
    "FashionMNIST",
    "ImageFolder",
    "Sample",
    "Source",
    "Subset",
    "Synthetic",
    "WebDataset",
    "Windows",
    "few_labels",
    "gives_float",
    "require_labels",
    "some_images",
    "train_source",
    "val_source",
    "with_classes",
]
