"""The commands ``evaluate``, ``knn``, ``probe`` and ``reconstruct`` as functions."""

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fcmae import distributed, memory, precision
from fcmae.checkpoints import checkpoint
from fcmae.checkpoints.checkpoint import State
from fcmae.config import (
    BackboneConfig,
    CheckpointConfig,
    DataConfig,
    DataOverrides,
    EvaluateConfig,
    FeaturesConfig,
    FinetuneConfig,
    KnnConfig,
    LoaderConfig,
    PretrainConfig,
    ProbeConfig,
    check,
    check_channels,
    check_outputs,
    from_dotlist,
)
from fcmae.config.commands import RANDOM
from fcmae.config.unset import settled
from fcmae.data.pixels.decode import Encoded, LazyImage, read_file
from fcmae.data.pixels.transforms import CentreCrop, eval_transform, normalize_channels, normalized, pretrain_transform
from fcmae.data.samples import CroppedImages
from fcmae.data.sources import ImageFolder, Source, train_source, val_source
from fcmae.distributed import World
from fcmae.errors import CheckpointError, ConfigError, UsageError
from fcmae.evaluation import probe as linear
from fcmae.evaluation.cache import CachedExtractor
from fcmae.evaluation.class_metrics import class_metrics
from fcmae.evaluation.classify import accuracy, predictions
from fcmae.evaluation.features import Extractor, Features, first, labelled_sources, one_class
from fcmae.evaluation.knn import check_neighbours, knn_of
from fcmae.evaluation.labels import read_accepted
from fcmae.evaluation.reconstruct import Picture, reconstruction_picture
from fcmae.evaluation.summary import Recorder, describe, finish_images, folder_of, named
from fcmae.evaluation.whole_images import evaluate_boxes, evaluate_maps, write_tables
from fcmae.interchange.foreign import is_foreign, read_foreign
from fcmae.loggers.wandb import check_report, log_report
from fcmae.masks import create_mask, draw_scores
from fcmae.masks.patches import grid_size, random_mask
from fcmae.messages import say
from fcmae.models import FCMAE
from fcmae.models.build import (
    config_of,
    encoder_of,
    known_of,
    model_of,
    networks_of,
    objective_of,
    random_encoder,
    unsaid,
)
from fcmae.models.objective import BoxObjective, DenseObjective, Report


@contextlib.contextmanager
def opened(cfg: CheckpointConfig) -> Iterator[tuple[World, Path, State]]:
    """The ranks of this launch, and the checkpoint. ``cfg.precision`` becomes the one that the ranks compute in."""
    world = distributed.connect(cfg.device)
    try:
        world.on_main(lambda: check_outputs(cfg))
        if isinstance(cfg, FeaturesConfig) and cfg.checkpoint == RANDOM:
            file, state = _random(cfg, world)
        else:
            file, state = _read(cfg.checkpoint, world)
        cfg.precision = precision.settle(
            "precision", cfg.precision, world.device, smallest=world.smallest, main=world.is_main
        )
        with memory.explained(world.device, lambda: _how_to_shrink(cfg)):
            yield world, file, state
    finally:
        distributed.disconnect()


def _how_to_shrink(cfg: CheckpointConfig) -> str:
    """What to change where memory runs out."""
    steps = f" or train_batch_size (now {cfg.train_batch_size})" if isinstance(cfg, ProbeConfig) else ""
    now = cfg.batch_size or f"{cfg.at_once()}, or {cfg.at_once(dense=True)} for maps and boxes"
    return f"batch_size is {now}; set a smaller one{steps}"


@contextlib.contextmanager
def _frozen(cfg: FeaturesConfig) -> Iterator[tuple[Extractor, Callable[[Source], Features]]]:
    """What extracts features of a checkpoint's backbone, and the same with the cache that ``cfg`` asks for."""
    with opened(cfg) as (world, file, state):
        data = data_of(cfg, state, file)
        if unknown := ", ".join(unsaid(state)):
            world.say(f"{file} does not say {unknown}; the standard values are taken where none are given")
        backbone = encoder_of(state, file)
        how: dict[str, Any] = {"layer": cfg.layer, "stages": cfg.stages, "loader": cfg.loader}
        extractor = Extractor(backbone.to(world.device), data, world, cfg.at_once(), cfg.precision, **how)
        random = cfg.checkpoint == RANDOM
        if cfg.cache is None or is_foreign(cfg.checkpoint) or (random and cfg.cache == "run"):
            yield extractor, extractor
            return
        folder = _features_folder(file) if cfg.cache == "run" else Path(cfg.cache)
        identity = json.dumps([state["config"], cfg.seed]) if random else checkpoint.checksum(file)
        yield extractor, CachedExtractor(extractor, folder, {"checkpoint": identity})


def split_overrides(images: Sequence[str]) -> tuple[list[str], list[str], Any, LoaderConfig]:
    """Arguments as paths, overrides ``data.KEY=VALUE``, and the configs that these and ``loader.KEY=VALUE`` give."""
    groups: dict[str, list[str]] = {"data": [], "loader": [], "": []}
    for image in images:
        group = image.partition(".")[0] if "=" in image else ""
        groups[group if group in groups else ""].append(image)
    given: Any = from_dotlist(DataOverrides, groups["data"], "data")
    return groups[""], groups["data"], given, from_dotlist(LoaderConfig, groups["loader"], "loader")


def data_of(cfg: CheckpointConfig, state: State, file: Path) -> DataConfig:
    """The checkpoint's data config with what was given. Raises ConfigError for other channels than the network's."""
    known = known_of(state, file)["data"]
    data = cfg.merge_data(known)
    if data.in_chans != known["in_chans"]:
        raise ConfigError(f"data.in_chans is {data.in_chans}; {file} has {known['in_chans']}")
    return data


def _random(cfg: FeaturesConfig, world: World) -> tuple[Path, State]:
    """Random weights, the same on every rank."""
    in_chans = cfg.merge_data({}).in_chans
    state = world.together(lambda: random_encoder(settled(BackboneConfig, cfg.model), in_chans, cfg.seed))
    world.say(f"checkpoint random: random weights of {cfg.model.backbone}, drawn with seed={cfg.seed}")
    return Path(RANDOM), state


def _read(path: str, world: World) -> tuple[Path, State]:
    """The same checkpoint on every rank, although the run that writes it may save another one meanwhile.

    Files of other libraries are read too.
    """
    foreign = is_foreign(path)
    file = Path(path) if foreign else world.from_main(lambda: checkpoint.resolve(path))
    states: list[State] = []
    world.together(lambda: states.append(read_foreign(path) if foreign else checkpoint.read(file, mmap=True)))
    (state,) = states
    world.say(f"{path}: weights of {state['imported_from']}" if foreign else checkpoint.describe(file, state))
    return file, state


def _features_folder(file: Path) -> Path:
    """The folder ``features`` of a checkpoint's run; beside a checkpoint that is in none."""
    return (checkpoint.run_of(file) or file.parent) / "features"


def evaluate(cfg: EvaluateConfig) -> dict[str, float] | None:
    """The metrics of a fine-tuned checkpoint's objective, with its averaged weights too where it kept some.

    The files of ``cfg.per_class`` and ``cfg.confusion`` are of the averaged weights then. None on ranks other than the
    first.
    """
    with opened(cfg) as (world, file, state):
        run = file.parent.parent
        if cfg.wandb:
            world.on_main(lambda: check_report(run, cfg.report))
        result = _evaluate(cfg, file, state, world)
        folder = world.from_main(lambda: folder_of(cfg.report, file) if cfg.wandb else None)
        if folder is not None:
            world.on_main(lambda: log_report(run, folder))
        return result


def _evaluate(cfg: EvaluateConfig, file: Path, state: State, world: World) -> dict[str, float] | None:
    if state["task"] != "finetune":
        raise CheckpointError(
            f"{file} is of the task {state['task']!r} and has no classifier; fine-tune it, or use knn or probe"
        )
    data = data_of(cfg, state, file)
    own = config_of(state, file, cfg.allow)
    assert isinstance(own, FinetuneConfig)
    objective = objective_of(state, own)
    if objective.outputs == 0:
        raise CheckpointError(f"{file} has no classifier, only a backbone; fine-tune it, or use knn or probe")
    if isinstance(objective, DenseObjective):
        return evaluate_maps(cfg, file, state, world, objective, data)
    if isinstance(objective, BoxObjective):
        return evaluate_boxes(cfg, file, state, world, objective, data)
    source = val_source(data, cfg.loader)
    classes: list[str] = state.get("classes") or []
    tables = cfg.per_class is not None or cfg.confusion is not None
    if (tables or cfg.labels is not None) and objective.num_classes is None:
        raise UsageError(f"labels, per_class and confusion must be null: the targets of {file} are no classes")
    accepted = None if cfg.labels is None else read_accepted(Path(cfg.labels), source, classes)
    if accepted is None:
        source, notes = objective.validation(source, "data.val_path", str(file))
        if objective.num_classes is not None:
            notes = notes + one_class(classes)
        world.say(*notes)
    if tables and accepted is not None and max(map(len, accepted)) > 1:
        raise UsageError(f"per_class and confusion need one class per image; labels={cfg.labels} has several")
    result: dict[str, float] = {}
    recorder = Recorder([], world)
    for prefix, model in networks_of(state, file, cfg.allow, world.device):
        confusion = None
        if tables:
            confusion = torch.zeros(len(classes), len(classes), dtype=torch.int64, device=world.device)
        share = recorder = Recorder(
            predictions(model, source, data, cfg.loader, cfg.at_once(), cfg.precision, world, target=objective.target),
            world,
        )
        if accepted is not None:
            metrics = accuracy(share, world, accepted=accepted, confusion=confusion)
        elif tables:
            metrics = class_metrics(share, world, len(classes), confusion)
        else:
            metrics = objective.metrics(share, world)
        result |= named(prefix, metrics)
    if confusion is not None:
        total = world.sum(confusion).cpu()
        world.on_main(lambda: write_tables(cfg, classes, total))
    if accepted is not None:
        world.on_main(lambda: describe(result, Report(), classes))
    else:
        folder = world.from_main(lambda: folder_of(cfg.report, file))
        finish_images(folder, objective, result, recorder, source, data, cfg.loader.max_pixels, classes)
    return result if world.is_main else None


def knn(cfg: KnnConfig) -> dict[str, float] | None:
    """k-NN accuracy of a checkpoint's frozen features; None on ranks other than the first."""
    with _frozen(cfg) as (extractor, extract):
        world = extractor.world
        result = knn_of(
            extractor.data,
            cfg.loader,
            extract,
            world,
            ks=cfg.k,
            temperature=cfg.temperature,
            gallery=cfg.gallery,
            queries=cfg.queries,
            seed=cfg.seed,
        )
        check_neighbours("k", cfg.k, int(result["gallery"]))
        return result if world.is_main else None


def probe(cfg: ProbeConfig) -> dict[str, Any] | None:
    """Accuracy of linear classifiers on a checkpoint's frozen features; None on ranks other than the first."""
    with _frozen(cfg) as (extractor, extract):
        data, world = extractor.data, extractor.world
        train, val, classes, notes = labelled_sources(data, cfg.loader, cfg.seed)
        world.say(*notes)
        crop = pretrain_transform(data, cfg.loader.max_pixels)
        if cfg.random_crops:
            epochs: Iterable[Features] = linear.Epochs(
                lambda epoch: extractor(train, CroppedImages(train, crop, cfg.seed, epoch))
            )
        else:
            epochs = itertools.repeat(extract(train))
        known = extract(val)
        solve = linear.probe_by_lbfgs if cfg.solver == "lbfgs" else linear.probe_by_sgd
        result = solve(epochs, known, len(classes), cfg, world)
        if not world.is_main:
            return None
        say(linear.table(result))
        return result


def reconstruct(
    path: str,
    images: Sequence[str],
    *,
    max_images: int = 16,
    mask_ratio: float | None = None,
    seed: int = 0,
    channels: Sequence[int] | None = None,
    allow: Sequence[str] = (),
) -> Picture:
    """A picture of reconstructions by a pretraining checkpoint.

    Args:
        images: image files; folders; overrides ``data.KEY=VALUE`` of the checkpoint's data config, whose training
            images are then taken, e.g. ``data.source._target_=cells.Cells``; and overrides ``loader.KEY=VALUE``.
        max_images: rows, of the files, then of the folders' images evenly spread over their list, then of the training
            images.
        mask_ratio: instead of the checkpoint's.
        seed: of the masks.
        channels: see :func:`fcmae.evaluation.display.choose`.
        allow: classes that may be called although only the checkpoint names them.
    """
    check("--max-images", max_images, max_images > 0, "a positive integer")
    paths, overrides, given, loader = split_overrides(images)
    asked = CheckpointConfig(path, data=given, loader=loader, allow=list(allow))
    file = checkpoint.resolve(path)
    state = checkpoint.read(file, mmap=True)
    say(checkpoint.describe(file, state))
    model = model_of(state, file, allow=allow)
    if not isinstance(model, FCMAE):
        task = f"{path} is of the task {state['task']!r} and has no decoder"
        raise CheckpointError(f"{task}; give a pretraining run or one of its checkpoints")
    cfg, data = config_of(state, file, allow), data_of(asked, state, file)
    assert isinstance(cfg, PretrainConfig)
    strategy = create_mask(cfg.mask)
    if mask_ratio is not None:
        check("--mask-ratio", mask_ratio, 0 <= mask_ratio < 1, "a number in [0, 1)")
        model.mask_ratio = mask_ratio
    check_channels("--channels", channels, data.in_chans)
    channels = channels or cfg.logger.channels
    samples: list[Tensor | Encoded | LazyImage] = [read_file(file) for file in _files(paths, max_images)]
    if overrides:
        source = first(train_source(data, loader), max(0, max_images - len(samples)))
        samples += [source[index].image for index in range(len(source))]
    whole = dataclasses.replace(data, crop_pct=1.0)
    seen: dict[str, Tensor] = {}
    if model.targets_that_need("channels"):
        crop = CentreCrop(whole, loader.max_pixels, channels=True)
        crops, *more = (list(column) for column in zip(*(crop.seen(sample) for sample in samples), strict=True))
        seen = {name: torch.stack(column) for name, column in zip(crop.carries, more, strict=True)}
        seen["channels"] = normalize_channels(seen["channels"], data.layout, data.bit_depth, data.dtype)
    else:
        crops = [eval_transform(whole, loader.max_pixels)(sample) for sample in samples]
    grid, rng = grid_size(*data.size, model.mask_patch_size), torch.Generator().manual_seed(seed)
    scores = torch.stack([draw_scores(strategy, rng, grid, crop) for crop in crops])
    imgs = torch.stack([normalized(crop, data) for crop in crops])
    mask = random_mask(scores, model.len_keep(*data.size))
    picture = reconstruction_picture(model, imgs, data, mask, channels, seen)
    if picture is None:
        raise UsageError(f"no target of {path} can be drawn: to_pixels returns None for {', '.join(model.targets)}")
    return picture


def _files(images: Sequence[str], count: int) -> list[str]:
    """At most ``count`` of the files that are named, then of those in the folders."""
    folders = [ImageFolder(image) for image in images if Path(image).is_dir()]
    named = _spread([image for image in images if not Path(image).is_dir()], count)
    found = [folder.describe(index) for folder in folders for index in range(len(folder))]
    return named + _spread(found, count - len(named))


def _spread(files: list[str], count: int) -> list[str]:
    """At most ``count`` files, evenly spread over the list, which is mostly sorted by class."""
    return files if len(files) <= count else [files[place * len(files) // count] for place in range(count)]
