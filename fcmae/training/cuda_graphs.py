"""The forward and backward pass of micro-batches: run as they are, or recorded once as a CUDA graph and replayed.

At small batches launching thousands of kernels takes longer than running them. A replay is one launch. It runs the same
kernels on the same data, so the result is the same to the bit.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from fcmae.config import FinetuneConfig, PretrainConfig, RunConfig, check_cuda_graph, graph_obstacles
from fcmae.engines import HOST_BOUND
from fcmae.training.exchange import GradientExchange, TorchDDP

Result = TypeVar("Result")
Pass = Callable[[Sequence[Tensor], bool], Result]
"""Forward and backward pass of a batch: adds to ``.grad`` of the parameters and returns detached losses.

Whether the batch is the last of an optimizer step says whether gradients are exchanged between ranks.
"""


WARM_UP = 3
"""Passes before the recording: they compile, and let libraries choose and allocate."""


class EagerBackward(Generic[Result]):
    """Runs a :data:`Pass` as it is."""

    def __init__(self, run: Pass[Result], model: nn.Module) -> None:
        self.run = run
        self.model = model

    def start_step(self) -> None:
        """Clears the gradients before an optimizer step's first micro-batch."""
        self.model.zero_grad(set_to_none=True)

    def __call__(self, batch: Sequence[Tensor], last: bool = True) -> Result:
        return self.run(batch, last)

    def close(self) -> None:
        """Nothing to release."""


class GraphedBackward(Generic[Result]):
    """A :data:`Pass` that is recorded at its first call, or before by :meth:`record`, and replayed from then on.

    The gradients stay the same tensors, so nothing else may replace ``.grad``: :meth:`start_step` clears them. Batches
    must keep the shapes of the first; randomness drawn in a replay would repeat.

    Args:
        run: the pass to record.
        model: the model whose gradients it fills.
        accumulate: add to the gradients, for several micro-batches per step; otherwise a replay overwrites them, which
            saves clearing and adding.
        exchange: what ``run`` exchanges gradients with, between several ranks.
    """

    def __init__(
        self,
        run: Pass[Result],
        model: nn.Module,
        accumulate: bool = False,
        exchange: GradientExchange | TorchDDP | None = None,
    ) -> None:
        self.run = run
        self.model = model
        self.accumulate = accumulate
        self.exchange = exchange if exchange is not None and exchange.size > 1 else None
        self.warm_up = WARM_UP if exchange is None else exchange.warm_up
        self.batch: list[Tensor] = []
        self.recorded: dict[bool, tuple[torch.cuda.CUDAGraph, Result]] = {}
        """The graph and what it returns, whose tensors each replay fills; with and without an exchange, where there are
        both."""

    def start_step(self) -> None:
        """Clears the gradients, where replays add to them."""
        if self.accumulate and self.recorded:
            torch._foreach_zero_([p.grad for p in self._parameters() if p.grad is not None])

    def __call__(self, batch: Sequence[Tensor], last: bool = True) -> Result:
        if not self.recorded:
            self.record(batch)
        for static, part in zip(self.batch, batch, strict=True):
            static.copy_(part, non_blocking=True)
        graph, result = self.recorded[last or self.exchange is None]
        graph.replay()
        return result

    def close(self) -> None:
        """Releases the graphs. NCCL does not end while a graph holds its collectives."""
        for graph, _ in self.recorded.values():
            graph.reset()
        self.recorded.clear()

    def _parameters(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def record(self, batch: Sequence[Tensor]) -> None:
        """Records the pass of a batch, whose values do not matter, and changes nothing but gradients."""
        self.batch = [part.clone() for part in batch]
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        stream = _warm_up_stream(torch.cuda.current_device())
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(self.warm_up):
                self.model.zero_grad(set_to_none=True)
                self.run(self.batch, True)
        torch.cuda.current_stream().wait_stream(stream)
        for buffer, before in buffers:  # a batch norm's, for one
            if not torch.equal(buffer, before):
                buffer.copy_(before)
        del buffers
        self.model.zero_grad(set_to_none=True)
        if self.accumulate and self.exchange is not None:
            self.exchange.attach()
        elif self.accumulate:
            for param in self._parameters():
                param.grad = torch.zeros_like(param)
        pool = None
        for last in (False, True) if self.accumulate and self.exchange is not None else (True,):
            graph = torch.cuda.CUDAGraph()
            # Other threads keep running: the loader's, which pins memory, and NCCL's watchdog.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                result = self.run(self.batch, last)
            self.recorded[last] = graph, result
            pool = graph.pool()


@functools.cache
def _warm_up_stream(device: int) -> torch.cuda.Stream:
    """One for all recordings of a process: cuBLAS keeps a workspace of 32 MiB for every stream that it has seen."""
    return torch.cuda.Stream(device)


def use_cuda_graph(cfg: RunConfig, device: torch.device) -> bool:
    """Whether steps are replayed from a CUDA graph. Raises ConfigError if that was asked for and is not possible."""
    assert isinstance(cfg, PretrainConfig | FinetuneConfig)
    obstacles = graph_obstacles(cfg, device.type)
    if cfg.engine.name in (*HOST_BOUND, "timm"):
        obstacles.append(f"engine={cfg.engine.name}")
    return check_cuda_graph(cfg, obstacles)
