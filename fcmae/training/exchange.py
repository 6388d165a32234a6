"""Sums gradients over the ranks, bucket by bucket, during the backward pass.

:class:`GradientExchange` is made of tensor operations and collectives only, so that a CUDA graph records it together
with the backward pass. :class:`TorchDDP` is torch's DistributedDataParallel. Both compute the same.
"""

import contextlib
import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET_BYTES = 100 * 2**20
"""Few buckets, because each of them slows down the kernels that run beside it (measured: docs/scale.md)."""
LAST_SHARE = 1 / 32
"""Share of the bytes in the last bucket, of the stem and the first stages: nothing hides its exchange."""


class Bucket:
    """Parameters whose gradients are exchanged together, in one flat buffer."""

    def __init__(self, params: list[nn.Parameter], group: dist.ProcessGroup | None = None) -> None:
        self.params = params
        self.group = group
        sizes = [p.numel() for p in params]
        self.flat = self.allocate(sum(sizes))
        parts = self.flat[: sum(sizes)].split(sizes)
        self.views = [_as(part, p) for part, p in zip(parts, params, strict=True)]
        self.missing: set[Tensor] = set()
        """Parameters whose gradients are not there yet."""
        self.work: Any = None

    def allocate(self, numel: int) -> Tensor:
        """A buffer of zeros for that many values; it may be longer."""
        return torch.zeros(numel, dtype=self.params[0].dtype, device=self.params[0].device)

    @torch.no_grad()
    def launch(self) -> None:
        """Starts the sum over the ranks."""
        grads = [p.grad for p in self.params if p.grad is not None]
        if any(grad is not view for grad, view in zip(grads, self.views, strict=True)):
            torch._foreach_copy_(self.views, grads)
        self.work = self.all_reduce()

    def all_reduce(self) -> Any:
        """Starts the sum of ``flat`` over the ranks; what it returns has a ``wait()``."""
        return dist.all_reduce(self.flat, group=self.group, async_op=True)

    def finish(self) -> None:
        """Puts the sum into ``.grad``; on a GPU only the stream waits."""
        assert self.work is not None
        self.work.wait()
        self.work = None
        self.attach()

    def attach(self) -> None:
        """Makes the parts of the buffer the gradients."""
        for param, view in zip(self.params, self.views, strict=True):
            param.grad = view


Loss = Callable[[Sequence[Tensor]], tuple[Tensor, dict[str, Tensor]]]
"""The loss of a micro-batch and its parts by name."""


class GradientExchange:
    """Sums the gradients of a model over ``size`` ranks, which start with the weights of the first.

    Buckets are filled from the output of the model to its input, as gradients come, and start in that order on every
    rank. With one rank there is nothing to do.

    Attributes:
        averages: whether the mean over the ranks is taken, and not the sum: then losses are not divided by ``size``.
        warm_up: passes before a CUDA graph can record one.

    Args:
        model: its parameters that require gradients must all get one in every backward pass.
        size: number of ranks in ``group``. For a mean over ranks, each divides its loss by it.
        group: the ranks; None = all.
        bucket: how a bucket sums.
    """

    averages, warm_up = False, 3

    def __init__(
        self,
        model: nn.Module,
        size: int,
        group: dist.ProcessGroup | None = None,
        bucket_bytes: int = BUCKET_BYTES,
        bucket: Callable[[list[nn.Parameter], dist.ProcessGroup | None], Bucket] = Bucket,
    ) -> None:
        self.size = size
        self.buckets: list[Bucket] = []
        self._active = False
        self._next = 0
        if size == 1:
            return
        broadcast(model, group)
        self.names = {param: name for name, param in model.named_parameters() if param.requires_grad}
        self.buckets = [bucket(params, group) for params in _split(list(self.names)[::-1], bucket_bytes)]
        self._bucket: dict[Tensor, Bucket] = {param: bucket for bucket in self.buckets for param in bucket.params}
        for param in self.names:
            param.register_post_accumulate_grad_hook(self._arrived)

    def through(self, loss: Loss) -> Loss:
        """The function that computes a loss to be exchanged."""
        return loss

    @contextlib.contextmanager
    def __call__(self, last: bool = True) -> Iterator[None]:
        """Runs both passes of a micro-batch in its block; exchanges gradients if it is the ``last`` of a step.

        Raises RuntimeError naming a parameter that got no gradient, without which its bucket cannot start.
        """
        if not last or not self.buckets:
            yield
            return
        for bucket in self.buckets:
            bucket.missing = set(bucket.params)
        self._next = 0
        self._active = True
        try:
            yield
        finally:
            self._active = False
        if self._next < len(self.buckets):
            missing = self.buckets[self._next].missing
            name = next(name for param, name in self.names.items() if param in missing)
            raise RuntimeError(f"the parameter {name} got no gradient")
        for bucket in self.buckets:
            bucket.finish()

    def attach(self) -> None:
        """Clears the buffers and makes them the gradients, for passes that add to them."""
        for bucket in self.buckets:
            bucket.flat.zero_()
            bucket.attach()

    def _arrived(self, param: Tensor) -> None:
        """Called when a parameter's gradient is complete: starts the buckets whose turn it is."""
        if not self._active:
            return
        self._bucket[param].missing.discard(param)
        while self._next < len(self.buckets) and not self.buckets[self._next].missing:
            self.buckets[self._next].launch()
            self._next += 1


class TorchDDP:
    """The same by torch's DistributedDataParallel, with its usual buckets."""

    averages, warm_up = True, 11  # it lays out its buckets in the first pass, and measures itself in the first ten

    def __init__(self, model: nn.Module, size: int, group: dist.ProcessGroup | None = None) -> None:
        self.model, self.size, self.group = model, size, group
        self.wrapped: nn.parallel.DistributedDataParallel | None = None
        self._views: list[tuple[nn.Parameter, Tensor]] = []

    def through(self, loss: Loss) -> Loss:
        """``loss``, called by DistributedDataParallel, which starts with the weights of the first rank."""
        import torch._dynamo

        torch._dynamo.config.optimize_ddp = False  # regions are compiled as without it
        device = next(self.model.parameters()).device
        options = inspect.signature(nn.parallel.DistributedDataParallel).parameters
        name = "forward_sync_buffers" if "forward_sync_buffers" in options else "broadcast_buffers"
        no_buffers: dict[str, Any] = {name: False}  # none is sent in a step
        # A CUDA graph can record it if it was made on a stream of its own.
        stream = torch.cuda.Stream() if device.type == "cuda" else None
        with torch.cuda.stream(stream):
            self.wrapped = nn.parallel.DistributedDataParallel(
                _LossModule(self.model, loss),
                process_group=self.group,
                gradient_as_bucket_view=True,
                **no_buffers,
            )
        return lambda batch: self.wrapped(*batch)  # type: ignore[misc]

    @contextlib.contextmanager
    def __call__(self, last: bool = True) -> Iterator[None]:
        """As :meth:`GradientExchange.__call__`; a parameter without a gradient is an error of the next pass."""
        assert self.wrapped is not None
        if not last:
            with self.wrapped.no_sync():
                yield
            return
        yield
        self._views = [(p, p.grad) for p in self.model.parameters() if p.grad is not None]

    def attach(self) -> None:
        """As :meth:`GradientExchange.attach`, after a pass that was exchanged."""
        for param, view in self._views:
            param.grad = view.zero_()


class _LossModule(nn.Module):
    """A loss as the forward pass of a module with the parameters of ``model``."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, *batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self.loss(batch)


def create_exchange(
    kind: str, model: nn.Module, size: int, group: dist.ProcessGroup | None = None
) -> GradientExchange | TorchDDP:
    """The exchange that ``trainer.exchange`` names; one rank has nothing to exchange."""
    return TorchDDP(model, size, group) if kind == "ddp" and size > 1 else GradientExchange(model, size, group)


def _as(part: Tensor, param: Tensor) -> Tensor:
    """``part`` with the shape and the strides of ``param``: fused optimizers walk both in the order of memory."""
    strides = torch.empty_like(param, device="meta").stride()  # those of a dense tensor, whatever param is a view of
    return part.as_strided(param.shape, strides, part.storage_offset())


def _split(params: list[nn.Parameter], limit: int) -> Iterator[list[nn.Parameter]]:
    """Runs of at most ``limit`` bytes; the last parameters are a separate run, of at most ``LAST_SHARE``."""
    sizes = list(itertools.accumulate(param.nbytes for param in reversed(params)))
    last = sum(size <= LAST_SHARE * sizes[-1] for size in sizes)
    yield from _runs(params[: len(params) - last], limit)
    yield from _runs(params[len(params) - last :], limit)


def _runs(params: list[nn.Parameter], limit: int) -> Iterator[list[nn.Parameter]]:
    """Runs of parameters of one dtype and device, of at most ``limit`` bytes or of one parameter."""
    part: list[nn.Parameter] = []
    size = 0
    for param in params:
        other = bool(part) and (param.dtype, param.device) != (part[0].dtype, part[0].device)
        if part and (size + param.nbytes > limit or other):
            yield part
            part, size = [], 0
        part.append(param)
        size += param.nbytes
    if part:
        yield part


def broadcast(model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Sends rank 0's parameters and buffers to all ranks."""
    with torch.no_grad():
        tensors = [*model.parameters(), *model.buffers()]
        for work in [dist.broadcast(t, group_src=0, group=group, async_op=True) for t in tensors]:
            assert work is not None
            work.wait()
