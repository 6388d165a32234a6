"""Decodes all images of a source once, into memory that the processes of a machine share (``data.cache``)."""

import hashlib
import json
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from fcmae import ranks
from fcmae.data.cores import cores_per_rank
from fcmae.data.decoded import ALIGN, GIB, DecodedImages, check_fits, places
from fcmae.data.loading import START, Workers, eval_loader, explained
from fcmae.data.pixels.decode import PixelFormat, open_image
from fcmae.data.sources.base import Source
from fcmae.errors import ImageError, UsageError
from fcmae.files import one_at_a_time, replacing
from fcmae.memory import available_memory
from fcmae.messages import say
from fcmae.opening import cache_folder, open_trusted
from fcmae.processes import Process

BATCH = 64
"""Images that a process decodes per task."""


class _Sizes(Dataset):
    """Height and width of each image, 0 of one that cannot be read."""

    def __init__(self, source: Source, to: PixelFormat) -> None:
        self.source, self.to = source, to

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor]:
        try:
            return (torch.tensor(open_image(self.source[index].image, self.to).size),)
        except ImageError:
            return (torch.zeros(2, dtype=torch.int64),)


class _Fill(_Sizes):
    """Decodes each image into memory that is shared; whether it could be read."""

    def __init__(self, source: Source, to: PixelFormat, into: DecodedImages) -> None:
        super().__init__(source, to)
        self.into = into

    def __getitem__(self, index: int) -> tuple[Tensor]:
        try:
            if self.into.is_readable(index):
                self.into.store(index, open_image(self.source[index].image, self.to).pixels(1))
        except ImageError:
            return (torch.tensor(False),)
        return (torch.tensor(True),)


def decoded(source: Source, to: PixelFormat) -> DecodedImages:
    """Decodes all images of a source. The ranks of a machine share them. Raises UsageError if they do not fit."""
    launch = ranks.detect()
    if launch.size == 1 or not hasattr(os, "memfd_create"):
        return _decode(source, to, None)[0]
    names = hashlib.sha256()
    for part in (launch.meeting, *(os.environ.get(name, "") for name in ("MASTER_PORT", "SLURM_JOB_ID")), str(to)):
        names.update(f"{part}\n".encode())
    for index in {0, len(source) // 2, len(source) - 1}:
        names.update(f"{len(source)} {source.describe(index)}\n".encode(errors="surrogateescape"))
    told = cache_folder("decoded") / f"{names.hexdigest()[:24]}.json"
    with one_at_a_time(told):
        found = _of_another_rank(source, told)
        if found is not None:
            return found
        descriptor = os.memfd_create("fcmae")
        made, sizes = _decode(source, to, descriptor)
        entry = {"process": vars(Process.this()), "descriptor": descriptor, "dtype": str(made.dtype)}
        entry |= {"channels": made.channels, "images": len(sizes)}
        with replacing(told, 0o600) as file:
            file.write(json.dumps(entry).encode())
        return made


def _of_another_rank(source: Source, told: Path) -> DecodedImages | None:
    """The images that another rank of this machine has decoded; None if none has."""
    try:
        with open_trusted(told) as file:
            entry = json.loads(file.read())
        process = Process.parse(entry["process"])
        if not process.is_alive() or entry["images"] != len(source):
            return None
        with open(f"/proc/{process.pid}/fd/{entry['descriptor']}", "r+b") as file:
            memory = np.frombuffer(mmap.mmap(file.fileno(), 0), np.uint8)
    except (OSError, ValueError, KeyError):
        return None
    head = 8 * len(source)
    sizes = memory[:head].view(np.int32).reshape(-1, 2)
    return DecodedImages(source, memory[_begin(head) :], sizes, entry["channels"], getattr(torch, entry["dtype"][6:]))


def _begin(head: int) -> int:
    """Where pixels begin after the sizes."""
    return -(-head // ALIGN) * ALIGN


def _decode(source: Source, to: PixelFormat, descriptor: int | None) -> tuple[DecodedImages, np.ndarray]:
    sizes = np.zeros((len(source), 2), np.int32)
    for first, part in _every(_Sizes(source, to), "sizes of images"):
        sizes[first : first + len(part)] = part
    first_readable = int(sizes[:, 0].argmax())
    if not sizes[first_readable, 0]:
        open_image(source[0].image, to)  # raises why
        raise UsageError("data.cache: no image can be read")
    one = open_image(source[first_readable].image, to).pixels(1)
    channels, dtype = len(one), one.dtype
    head = _begin(sizes.nbytes)
    total = head + places(sizes, channels * dtype.itemsize)[1]
    check_fits(total, available_memory(), len(source), "ram", "memory")
    say(f"data.cache=ram: {len(source):,} images, {total / GIB:.2f} GiB")  # once
    if descriptor is not None:
        os.ftruncate(descriptor, total)
    shared = mmap.mmap(-1 if descriptor is None else descriptor, total)
    memory = np.frombuffer(shared, np.uint8)
    of_all = memory[: sizes.nbytes].view(np.int32).reshape(-1, 2)
    of_all[:] = sizes
    into = DecodedImages(source, memory[head:], of_all, channels, dtype)
    for first, readable in _every(_Fill(source, to, into), "decoding"):
        of_all[first : first + len(readable)][~readable] = 0
    into.offsets = places(sizes, channels * dtype.itemsize)[0]
    return into, sizes


def _every(dataset: _Sizes, what: str) -> Iterator[tuple[int, np.ndarray]]:
    """What a dataset gives, batch by batch, from as many processes as there are cores."""
    shares = START == "fork" and len(dataset) > BATCH  # other workers would fill a copy of the memory
    workers = Workers(min(cores_per_rank(1), -(-len(dataset) // BATCH)) if shares else 0)
    first = 0
    with explained(), tqdm(total=len(dataset), desc=what, unit=" images", delay=1, leave=False, disable=None) as bar:
        for batch in eval_loader(dataset, BATCH, rank=0, world_size=1, workers=workers):
            for error in batch.errors:
                raise error
            found = batch.parts[0].numpy()
            yield first, found
            first += len(found)
            bar.update(len(found))
