"""The targets that ``fcmae bench step`` measures the price of."""

from collections.abc import Callable, Sequence
from functools import partial

import torch

from fcmae.config import DataConfig
from fcmae.errors import UsageError, reason_of
from fcmae.targets import Hog, Labels, Laplacian, Pixels, Target, Teacher
from fcmae.tasks.teachers import Features, create_network

CLASSES = 1000
KINDS: dict[str, Callable[..., Target]] = {
    "pixels": Pixels,
    "hog": Hog,
    "laplacian": Laplacian,
    "labels": partial(Labels, dim=CLASSES),
}
TEACHER = "teacher"


def create_targets(names: Sequence[str], teacher: str, image_size: int) -> dict[str, Callable[..., Target]]:
    """Targets by name, for :class:`fcmae.FCMAE`.

    Args:
        teacher: timm's name of the network of ``teacher``, which has random weights here.

    Raises UsageError for a network that timm does not know, or without a feature map of such images.
    """
    return {name: _teacher(teacher, image_size) if name == TEACHER else KINDS[name] for name in names}


def _teacher(name: str, image_size: int) -> Callable[..., Target]:
    try:
        data = DataConfig(image_size=image_size)
        features = Features(create_network(name, pretrained=False), data.mean, data.std, data, None)
        with torch.no_grad():
            dim = features(torch.zeros(1, 3, image_size, image_size)).shape[1]
    except (RuntimeError, TypeError, AttributeError, AssertionError) as error:
        raise UsageError(f"teacher={name} gives no feature map: {reason_of(error)}") from error

    def create(patch_size: int, in_chans: int) -> Teacher:
        target = Teacher(patch_size, in_chans, dim=dim)
        target.network = features
        return target

    return create
