"""Files that are written whole or not at all, and messages if that fails."""

import contextlib
import csv
import errno
import glob
import hashlib
import io
import itertools
import json
import math
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

from fcmae.errors import DiskError, UsageError, reason_of
from fcmae.opening import cache_folder, check_link, create, open_regular, random_token, read_regular
from fcmae.processes import Process

STRAY = re.compile(r"\.(\d+(?:-[0-9a-f]{8})?)(?:-[0-9a-f]{16})?\.tmp$")
"""Ending of temporary files of :func:`replacing`: process, machine, random digits. Older versions: the process."""

MARGIN = 2**16
"""Bytes: a disk with less is full."""
PATIENCE = 10.0
"""Seconds after which a process says that it waits for another."""


@contextlib.contextmanager
def replacing(path: Path, permissions: int = 0o666) -> Iterator[IO[bytes]]:
    """A file to write, which replaces ``path`` at the end of the block.

    ``path`` is either the old file or the whole new one, also after a power cut. A link at ``path`` is replaced too.

    Args:
        permissions: of the file, less those of the umask; 0o644 for files that are trusted later.
    """
    temporary = temporary_path(path)
    try:
        with create(temporary, permissions) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)  # a failed write does not know what it wrote to
        raise
    sync_folder(path.parent)


class HashingWriter:
    """A file to write through: hashes and counts the bytes, and keeps the first error.

    Some writers replace an OSError such as "No space left on device" by an error of their own.

    Args:
        alive: called after every write.
    """

    def __init__(self, file: IO[bytes], alive: Callable[[], object] | None = None) -> None:
        self.file = file
        self.alive = alive
        self.digest = hashlib.sha256()
        self.count = 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        self.digest.update(data)
        try:
            written = self.file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise
        self.count += written
        if self.alive is not None:
            self.alive()
        return written

    def flush(self) -> None:
        self.file.flush()


def temporary_path(path: Path) -> Path:
    """A unique name beside ``path`` for a temporary file or folder of this process."""
    return path.with_name(f"{path.name}.{_tag(Process.this())}-{random_token()}.tmp")


def delete_strays(run_dir: Path, processes: Collection[Process] | None = None) -> None:
    """Deletes the temporary files of :func:`replacing` in a run directory, of all or of some processes."""
    tags = None if processes is None else {_tag(process) for process in processes}
    for stray in (*run_dir.glob("*.tmp"), *run_dir.glob("*/*.tmp")):
        found = STRAY.search(stray.name)
        if found is not None and (tags is None or found[1] in tags):
            stray.unlink(missing_ok=True)


def delete_remains(path: Path, of_all: bool = False) -> None:
    """Deletes temporary files and folders that killed processes of this machine left beside ``path``.

    Args:
        of_all: not only those for ``path``, but for every file in its folder.
    """
    place = _tag(Process.this()).partition("-")[2]
    for stray in path.parent.glob(f"{'*' if of_all else glob.escape(path.name)}.*.tmp"):
        found = STRAY.search(stray.name)
        pid, _, left_at = found[1].partition("-") if found else ("", "", "")
        if left_at == place and not Path(f"/proc/{pid}").exists():
            if stray.is_dir() and not stray.is_symlink():
                shutil.rmtree(stray, ignore_errors=True)
            else:
                stray.unlink(missing_ok=True)


def _tag(process: Process) -> str:
    """The process in the name of a temporary file, with its machine and container: process ids repeat."""
    return f"{process.pid}-{hashlib.sha256(process.place.encode()).hexdigest()[:8]}"


def set_aside(path: Path, say: Callable[[str], object]) -> None:
    """Renames a file that a run no longer uses to a new name ``*.unused``, and says so."""
    names = (f"{path.name}.unused{'' if i == 1 else i}" for i in itertools.count(1))
    aside = next(path.with_name(name) for name in names if not path.with_name(name).exists())
    path.replace(aside)
    say(f"{path.name} is no longer used: renamed to {aside.name}")


def sync_folder(folder: Path) -> None:
    """Makes changes of the names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems cannot do this
            raise
    finally:
        os.close(descriptor)


def check_checkpoint(path: str) -> None:
    """Raises UsageError if there is neither a checkpoint nor a run's directory, before anything slow is imported."""
    if not (path.startswith("timm:") or os.path.exists(path) or os.path.isdir(path.rpartition("@")[0])):
        raise UsageError(f"no checkpoint or run directory {path}")


def check_output(key: str, path: str | Path, kept: Iterable[str | Path] = (), json: bool = False) -> None:
    """Raises UsageError, before the work begins, if ``path`` cannot be written; creates its folder.

    Args:
        key: the key that the user set to ``path``, for the message.
        kept: files that must not be overwritten, such as inputs.
        json: overwrite an existing file only if it begins like JSON.
    """
    if os.path.isdir(path or "."):
        raise UsageError(f"{key} must be a file; {str(path)!r} is a folder")
    try:
        real = _target(path)
    except OSError as error:
        raise UsageError(f"{key} {path} cannot be written: {error.strerror}") from error
    if _is_special(path):
        return
    if any(os.path.realpath(other) == str(real) for other in kept):
        raise UsageError(f"{key} must be another file; {str(path)!r} is used otherwise")
    try:
        if json and real.is_file() and not _begins_like_json(real):
            raise UsageError(f"{key} must be a new file or JSON; {str(path)!r} is something else")
        if real.parent.exists() and not real.parent.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        real.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=real.parent):
            pass
    except OSError as error:
        raise UsageError(f"{key} {path} cannot be written: {reason_of(error)}") from error


def _begins_like_json(path: Path) -> bool:
    with open_regular(path) as file:
        return file.read(64).lstrip()[:1] in (b"", b"{", b"[")


@contextlib.contextmanager
def output(key: str, path: str | Path) -> Iterator[IO[bytes]]:
    """A file that the user named, to write: the whole file or nothing, unless it is a device or a pipe.

    Raises DiskError.
    """
    try:
        target = _target(path)
        delete_remains(target)
        with open(path, "wb") if _is_special(path) else replacing(target) as file:
            yield file
    except OSError as error:
        raise DiskError(f"{key} {path} cannot be written: {reason_of(error)}") from error


def make_folder(key: str, folder: Path) -> None:
    """Makes a folder that the user named, and those above it. Raises UsageError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{key} {folder} cannot be made: {error.strerror}") from error


def nearest(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def json_text(value: Any, indent: int | None = None, default: Callable[[Any], Any] | None = None) -> str:
    """JSON that every reader takes. A number that is NaN or infinite, which JSON does not have, becomes null.

    Args:
        default: makes what JSON can hold of an object that it cannot.
    """
    try:
        return json.dumps(value, allow_nan=False, indent=indent, default=default)
    except ValueError:
        finite = json.loads(json.dumps(value, default=default), parse_constant=lambda _: None)
        return json.dumps(finite, indent=indent)


def defined(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics from JSON by :func:`json_text`: NaN for null, which means that a metric is not defined."""
    return {name: math.nan if value is None else value for name, value in metrics.items()}


def json_object(path: Path, most: int) -> dict[str, Any]:
    """The object in a JSON file of at most ``most`` bytes; empty if the file is missing, damaged, a link or larger."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        content = json.loads(read_regular(path, most, links=False))
        return content if isinstance(content, dict) else {}
    return {}


def json_lines(content: bytes) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """The lines that are JSON objects, and the objects. Others were cut off when the run was killed, or are damaged."""
    for line in content.splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(line.decode())
            if isinstance(value, dict):
                yield line, value


def read_metrics(file: Path) -> Iterator[dict[str, float]]:
    """The lines of a run's metrics.jsonl, by :func:`json_lines`. Raises OSError."""
    return (defined(value) for _, value in json_lines(file.read_bytes()))


def read_result(file: Path, **needed: type) -> dict[str, Any] | None:
    """A JSON file that this program wrote; None if there is none. Raises UsageError for a damaged one.

    NaN and infinity, which earlier versions wrote, are None as :func:`json_text` writes them now.

    Args:
        needed: keys that it must have, and the types of their values.
    """
    try:
        result = json.loads(file.read_text(), parse_constant=lambda _: None)
        if not isinstance(result, dict):
            raise ValueError("no JSON object")
        wrong = [key for key, kind in needed.items() if key not in result or not isinstance(result[key], kind)]
        if wrong:
            raise ValueError(f"without {', '.join(wrong)}")
        return result
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{file} is damaged ({error}); delete it, and the same command makes it again") from error


def write_result(file: Path, result: dict[str, Any]) -> None:
    """Writes a JSON file for :func:`read_result`, by :func:`json_text`, and the folder for it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    delete_remains(file)
    with replacing(file) as out:
        out.write(json_text(result, indent=1).encode())


def as_read(value: Any) -> Any:
    """What :func:`read_result` gives of a value that :func:`write_result` has written."""
    return json.loads(json_text(value))


def write_output(key: str, path: str | Path, text: str) -> None:
    """Writes text to a file that the user named, by :func:`output`."""
    with output(key, path) as file:
        file.write(text.encode(errors="surrogateescape"))


def csv_text(rows: Iterable[Iterable[Any]], digits: int | None = None) -> str:
    """Rows of cells as CSV. A number that is NaN or infinite becomes an empty cell, which readers take as missing.

    Args:
        digits: significant digits of a float; None = all.
    """

    def cell(value: Any) -> Any:
        if not isinstance(value, float):
            return value
        return "" if not math.isfinite(value) else value if digits is None else f"{value:.{digits}g}"

    text = io.StringIO()
    csv.writer(text).writerows(map(cell, row) for row in rows)
    return text.getvalue()


def _target(path: str | Path) -> Path:
    """The file that the user named, behind links. Raises OSError for a link that another user made."""
    return Path(os.path.realpath(check_link(Path(path))))


def _is_special(path: str | Path) -> bool:
    return os.path.exists(path) and not os.path.isfile(path)


def is_full(folder: Path, error: BaseException) -> bool:
    """Whether ``error``, raised by writing to ``folder``, means a full disk. Some libraries hide the system's error."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return "No space left" in str(error) or shutil.disk_usage(folder).free < MARGIN


@contextlib.contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """In this block the processes of this user that work on ``folder`` wait for each other, where that is possible.

    The lock is a file in the user's own cache: anyone who may read a folder could lock the folder itself.
    """
    digest = hashlib.blake2b(os.fsencode(folder.resolve()), digest_size=16).hexdigest()
    path = cache_folder("locks") / f"{digest}.lock"
    lock = FileLock(path, mode=0o600)
    with contextlib.suppress(OSError, NotImplementedError):  # some network file systems have no locks
        try:
            lock.acquire(timeout=PATIENCE)
        except Timeout:
            waiting = f"waiting for another process that reads {folder} (it holds {path})"
            print(waiting, file=sys.stderr, flush=True)
            lock.acquire()
    try:
        yield
    finally:
        if lock.is_locked:
            with contextlib.suppress(OSError):
                path.unlink()  # others, who have it open, notice and make a new one
            lock.release()
