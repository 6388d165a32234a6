"""k-nearest-neighbour accuracy of frozen features (Wu et al. 2018, arXiv 1805.01978, section 3.4)."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fcmae.config import DataConfig, LoaderConfig, check
from fcmae.data.sources import Source
from fcmae.distributed import World
from fcmae.evaluation.features import Features, first, labelled_sources

SIMILARITIES = 2**27
"""Most similarities that are computed at once: half a GiB."""
SAME = 1e-4
"""Normalised features that differ by less are of the same image, or of images that the network cannot tell apart."""


@torch.inference_mode()
def knn_predict(
    queries: Tensor, gallery: Tensor, labels: Tensor, ks: Sequence[int], temperature: float, num_classes: int
) -> tuple[Tensor, Tensor]:
    """The class that the k most similar gallery features vote for, for several k.

    Args:
        queries: ``[q, D]``.
        gallery: ``[n, D]``, with ``labels`` int64 ``[n]``.
        temperature: a neighbour's vote is exp(cosine similarity / temperature).

    Returns:
        The classes, int64 ``[len(ks), q]``, and which queries are in the gallery too (:data:`SAME`), bool ``[q]``.
    """
    gallery = F.normalize(gallery, dim=1)
    predicted = [torch.empty(len(ks), 0, dtype=torch.int64, device=queries.device)]
    copies = [torch.empty(0, dtype=torch.bool, device=queries.device)]
    for chunk in F.normalize(queries, dim=1).split(max(1, SIMILARITIES // len(gallery))):
        similarity, nearest = (chunk @ gallery.t()).topk(min(max(ks), len(gallery)), dim=1)
        # Votes relative to the nearest's: exp(1 / temperature) is infinite below a temperature of 0.0113.
        weight = ((similarity - similarity[:, :1]) / temperature).exp()
        votes = [
            torch.zeros(len(chunk), num_classes, device=chunk.device).scatter_add_(
                1, labels[nearest[:, :k]], weight[:, :k]
            )
            for k in ks
        ]
        predicted.append(torch.stack(votes).argmax(dim=2))
        copies.append((chunk - gallery[nearest[:, 0]]).norm(dim=1) < SAME)
    return torch.cat(predicted, dim=1), torch.cat(copies)


def knn_accuracy(
    train: Features, val: Features, num_classes: int, world: World, *, ks: Sequence[int], temperature: float = 0.07
) -> dict[str, float]:
    """Accuracy in percent of ``val`` against the gallery ``train`` for each k, as ``knnK``.

    ``copies`` is how many images of ``val`` are in the gallery too, so that their own label votes. Every rank has all
    features; they share the queries.
    """
    mine = slice(world.rank, None, world.size)
    predicted, copies = knn_predict(val.values[mine], train.values, train.labels, ks, temperature, num_classes)
    right = world.sum(torch.cat([(predicted == val.labels[mine]).sum(dim=1), copies.sum()[None]])).tolist()
    named = {f"knn{k}": 100 * count / len(val.labels) for k, count in zip(ks, right[:-1], strict=True)}
    return {**named, "copies": right[-1]}


def warn_of_copies(result: dict[str, float], queries: int, world: World) -> None:
    """Prints a line, once a launch, if validation images are in the gallery too."""
    if result["copies"]:
        world.say(
            f"warning: {result['copies']:.0f} of {queries} validation images have the features of a training image, "
            "whose label then counts: data.path and data.val_path must have no image in common"
        )


def check_neighbours(key: str, ks: Sequence[int], most: int) -> None:
    """Raises ConfigError if there are fewer images, ``most``, than neighbours."""
    check(key, list(ks), max(ks) <= most, f"at most {most}, the number of images to compare with")


def knn_of(
    data: DataConfig,
    loader: LoaderConfig,
    extract: Callable[[Source], Features],
    world: World,
    *,
    ks: Sequence[int],
    temperature: float = 0.07,
    gallery: int | None = 20_000,
    queries: int | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """:func:`knn_accuracy` of validation images against training images, and how many of each.

    ``gallery`` and ``queries`` limit the images, to the first of a fixed random order; None = all. ``seed`` draws
    ``data.labels_per_class``.
    """
    train, val, classes, notes = labelled_sources(data, loader, seed)
    train, val = first(train, gallery), first(val, queries)
    check_neighbours("k", ks, len(train))
    world.say(*notes)
    known, asked = extract(train), extract(val)
    result = knn_accuracy(known, asked, len(classes), world, ks=ks, temperature=temperature)
    warn_of_copies(result, len(asked.labels), world)
    return {**result, "gallery": len(known.labels), "queries": len(asked.labels)}
