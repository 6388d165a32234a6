"""Repeats a failed read until the server answers again, with lines that say so."""

import asyncio
import contextlib
import errno
import random
import sys
import time
from collections.abc import Callable
from typing import TypeVar

from filelock import FileLock, Timeout

from fcmae import interrupt
from fcmae.errors import RemoteError, UsageError
from fcmae.opening import cache_folder

T = TypeVar("T")
KEY = "loader.retry_seconds"
FIRST, LONGEST = 0.25, 15.0
"""Seconds between two attempts: twice as many each time."""
FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, NotImplementedError)
FINAL_NUMBERS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EINVAL)


class MissingFile(UsageError):
    """There is no such file, or this user may not read it."""


_waits = random.Random()  # of its own: waiting must not change what is drawn for training


def retried(action: Callable[[], T], url: str, limit: float) -> T:
    """What ``action`` returns, called again after errors of the network for up to ``limit`` seconds.

    The first process of a machine that waits prints a line, and another one when it continues.

    Raises UsageError for what no waiting helps against, such as a missing file, and RemoteError after the limit.
    """
    began, wait, teller = 0.0, FIRST, _Teller(url, limit)
    with contextlib.closing(teller):
        while True:
            try:
                result = action()
            except UsageError:
                raise
            except Exception as error:  # libraries raise all kinds
                error = _real(error)
                if _is_final(error):
                    kind = MissingFile if _is_missing(error) else UsageError
                    raise kind(f"cannot read {url}: {explain(error)}") from error
                began = began or time.monotonic()
                waited = time.monotonic() - began
                if waited + wait > limit:
                    tried = f"no attempt succeeded for {waited:.0f} s, and {KEY} is {limit:g}"
                    raise RemoteError(f"cannot read {url}: {explain(error)} ({tried})") from error
                teller.waits(error)
            else:
                teller.continues(began)
                return result
            _sleep(wait * _waits.uniform(0.75, 1.25), url)
            wait = min(2 * wait, LONGEST)


def _sleep(seconds: float, url: str) -> None:
    """Sleeps. Raises RemoteError if the process is asked to stop."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        if name := interrupt.received():
            raise RemoteError(f"stopped by {name} while waiting for {url}")
        time.sleep(min(left, 0.25))


class _Teller:
    """Prints lines about a wait, unless another process of this machine does so already."""

    def __init__(self, url: str, limit: float) -> None:
        self.url, self.limit = url, limit
        self.lock: FileLock | None = None

    def waits(self, error: Exception) -> None:
        if self.lock is not None:
            return
        lock = FileLock(cache_folder("locks") / "waiting.lock", mode=0o600)
        with contextlib.suppress(OSError, NotImplementedError, Timeout):
            lock.acquire(timeout=0)
            self.lock = lock
            _say(f"waiting for {self.url}: {explain(error)}; tries again for up to {self.limit:g} s ({KEY})")

    def continues(self, began: float) -> None:
        if self.lock is not None:
            _say(f"continues to read {self.url} after {time.monotonic() - began:.0f} s")

    def close(self) -> None:
        if self.lock is not None:
            self.lock.release()


def _real(error: Exception) -> Exception:
    """What happened: fsspec calls every failed question for the size of a file on a web server a missing file."""
    cause = error.__cause__
    is_hidden = isinstance(error, FileNotFoundError) and type(cause).__module__.startswith("aiohttp")
    return cause if is_hidden and isinstance(cause, Exception) else error


def _is_missing(error: Exception) -> bool:
    """S3 forbids what is not there if one may not list the bucket."""
    return isinstance(error, (FileNotFoundError, PermissionError)) or getattr(error, "status", 0) in (403, 404, 410)


def _is_final(error: Exception) -> bool:
    """Whether trying again cannot help."""
    status = getattr(error, "status", None)
    if isinstance(status, int) and 400 <= status < 500:
        return status not in (408, 425, 429)
    if isinstance(error, FINAL):
        return True
    if isinstance(error, OSError):
        return error.errno in FINAL_NUMBERS
    return isinstance(error, (ImportError, TypeError, AttributeError, ValueError)) or _is_of_credentials(error)


def _is_of_credentials(error: Exception) -> bool:
    """botocore and google-auth have classes of their own."""
    return "Credentials" in type(error).__name__


def explain(error: BaseException) -> str:
    """The reason in one line."""
    if isinstance(error, (TimeoutError, asyncio.TimeoutError)) and not str(error):
        return "the server does not answer"
    if isinstance(error, ImportError):
        return f"{error.name or error} is missing: pip install 'fcmae[cloud]'"
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return f"the server answers {status} {getattr(error, 'message', '')}".rstrip()
    if isinstance(error, FileNotFoundError):
        return "it is not there"
    text = str(getattr(error, "strerror", None) or error)
    return " ".join(text.split())[:300] or type(error).__name__


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
