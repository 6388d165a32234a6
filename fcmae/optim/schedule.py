"""The learning rate as a pure function of the step."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up from 0 to ``peak``, then half a cosine (the official code's) or a line to ``min_lr``."""

    peak: float
    min_lr: float
    warmup_steps: int
    total_steps: int
    decay: str = "cosine"
    """``cosine`` or ``linear``."""

    def __call__(self, step: int) -> float:
        """The learning rate of optimizer step ``step``, counted from 0."""
        if step < self.warmup_steps:
            return self.peak * step / self.warmup_steps
        progress = min(1.0, (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps))
        left = 1 - progress if self.decay == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
        return self.min_lr + (self.peak - self.min_lr) * left
