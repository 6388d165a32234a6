"""Connects the ranks of a run, and lets them agree. :mod:`fcmae.ranks` reads who they are from the environment."""

import contextlib
import datetime
import functools
import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fcmae import ranks as launch
from fcmae.errors import EXIT_ERROR, FCMAEError, LostRankError, PeerError, UsageError
from fcmae.messages import say
from fcmae.processes import Process

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """A process among the ranks of a run."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    """Ranks that share the cores this process may use."""
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def mean(self, value: Tensor) -> Tensor:
        """The mean of ``value`` over the ranks."""
        return self.sum(value) / self.size

    def sum(self, value: Tensor) -> Tensor:
        """The sum of ``value`` over the ranks."""
        return self._reduce(value, dist.ReduceOp.SUM)

    def max(self, value: Tensor) -> Tensor:
        """The largest ``value`` of the ranks."""
        return self._reduce(value, dist.ReduceOp.MAX)

    def smallest(self, value: int) -> int:
        """The smallest ``value`` of the ranks."""
        return -int(self.max(torch.tensor(-value)))

    def _reduce(self, value: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
        if self.size > 1:
            value = value.clone()
            dist.all_reduce(value, op)
        return value

    def gather(self, values: list[T]) -> list[T]:
        """The values of all ranks, in the order of the ranks. They must be picklable."""
        if self.size == 1:
            return values
        parts: list[list[T]] = [[]] * self.size
        dist.all_gather_object(parts, values)
        return [value for part in parts for value in part]

    def say(self, *lines: str) -> None:
        """Prints lines for the user, on the first rank."""
        for line in lines if self.is_main else ():
            say(line)

    def on_main(self, action: Callable[[], object]) -> None:
        """Runs ``action`` on the first rank; the others wait for it.

        Raises what it raised there, and PeerError on the other ranks.
        """
        self.together(action if self.is_main else lambda: None)

    def from_main(self, action: Callable[[], T]) -> T:
        """What ``action`` returns on the first rank, on every rank: an object that can be pickled.

        Raises what it raised there, and PeerError on the other ranks.
        """
        result: list[Any] = [self.together(action if self.is_main else lambda: None)]
        if self.size > 1:
            dist.broadcast_object_list(result, src=0, device=torch.device("cpu"))
        return result[0]

    def together(self, action: Callable[[], T]) -> T:
        """What ``action`` returns; every rank runs it, and where one fails, all of them end here.

        Raises what it raised on the first rank that failed, and PeerError on the others: ranks mostly fail for the same
        reason, which needs to be printed once.
        """
        failure: Exception | None = None
        try:
            result = action()
        except Exception as error:
            failure = error
        exit_code = 0 if failure is None else getattr(failure, "exit_code", EXIT_ERROR)
        before_others = 0 if failure is None else self.size - self.rank
        exit_code, first = map(int, self.max(torch.tensor([exit_code, before_others])))
        if failure is not None and first == before_others:
            if isinstance(failure, FCMAEError):
                failure.raised_by = "rank"
            raise failure
        if exit_code:
            raise PeerError(exit_code) from failure
        return result


@functools.cache
def _store() -> tuple[dist.Store, int, int]:
    """The store through which the ranks find each other, the rank and the number of ranks."""
    return next(dist.rendezvous(launch.detect().meeting))


GLOO = re.compile("gloo|timeout caused pair closure")
"""In its RuntimeErrors: the file of its source; or only this, where another collective has met the timeout before."""
LOST = {"closed by peer|reset by peer|Broken pipe|refused": "its connection is closed", "time(d )?out": "no answer"}
"""What the errors of collectives say, and a line that is the same on every rank."""


@contextlib.contextmanager
def lost_ranks_explained() -> Iterator[None]:
    """Turns errors of connecting to other ranks and of collectives in this block into a LostRankError of one line."""
    try:
        yield
    except RuntimeError as error:
        if launch.detect().size == 1 or not (isinstance(error, dist.DistError) or GLOO.search(str(error))):
            raise
        reasons = [reason for pattern, reason in LOST.items() if re.search(pattern, str(error), re.IGNORECASE)]
        raise LostRankError(f"lost contact with another rank ({reasons[0] if reasons else error})") from error


SAID = "fcmae/said"
PATIENCE = 2.0
"""Seconds that a rank which lost another one leaves that one to say why it ends."""


def is_first_to_say(line: str, only_if_alone: bool = False) -> bool:
    """Whether no other rank of this launch has said the same line; True where they have not met.

    Args:
        only_if_alone: whether no other rank says anything, which is waited for.
    """
    if launch.detect().size == 1 or not _store.cache_info().currsize:
        return True
    store, _, _ = _store()
    deadline = time.monotonic() + PATIENCE * only_if_alone
    try:
        while only_if_alone and time.monotonic() < deadline:
            if store.check([SAID]):
                return False
            time.sleep(0.05)
        first = store.add(f"{SAID}/{hashlib.sha256(line.encode()).hexdigest()}", 1) == 1
        store.add(SAID, 1)
        return first
    except RuntimeError:  # the process that kept the store has ended
        return True


@functools.cache
def start_time() -> str:
    """When the run started, the same for all ranks, as year-month-day_hour-minute-second.

    The processes of a launch would each read their own clock, and their run directories would differ.
    """
    now = launch.now()
    if launch.detect().size == 1:
        return now
    store, rank, _ = _store()
    if rank == 0:
        store.set("fcmae/start_time", now)
    return _checked_time(store.get("fcmae/start_time"))


def _checked_time(told: bytes) -> str:
    """The start time that another rank says; it becomes a folder's name. Raises UsageError."""
    try:
        time = told.decode("ascii")
        if datetime.datetime.strptime(time, launch.START_FORMAT).strftime(launch.START_FORMAT) == time:
            return time
    except ValueError:
        pass
    address = launch.detect().meeting
    raise UsageError(
        f"{told[:40]!r}, which {address} answered, is not a time such as 2026-01-31_23-59-59; "
        "another program uses this port: set another MASTER_PORT"
    )


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """The device named ``auto``, ``cpu`` or ``cuda``. Raises UsageError if it isn't there."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UsageError(
            f"trainer.device is {name!r}, but torch {torch.__version__} sees no CUDA device; auto takes the CPU then"
        )
    gpus = torch.cuda.device_count()
    if gpus == 1 and launch.detect().one_gpu_each:
        return torch.device("cuda", 0)
    if local_rank >= gpus:
        raise UsageError(f"rank {local_rank} of this machine has no GPU of its own: {gpus} seen")
    return torch.device("cuda", local_rank)


def unused_accelerator() -> str | None:
    """An accelerator of this machine that torch knows and fcmae cannot use, such as an Apple GPU (``mps``)."""
    found = torch.accelerator.current_accelerator()
    return None if found is None or found.type == "cuda" else f"this machine's accelerator ({found.type})"


def connect(device: str, timeout: float = 1800.0) -> World:
    """Joins the other ranks, over NCCL on GPUs and gloo on CPUs. Call once, and :func:`disconnect` at the end.

    Waiting for another rank longer than ``timeout`` seconds is an error.
    """
    launched = launch.detect()
    picked = pick_device(device, launched.local_rank)
    if picked.type == "cuda":
        torch.cuda.set_device(picked)
    elif device == "auto" and launched.rank == 0 and (other := unused_accelerator()):
        say(f"device=auto takes the CPU: fcmae does not run on {other}")
    if launched.size == 1:
        return World(0, 1, 0, 1, picked)
    store, rank, size = _store()
    if not dist.is_initialized():
        # Over gloo the hosts agree on when to stop without waiting for their GPUs.
        backend = "cpu:gloo,cuda:nccl" if picked.type == "cuda" else "gloo"
        dist.init_process_group(
            backend,
            store=store,
            rank=rank,
            world_size=size,
            timeout=datetime.timedelta(seconds=timeout),
            device_id=picked if picked.type == "cuda" else None,
        )
    return World(rank, size, launched.local_rank, launched.sharing, picked)


def siblings(world: World) -> dict[int, Process]:
    """The other ranks on this machine. Every rank of a launch calls this once, after :func:`connect`."""
    if world.size == 1:
        return {}
    store, rank, size = _store()
    store.set(f"fcmae/process/{rank}", json.dumps(asdict(Process.this())))
    others = (other for other in range(size) if other != rank)
    told = {other: Process.parse(json.loads(store.get(f"fcmae/process/{other}"))) for other in others}
    return {other: process for other, process in told.items() if process.is_here()}


def disconnect() -> None:
    """Disconnects from the other ranks."""
    if dist.is_initialized():
        dist.destroy_process_group()
