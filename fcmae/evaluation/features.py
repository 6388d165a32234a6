"""Running a model over every sample of a source, on any number of ranks."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from timm.models.convnext import ConvNeXt
from torch import Tensor, nn
from torch.utils.data import Dataset

from fcmae.config import DataConfig, LoaderConfig
from fcmae.data.loading import Workers, eval_loader
from fcmae.data.pixels.transforms import eval_transform, normalized
from fcmae.data.samples import CanvasImages, CroppedImages, EvaluationImages, WholePairs
from fcmae.data.sources import Source, Subset, few_labels, require_labels, train_source, val_source, with_classes
from fcmae.data.sources.base import shuffled
from fcmae.data.to_device import to_device
from fcmae.data.unreadable import readable
from fcmae.distributed import World
from fcmae.engines.dense import dense
from fcmae.errors import ConfigError, EvaluationStopped, UsageError, counted
from fcmae.models.backbone import stage_shapes
from fcmae.models.headed import backbone_of
from fcmae.models.pooled import pool_maps, row_width
from fcmae.precision import autocast


def never() -> bool:
    """No wish to stop."""
    return False


class Images(NamedTuple):
    """A batch on the device: normalised ``[N, C, H, W]``; targets, by default int64 labels or -1; int64 places."""

    imgs: Tensor
    labels: Tensor
    places: Tensor


class _Placed(Dataset[tuple[Tensor, Any, int]]):
    """Samples with their places."""

    def __init__(self, dataset: EvaluationImages | CroppedImages | WholePairs | CanvasImages) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, Any, int]:
        image, label = self.dataset[index]
        return image, label, index


def share_of(
    dataset: Dataset, loader: LoaderConfig, batch_size: int, world: World, stop: Callable[[], bool] = never
) -> Iterator[list[Tensor]]:
    """This rank's samples of a dataset, in order, as batches on the device.

    Ranks share no sample; each must read its share to the end. What cannot be read is left out with
    ``loader.on_error=skip``. Raises UsageError if that is all.

    Args:
        stop: asked before every batch. Raises EvaluationStopped on all ranks if it was true on one of them.
    """
    count = len(dataset)  # type: ignore[arg-type]
    workers = Workers.of(loader, world)
    loaded = eval_loader(dataset, batch_size, rank=world.rank, world_size=world.size, workers=workers)
    said = torch.zeros(2, dtype=torch.int64)  # whether to stop, and the batches that could be read
    for parts in readable(loaded, count, loader.on_error == "skip", loader.max_bad):
        if stop():
            said[0] = 1
            break
        said[1] += 1
        yield [to_device(part, world.device) for part in parts]
    stopped, read = world.max(said).tolist()
    if stopped:
        raise EvaluationStopped
    if count and not read:
        raise UsageError(f"none of the {counted(count, 'image')} could be read")


def batches(
    source: Source,
    cfg: DataConfig,
    loader: LoaderConfig,
    batch_size: int,
    world: World,
    dataset: CroppedImages | EvaluationImages | WholePairs | CanvasImages | None = None,
    stop: Callable[[], bool] = never,
) -> Iterator[Images]:
    """This rank's share of the source, see :func:`share_of`.

    Args:
        dataset: reads the samples in another way than evaluation does.
    """
    samples = _Placed(dataset or EvaluationImages(source, eval_transform(cfg, loader.max_pixels)))
    for imgs, labels, places in share_of(samples, loader, batch_size, world, stop):
        yield Images(normalized(imgs, cfg), labels, places)


def first_indices(source: Source, count: int | None) -> list[int]:
    """The first ``count`` indices of a fixed random order, or all of them in order."""
    if count is None or count >= len(source):
        return list(range(len(source)))
    return shuffled(source)[:count]


def first(source: Source, count: int | None) -> Source:
    """The samples of :func:`first_indices`."""
    return source if count is None or count >= len(source) else Subset(source, first_indices(source, count))


class Labelled(NamedTuple):
    """Training and validation samples with labels of the same ``classes``, and what the user should know, by line."""

    train: Source
    val: Source
    classes: list[str]
    notes: list[str]


def labelled_sources(cfg: DataConfig, loader: LoaderConfig, seed: int) -> Labelled:
    """The sources of a data config; ``seed`` draws ``data.labels_per_class``.

    Raises UsageError if either has no labels, or the validation samples have a class that the training samples lack.
    """
    train, val = train_source(cfg, loader), val_source(cfg, loader)
    classes = require_labels(train, "data.path")
    val, notes = with_classes(val, "data.val_path", classes, "data.path")
    if cfg.labels_per_class is not None:
        train = few_labels(train, cfg.labels_per_class, seed)
    return Labelled(train, val, classes, notes + one_class(classes))


def one_class(classes: Sequence[str]) -> list[str]:
    """A note that an accuracy over a single class says nothing, if there is only one."""
    if len(classes) != 1:
        return []
    return [f"warning: all images are of one class, {classes[0]}: any network has an accuracy of 100 %"]


class Features(NamedTuple):
    """``values``: float32 ``[n, D]``. ``labels``: int64 ``[n]``, -1 without one. In the source's order.

    Of the images that could be read.
    """

    values: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Extractor:
    """Features of a frozen backbone, a row per image. The ranks share the work, and each gets all of the result.

    Args:
        layer, stages: which features; see :data:`fcmae.models.pooled.ROWS`.
        stop: see :func:`batches`.
    """

    backbone: ConvNeXt
    data: DataConfig
    world: World
    batch_size: int = 256
    precision: str = "float32"
    layer: str = "pooled"
    stop: Callable[[], bool] = never
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    stages: Sequence[int] | None = None

    @property
    def width(self) -> int:
        """D, the number of features."""
        return row_width(stage_shapes(self.backbone)[0], self.layer, self.stages)

    @torch.no_grad()
    def __call__(self, source: Source, dataset: CroppedImages | None = None) -> Features:
        """The features of all of ``source``, read by ``dataset`` or as evaluation does."""
        was_training = self.backbone.training
        self.backbone.eval()
        try:
            values, labels, _ = gather_in_order(self._share(source, dataset), self.world)
        finally:
            self.backbone.train(was_training)
        broken = ~values.isfinite().all(dim=1)
        if broken.any():
            values = values.masked_fill(broken[:, None], 0)  # NaN would be nearest to every image
            images = counted(int(broken.sum()), "image")
            self.world.say(
                f"warning: the features of {images} are not finite, and count as zero; try precision=float32"
            )
        return Features(values, labels)

    def _share(self, source: Source, dataset: CroppedImages | None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Features, labels and places of this rank's images. Begins with a batch of none, for a rank without images."""
        device = self.world.device
        none = torch.empty(0, dtype=torch.int64, device=device)
        yield torch.empty(0, self.width, device=device), none, none
        stream = batches(source, self.data, self.loader, self.batch_size, self.world, dataset, self.stop)
        for imgs, labels, places in stream:
            with autocast(device, self.precision):
                values = self._pool(imgs).float()
            yield values, labels, places

    def _pool(self, imgs: Tensor) -> Tensor:
        if self.layer == "pooled":
            return self.backbone.forward_head(self.backbone.forward_features(imgs), pre_logits=True)
        return pool_maps(dense(self.backbone, imgs), self.layer, self.stages)


def check_image_size(cfg: DataConfig, model: nn.Module, why: str) -> None:
    """Raises ConfigError unless the sides of images are multiples of the network's total stride, as ``why`` needs."""
    stride = stage_shapes(backbone_of(model))[1][-1]
    if any(side % stride for side in cfg.size):
        size = list(cfg.size)
        raise ConfigError(f"data.image_size must be a multiple of {stride}, the total stride, with {why}; got {size}")


def gather(share: Tensor, world: World) -> Tensor:
    """The rows of all ranks, those of the first rank first; ranks may bring different numbers of rows, or none."""
    if world.size == 1:
        return share
    counts = torch.zeros(world.size, dtype=torch.int64, device=share.device)
    counts[world.rank] = len(share)
    counts = world.sum(counts)
    padded = share.new_zeros(int(counts.max()), *share.shape[1:])
    padded[: len(share)] = share
    everyone = [torch.empty_like(padded) for _ in range(world.size)]
    dist.all_gather(everyone, padded)
    return torch.cat([rows[:count] for rows, count in zip(everyone, counts.tolist(), strict=True)])


def gather_in_order(share: Iterable[Sequence[Tensor]], world: World) -> list[Tensor]:
    """The rows of the batches of all ranks, in the order of their places ``[N]``, which each batch ends with.

    A rank without rows brings a batch of none.
    """
    columns = [gather(torch.cat(column), world) for column in zip(*share, strict=True)]
    order = columns[-1].argsort()
    return [column[order] for column in columns]
