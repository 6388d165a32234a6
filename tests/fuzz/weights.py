"""Checkpoints, encoder files and exports, damaged; those with a checksum also made by somebody who can compute it."""

import functools
import hashlib
import io
import pickletools
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fcmae.checkpoints import checkpoint, encoder
from fcmae.config import FinetuneConfig
from fcmae.interchange.convert import export, import_weights
from fcmae.models.build import load
from fcmae.tasks.initial import find_start
from tests import interchange
from tests.fuzz.files import made
from tests.fuzz.mutate import Files, changed, mutated, pick
from tests.fuzz.target import Target
from tests.results import assert_same

CASES = 2000
LIBRARIES = ("timm", "transformers", "official")
NAME = "step_00000007.pt"
CALLS = (
    *("os system", "posix system", "builtins eval", "builtins exec", "subprocess Popen", "torch load", "numpy load"),
    *("builtins bytearray", "builtins getattr", "torch._utils _rebuild_tensor_v2", "torch FloatStorage"),
    *("torch.hub load", "timm create_model", "pickle loads", "fcmae.plugins create", "functools partial"),
)
ARGUMENTS = ("touch TOUCHED", "__import__('os').system('touch TOUCHED')", "", "x" * 1000)


def small(folder: Path) -> None:
    interchange.finetuned(folder / NAME)


def pretrained(folder: Path) -> None:
    interchange.pretrained(folder / NAME)


def exported(to: str) -> Callable[[], Files]:
    def write(folder: Path) -> None:
        source = folder / "ours.pt"
        interchange.finetuned(source)
        export(source, to, folder / "out", check=False)
        source.unlink()

    return made(write)


@functools.cache
def sound(write: Callable[[Path], None]) -> dict[str, Any]:
    """The state of a sound checkpoint."""
    return torch.load(io.BytesIO(made(write)()[NAME]), weights_only=True)


def refused_or_equal(write: Callable[[Path], None]) -> Callable[[Path], str]:
    def read(folder: Path) -> str:
        state, expected = checkpoint.read(folder / NAME), sound(write)
        assert_same(state["model"], expected["model"])
        assert {k: v for k, v in state.items() if k != "model"} == {k: v for k, v in expected.items() if k != "model"}
        return "equal"

    return read


def read_any(folder: Path) -> str:
    """What evaluation, fine-tuning and resuming do with a checkpoint before they compute."""
    path = next(folder.glob("*.pt"), folder / NAME)
    checkpoint.describe(path, checkpoint.header(path))
    find_start(FinetuneConfig(init_from=str(path)))
    return type(load(path)).__name__


def resealed(files: Files, rng: np.random.Generator) -> Files:
    """A changed checkpoint with the checksum of its content."""
    (name, content), = files.items()  # fmt: skip
    archive = content[: -checkpoint.TRAILER_BYTES]
    kind = rng.random()
    if kind < 0.5:
        archive = _restated(archive, rng)
    elif kind < 0.8:
        archive = _with_pickle(archive, functools.partial(_sabotaged, rng=rng))
    else:
        archive = mutated({name: archive}, rng).get(name, b"")
    return {name: archive + checkpoint.MAGIC + hashlib.sha256(archive).digest()}


def _restated(archive: bytes, rng: np.random.Generator) -> bytes:
    """With other values in its state, or other tensors."""
    state = torch.load(io.BytesIO(archive), weights_only=True)
    if rng.random() < 0.3:
        names = sorted(state["model"])
        state["model"][pick(names, rng)] = pick(
            (
                torch.zeros(0),
                torch.zeros(1).expand(2**30),
                torch.zeros(3, dtype=torch.int8),
                torch.full((8,), float("nan")),
                torch.zeros(1, dtype=torch.complex64),
                torch.zeros(()),
                torch.zeros(2, 3, 4, 5, 6, 7),
                torch.zeros(4, device="meta"),
                torch.eye(3).to_sparse(),
                None,
                7,
            ),
            rng,
        )
    else:
        parts = ("config", "config", "config", "classes", "versions", "step", "task", "ema", "format")
        part = pick([part for part in parts if part in state], rng)  # pretraining has no classes
        state[part] = changed({"": state[part]}, rng).get("")
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def _with_pickle(archive: bytes, change: Callable[[bytes], bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as before, zipfile.ZipFile(buffer, "w") as after:
        for member in before.infolist():
            content = before.read(member)
            after.writestr(member.filename, change(content) if member.filename.endswith("data.pkl") else content)
    return buffer.getvalue()


def _sabotaged(content: bytes, rng: np.random.Generator) -> bytes:
    """A pickle that names another function somewhere, or calls one."""
    places = [place for _, _, place in pickletools.genops(content)]
    names = [(arg, place) for op, arg, place in pickletools.genops(content) if op.name == "GLOBAL"]
    call = str(pick(CALLS, rng))
    if names and rng.random() < 0.5:
        old, place = names[int(rng.integers(len(names)))]
        length = 1 + len(old) + 1
        return content[:place] + _global(call) + content[place + length :]
    place, argument = int(pick(places, rng)), str(pick(ARGUMENTS, rng)).encode()
    snippet = _global(call) + b"X" + struct.pack("<I", len(argument)) + argument + b"\x85R0"
    return content[:place] + snippet + content[place:]


def _global(name: str) -> bytes:
    return b"c" + name.replace(" ", "\n").encode() + b"\n"


def read_encoder(folder: Path) -> str:
    path = folder / encoder.ENCODER_FILE
    find_start(FinetuneConfig(init_from=str(path)))
    return type(load(path)).__name__


def write_encoder(folder: Path) -> None:
    interchange.pretrained(folder / NAME)
    encoder.write(folder / encoder.ENCODER_FILE, checkpoint.read(folder / NAME))
    (folder / NAME).unlink()


def imported(library: str) -> Callable[[Path], str]:
    def read(folder: Path) -> str:
        path = folder / "out"
        file = next((path / name for name in ("official.pth", "model.safetensors") if (path / name).exists()), path)
        given = path if library in ("timm", "transformers") else next(path.glob("*.p*"), file)
        import_weights(given, library, folder / "new.pt")
        (folder / "new.pt").unlink()
        return "imported"

    return read


def large(folder: Path) -> None:
    """A checkpoint of 40 MB, for the peak of memory."""
    from fcmae.version import versions

    interchange.finetuned(folder / NAME)
    known = checkpoint.read(folder / NAME)
    more = {"optimizer": {"moments": torch.zeros(10_000_000)}}
    checkpoint.write_atomically(folder / NAME, {**known, "versions": versions(), **more})


TARGETS = {
    "weights.finetune": Target(made(small), refused_or_equal(small), CASES),
    "weights.pretrain": Target(made(pretrained), refused_or_equal(pretrained), CASES),
    "weights.resealed": Target(made(small), read_any, CASES, resealed),
    "weights.resealed-pretrain": Target(made(pretrained), read_any, CASES, resealed),
    "weights.large": Target(made(large), read_any, 100, resealed),
    "weights.encoder": Target(made(write_encoder), read_encoder, CASES),
    **{f"weights.{to}": Target(exported(to), imported(to), CASES) for to in LIBRARIES},
}
