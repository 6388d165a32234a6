"""``fcmae predict`` with boxes: COCO's results, or a table."""

from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from fcmae.config import CheckpointConfig, DataConfig, check
from fcmae.data.sources.base import Source, locate
from fcmae.data.sources.coco import CocoImages
from fcmae.data.sources.images import Joined
from fcmae.distributed import World
from fcmae.errors import ConfigError, shown
from fcmae.evaluation.coco_metrics import rows
from fcmae.evaluation.detections import found_in
from fcmae.evaluation.features import check_image_size
from fcmae.files import csv_text, json_text, write_output
from fcmae.messages import say
from fcmae.models.detector import Found

ENDINGS = (".json", ".csv")


class BoxNetwork(NamedTuple):
    """A network that predicts boxes, the names of its classes, and their ids in the training annotations."""

    model: nn.Module
    columns: list[str]
    ids: list[int]


class Boxes(NamedTuple):
    """The objects found in each image that could be read, in the order in which the images were given.

    ``paths``: what names each image. ``boxes``: float32 ``[n, 4]`` each, left, top, right, bottom in pixels.
    ``classes``: int64 ``[n]``, places in ``columns``. ``scores``: float32 ``[n]``, the highest first. ``masks``: COCO's
    run lengths of each object, if the network predicts masks. ``columns``: names of classes.
    """

    paths: list[str]
    boxes: list[Tensor]
    classes: list[Tensor]
    scores: list[Tensor]
    masks: list[list[dict[str, Any]]]
    columns: list[str]


def predict_boxes(
    network: BoxNetwork, source: Joined, cfg: CheckpointConfig, data: DataConfig, world: World, out: str | None
) -> Boxes | None:
    """Predicts whole images, the ranks sharing them, and writes them to ``out``. None on ranks other than the first."""
    expected = "a file whose name ends in .json or .csv"
    check("--out", out, out is None or Path(out).suffix in ENDINGS, expected)
    check_image_size(data, network.model, "objective=detect")
    ids = [_category_ids(each, network) for each in source.sources]
    done: list[tuple[int, Found, list[dict[str, Any]]]] = []
    for batch in found_in(network.model, source, data, cfg.loader, cfg.at_once(dense=True), cfg.precision, world):
        done += [
            (place, each._replace(masks=None), rows(each, (size[2], size[3])))
            for place, each, size in zip(batch.places.tolist(), batch.found, batch.sizes, strict=True)
        ]
    done = world.gather(done)
    if not world.is_main:
        return None
    done.sort(key=lambda each: each[0])
    if len(done) < len(source):
        say(f"{len(source) - len(done)} of {len(source)} images could not be read and are left out")
    if out is not None:
        named = [(source.describe(place), found) for place, _, found in done]
        if out.endswith(".json"):
            places = [(place, *locate(source.ends, place)) for place, _, _ in done]
            of = [(_image_id(source.sources[part], index, place), ids[part]) for place, part, index in places]
            write_output("--out", out, _json(named, of))
        else:
            write_output("--out", out, _csv(named, network))
    found = [each for _, each, _ in done]
    masks = [[row["segmentation"] for row in each if "segmentation" in row] for _, _, each in done]
    paths = [source.describe(place) for place, _, _ in done]
    boxes, classes, scores = zip(*(each[:3] for each in found), strict=True) if found else ((), (), ())
    return Boxes(paths, list(boxes), list(classes), list(scores), masks, network.columns)


def _image_id(images: Source, index: int, place: int) -> int:
    """That of the COCO file which lists the image; of other images the place."""
    return images.ids[index] if isinstance(images, CocoImages) else place


def _category_ids(images: Source, network: BoxNetwork) -> list[int]:
    """The ``category_id`` of each class: from the COCO file of these images, by name, or from the training file.

    Raises ConfigError if an id of the training file means another class in the file of these images.
    """
    if not isinstance(images, CocoImages):
        return network.ids
    known, ids = images.ids_of_names, dict(zip(network.columns, network.ids, strict=False))
    names = {identity: name for name, identity in known.items()}
    for name, identity in ids.items():
        if name not in known and identity in names:
            raise ConfigError(
                f"{images.key}: {images.file} has no category {shown(name)}, and its id in training, {identity}, is "
                f"that of {shown(names[identity])}; add {shown(name)} to its categories"
            )
    return [known.get(name, identity) for name, identity in ids.items()]


Images = list[tuple[str, list[dict[str, Any]]]]
"""Name and objects of each image."""


def _json(images: Images, of: list[tuple[int, list[int]]]) -> str:
    """COCO's results. ``of`` holds, for each image, its id and the ids of the classes."""
    results = [
        {"image_id": identity, "file_name": name, **row, "category_id": ids[row["category_id"]]}
        for (name, found), (identity, ids) in zip(images, of, strict=True)
        for row in found
    ]
    return json_text(results)


def _csv(images: Images, network: BoxNetwork) -> str:
    rows: list[list[Any]] = [["path", "class", "score", "left", "top", "right", "bottom"]]
    for name, found in images:
        for row in found:
            left, top, width, height = row["bbox"]
            numbers = (row["score"], left, top, left + width, top + height)
            rows.append([name, network.columns[row["category_id"]], *numbers])
    return csv_text(rows, digits=6)
