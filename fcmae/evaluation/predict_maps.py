"""``fcmae predict`` with target maps: a file per image, in a folder."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fcmae.config import CheckpointConfig, DataConfig, check
from fcmae.data.pixels.transforms import WholeImage
from fcmae.data.samples import EvaluationImages
from fcmae.data.sources import ImageFolder, Source
from fcmae.data.sources.images import Joined
from fcmae.distributed import World
from fcmae.errors import UsageError, counted
from fcmae.evaluation.features import batches, check_image_size, gather
from fcmae.evaluation.windows import Windows, network_of, over_windows
from fcmae.files import make_folder, output
from fcmae.messages import say
from fcmae.models.objective import DenseObjective


class MapNetwork(NamedTuple):
    """A network that predicts a map per image, and the names of its classes or channels."""

    model: nn.Module
    objective: DenseObjective
    columns: list[str]


class Maps(NamedTuple):
    """A map per image that could be read, in the order in which the images were given.

    ``paths``: what names each image. ``maps``: what :meth:`.DenseObjective.final` gives, on the CPU: classes ``[H, W]``
    or numbers ``[K, H, W]``; empty if they were written to files. ``columns``: names of classes or channels.
    """

    paths: list[str]
    maps: list[Tensor]
    columns: list[str]


def predict_maps(
    network: MapNetwork, source: Joined, cfg: CheckpointConfig, data: DataConfig, world: World, out: str | None
) -> Maps | None:
    """Predicts whole images by windows, the ranks sharing them, and writes a file for each to the folder ``out``.

    A file has the relative path of its image below the folder that was given. None on ranks other than the first.
    Raises UsageError, before the work begins, if files would replace images or each other.
    """
    check("--out", out, out is not None or world.size == 1, "a folder on several ranks")
    check_image_size(data, network.model, "target maps")
    files = None if out is None else _files(source, Path(out), network.objective.ending)
    dataset = EvaluationImages(source, WholeImage(data, cfg.loader.max_pixels))
    stream = batches(source, data, cfg.loader, 1, world, dataset)
    run = network_of(network.model.eval(), network.objective, world, cfg.precision)
    windows = Windows(data.size, data.window_overlap, cfg.at_once(dense=True))
    maps, done = [], []
    for image, predicted in over_windows(run, stream, windows):
        place, final = int(image.places), network.objective.final(predicted).cpu()
        done.append(place)
        if files is None:
            maps.append(final)
            continue
        make_folder("--out", files[place].parent)
        with output("--out", files[place]) as file:
            network.objective.write(final, file)
    places = sorted(gather(torch.tensor(done, dtype=torch.int64, device=world.device), world).tolist())
    left = len(source) - len(places)
    if not world.is_main:
        return None
    if left:
        say(f"{left} of {counted(len(source), 'image')} could not be read: no map")
    return Maps([source.describe(place) for place in places], maps, network.columns)


def _files(source: Joined, out: Path, ending: str) -> list[Path]:
    """The file of each image. Raises UsageError."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out must be a folder; {out} is a file")
    files: list[Path] = []
    for part in source.sources:
        files += [out.joinpath(*name) for name in _names(part, ending)]
    first: dict[Path, int] = {}
    images = {os.path.realpath(source.describe(place)) for place in range(len(source))}
    for place, file in enumerate(files):
        if os.path.realpath(file) in images:
            raise UsageError(f"--out {out}: {file} is an image that is read; give another folder")
        if file in first:
            both = " and ".join(source.describe(index) for index in (first[file], place))
            raise UsageError(f"--out {out}: {both} would be one file, {file}; predict them one after another")
        first[file] = place
    return files


def _names(source: Source, ending: str) -> Iterator[tuple[str, ...]]:
    """The parts of a relative path for each sample: an image's below its folder, else below what all share."""
    if isinstance(source, ImageFolder):
        names = [os.fsdecode(source.relative(index)[1]) for index in range(len(source))]
    else:
        names = [source.describe(index) for index in range(len(source))]
        with contextlib.suppress(ValueError):  # absolute and relative paths
            shared = os.path.commonpath([os.path.dirname(name) for name in names])
            names = [os.path.relpath(name, shared) if shared else name for name in names]
    for name in names:
        parts = [part for part in PurePath(os.path.splitext(name)[0] + ending).parts if part not in ("/", "..")]
        yield tuple(parts)
