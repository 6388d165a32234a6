"""Micro-batches of one size, whatever the number of ranks: what a rank lacks is padding that weighs nothing."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fcmae.data.plan import BatchPlan


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
