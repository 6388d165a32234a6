"""Ways to sum the gradients of a bucket over the ranks, which ``benchmarks/scaling_causes.py`` compares."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fcmae.training.exchange import Bucket

ALIGNMENT = 1024
"""A rank's part of a padded buffer is a multiple of so many values."""


class NothingSent(Bucket):
    """The copies into the buffer alone: what a step pays before anything is sent."""

    def all_reduce(self) -> Any:
        return Done()


class HalfBucket(Bucket):
    """Sums bfloat16 gradients, half the bytes. Changes the result."""

    def __init__(self, params: list[nn.Parameter], group: dist.ProcessGroup | None = None) -> None:
        super().__init__(params, group)
        self.half = self.flat.bfloat16()

    def all_reduce(self) -> Any:
        self.half.copy_(self.flat)
        return dist.all_reduce(self.half, group=self.group, async_op=True)

    def finish(self) -> None:
        super().finish()
        self.flat.copy_(self.half)


class WindowBucket(Bucket):
    """NCCL's kernels for symmetric memory: the buffer is registered as a window of the communicator."""

    def allocate(self, numel: int) -> Tensor:
        group = dist.group.WORLD if self.group is None else self.group
        assert group is not None
        device = self.params[0].device
        backend: Any = group._get_backend(device)
        self.pool = torch.cuda.MemPool(backend.mem_allocator)
        with torch.cuda.use_mem_pool(self.pool):
            flat = torch.zeros(padded(numel, group.size()), device=device)
        backend.register_mem_pool(self.pool, symm=True)
        return flat


class PeerBucket(Bucket):
    """Sums by copies between the GPUs of a host, which their copy engines do: no multiprocessor moves a byte.

    Each rank fetches its part of every other rank's buffer, adds the parts in the order of the ranks, and fetches the
    sums of the other parts. So the same bits come out on every rank and in every step.
    """

    def allocate(self, numel: int) -> Tensor:
        import torch.distributed._symmetric_memory as symmetric_memory

        group = dist.group.WORLD if self.group is None else self.group
        assert group is not None
        if symmetric_memory.get_backend(self.params[0].device) != "CUDA":
            symmetric_memory.set_backend("CUDA")
        size, param = padded(numel, group.size()), self.params[0]
        flat = symmetric_memory.empty(size, dtype=param.dtype, device=param.device).zero_()
        self.memory: Any = symmetric_memory.rendezvous(flat, group)
        self.received = torch.empty(group.size(), size // group.size(), dtype=param.dtype, device=param.device)
        self.stream = streams.setdefault(param.device, torch.cuda.Stream(param.device))
        return flat

    def all_reduce(self) -> Any:
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self.sum_parts()
        return Joined(self.stream)

    def sum_parts(self) -> None:
        """The whole exchange, on the current stream."""
        memory, (rank, size) = self.memory, (self.memory.rank, self.memory.world_size)
        part = self.flat.numel() // size
        memory.barrier(0)  # every buffer is full
        for other in others(rank, size):
            self.received[other].copy_(memory.get_buffer(other, [part], self.flat.dtype, rank * part))
        self.received[rank].copy_(self.flat[rank * part :][:part])
        torch.sum(self.received, 0, out=self.flat[rank * part :][:part])
        memory.barrier(0)  # every part is summed, and no buffer is read for it any more
        for other in others(rank, size):
            start = other * part
            self.flat[start:][:part].copy_(memory.get_buffer(other, [part], self.flat.dtype, start))
        memory.barrier(0)  # everyone has read this buffer, which the next step fills


class TwoShotBucket(PeerBucket):
    """torch's kernel of two steps over symmetric memory."""

    def sum_parts(self) -> None:
        group = dist.group.WORLD if self.group is None else self.group
        assert group is not None
        torch.ops.symm_mem.two_shot_all_reduce_(self.flat, "sum", group.group_name)


class ShardBucket(Bucket):
    """Leaves each rank the sum of its part only; :class:`ShardedUpdate` updates that part and sends it round."""

    def __init__(self, params: list[nn.Parameter], group: dist.ProcessGroup | None = None) -> None:
        super().__init__(params, group)
        size = dist.get_world_size(group)
        self.part = self.flat.new_zeros(self.flat.numel() // size)

    def allocate(self, numel: int) -> Tensor:
        size = dist.get_world_size(self.group)
        return torch.zeros(padded(numel, size), device=self.params[0].device)

    def all_reduce(self) -> Any:
        return dist.reduce_scatter_tensor(self.part, self.flat, group=self.group, async_op=True)


class ShardedUpdate:
    """AdamW on each rank's part of a copy of the weights, which are then gathered: for its time only.

    Args:
        hidden: leave a step's gather running until the next one ends, as a forward pass that waits for each layer's
            weights could at best.
    """

    def __init__(self, buckets: list[ShardBucket], dtype: torch.dtype = torch.float32, hidden: bool = False) -> None:
        self.buckets, self.hidden = buckets, hidden
        self.params = [nn.Parameter(torch.zeros_like(bucket.part)) for bucket in buckets]
        self.sent = [torch.zeros_like(param, dtype=dtype) for param in self.params]
        self.weights = [torch.zeros_like(bucket.flat, dtype=dtype) for bucket in buckets]
        for param, bucket in zip(self.params, buckets, strict=True):
            param.grad = bucket.part
        self.optimizer = torch.optim.AdamW(self.params, lr=1e-4, fused=True)
        self.works: list[Any] = []

    def step(self) -> None:
        self.wait()
        self.optimizer.step()
        for weights, sent, param, bucket in zip(self.weights, self.sent, self.params, self.buckets, strict=True):
            sent.copy_(param.detach())
            self.works.append(dist.all_gather_into_tensor(weights, sent, group=bucket.group, async_op=True))
        if not self.hidden:
            self.wait()

    def wait(self) -> None:
        """Waits for the gathers that were started."""
        for work in self.works:
            work.wait()
        self.works.clear()


class Done:
    """Nothing to wait for."""

    def wait(self) -> None:
        pass


class Joined:
    """Work on another stream, which the current one waits for."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.stream = stream

    def wait(self) -> None:
        torch.cuda.current_stream().wait_stream(self.stream)


streams: dict[torch.device, torch.cuda.Stream] = {}
"""One per device, so that exchanges follow one another."""


def padded(numel: int, size: int) -> int:
    """The next number of values that ``size`` ranks share equally."""
    return -(-numel // (size * ALIGNMENT)) * size * ALIGNMENT


def others(rank: int, size: int) -> list[int]:
    """The other ranks, from the next one on, so that no two ranks read from the same one at a time."""
    return [(rank + step) % size for step in range(1, size)]
