"""k-nearest-neighbour accuracy of frozen features (Wu et al. 2018, arXiv 1805.01978, section 3.4)."""

import torch
import torch.nn.functional as F
from timm.models.convnext import ConvNeXt
from torch import Tensor

from fcmae.config import DataConfig
from fcmae.data.sources import Source, Subset, require_labels, train_source, val_source
from fcmae.evaluation.features import pooled_features
from fcmae.randomness import Stream, generator
from fcmae.training.distributed import World


def knn_predict(
    queries: Tensor, gallery: Tensor, labels: Tensor, k: int, temperature: float, num_classes: int
) -> Tensor:
    """The class that the k most similar gallery features vote for.

    Args:
        queries: ``[q, D]``.
        gallery: ``[n, D]``, with ``labels`` int64 ``[n]``.
        temperature: a neighbour's vote is exp(cosine similarity / temperature).

    Returns:
        int64 ``[q]``.
    """
    gallery = F.normalize(gallery, dim=1)
    predicted = []
    for chunk in F.normalize(queries, dim=1).split(1024):
        similarity, nearest = (chunk @ gallery.t()).topk(min(k, len(gallery)), dim=1)
        votes = torch.zeros(len(chunk), num_classes, device=chunk.device)
        votes.scatter_add_(1, labels[nearest], (similarity / temperature).exp())
        predicted.append(votes.argmax(dim=1))
    return torch.cat(predicted)


def knn_accuracy(
    backbone: ConvNeXt,
    data: DataConfig,
    *,
    k: int = 10,
    temperature: float = 0.07,
    gallery: int | None = 20_000,
    queries: int | None = None,
    batch_size: int = 256,
    precision: str = "float32",
    world: World,
) -> float:
    """k-NN accuracy in percent of pooled features: validation images against training images.

    ``gallery`` and ``queries`` limit the images, to the first of a fixed random order; None = all. Single process.
    """
    train, val = train_source(data), val_source(data)
    classes = require_labels(train, "data.path")
    require_labels(val, "data.val_path")
    gallery_features, gallery_labels = pooled_features(
        backbone, _first(train, gallery), data, batch_size, precision, world
    )
    features, labels = pooled_features(backbone, _first(val, queries), data, batch_size, precision, world)
    predicted = knn_predict(features, gallery_features, gallery_labels, k, temperature, len(classes))
    return 100 * (predicted == labels).double().mean().item()


def _first(source: Source, count: int | None) -> Source:
    if count is None or count >= len(source):
        return source
    order = torch.randperm(len(source), generator=generator(0, Stream.SUBSET))
    return Subset(source, order[:count].tolist())
