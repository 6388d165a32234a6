"""``fcmae embed`` and ``fcmae predict``: a row of features or predictions per image, labels or not."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from timm.models.convnext import ConvNeXt
from torch import Tensor

from fcmae.checkpoints.checkpoint import State
from fcmae.config import (
    LAYERS,
    CheckpointConfig,
    DataConfig,
    FinetuneConfig,
    LoaderConfig,
    check,
    check_stages,
)
from fcmae.data.sources import Source, train_source
from fcmae.data.sources.dataset import registered
from fcmae.data.sources.images import Joined, images_at
from fcmae.distributed import World
from fcmae.engines.dense import dense
from fcmae.errors import CheckpointError, UsageError
from fcmae.evaluation.features import batches, gather_in_order
from fcmae.evaluation.predict_boxes import Boxes, BoxNetwork, predict_boxes
from fcmae.evaluation.predict_maps import MapNetwork, Maps, predict_maps
from fcmae.evaluation.run import data_of, opened, split_overrides
from fcmae.files import check_output, csv_text, output, write_output
from fcmae.imports import needed
from fcmae.messages import say
from fcmae.models.build import config_of, encoder_of, model_of, objective_of
from fcmae.models.objective import BoxObjective, DenseObjective
from fcmae.models.pooled import pool_maps
from fcmae.precision import autocast

ROWS = (*LAYERS, "patches")
"""What a row may hold."""
TABLES = {"embed": (".npz", ".parquet"), "predict": (".csv", ".npz", ".parquet", ".json")}
"""Endings of the files that each command writes."""


class Rows(NamedTuple):
    """A row per image that could be read, in the order in which the images were given.

    ``paths``: what names each image. ``values``: float32 ``[n, ...]`` on the CPU. ``columns``: names of the last
    dimension, or none. ``exclusive``: the columns are classes, of which an image has one.
    """

    paths: list[str]
    values: Tensor
    columns: list[str]
    exclusive: bool = False


def embed(
    checkpoint: str | os.PathLike[str],
    images: Any,
    *,
    layer: str = "pooled",
    stages: Sequence[int] | None = None,
    out: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Rows | None:
    """Features of images by the encoder of a checkpoint of any task, the same on any number of ranks.

    Args:
        checkpoint: RUN, RUN@best, a checkpoint, or ``encoder.safetensors``.
        images: a path or several of files, folders and tar files, and overrides ``data.KEY=VALUE`` and
            ``loader.KEY=VALUE`` of the checkpoint's config; with ``data.path`` or ``data.source`` its training images.
            Or a dataset, as for :func:`fcmae.pretrain`.
        layer: ``pooled`` ``[D]``, the mean over the image and the head's norm, as k-NN and probe use; ``mean``, without
            the norm; ``stages``, the means of the stages one after another; ``stages_std``, their means and standard
            deviations; ``patches`` ``[h, w, D]``, the last map.
        stages: numbers, from 1, of the stages of ``stages`` and ``stages_std``; None = all.
        out: an .npz file (arrays ``paths``, ``features``) or a .parquet file to write.
        options: ``batch_size``, ``precision``, ``device``, ``allow`` as for ``fcmae evaluate``; ``ema``.

    Returns:
        The rows; None on ranks other than the first.
    """
    check("--layer", layer, layer in ROWS, f"one of {', '.join(ROWS)}")
    check_stages("--stages", stages, layer)

    def create(state: State, file: Path, world: World, ema: bool, allow: Sequence[str]) -> _Network:
        backbone = encoder_of(state, file, ema).to(world.device).eval()
        return lambda imgs: _features(backbone, imgs, layer, stages), [], False

    rows = _rows(checkpoint, images, create, out, "embed", "features", **options)
    assert not isinstance(rows, Maps | Boxes)
    return rows


def predict(
    checkpoint: str | os.PathLike[str], images: Any, *, out: str | os.PathLike[str] | None = None, **options: Any
) -> Rows | Maps | Boxes | None:
    """Predictions for images by a fine-tuned checkpoint: the probability of each class, or the numbers it learned.

    Arguments and result are those of :func:`embed`; ``columns`` are the classes, labels or numbers. ``out`` may be a
    .csv file too, whose rows have the path and the values; after ``objective=classify`` also the most likely class and
    its probability.

    After an objective with target maps, such as ``objective=segment``, the result is a :class:`.Maps`: a map for each
    whole image. ``out`` is then a folder for a file per image. After ``objective=detect`` it is a :class:`.Boxes`, and
    ``out`` a .json file of COCO's results or a .csv file.
    """

    def create(state: State, file: Path, world: World, ema: bool, allow: Sequence[str]) -> Any:
        if state["task"] != "finetune":
            task = f"{file} is of the task {state['task']!r} and predicts nothing"
            raise CheckpointError(f"{task}; fine-tune it, or use fcmae embed")
        cfg = config_of(state, file, allow)
        assert isinstance(cfg, FinetuneConfig)
        objective = objective_of(state, cfg)
        if objective.outputs == 0:
            raise CheckpointError(f"{file} has no classifier, only a backbone; fine-tune it, or use fcmae embed")
        model = model_of(state, file, ema, allow).to(world.device).eval()
        classes: list[str] = state.get("classes") or []
        if isinstance(objective, DenseObjective):
            return MapNetwork(model, objective, classes)
        if isinstance(objective, BoxObjective):
            return BoxNetwork(model, classes, objective.state_dict().get("category_ids") or [])

        def network(imgs: Tensor) -> Tensor:
            outputs = model(imgs)
            if not isinstance(outputs, Tensor) or outputs.ndim != 2:
                raise UsageError(f"{file} gives no row of numbers per image, so predict cannot write them")
            return objective.predict(outputs.float())

        return network, classes, objective.num_classes is not None

    return _rows(checkpoint, images, create, out, "predict", "predictions", **options)


_Network = tuple[Callable[[Tensor], Tensor], list[str], bool]
"""What makes rows of a batch of normalised images, the names of columns, and whether these are exclusive."""


def _features(backbone: ConvNeXt, imgs: Tensor, layer: str, stages: Sequence[int] | None) -> Tensor:
    maps = dense(backbone, imgs)
    if layer == "patches":
        return maps[-1].permute(0, 2, 3, 1)
    if layer == "pooled":
        return backbone.forward_head(maps[-1], pre_logits=True)
    return pool_maps(maps, layer, stages)


def _rows(
    checkpoint: str | os.PathLike[str],
    images: Any,
    create: Callable[[State, Path, World, bool, Sequence[str]], _Network | MapNetwork | BoxNetwork],
    out: str | os.PathLike[str] | None,
    command: str,
    name: str,
    ema: bool = True,
    allow: Sequence[str] = (),
    **how: Any,
) -> Rows | Maps | Boxes | None:
    """Runs a network over images, the ranks sharing them, and writes the rows."""
    checkpoint, out = os.fspath(checkpoint), None if out is None else os.fspath(out)
    with _texts(images) as texts:
        table = out is None or Path(out).suffix in TABLES[command]
        expected = f"a file whose name ends in {' or '.join(TABLES[command][:3])}"
        check("--out", out, table or command == "predict", expected)
        if out is not None and table:
            check_output("--out", out, [checkpoint, *texts], json=out.endswith(".json"))
            if out.endswith(".parquet"):
                _arrow()
        paths, overrides, given, loader = split_overrides(texts)
        cfg = CheckpointConfig(checkpoint, data=given, loader=loader, allow=list(allow), **how)
        with opened(cfg) as (world, file, state):
            data = data_of(cfg, state, file)
            source = world.together(lambda: _source(paths, overrides, data, given, loader))
            made = create(state, file, world, ema, allow)
            if isinstance(made, MapNetwork):
                check("--out", out, out is None or not table, f"a folder, because {file} predicts a map per image")
                return predict_maps(made, source, cfg, data, world, out)
            if isinstance(made, BoxNetwork):
                return predict_boxes(made, source, cfg, data, world, out)
            check("--out", out, table and Path(out or "").suffix != ".json", expected)
            network, columns, exclusive = made
            values, places = gather_in_order(_share(network, source, cfg, data, world), world)
            if not world.is_main:
                return None
            named = [source.describe(place) for place in places.tolist()]
            rows = Rows(named, values.cpu(), columns, exclusive)
            if len(named) < len(source):
                say(f"{len(source) - len(named)} of {len(source)} images could not be read and have no row")
            if out is not None:
                write(rows, out, name)
            return rows


@contextlib.contextmanager
def _texts(images: Any) -> Iterator[list[str]]:
    """Paths and overrides; for a dataset the override that names it in this block."""
    if isinstance(images, (str, os.PathLike)):
        images = [images]
    if isinstance(images, (list, tuple)) and all(isinstance(image, (str, os.PathLike)) for image in images):
        yield [os.fspath(image) for image in images]
    else:
        with registered(images, "images") as source:
            yield [f"data.source={json.dumps(source)}"]


def _source(
    paths: Sequence[str], overrides: Sequence[str], data: DataConfig, given: Any, loader: LoaderConfig
) -> Joined:
    sources: list[Source] = list(images_at(paths, given, loader).sources) if paths else []
    if any(override.startswith(("data.path=", "data.source", "data.name=")) for override in overrides):
        sources.append(train_source(data, loader))
    source = Joined(sources)
    if not len(source):
        raise UsageError("no images are given; name files, folders or tar files, or data.path=FOLDER")
    return source


def _share(
    network: Callable[[Tensor], Tensor], source: Source, cfg: CheckpointConfig, data: DataConfig, world: World
) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's rows and their places in the source. Begins with a batch of none, for a rank without images."""
    blank = torch.zeros(1, data.in_chans, *data.size, device=world.device)
    with torch.inference_mode(), autocast(world.device, cfg.precision):
        yield network(blank)[:0].float(), torch.empty(0, dtype=torch.int64, device=world.device)
    for imgs, _, places in batches(source, data, cfg.loader, cfg.at_once(), world):
        with torch.inference_mode(), autocast(world.device, cfg.precision):
            values = network(imgs).float()
        yield values, places


def write(rows: Rows, out: str, name: str) -> None:
    """Writes rows as CSV, .npz or Parquet, by the file's ending. Raises DiskError."""
    kind = Path(out).suffix
    if kind == ".csv":
        write_output("--out", out, _csv(rows))
        return
    with output("--out", out) as file:
        if kind == ".npz":
            arrays = {"paths": np.array(rows.paths, dtype=np.str_), name: rows.values.numpy()}
            if rows.columns:
                arrays["classes" if rows.exclusive else "columns"] = np.array(rows.columns, dtype=np.str_)
            np.savez(file, **arrays)  # type: ignore[arg-type]  # of a name that is a parameter
            return
        arrow, parquet = _arrow()
        paths = [os.fsencode(path).decode(errors="backslashreplace") for path in rows.paths]  # Parquet has UTF-8 only
        values = arrow.array(list(rows.values.flatten(1).numpy()), arrow.list_(arrow.float32()))
        said = {"shape": json.dumps(list(rows.values.shape[1:]))}
        if rows.columns:
            said["classes" if rows.exclusive else "columns"] = json.dumps(rows.columns)
        parquet.write_table(
            arrow.table({"path": arrow.array(paths, arrow.string()), name: values}, metadata=said), file
        )


def _csv(rows: Rows) -> str:
    columns = rows.columns or [f"output_{number}" for number in range(rows.values.shape[1])]
    best = ["class", "probability"] if rows.exclusive and rows.columns else []
    lines: list[list[Any]] = [["path", *best, *columns]]
    for path, values in zip(rows.paths, rows.values, strict=True):
        top = int(values.argmax())
        cells = [float(str(value)) for value in values.numpy()]  # the fewest digits that give the same float32
        first = [columns[top] if values[top].isfinite() else "", cells[top]] if best else []
        lines.append([path, *first, *cells])
    return csv_text(lines)


def _arrow() -> tuple[Any, Any]:
    with needed("--out FILE.parquet needs pyarrow: pip install pyarrow, or write an .npz file"):
        import pyarrow
        import pyarrow.parquet
    return pyarrow, pyarrow.parquet
