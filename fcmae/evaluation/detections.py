"""What a detector finds in whole images."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fcmae.config import DataConfig, LoaderConfig
from fcmae.data.pixels.boxes import WholeOnCanvas
from fcmae.data.samples import CanvasImages
from fcmae.data.sources import Source
from fcmae.data.sources.coco import CocoObjects
from fcmae.distributed import World
from fcmae.engines.dense import dense
from fcmae.evaluation.box_pictures import BoxPictures
from fcmae.evaluation.features import batches, never
from fcmae.models.detector import Detector, Found
from fcmae.models.headed import Headed
from fcmae.models.objective import Predictions
from fcmae.precision import autocast


class Batch(NamedTuple):
    """Images on their canvases, normalised ``[N, C, H, W]``; heights and widths there and in the files; what is found,
    in pixels of the files, on the CPU; places in the source ``[N]``."""

    imgs: Tensor
    sizes: list[list[int]]
    found: list[Found]
    places: Tensor


def found_in(
    model: nn.Module,
    source: Source,
    cfg: DataConfig,
    loader: LoaderConfig,
    batch_size: int,
    precision: str,
    world: World,
    stop: Callable[[], bool] = never,
) -> Iterator[Batch]:
    """This rank's share of the source, in batches.

    ``stop`` is asked before every batch. Raises EvaluationStopped on all ranks if it was true on one of them.
    """
    model.eval()
    dataset = CanvasImages(source, WholeOnCanvas(cfg, loader.max_pixels))
    for imgs, sizes, places in batches(source, cfg, loader, batch_size, world, dataset, stop):
        with torch.inference_mode(), autocast(world.device, precision):
            found = detect(model, imgs, sizes[:, :2])
        yield Batch(imgs, sizes.tolist(), [_in_file(*row) for row in zip(found, sizes.tolist(), strict=True)], places)


def detect(model: nn.Module, imgs: Tensor, extents: Tensor) -> list[Found]:
    """What a detector finds in normalised images on a canvas ``[N, C, H, W]``; see :meth:`.Detector.forward`."""
    assert isinstance(model, Headed)
    assert isinstance(model.head, Detector)
    return model.head(dense(model.backbone, imgs), extents)


def _in_file(found: Found, sizes: Sequence[int]) -> Found:
    """In pixels of the image's file instead of the canvas."""
    rows, cols, height, width = sizes
    boxes = found.boxes.cpu().double() * torch.tensor([width / cols, height / rows] * 2, dtype=torch.float64)
    most = torch.tensor([width, height] * 2, dtype=torch.float64)
    masks = None if found.masks is None else found.masks.cpu()
    return Found(torch.minimum(boxes, most).float(), found.classes.cpu(), found.scores.cpu(), masks)


def detections(
    model: nn.Module, source: Source, *how: Any, pictures: BoxPictures | None = None
) -> Iterator[Predictions]:
    """:func:`found_in`, with the objects of images as targets; ``pictures`` takes each image."""
    assert isinstance(source, CocoObjects)
    for imgs, sizes, found, places in found_in(model, source, *how):
        targets = [source.objects(place) for place in places.tolist()]
        if pictures is not None:
            for image in zip(imgs, sizes, found, targets, strict=True):
                pictures.take(*image)
        yield Predictions(found, targets, places)  # type: ignore[arg-type]
