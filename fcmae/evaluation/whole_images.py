"""``fcmae evaluate`` for targets of whole images: maps and boxes."""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from fcmae.checkpoints.checkpoint import State
from fcmae.config import DataConfig, EvaluateConfig, check
from fcmae.data.sources import Subset
from fcmae.data.sources.check_maps import check_maps
from fcmae.data.sources.create import boxed_source
from fcmae.data.sources.map_files import map_key, mapped_source
from fcmae.distributed import World
from fcmae.errors import UsageError
from fcmae.evaluation.box_pictures import BoxPictures, colour
from fcmae.evaluation.detections import detections, found_in
from fcmae.evaluation.features import check_image_size
from fcmae.evaluation.map_pictures import MapPictures
from fcmae.evaluation.summary import WORST, Errors, Worst, finish_whole, folder_of, named, worst_of
from fcmae.evaluation.tables import write_confusion, write_per_class
from fcmae.evaluation.windows import whole_predictions
from fcmae.models.build import networks_of
from fcmae.models.objective import BoxObjective, DenseObjective, Report


def evaluate_maps(
    cfg: EvaluateConfig, file: Path, state: State, world: World, objective: DenseObjective, data: DataConfig
) -> dict[str, float] | None:
    """The metrics of an objective with target maps, on whole images, as :func:`fcmae.evaluation.run.evaluate`."""
    for name in ("labels", "per_class"):
        check(name, getattr(cfg, name), getattr(cfg, name) is None, f"null: {file} predicts a map per image")
    objective.max_pixels = cfg.loader.max_pixels
    maps = mapped_source(data, cfg.loader, train=False)
    classes = state.get("classes") or []
    notes = world.together(lambda: check_maps(maps, map_key(data, train=False), objective.target, classes))
    source, more = objective.validation(maps, "data.val_path", str(file))
    world.say(*notes, *more)
    result: dict[str, float] = {}
    for prefix, model in networks_of(state, file, cfg.allow, world.device):
        check_image_size(data, model, "target maps")
        how = (data, cfg.loader, cfg.at_once(dense=True), cfg.precision)
        errors = Errors(objective)
        metrics = objective.metrics(whole_predictions(model, objective, source, *how, world, look=errors), world)
        result |= named(prefix, metrics)
    counts = objective.confusion
    if cfg.confusion is not None:
        if counts is None:
            raise UsageError(f"confusion must be null: the targets of {file} are no classes")
        world.on_main(lambda: write_tables(cfg, classes, counts))

    worst = [(place, error, f"error {error:.4g}") for place, error in errors.worst(world)]

    def draw(places: list[int], alone: World) -> tuple[Image.Image | None, dict[str, Tensor]]:
        pictures = MapPictures(objective, data, most=WORST)
        for _ in whole_predictions(model, objective, Subset(source, places), *how, alone, look=pictures):
            pass
        return pictures.draw(), objective.legend()

    folder = world.from_main(lambda: folder_of(cfg.report, file))
    finish_whole(folder, objective.report_maps, result, lambda _: worst, source, draw, classes, world)
    return result if world.is_main else None


def evaluate_boxes(
    cfg: EvaluateConfig, file: Path, state: State, world: World, objective: BoxObjective, data: DataConfig
) -> dict[str, float] | None:
    """The same for an objective with boxes, on whole images."""
    for name in ("labels", "per_class", "confusion"):
        check(name, getattr(cfg, name), getattr(cfg, name) is None, f"null: {file} predicts boxes")
    boxed = world.together(lambda: boxed_source(data, cfg.loader, train=False))
    source, notes = objective.validation(boxed, "data.val_annotations", str(file))
    world.say(*boxed.notes, *notes)
    result: dict[str, float] = {}
    for prefix, model in networks_of(state, file, cfg.allow, world.device):
        check_image_size(data, model, "objective=detect")
        how = (data, cfg.loader, cfg.at_once(dense=True), cfg.precision)
        metrics = objective.metrics(detections(model, source, *how, world), world)
        result |= named(prefix, metrics)

    def draw(places: list[int], alone: World) -> tuple[Image.Image | None, dict[str, Tensor]]:
        pictures = BoxPictures(data, most=WORST)
        for imgs, sizes, found, at in found_in(model, Subset(source, places), *how, alone):
            for one in zip(imgs, sizes, found, at.tolist(), strict=True):
                pictures.take(*one[:3], boxed.objects(places[one[3]]))
        return pictures.draw(), {name: torch.tensor(colour(k)) for k, name in enumerate(objective.classes)}

    def worst(report: Report) -> Worst:
        errors = torch.zeros(0) if report.errors is None else report.errors
        return [(place, float(errors[place]), report.caption(place)) for place in worst_of(errors)]

    folder = world.from_main(lambda: folder_of(cfg.report, file))
    finish_whole(folder, objective.report_boxes, result, worst, source, draw, objective.classes, world)
    return result if world.is_main else None


def write_tables(cfg: EvaluateConfig, classes: list[str], confusion: Tensor) -> None:
    """The files of ``cfg.per_class`` and ``cfg.confusion``, of images or pixels ``[K, K]`` by true class (rows)."""
    if cfg.per_class is not None:
        write_per_class(Path(cfg.per_class), classes, confusion)
    if cfg.confusion is not None:
        write_confusion(Path(cfg.confusion), classes, confusion)
