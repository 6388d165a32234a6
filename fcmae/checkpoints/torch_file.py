"""Files of torch from elsewhere: read without running code, in memory of about the file's size.

``weights_only=True`` runs no code of a file, but it calls functions such as ``bytearray(10**10)``, unpacks members of
the archive that are compressed a thousandfold, and makes tensors with far more elements than bytes (a stride of 0). So
the archive and its pickle are checked before, and the tensors after.
"""

import contextlib
import pickle
import pickletools
import zipfile
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import safe_open
from torch import Tensor

from fcmae.opening import open_regular

MAX_PICKLE = 2**23
"""Bytes of the pickle, of an archive's list of members, of a safetensors header; a training state of ConvNeXt V2 Huge
has a pickle of 1 MB."""
MAX_STEPS = 2_000_000
"""Instructions of a pickle, each of which makes an object of 50 bytes or more; that state has 300,000."""
_STORAGES = ("Float", "Half", "BFloat16", "Double", "Long", "Int", "Short", "Char", "Byte", "Bool")
CALLED = frozenset(
    {
        "collections OrderedDict",
        "torch Size",
        "torch._utils _rebuild_parameter",
        "torch._utils _rebuild_tensor_v2",
        "torch.storage UntypedStorage",
        *(f"torch {name}Storage" for name in _STORAGES),
    }
)
"""What a pickle of plain values and tensors names."""
PLAIN = (str, int, float, bool, type(None))


def load(file: IO[bytes], map_location: str | torch.device = "cpu", namespaces: bool = False) -> Any:
    """What a file of ``torch.save`` holds: nested dicts, lists and tuples of tensors and plain values.

    Args:
        namespaces: allow ``argparse.Namespace``, as which official training scripts store their arguments.

    Raises ValueError or pickle.UnpicklingError for other content, and what torch raises.
    """
    size = _check_archive(file, namespaces)
    file.seek(0)
    with torch.serialization.safe_globals([Namespace] if namespaces else []), _explained():
        content = torch.load(file, map_location=map_location, weights_only=True)
    _check_content(content, size)
    return content


def load_mapped(path: Path, map_location: str | torch.device = "cpu") -> Any:
    """As :func:`load`, but the tensors stay on the disk until they are used."""
    with open_regular(path) as file:
        size = _check_archive(file, namespaces=False)
    with _explained():
        content = torch.load(path, map_location=map_location, weights_only=True, mmap=True)
    _check_content(content, size)
    return content


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """In this block errors that a damaged pickle causes are ValueErrors: torch raises whatever its functions raise."""
    try:
        yield
    except (OSError, MemoryError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError):
        raise
    except Exception as error:
        raise ValueError(f"it is damaged ({type(error).__name__}: {error})") from error


def check_safetensors(file: IO[bytes]) -> None:
    """Raises ValueError for a safetensors file whose list of tensors would take far more memory than weights need."""
    length = int.from_bytes(file.read(8), "little")
    if length > MAX_PICKLE:
        raise ValueError(f"its header has {length} bytes; at most {MAX_PICKLE} are read")


def open_safetensors(path: Path) -> safe_open:
    """A safetensors file whose tensors are read when asked for. Raises OSError, SafetensorError, or ValueError as
    :func:`check_safetensors`."""
    with open_regular(path) as file:
        check_safetensors(file)
    return safe_open(path, "pt")


def _check_archive(file: IO[bytes], namespaces: bool) -> int:
    """The size of the file in bytes. Raises ValueError or pickle.UnpicklingError."""
    file.seek(0)
    if file.read(4) != b"PK\3\4":
        raise ValueError("it is not a file of torch.save; files from before torch 1.6 have to be saved again")
    size = file.seek(0, 2)
    try:
        with zipfile.ZipFile(_InPieces(file)) as archive:
            members = archive.infolist()
            if any(m.compress_type != zipfile.ZIP_STORED or m.compress_size != m.file_size for m in members):
                raise ValueError("its members are compressed; torch.save does not compress")
            if sum(member.file_size for member in members) > size:
                raise ValueError("its members overlap")
            pickles = [member for member in members if member.filename.lower().endswith(".pkl")]
            if len(pickles) != 1 or pickles[0].file_size > MAX_PICKLE:
                raise ValueError(f"it must have one pickle of at most {MAX_PICKLE} bytes")
            _check_pickle(archive.read(pickles[0]), CALLED | ({"argparse Namespace"} if namespaces else set()))
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise ValueError("it is cut off, or no checkpoint") from error
    return size


class _InPieces:
    """A file of which zipfile reads no large piece: a list of members becomes ten times as large in memory."""

    def __init__(self, file: IO[bytes]) -> None:
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable
        self._read = file.read

    def read(self, count: int = -1) -> bytes:
        content = self._read(min(count, MAX_PICKLE + 1) if count >= 0 else MAX_PICKLE + 1)
        if len(content) > MAX_PICKLE:
            raise ValueError(f"the list of its members has more than {MAX_PICKLE} bytes")
        return content


def _check_pickle(content: bytes, called: Collection[str]) -> None:
    for step, (instruction, argument, _) in enumerate(pickletools.genops(content)):
        if step >= MAX_STEPS:
            raise ValueError(f"its pickle has more than {MAX_STEPS} instructions")
        if instruction.name == "GLOBAL" and argument not in called:
            raise pickle.UnpicklingError(f"it holds more than tensors and plain values: {argument}")


def _check_content(content: Any, size: int) -> None:
    """Raises ValueError for other types, and for tensors that have more elements than the file has bytes for."""
    total = 0
    for value in _leaves(content):
        if isinstance(value, Tensor):
            if value.layout != torch.strided or value.is_meta or value.is_quantized:
                raise ValueError(f"it holds a tensor of layout {value.layout} on {value.device}")
            total += value.nbytes
            if total > 2 * size:
                raise ValueError("its tensors have more elements than it has bytes for")
        elif type(value) not in (*PLAIN, Namespace):
            raise ValueError(f"it holds a {type(value).__name__}")


def _leaves(content: Any) -> Iterator[Any]:
    """The values in nested dicts, lists and tuples. Raises ValueError where these contain themselves, or nearly."""
    left, steps = [content], 0
    while left:
        value = left.pop()
        steps += 1
        if steps > MAX_STEPS:
            raise ValueError(f"it holds more than {MAX_STEPS} values")
        if type(value) in (dict, OrderedDict):
            left += [*value.keys(), *value.values()]
        elif type(value) in (list, tuple, torch.Size):
            left += value
        else:
            yield value
