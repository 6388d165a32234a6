"""What a network gives for exactly the validation set, on any number of ranks, and the accuracy of a classifier."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fcmae import toolchain
from fcmae.config import DataConfig, LoaderConfig
from fcmae.data.pixels.transforms import eval_transform
from fcmae.data.samples import EvaluationImages, Target, label_of
from fcmae.data.sources import Source
from fcmae.distributed import World
from fcmae.evaluation.features import batches, never
from fcmae.models.headed import dense_outputs
from fcmae.models.objective import Predictions
from fcmae.precision import autocast

TOP5_FROM = 6
"""Classes from which on the accuracy of five guesses says anything."""


COMPILE_FROM = 20_000
"""Images per rank from which on compiling the network takes less time than it saves."""


def forward_of(model: nn.Module, device: torch.device, images: int, batch_size: int) -> Callable[[Tensor], Any]:
    """What runs a network of fine-tuning over ``images`` images, in batches: on a GPU on the dense engine's kernels.

    Batches have at most ``batch_size`` images.
    """
    if device.type != "cuda":
        return model
    if images < COMPILE_FROM or toolchain.missing("cuda"):
        return partial(dense_outputs, model)
    return partial(_in_full_batches, partial(dense_outputs, model, compiled=True), batch_size)


def _in_full_batches(forward: Callable[[Tensor], Any], batch_size: int, imgs: Tensor) -> Any:
    """``forward`` of a batch filled up with its last image, so that only one size is compiled."""
    missing = batch_size - len(imgs)
    full = torch.cat([imgs, imgs[-1:].expand(missing, -1, -1, -1)]) if missing > 0 else imgs
    return tree_map_only(Tensor, lambda output: output[: len(imgs)], forward(full))


def predictions(
    model: nn.Module,
    source: Source,
    cfg: DataConfig,
    loader: LoaderConfig,
    batch_size: int,
    precision: str,
    world: World,
    stop: Callable[[], bool] = never,
    target: Target = label_of,
) -> Iterator[Predictions]:
    """This rank's share of the source, every image once over all ranks.

    ``stop`` is asked before every batch. Raises EvaluationStopped on all ranks if it was true on one of them.
    """
    model.eval()
    forward = forward_of(model, world.device, len(source) // world.size, batch_size)
    samples = EvaluationImages(source, eval_transform(cfg, loader.max_pixels), target)
    for imgs, targets, places in batches(source, cfg, loader, batch_size, world, samples, stop):
        with torch.inference_mode(), autocast(world.device, precision):
            outputs = tree_map_only(Tensor, Tensor.float, forward(imgs))
        yield Predictions(outputs, targets, places)


def accuracy(
    share: Iterable[Predictions],
    world: World,
    *,
    accepted: Sequence[Sequence[int]] | None = None,
    confusion: Tensor | None = None,
) -> dict[str, float]:
    """``top1`` and ``top5`` in percent and the number of ``images``; every image counts once on any number of ranks.

    There is no ``top5`` of fewer than six classes, which would be 100. Outputs that are not finite count as wrong,
    and a line says how many there were.

    Args:
        share: the :func:`predictions` of this rank; outputs are logits ``[N, classes]``, targets int64 labels or -1.
        accepted: the classes that are right for each image, instead of the source's label; images with none are left
            out (ImageNet-ReaL, arXiv 2006.07159).
        confusion: int64 ``[classes, classes]``, to which this rank's predictions (columns) are added for each class
            (rows). It needs one class per image.
    """
    counts = torch.zeros(5, dtype=torch.float64, device=world.device)
    for logits, labels, places in share:
        right = (
            labels[:, None]
            if accepted is None
            else _padded([accepted[place] for place in places.tolist()], world.device)
        )
        counted = (right >= 0).any(dim=1)
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices
        finite = logits.isfinite().all(dim=1)
        hits = (ranked[:, :, None] == right[:, None, :]).any(dim=2) & finite[:, None]
        of_many = counted.sum() * (logits.shape[1] >= TOP5_FROM)
        counts += torch.stack([hits[:, 0].sum(), hits.any(dim=1).sum(), counted.sum(), of_many, (~finite).sum()])
        if confusion is not None:
            pairs = right[counted & finite, 0], ranked[counted & finite, 0]
            confusion.index_put_(pairs, torch.ones_like(pairs[0]), accumulate=True)
    top1, top5, images, of_many, broken = world.sum(counts).tolist()
    if broken:
        world.say(
            f"warning: the outputs for {broken:.0f} images are not finite, and count as wrong; try precision=float32"
        )
    result = {"top1": 100 * top1 / images}
    if of_many:
        result["top5"] = 100 * top5 / images
    return {**result, "images": images}


def _padded(classes: list[Sequence[int]], device: torch.device) -> Tensor:
    """Classes of each image, filled up with -1: ``[n, most]``."""
    most = max(1, *map(len, classes)) if classes else 1
    return torch.tensor([[*some, *[-1] * (most - len(some))] for some in classes], device=device)
