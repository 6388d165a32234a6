"""State dicts and files of weights, whatever the library: read without running code, translated strictly."""

import contextlib
import json
import pickle
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fcmae.checkpoints import torch_file
from fcmae.errors import FCMAEError, WeightsError, reason_of
from fcmae.opening import open_regular, read_regular

StateDict = dict[str, Tensor]

MAX_JSON = 2**24
"""Bytes of a config.json."""
LOSSLESS = (torch.float32, torch.float16, torch.bfloat16)
HEAD_NORM = {"head.norm.weight": torch.ones, "head.norm.bias": torch.zeros}
"""The final norm of a timm ConvNeXt and its initial values; pretraining leaves it as it is."""


def read(path: Path) -> dict:
    """What a .safetensors or torch file holds; no code in it is executed. Raises WeightsError naming the file."""
    try:
        with open_regular(path) as file:
            if path.suffix == ".safetensors":
                torch_file.check_safetensors(file)
                return load_file(path)
            content = torch_file.load(file, namespaces=True)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise WeightsError(f"no file {path}" + " but a folder" * path.is_dir()) from error
    except pickle.UnpicklingError as error:
        raise WeightsError(f"{path} cannot be read: it is no file of torch, or holds more than weights") from error
    except Exception as error:  # of what is no such file the libraries raise all sorts
        known = isinstance(error, (OSError, RuntimeError, ValueError))
        reason = reason_of(error) if known else "it is no file of weights"
        raise WeightsError(f"{path} cannot be read: {reason}") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path} must hold a dict; got a {type(content).__name__}")
    return content


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises WeightsError."""
    try:
        content = json.loads(read_regular(path, MAX_JSON))
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path} must hold an object; got a {type(content).__name__}")
    return content


def as_float32(weights: Mapping[str, object], where: Path) -> StateDict:
    """The tensors in float32, if that loses nothing. Raises WeightsError naming what is not a floating tensor."""
    wrong = [name for name, value in weights.items() if not isinstance(value, Tensor) or value.dtype not in LOSSLESS]
    if wrong:
        raise WeightsError(f"{where} has what are not tensors of 32 or 16 bits: {', '.join(sorted(wrong))}")
    return {name: value.float() for name, value in weights.items() if isinstance(value, Tensor)}


def read_file(path: Path) -> StateDict:
    """The weights in a file, which may have them under ``state_dict`` or ``model``. Raises WeightsError."""
    content = read(path)
    return as_float32(next((content[key] for key in ("state_dict", "model") if key in content), content), path)


def read_folder(folder: Path) -> StateDict:
    """The weights in a directory of the hub, ``model.safetensors`` or ``pytorch_model.bin``. Raises WeightsError."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return as_float32(read(folder / name), folder / name)
    raise WeightsError(f"{folder} has neither model.safetensors nor pytorch_model.bin")


def write_folder(folder: Path, weights: StateDict, configs: Mapping[str, Any]) -> None:
    """A directory of the hub: ``model.safetensors`` and JSON files by name."""
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    for name, content in configs.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


@contextlib.contextmanager
def explained(path: Path, what: str) -> Iterator[None]:
    """In this block an error that wrong content causes is a WeightsError: ``path`` does not hold ``what``."""
    try:
        yield
    except FCMAEError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise WeightsError(f"{path} does not hold {what} ({reason})") from error


def same_values(value: Tensor, like: Tensor) -> Tensor:
    """``value`` in the shape of ``like`` if they differ only by dimensions of size 1, else as it is."""
    if [side for side in value.shape if side != 1] == [side for side in like.shape if side != 1]:
        return value.reshape(like.shape)
    return value


def renamed(name: str, table: Sequence[tuple[str, str]], of: str) -> str:
    """``name`` by the first pattern of ``table`` that it begins with. Raises WeightsError if there is none."""
    for ours, theirs in table:
        new, matched = re.subn(f"^{ours}", theirs, name)
        if matched:
            return new
    raise WeightsError(f"{name!r} is not a parameter {of}")


def translate(
    theirs: StateDict,
    like: StateDict,
    names: Mapping[str, str],
    library: str,
    convert: Callable[[Tensor, Tensor], Tensor] = same_values,
) -> StateDict:
    """Another library's state dict under our names and in our shapes.

    Args:
        like: the state dict of the model to load into; what is not in ``names`` is kept.
        names: ours to theirs.
        library: for the message.
        convert: their tensor and ours of the same name to theirs in our shape.

    Raises WeightsError naming the keys that are missing, left over, or of another shape.
    """
    missing = sorted(set(names.values()) - set(theirs))
    unexpected = sorted(set(theirs) - set(names.values()))
    if missing or unexpected:
        raise WeightsError(
            f"the {library} state dict does not fit the model: missing {missing or 'none'}, "
            f"unexpected {unexpected or 'none'}"
        )
    ours = dict(like)
    wrong = []
    for name, key in names.items():
        ours[name] = convert(theirs[key], like[name])
        if ours[name].shape != like[name].shape:
            wrong.append(f"{key} {list(theirs[key].shape)} for {list(like[name].shape)}")
    if wrong:
        raise WeightsError(f"the {library} state dict has tensors of other shapes than the model: {', '.join(wrong)}")
    return ours


def without_head_norm(weights: StateDict) -> StateDict:
    """A backbone's weights without its final norm, for layouts that have none.

    Raises WeightsError if that norm was trained: it would be lost.
    """
    trained = [
        name for name, initial in HEAD_NORM.items() if not torch.equal(weights[name], initial(len(weights[name])))
    ]
    if trained:
        raise WeightsError(f"this layout has no final norm and would lose the trained {', '.join(trained)}")
    return {name: value for name, value in weights.items() if name not in HEAD_NORM}
