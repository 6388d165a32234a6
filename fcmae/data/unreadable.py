"""Samples that cannot be read: ``loader.on_error=raise`` ends the run at the first one, ``skip`` replaces it.

A worker sends errors along with the batch, so the training process reports them in order, in one line each, the same
for any number of workers.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import Dataset

from fcmae.config import LoaderConfig
from fcmae.data.collate import Batch, Item
from fcmae.distributed import World
from fcmae.errors import FCMAEError, ImageError, RemoteError, UsageError, shown
from fcmae.messages import print_once, print_rank0
from fcmae.randomness import Stream, derive

TRIES = 10
"""Images that are tried in place of an unreadable one."""
NAMED = 3
"""Unreadable images that the line at the end of an epoch names."""


class ErrorsAside(Dataset[Item]):
    """A dataset that returns errors along with its samples instead of raising them."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, key: Any) -> Item:
        errors: list[FCMAEError] = []
        for candidate in self.candidates(key):
            try:
                return Item(self.dataset[candidate], errors)
            except ImageError as error:
                errors.append(error)
            except (UsageError, RemoteError) as error:  # of a class that the config names, or a server: no image's
                return Item(None, [error])
        return Item(None, errors)

    def candidates(self, key: Any) -> Iterator[Any]:
        """The key of the sample itself, then those that may replace it."""
        yield key


class Replacing(ErrorsAside):
    """Replaces unreadable samples by others, which are a function of (seed, epoch, index)."""

    def __init__(self, dataset: Dataset, num_samples: int, seed: int) -> None:
        super().__init__(dataset)
        self.num_samples = num_samples
        self.seed = seed

    def candidates(self, key: tuple[int, int]) -> Iterator[tuple[int, int]]:
        epoch, index = key
        yield key
        for attempt in range(TRIES):
            yield epoch, derive(self.seed, Stream.REPLACE, epoch, index, attempt) % self.num_samples


def errors_aside(dataset: Dataset, num_samples: int, seed: int, skip: bool) -> ErrorsAside:
    """Training samples by (epoch, index). Unreadable ones are replaced if ``skip``."""
    return Replacing(dataset, num_samples, seed) if skip else ErrorsAside(dataset)


class BadSamples:
    """Reports and counts the unreadable samples of a loader.

    Args:
        skip: continue; otherwise the first one is raised.
        num_samples: how many an epoch or an evaluation has. With ``max_bad`` it says what to advise.
    """

    def __init__(self, skip: bool, num_samples: int, max_bad: float) -> None:
        self.skip, self.num_samples, self.max_bad = skip, num_samples, max_bad
        self.counts: Counter[int] = Counter()
        """Unreadable samples per epoch."""
        self.names: dict[int, list[str]] = {}
        """The first of each epoch."""

    def take(self, batch: Batch, epoch: int, replaced: bool) -> Any:
        """The parts of a batch. Its errors are raised, or reported and counted.

        Args:
            replaced: no sample may be left out.

        Raises ImageError, and any other FCMAEError that a sample raised.
        """
        for error in batch.errors:
            if not isinstance(error, ImageError):
                raise error
            if not self.skip:
                hint = self._hint()
                if batch.parts is None and batch.left_out > 1:
                    hint = (
                        f"no image of this batch of {batch.left_out} can be read; loader.on_error=skip would not help"
                    )
                raise ImageError(error.name, f"{error.reason} ({hint})")
            print_once(f"{error}; skipped")
            self.counts[epoch] += 1
            names = self.names.setdefault(epoch, [])
            if len(names) < NAMED and error.name not in names:
                names.append(error.name)
        if replaced and batch.left_out:
            last = batch.errors[-1]
            assert isinstance(last, ImageError)
            raise ImageError(last.name, f"{last.reason}; it was the last of {1 + TRIES} tried for the same place")
        return batch.parts

    def _hint(self) -> str:
        """Names the share, too, where one sample is more than it. Three: a replacement may be the same image again."""
        if self.max_bad * self.num_samples >= 1:
            return "loader.on_error=skip would continue without it"
        share = min(1.0, float(f"{3 / self.num_samples:.1g}"))
        return (
            f"loader.on_error=skip loader.max_bad={share:g} would continue without it; "
            f"1 of {self.num_samples} samples is more than loader.max_bad={self.max_bad:g}"
        )


def check_share(count: int, num_samples: int, max_bad: float, what: str) -> None:
    """Raises UsageError if more than the share ``max_bad`` of the samples could not be read."""
    if count > max_bad * num_samples:
        failed = f"{count} of {num_samples} samples of {what} could not be read"
        raise UsageError(f"{failed}; the share must be at most {max_bad} (loader.max_bad)")


def tell_epoch(bad: BadSamples, epoch: int, num_samples: int, world: World) -> None:
    """A line that counts the unreadable samples of an epoch over all ranks, if there are any. Every rank calls this."""
    count = int(world.sum(torch.tensor(bad.counts[epoch])))
    if count:
        named = ", ".join(map(shown, bad.names.get(epoch, [])))
        print_rank0(
            f"epoch {epoch + 1}: {count:,} of {num_samples:,} samples could not be read and were replaced"
            + (f", such as {named}" if named else "")
        )


def count_bad_samples(counts: list[int], num_samples: int, cfg: LoaderConfig, world: World) -> dict[str, float]:
    """The metric ``bad_samples`` where they are skipped, over all ranks. Every rank calls this.

    Args:
        counts: see :meth:`fcmae.data.loading.TrainBatches.bad_samples`.
        num_samples: of an epoch.

    Raises UsageError if they are more than ``loader.max_bad`` of an epoch (PeerError on all ranks but the first).
    """
    if cfg.on_error != "skip":
        return {}
    since, *epochs = world.sum(torch.tensor(counts)).tolist()
    world.on_main(lambda: check_share(max(epochs, default=0), num_samples, cfg.max_bad, "an epoch"))
    return {"bad_samples": since}


def readable(batches: Iterable[Batch], num_samples: int, skip: bool, max_bad: float) -> Iterator[Any]:
    """The parts of batches for evaluation, without unreadable samples if ``skip``.

    Raises ImageError, and UsageError if more than the share ``max_bad`` is unreadable.
    """
    bad = BadSamples(skip, num_samples, max_bad)
    for batch in batches:
        parts = bad.take(batch, 0, replaced=False)
        check_share(bad.counts[0], num_samples, max_bad, "the evaluation")
        if parts is not None:
            yield parts
