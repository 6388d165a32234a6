"""Checkpoints and other files of weights made to do harm, for :func:`tests.hostile.measure`.

``python -m tests.hostile_checkpoints`` prints the table of :mod:`tests.hostile`.
"""

import copy
import io
import json
import os
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from fcmae.checkpoints import checkpoint
from fcmae.config import EvaluateConfig, FinetuneConfig
from fcmae.config.commands import DataOverrides
from fcmae.evaluation.run import evaluate
from fcmae.interchange.convert import export, import_weights
from fcmae.models.build import config_of, load
from fcmae.tasks.initial import find_start
from tests import interchange as made
from tests.hostile import Case, Read, measure, table
from tests.interchange import Change, classifier, sealed


def loaded(change: Change) -> Callable[[Path], Read]:
    def make(folder: Path) -> Read:
        path = classifier(folder, change)
        return lambda: type(load(path)).__name__

    return make


def of_pickle(content: bytes) -> Callable[[Path], Read]:
    """A checkpoint whose archive holds this pickle."""

    def make(folder: Path) -> Read:
        path = sealed(folder / "step_00000001.pt", archive_of(content))
        return lambda: type(load(path)).__name__

    return make


def archive_of(content: bytes, compression: int = zipfile.ZIP_STORED, **members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/version", b"3\n")
        archive.writestr("archive/byteorder", b"little")
        for name, member in members.items():
            archive.writestr(f"archive/{name}", member)
    return buffer.getvalue()


def deflated(folder: Path) -> Read:
    path = classifier(folder, lambda state: state.update(ema={"zeros": torch.zeros(10_000_000)}))
    plain = path.read_bytes()
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(plain)) as before, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as after:
        for member in before.infolist():
            after.writestr(member.filename, before.read(member))
    sealed(path, buffer.getvalue())
    return lambda: type(load(path)).__name__


def overlapping(folder: Path) -> Read:
    """A hundred members that are the same bytes."""
    path = classifier(folder, lambda state: state.update(ema={f"{i}": torch.zeros(2**19) for i in range(40)}))
    plain = path.read_bytes()
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(plain)) as before, zipfile.ZipFile(buffer, "w") as after:
        large = None
        for member in before.infolist():
            if member.file_size < 2**21:
                after.writestr(member.filename, before.read(member))
            elif large is None:
                after.writestr(member.filename, before.read(member))
                large = after.getinfo(member.filename)
            else:
                again = copy.copy(large)
                again.filename = again.orig_filename = member.filename
                after.filelist.append(again)
    sealed(path, buffer.getvalue())
    return lambda: type(load(path)).__name__


def many_members(folder: Path) -> Read:
    members = {f"{i:01000}": b"" for i in range(9000)}
    path = sealed(folder / "step_00000001.pt", archive_of(pickle.dumps({}, 2), **members))
    return lambda: type(load(path)).__name__


def secret(folder: Path) -> Read:
    """An interpolation that reads the environment."""
    os.environ["HOSTILE"] = "the password"
    path = classifier(folder, lambda state: state["config"].update(name="${oc.env:HOSTILE}"))
    return lambda: config_of(checkpoint.read(path), path).name


def plugin(target: str, **arguments: Any) -> Callable[[Path], Read]:
    """What a checkpoint names as its validation images; "TOUCHED" is a file that must not appear."""

    def make(folder: Path) -> Read:
        touched = folder / "touched"
        source = {name: str(value).replace("TOUCHED", str(touched)) for name, value in arguments.items()}
        path = classifier(
            folder, lambda state: state["config"]["data"].update(val_source={"_target_": target, **source})
        )

        def read() -> str:
            try:
                evaluate(EvaluateConfig(checkpoint=str(path), device="cpu", data=DataOverrides()))
            except Exception as error:
                return f"touched: {touched.exists()}; {type(error).__name__}: {error}"
            return "evaluated"

        return read

    return make


def imported(library: str, write: Callable[[Path], Path]) -> Callable[[Path], Read]:
    def make(folder: Path) -> Read:
        path = write(folder)
        return lambda: import_weights(path, library, folder / "out.pt")

    return make


def timm_folder(change: Change) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        made.finetuned(folder / "ours.pt")
        export(folder / "ours.pt", "timm", folder / "timm", check=False)
        file = folder / "timm" / "config.json"
        config = json.loads(file.read_text())
        change(config)
        file.write_text(json.dumps(config))
        return folder / "timm"

    return write


def transformers_folder(folder: Path) -> Path:
    made.finetuned(folder / "ours.pt")
    export(folder / "ours.pt", "transformers", folder / "hf", check=False)
    file = folder / "hf" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "hidden_sizes": [3000] * 4}))
    return folder / "hf"


def large_header(folder: Path) -> Path:
    """A safetensors file of half a million tensors of no bytes."""
    made.finetuned(folder / "ours.pt")
    export(folder / "ours.pt", "timm", folder / "timm", check=False)
    entry = json.dumps({"dtype": "F32", "shape": [0], "data_offsets": [0, 0]})
    header = f"{{{', '.join(f'{i}: {entry}' for i in map(json.dumps, map(str, range(500_000))))}}}".encode()
    (folder / "timm" / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    return folder / "timm"


def official(weights: dict[str, Any], **others: Any) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        torch.save({"model": weights, **others}, folder / "official.pth")
        return folder / "official.pth"

    return write


def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "official.pth")
    return folder / "official.pth"


def large_metrics(folder: Path) -> Read:
    """64 GiB beside the checkpoint where a run has its metrics."""
    path = classifier(folder)
    (folder / "run" / "metrics.jsonl").write_text('{"step": 7, "top1": "![x](//evil)"}\n')
    os.truncate(folder / "run" / "metrics.jsonl", 2**36)

    def read() -> str:
        export(path, "timm", folder / "out", check=False)
        return (folder / "out" / "README.md").read_text()[:40]

    return read


def encoder_of(width: int, blocks: int, **metadata: str) -> Callable[[Path], Read]:
    """An encoder file whose convolutions have a width and no bytes, as a fine-tuning run begins with it."""

    def make(folder: Path) -> Read:
        path = folder / "encoder.safetensors"
        names = {f"stages.{stage}.blocks.{block}.conv_dw.weight" for stage in range(4) for block in range(blocks)}
        tensors = {"stem.0.weight": torch.zeros(0, 3, 4, 4), **{name: torch.zeros(width, 0, 7, 7) for name in names}}
        path.write_bytes(save(tensors, {"backbone": "convnextv2_atto", **metadata}))
        return lambda: (find_start(FinetuneConfig(init_from=str(path))).path, load(path))

    return make


def initial(change: Change) -> Callable[[Path], Read]:
    """What a fine-tuning run begins with."""

    def make(folder: Path) -> Read:
        path = classifier(folder, change)
        return lambda: find_start(FinetuneConfig(init_from=str(path))).path

    return make


def config(**values: Any) -> Change:
    """A change of the config: ``model__dims=...`` for model.dims."""

    def change(state: dict[str, Any]) -> None:
        for name, value in values.items():
            group, _, key = name.partition("__")
            state["config"][group][key] = value

    return change


DEEP = b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."
"""The pickle of lists in lists."""
GIGABYTE = b"\x80\x02cbuiltins\nbytearray\nJ" + struct.pack("<i", 2**30) + b"\x85R."
WITHOUT = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R."
LISTS = b"\x80\x02" + b"]" * 16_000_000 + b"."
TWO_BYTES = torch.zeros(1, dtype=torch.float16).expand(2**28)

CHECKPOINTS = {
    "checkpoint, deflated": Case(deflated, "its members are compressed"),
    "checkpoint, overlapping members": Case(overlapping, "its members overlap"),
    "checkpoint, 9,000 members of long names": Case(many_members, "the list of its members has more than"),
    "checkpoint that calls bytearray(2**30)": Case(of_pickle(GIGABYTE), "more than tensors and plain values"),
    "checkpoint, classes are null": Case(initial(lambda state: state.update(classes=None)), "step_00000007.pt"),
    "checkpoint, versions are null": Case(
        loaded(lambda state: state.update(versions=None)), "its entry 'versions' has another type"
    ),
    "checkpoint that calls without arguments": Case(of_pickle(WITHOUT), r"it is damaged \(TypeError"),
    "checkpoint of 16 million lists": Case(of_pickle(LISTS), "one pickle of at most 8388608 bytes"),
    "checkpoint of lists in lists": Case(of_pickle(DEEP), "is not a checkpoint of fcmae"),
    "checkpoint, a tensor of stride 0": Case(
        loaded(lambda state: state["model"].update(more=torch.zeros(1).expand(2**40))),
        "more elements than it has bytes",
    ),
    "checkpoint, dims of 3000": Case(loaded(config(model__dims=[3000] * 4)), "the network of its config needs"),
    "checkpoint, dims of 2^61": Case(loaded(config(model__dims=[2**61] * 4)), "config of no network|refused"),
    "checkpoint, of a larger backbone": Case(
        loaded(config(model__dims=None, model__depths=None, model__backbone="convnextv2_large")),
        "network of its config",
    ),
    "checkpoint, a million blocks": Case(loaded(config(model__depths=[10**6, 1, 1, 1])), "a config of 1000003 blocks"),
    "checkpoint, 3 million classes": Case(loaded(lambda state: state.update(classes=["c"] * 3_000_000)), "one pickle "),
    "checkpoint, a config of 200,000 values": Case(
        loaded(config(data__path=["x"] * 200_000)), "the config has more than 20000 values"
    ),
    "checkpoint, a config that nests": Case(
        loaded(config(data__source={"_target_": "a.B", "deep": [[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]})), "16 levels deep"
    ),
    "checkpoint, an interpolation": Case(secret, "name: must not be an interpolation"),
    "checkpoint, os.system as its images": Case(
        plugin("os.system", command="touch TOUCHED"), "touched: False; .*names the class os.system as its data.val_so"
    ),
    "checkpoint, subprocess.Popen": Case(
        plugin("subprocess.Popen", args="TOUCHED"), r"touched: False; .*allow=\[subprocess.Popen\]"
    ),
    "metrics of 64 GiB": Case(large_metrics, "^'---"),
    "timm, dims of 3000": Case(
        imported("timm", timm_folder(lambda c: c["model_args"].update(dims=[3000] * 4))), "network of its config needs"
    ),
    "timm, 100 million classes": Case(
        imported("timm", timm_folder(lambda c: c.update(num_classes=10**8, label_names=None))), r"^\[\]$"
    ),
    "timm, half a million tensors": Case(imported("timm", large_header), "its header has 3....... bytes"),
    "Transformers, dims of 3000": Case(imported("transformers", transformers_folder), "network of its config needs"),
    "official, stride 0 in 16 bits": Case(
        imported("official", official({"x": TWO_BYTES})), "more elements than it has"
    ),
    "official, a config that is none": Case(
        imported("official", official({"mask_token": torch.zeros(1)}, fcmae={"config": []})), "missing encoder|as they"
    ),
    "init_from, dims of 3000": Case(initial(config(model__dims=[3000] * 4)), "the network of its config needs"),
    "encoder, a width of 3000 and no bytes": Case(encoder_of(3000, 1), "the network of its config needs"),
    "encoder, 8000 blocks of no bytes": Case(encoder_of(8, 2000), "a config of 8000 blocks"),
    "encoder, an interpolation": Case(encoder_of(8, 1, fcmae='{"step": "${oc.env:HOME}"}'), "not be an interpolation"),
    "official, a pipe": Case(imported("official", pipe), "official.pth cannot be read: not a regular file"),
}

if __name__ == "__main__":
    chosen = {name: case for name, case in CHECKPOINTS.items() if not sys.argv[1:] or sys.argv[1] in name}
    print(*table(measure(chosen)), sep="\n")
