"""Divides the source into optimizer steps, and each step into ranks and micro-batches.

The samples of optimizer step k are a function of the seed and k alone: each epoch is a new random order of the source,
cut into global batches; the remainder is left out. Ranks and micro-batches divide a global batch into parts that are
equal or differ by one unit. All micro-batches have one size, so that shapes stay static: what a part
lacks is padding of weight 0 (:class:`Padding`).
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.data import Sampler

from fcmae.errors import UsageError
from fcmae.randomness import Stream, generator

SampleKey = tuple[int, int]
"""(pass over the source, which is an epoch unless images give several crops; index into the source)."""


@dataclass(frozen=True)
class BatchPlan:
    """The samples of each optimizer step and rank.

    A step has ``global_batch_size`` samples in ``accum_steps`` micro-batches of ``micro_batch_size``, padding included,
    on each of ``world_size`` ranks. Each image gives ``crops_per_image`` samples of the same step. An epoch has as many
    samples as there are images, so a pass over the images takes ``crops_per_image`` epochs. With ``pairs`` the samples
    at positions 2i and 2i + 1 of a global batch stay together. With the ``labels`` of the images, each class is drawn
    equally often (:class:`Balance`).
    """

    num_samples: int
    global_batch_size: int
    micro_batch_size: int
    world_size: int = 1
    seed: int = 0
    crops_per_image: int = 1
    pairs: bool = False
    labels: tuple[int, ...] | None = None

    @classmethod
    def create(
        cls,
        num_samples: int,
        global_batch_size: int,
        micro_batch_size: int | None,
        world_size: int,
        seed: int,
        crops_per_image: int = 1,
        pairs: bool = False,
    ) -> "BatchPlan":
        """A plan with the fewest and smallest micro-batches of at most ``micro_batch_size``.

        Raises UsageError naming sizes that fit.
        """
        rest = global_batch_size % crops_per_image
        if rest:
            below = global_batch_size - rest
            fits = " or ".join(str(size) for size in (below, below + crops_per_image) if size)
            raise UsageError(
                f"optim.global_batch_size must be a multiple of data.crops_per_image={crops_per_image}, such as "
                f"{fits}; got {global_batch_size}"
            )
        if num_samples < global_batch_size:
            raise UsageError(
                f"optim.global_batch_size must be at most {num_samples}, the number of training images; got "
                f"{global_batch_size}"
            )
        plan = cls(num_samples, global_batch_size, global_batch_size, world_size, seed, crops_per_image, pairs)
        most = plan.units if micro_batch_size is None else micro_batch_size // plan.unit
        if not most:
            why = "augment.mixup or augment.cutmix (pairs)" if pairs else f"data.crops_per_image={crops_per_image}"
            raise UsageError(
                f"trainer.micro_batch_size must be at least {plan.unit} with {why}; got {micro_batch_size}"
            )
        accum_steps = -(-plan.units // (world_size * most))
        return replace(plan, micro_batch_size=plan.unit * -(-plan.units // (world_size * accum_steps)))

    def __str__(self) -> str:
        """The global batch as ranks x micro-batch x accumulation."""
        padding = f" - {self.padding} of padding" if self.padding else ""
        return f"{self.global_batch_size} = {self.world_size} x {self.micro_batch_size} x {self.accum_steps}{padding}"

    @property
    def unit(self) -> int:
        """Samples that stay in one micro-batch: the crops of an image, or a pair that is mixed."""
        return 2 if self.pairs else self.crops_per_image

    @property
    def units(self) -> int:
        """Units per global batch; the last one may lack a sample."""
        return -(-self.global_batch_size // self.unit)

    @property
    def steps_per_epoch(self) -> int:
        return self.num_samples // self.global_batch_size

    @property
    def accum_steps(self) -> int:
        return -(-self.units // (self.world_size * self.micro_batch_size // self.unit))

    @property
    def padding(self) -> int:
        """Samples of padding per step, over all ranks."""
        return self.world_size * self.accum_steps * self.micro_batch_size - self.global_batch_size

    @property
    def images_per_step(self) -> int:
        return self.global_batch_size // self.crops_per_image

    @property
    def steps_per_pass(self) -> int:
        """Steps of a pass over the images, without the remainder; an epoch's for one crop per image."""
        return self.num_samples // self.images_per_step

    def order(self, epoch: int) -> Tensor:
        """The order of the source in a pass over it, int64 ``[num_samples]``."""
        return torch.randperm(self.num_samples, generator=generator(self.seed, Stream.ORDER, epoch))

    def keys(self, epoch: int) -> Tensor:
        """The keys of the samples of a pass over the source, in order, int64 ``[num_samples, 2]``."""
        if self.labels is not None:
            return _balance(self.labels).keys(epoch, generator(self.seed, Stream.ORDER, epoch))
        order = self.order(epoch)
        return torch.stack([torch.full_like(order, epoch), order], 1)

    def global_batch(self, step: int) -> list[SampleKey]:
        """The images of an optimizer step, the same for any number of ranks."""
        epoch, position = divmod(step, self.steps_per_pass)
        count = self.images_per_step
        return _tuples(self.keys(epoch)[position * count : (position + 1) * count])

    def part(self, micro: int, rank: int) -> range:
        """The positions of a rank's micro-batch in the global batch; none if it is all padding."""
        number, parts = micro * self.world_size + rank, self.accum_steps * self.world_size
        first, last = (self.unit * ((number + i) * self.units // parts) for i in (0, 1))
        return range(first, min(last, self.global_batch_size))

    def read(self, micro: int, rank: int) -> range:
        """The positions that are read for a rank's micro-batch: :meth:`part`, or the first unit if that is empty."""
        return self.part(micro, rank) or range(min(self.unit, self.global_batch_size))

    def share(self, rank: int) -> float:
        """A rank's samples divided by the mean over ranks."""
        count = sum(len(self.part(micro, rank)) for micro in range(self.accum_steps))
        return count * self.world_size / self.global_batch_size


class Balance:
    """Draws each class equally often: of any K samples in a row from a multiple of K on, K being the number of classes
    that have images, one is of each class. Within a class, every image is drawn once before any is drawn again.

    An image that is drawn r times in an epoch is r different samples: their passes are numbered ``epoch * repeats`` to
    ``epoch * repeats + r - 1``, so each has a crop of its own.
    """

    def __init__(self, labels: Sequence[int]) -> None:
        given = torch.tensor(labels)
        self.count = len(given)
        self.members = [(given == label).nonzero()[:, 0] for label in given.unique().tolist()]
        self.rounds = -(-self.count // len(self.members))
        self.repeats = -(-self.rounds // min(map(len, self.members)))

    def keys(self, epoch: int, rng: torch.Generator) -> Tensor:
        """As many samples as there are images, int64 ``[n, 2]``."""
        drawn = []
        for members in self.members:
            turns = -(-self.rounds // len(members))
            indices = torch.cat([members[torch.randperm(len(members), generator=rng)] for _ in range(turns)])
            turn = torch.arange(turns).repeat_interleave(len(members))
            drawn.append(torch.stack([epoch * self.repeats + turn, indices], 1)[: self.rounds])
        by_class = torch.stack(drawn)  # [K, rounds, 2]
        order = torch.rand(self.rounds, len(drawn), generator=rng).argsort(1)  # of the classes in each round
        return by_class[order, torch.arange(self.rounds)[:, None]].flatten(0, 1)[: self.count]


_balance = functools.lru_cache(maxsize=2)(Balance)


def _tuples(keys: Tensor) -> list[SampleKey]:
    return [(number, index) for number, index in keys.tolist()]


class MicroBatches(Sampler[list[SampleKey]]):
    """A rank's micro-batches from ``start_step`` to ``stop_step``, without padding; starting late costs no reading."""

    def __init__(self, plan: BatchPlan, rank: int, start_step: int, stop_step: int) -> None:
        self.plan = plan
        self.rank = rank
        self.start_step = start_step
        self.stop_step = stop_step

    def __len__(self) -> int:
        return (self.stop_step - self.start_step) * self.plan.accum_steps

    def __iter__(self) -> Iterator[list[SampleKey]]:
        plan = self.plan
        current, keys = -1, torch.empty(0)
        for step in range(self.start_step, self.stop_step):
            epoch, position = divmod(step, plan.steps_per_pass)
            if epoch != current:
                current, keys = epoch, plan.keys(epoch)
            first = position * plan.images_per_step
            for micro in range(plan.accum_steps):
                samples = plan.read(micro, self.rank)
                start, stop = samples.start // plan.crops_per_image, samples.stop // plan.crops_per_image
                yield _tuples(keys[first + start : first + stop])


class Padding:
    """Fills up the micro-batches of a rank with copies of their last sample, on the device.

    Weights are 0 for padding and have a mean of 1 over all samples of a step. So the mean of weighted losses over
    micro-batches and ranks is the mean over the samples of the step.
    """

    def __init__(self, plan: BatchPlan, rank: int, device: torch.device) -> None:
        self._micro: list[tuple[Tensor, Tensor]] = []
        if not plan.padding:
            return
        size = plan.micro_batch_size
        slots = torch.arange(size, device=device)
        weight = 1 + plan.padding / plan.global_batch_size
        for micro in range(plan.accum_steps):
            real, read = len(plan.part(micro, rank)), len(plan.read(micro, rank))
            self._micro.append((slots.clamp(max=read - 1), (slots < real) * weight))

    def __call__(self, micro: int, batch: Sequence[Tensor]) -> list[Tensor]:
        """The parts of a micro-batch, filled up, and weights float32 ``[N]`` if the plan has padding."""
        if not self._micro:
            return list(batch)
        index, weight = self._micro[micro]
        return [*(part[index] if len(part) < len(index) else part for part in batch), weight]
