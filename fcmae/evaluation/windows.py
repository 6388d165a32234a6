"""Predictions for whole images of any size by overlapping windows."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fcmae.config import DataConfig, LoaderConfig
from fcmae.data.pixels.pairs import WholePair
from fcmae.data.samples import WholePairs
from fcmae.data.sources import Source
from fcmae.distributed import World
from fcmae.evaluation.features import Images, batches, never
from fcmae.models.objective import DenseObjective, Predictions
from fcmae.precision import autocast

Network = Callable[[Tensor], Tensor]
"""Normalised windows ``[N, C, h, w]`` to float32 predictions ``[N, K, h, w]``."""


class Windows(NamedTuple):
    """How an image is covered: ``size`` is a window's height and width; each run of the network has ``batch_size``."""

    size: tuple[int, int]
    overlap: float
    batch_size: int


def whole_predictions(
    model: nn.Module,
    objective: DenseObjective,
    source: Source,
    cfg: DataConfig,
    loader: LoaderConfig,
    batch_size: int,
    precision: str,
    world: World,
    stop: Callable[[], bool] = never,
    look: Callable[[Images, Tensor], None] | None = None,
) -> Iterator[Predictions]:
    """This rank's share of the source, image by image; every image once over all ranks.

    Outputs are ``objective.predict``, averaged over windows: ``[1, K, H, W]``; targets are whole maps ``[1, ...]``.
    ``look`` takes each image and its prediction ``[K, H, W]``. ``stop`` is asked before every image. Raises
    EvaluationStopped on all ranks if it was true on one of them.
    """
    model.eval()
    dataset = WholePairs(source, WholePair(cfg, loader.max_pixels), objective.target)
    stream = batches(source, cfg, loader, 1, world, dataset, stop)
    network = network_of(model, objective, world, precision)
    for image, predicted in over_windows(network, stream, Windows(cfg.size, cfg.window_overlap, batch_size)):
        if look is not None:
            look(image, predicted)
        yield Predictions(predicted[None], image.labels, image.places)


def network_of(model: nn.Module, objective: DenseObjective, world: World, precision: str) -> Network:
    """What ``objective`` predicts by ``model``, without gradients."""

    def network(imgs: Tensor) -> Tensor:
        with torch.inference_mode(), autocast(world.device, precision):
            output = model(imgs)
        with torch.inference_mode():
            return objective.predict(output.float())

    return network


def over_windows(network: Network, images: Iterable[Images], windows: Windows) -> Iterator[tuple[Images, Tensor]]:
    """For each batch of one image, in order, the mean of the predictions of all windows: ``[K, H, W]``.

    Windows of several images run together. How many does not change what is summed, nor the order.
    """
    waiting: deque[_Canvas] = deque()
    queue: deque[tuple[_Canvas, int, int]] = deque()

    def run(count: int) -> None:
        now = [queue.popleft() for _ in range(min(count, len(queue)))]
        outputs = network(torch.stack([canvas.window(top, left) for canvas, top, left in now]))
        for (canvas, top, left), output in zip(now, outputs, strict=True):
            canvas.add(top, left, output)

    for image in images:
        waiting.append(_Canvas(image, windows))
        queue.extend((waiting[-1], top, left) for top, left in waiting[-1].places)
        while len(queue) >= windows.batch_size:
            run(windows.batch_size)
        while waiting and waiting[0].is_done:
            yield waiting.popleft().result()
    while queue:
        run(windows.batch_size)
    while waiting:
        yield waiting.popleft().result()


class _Canvas:
    """An image and the sum of what windows predicted for it. Images that are smaller than a window are padded."""

    def __init__(self, image: Images, windows: Windows) -> None:
        self.image = image
        self.size = windows.size
        pixels = image.imgs[0]
        self.height, self.width = pixels.shape[-2:]
        more = [max(0, want - side) for want, side in zip(windows.size, pixels.shape[-2:], strict=True)]
        self.pixels = F.pad(pixels, (0, more[1], 0, more[0]))
        rows, cols = (
            starts(side, want, windows.overlap) for side, want in zip(self.pixels.shape[-2:], windows.size, strict=True)
        )
        self.places = [(top, left) for top in rows for left in cols]
        self.left = len(self.places)
        self.total: Tensor | None = None
        self.count = pixels.new_zeros(self.pixels.shape[-2:])

    @property
    def is_done(self) -> bool:
        return self.left == 0

    def window(self, top: int, left: int) -> Tensor:
        return self.pixels[:, top : top + self.size[0], left : left + self.size[1]]

    def add(self, top: int, left: int, output: Tensor) -> None:
        if self.total is None:
            self.total = output.new_zeros(len(output), *self.pixels.shape[-2:])
        where = (..., slice(top, top + self.size[0]), slice(left, left + self.size[1]))
        self.total[where] += output
        self.count[where] += 1
        self.left -= 1

    def result(self) -> tuple[Images, Tensor]:
        assert self.total is not None
        return self.image, (self.total / self.count)[:, : self.height, : self.width]


def starts(side: int, window: int, overlap: float) -> list[int]:
    """Where windows begin on a line of ``side`` pixels, evenly spaced, neighbours sharing at least ``overlap``."""
    step = max(1, math.floor(window * (1 - overlap)))
    count = math.ceil((side - window) / step)
    return [round(number * (side - window) / count) for number in range(count + 1)] if count else [0]
