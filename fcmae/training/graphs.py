"""CUDA graphs: the forward and backward pass of a micro-batch recorded once and replayed.

At small batches launching thousands of kernels takes longer than running them. A replay is one launch. It runs the same
kernels on the same data, so the result is the same to the bit.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Backward = Callable[[Sequence[Tensor]], Tensor]
"""Forward and backward pass of a batch: fills ``.grad`` of the parameters and returns the detached loss."""


class GraphedBackward:
    """A :data:`Backward` that is recorded at its first call and replayed from then on.

    A replay overwrites the gradients of the call before, so it serves a single micro-batch a step, and nobody else may
    replace or clear ``.grad``. Batches must keep the shapes of the first; randomness drawn in it would repeat.
    """

    WARM_UP = 3
    """Passes before the recording: they compile, and let libraries choose and allocate."""

    def __init__(self, backward: Backward, model: nn.Module) -> None:
        self.backward = backward
        self.model = model
        self.graph: torch.cuda.CUDAGraph | None = None
        self.batch: list[Tensor] = []
        self.loss: Tensor | None = None

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
                self.backward(self.batch)
        torch.cuda.current_stream().wait_stream(stream)
        self.model.zero_grad(set_to_none=True)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.loss = self.backward(self.batch)
