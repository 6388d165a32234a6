"""Errors that the user can fix, words for their messages, and how commands end."""

from collections.abc import Sequence
from typing import Any

EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_RESUMABLE = 75


def shown(name: str) -> str:
    """A file's name for a message: in quotes and escaped if it would change or end the line."""
    return name if name.isprintable() else repr(name)


LONGEST = 2000
"""Characters of a line."""


def printable(text: str) -> str:
    """Text with escapes for what a terminal would act on or hide, and without the middle of long lines."""
    if len(text) > LONGEST:
        text = "\n".join(
            line if len(line) <= LONGEST else f"{line[:1500]} ... {line[-400:]}" for line in text.split("\n")
        )
    if text.replace("\n", "").isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def first_of(names: Sequence[Any], most: int = 3, separator: str = ", ") -> str:
    """The first of several names, and how many more there are: ``a, b, c and 5 more``."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return separator.join(map(str, names[:most])) + more


def reason_of(error: BaseException) -> str:
    """What went wrong in one line: the system's words, else the first line of the message, else the error's class."""
    return str(getattr(error, "strerror", None) or error).split("\n")[0] or type(error).__name__


def counted(count: int, what: str) -> str:
    """A number of things: ``1 image``, ``1,000 images``."""
    return f"{count:,} {what}{'s' * (count != 1)}"


class FCMAEError(Exception):
    """Something went wrong that one line explains; the command prints it without a traceback."""

    exit_code = EXIT_ERROR
    raised_by = "rank"
    """What else raises the same, so that it is printed once: ``launch``, all ranks; ``machine``, those of a machine."""

    def __str__(self) -> str:
        return printable(super().__str__())  # messages quote files, which may hold anything


class UsageError(FCMAEError):
    """A mistake in what was asked for: an argument, a missing file, images that do not fit."""

    exit_code = EXIT_USAGE


class ConfigError(UsageError, ValueError):
    """Config keys that are unknown, of the wrong type or out of range; a line for each names the full key."""

    raised_by = "launch"

    @property
    def mistakes(self) -> list[str]:
        return str(self).split("\n")


class ImageError(UsageError):
    """An image that cannot be read or does not fit the config; names the file."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"cannot read the image {shown(name)}: {reason}")
        self.name = name
        self.reason = printable(reason)

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.name, self.reason)  # a worker sends it to the training process


class CheckpointError(UsageError):
    """A checkpoint that cannot be read or does not belong to what was asked for."""


class WeightsError(CheckpointError, ValueError):
    """Weights of another library that do not fit, or a model that another library cannot hold; names what."""


class ExportError(FCMAEError):
    """What was exported does not give our outputs in the other library."""


class NonFiniteLossError(FCMAEError):
    """The loss or gradient became infinite or NaN; the weights are those before that step."""


class WorkerError(FCMAEError):
    """A data worker died or does not answer."""


class LostRankError(FCMAEError):
    """Another rank ended, or cannot be reached; it may have said why."""


class RemoteError(FCMAEError):
    """A server does not answer; what it has cannot be read now."""

    raised_by = "launch"


class SaveError(FCMAEError):
    """A checkpoint could not be written; the older ones are as they were."""

    raised_by = "launch"


class DiskError(FCMAEError):
    """The run directory, or another place on a disk, cannot be written."""


class OutOfMemory(FCMAEError):
    """The memory of a device does not suffice; the message names the key to change."""


class Interrupted(FCMAEError):
    """The run stopped early, saved, and can be resumed."""

    exit_code = EXIT_RESUMABLE
    raised_by = "launch"


class PeerError(FCMAEError):
    """Another rank failed and says why; this one ends with the same exit code and nothing to add."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"another rank ended with exit code {exit_code}")
        self.exit_code = exit_code


class EvaluationStopped(Exception):
    """A rank was asked to stop before all images were seen."""
