"""Which samples make up which optimizer step, and how ranks and micro-batches divide them.

The samples of optimizer step k are a function of the seed and k alone: a fresh random order of the source every epoch,
cut into global batches (a remainder is left out of that epoch). Ranks and micro-batches only divide a global batch, in
parts that are equal or differ by one unit. All micro-batches have one size, so that shapes stay static: what a part
lacks is padding of weight 0 (:class:`Padding`).
"""

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
    """Which samples every optimizer step and every rank gets.

    ``global_batch_size`` samples a step are divided into ``accum_steps`` micro-batches of ``micro_batch_size``, padding
    included, on each of ``world_size`` ranks. Of each image ``crops_per_image`` samples are made, for the same step. An
    epoch stays so many samples as there are images, and so a schedule its length: a pass over the images takes
    ``crops_per_image`` epochs. With ``pairs`` the samples at positions 2i and 2i + 1 of a global batch stay together.
    """

    num_samples: int
    global_batch_size: int
    micro_batch_size: int
    world_size: int = 1
    seed: int = 0
    crops_per_image: int = 1
    pairs: bool = False

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
        """A plan with as few micro-batches of at most ``micro_batch_size`` as possible, as small as that allows.

        Raises UsageError, naming the sizes that fit.
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
                f"optim.global_batch_size is {global_batch_size}; allowed with {num_samples} training images is at "
                f"most {num_samples}"
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
        """Samples that stay in one micro-batch: the crops of an image, or two that are mixed."""
        return 2 if self.pairs else self.crops_per_image

    @property
    def units(self) -> int:
        """Of a global batch; the last one may lack a sample."""
        return -(-self.global_batch_size // self.unit)

    @property
    def steps_per_epoch(self) -> int:
        return self.num_samples // self.global_batch_size

    @property
    def accum_steps(self) -> int:
        return -(-self.units // (self.world_size * self.micro_batch_size // self.unit))

    @property
    def padding(self) -> int:
        """How many of the samples that all ranks process in a step are padding."""
        return self.world_size * self.accum_steps * self.micro_batch_size - self.global_batch_size

    @property
    def images_per_step(self) -> int:
        return self.global_batch_size // self.crops_per_image

    @property
    def steps_per_pass(self) -> int:
        """Steps that read every image once, but for a remainder; without several crops an epoch's."""
        return self.num_samples // self.images_per_step

    def order(self, epoch: int) -> Tensor:
        """The order of the source in a pass over it, int64 ``[num_samples]``."""
        return torch.randperm(self.num_samples, generator=generator(self.seed, Stream.ORDER, epoch))

    def global_batch(self, step: int) -> list[SampleKey]:
        """The images of an optimizer step, the same for any number of ranks."""
        epoch, position = divmod(step, self.steps_per_pass)
        count = self.images_per_step
        return [(epoch, index) for index in self.order(epoch)[position * count : (position + 1) * count].tolist()]

    def part(self, micro: int, rank: int) -> range:
        """The positions in a global batch of the samples of a rank's micro-batch; none if it is all padding."""
        number, parts = micro * self.world_size + rank, self.accum_steps * self.world_size
        first, last = (self.unit * ((number + i) * self.units // parts) for i in (0, 1))
        return range(first, min(last, self.global_batch_size))

    def read(self, micro: int, rank: int) -> range:
        """The positions of what is read for a rank's micro-batch: :meth:`part`, or the first unit if there is none."""
        return self.part(micro, rank) or range(min(self.unit, self.global_batch_size))

    def share(self, rank: int) -> float:
        """A rank's samples, in mean shares: 1 where ranks divide the global batch."""
        count = sum(len(self.part(micro, rank)) for micro in range(self.accum_steps))
        return count * self.world_size / self.global_batch_size


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
        current, order = -1, torch.empty(0)
        for step in range(self.start_step, self.stop_step):
            epoch, position = divmod(step, plan.steps_per_pass)
            if epoch != current:
                current, order = epoch, plan.order(epoch)
            batch = order[position * plan.images_per_step :]
            for micro in range(plan.accum_steps):
                samples = plan.read(micro, self.rank)
                images = slice(samples.start // plan.crops_per_image, samples.stop // plan.crops_per_image)
                yield [(epoch, index) for index in batch[images].tolist()]


class Padding:
    """Fills the micro-batches of a rank up with copies of their last sample, on the device.

    The weights are 0 for padding and of mean 1 over all that the ranks process in a step. So the mean of weighted
    losses over micro-batches and ranks is the mean over the samples of the step, as it is without padding.
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
        """The parts of a micro-batch, filled up; and the weights float32 ``[N]``, if the plan has padding."""
        if not self._micro:
            return list(batch)
        index, weight = self._micro[micro]
        return [*(part[index] if len(part) < len(index) else part for part in batch), weight]
