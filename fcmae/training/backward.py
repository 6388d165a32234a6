"""The forward and backward pass of micro-batches: run as they are, or recorded once as a CUDA graph and replayed.

At small batches launching thousands of kernels takes longer than running them. A replay is one launch. It runs the same
kernels on the same data, so the result is the same to the bit.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Pass = Callable[[Sequence[Tensor]], Tensor]
"""Forward and backward pass of a batch: adds to ``.grad`` of the parameters and returns the detached loss."""


class EagerBackward:
    """Runs a :data:`Pass` as it is."""

    def __init__(self, run: Pass, model: nn.Module) -> None:
        self.run = run
        self.model = model

    def start_step(self) -> None:
        """Clears the gradients before an optimizer step's first micro-batch."""
        self.model.zero_grad(set_to_none=True)

    def __call__(self, batch: Sequence[Tensor]) -> Tensor:
        return self.run(batch)


class GraphedBackward:
    """A :data:`Pass` that is recorded at its first call and replayed from then on.

    The gradients stay the same tensors, so nobody else may replace ``.grad``: :meth:`start_step` clears them. Batches
    must keep the shapes of the first; randomness drawn in a replay would repeat.

    Args:
        run: the pass to record.
        model: the model whose gradients it fills.
        accumulate: add to the gradients, for several micro-batches a step; else a replay overwrites them, which saves
            clearing and adding.
    """

    WARM_UP = 3
    """Passes before the recording: they compile, and let libraries choose and allocate."""

    def __init__(self, run: Pass, model: nn.Module, accumulate: bool = False) -> None:
        self.run = run
        self.model = model
        self.accumulate = accumulate
        self.graph: torch.cuda.CUDAGraph | None = None
        self.batch: list[Tensor] = []
        self.loss: Tensor | None = None

    def start_step(self) -> None:
        """Clears the gradients, where replays add to them."""
        if self.accumulate and self.graph is not None:
            torch._foreach_zero_([p.grad for p in self._parameters() if p.grad is not None])

    def _parameters(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def __call__(self, batch: Sequence[Tensor]) -> Tensor:
        if self.graph is None:
            self._record(batch)
        for static, part in zip(self.batch, batch, strict=True):
            static.copy_(part, non_blocking=True)
        assert self.graph is not None
        assert self.loss is not None
        self.graph.replay()
        return self.loss

    def _record(self, batch: Sequence[Tensor]) -> None:
        self.batch = [part.clone() for part in batch]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(self.WARM_UP):
                self.model.zero_grad(set_to_none=True)
                self.run(self.batch)
        torch.cuda.current_stream().wait_stream(stream)
        self.model.zero_grad(set_to_none=True)
        if self.accumulate:
            for param in self._parameters():
                param.grad = torch.zeros_like(param)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.loss = self.run(self.batch)
