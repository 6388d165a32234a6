"""What an interrupted run, a listing or ``fcmae prepare`` leaves on the disk, damaged; and what reads it."""

import contextlib
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image

from fcmae import status
from fcmae.checkpoints import checkpoint
from fcmae.config import LoaderConfig, PrepareConfig
from fcmae.config.prepare import PreparedDataConfig
from fcmae.data.prepare.command import prepare
from fcmae.data.sources import ImageFolder, WebDataset, kept, listing
from fcmae.errors import UsageError
from fcmae.evaluation.cache import CachedExtractor
from fcmae.evaluation.features import Features
from fcmae.report.page import write as write_page
from tests import in_process
from tests.bad_files import encoded, picture
from tests.conftest import TINY_PRETRAIN
from tests.fuzz.files import made, only
from tests.fuzz.mutate import Files, mutated
from tests.fuzz.target import Target
from tests.hostile_sources import archive

RUN = (*TINY_PRETRAIN, "hydra.run.dir=run", "trainer.log_every=2")
SCRIPT = "<script>alert(1)"


def interrupted(folder: Path) -> None:
    """A run that was killed after its second checkpoint, with all that may be beside it."""
    in_process.run(folder, *RUN, "trainer.max_steps=6", check=75)
    run = folder / "run"
    (run / "run.lock").write_text(
        json.dumps({"host": "h", "started": "s", "pid": 1, "born": "1", "place": "elsewhere"})
    )
    (run / "metrics.jsonl.1-0123abcd-0123456789abcdef.tmp").write_bytes(b"half")
    (run / "reconstructions").mkdir(exist_ok=True)
    Image.new("RGB", (16, 16)).save(run / "reconstructions" / "picture_00000006.png")
    (run / "evaluation.json").write_text('{"top1": 50.0, "images": 24}')
    (run / "auto").mkdir()
    (run / "auto" / "chosen.json").write_text('{"kept": "probe"}')


def undisturbed(folder: Path) -> None:
    """The weights at the end of the run."""
    in_process.run(folder, *RUN)
    (folder / "sha256").write_text(digest(folder))
    shutil.rmtree(folder / "run")


def digest(folder: Path) -> str:
    """The SHA-256 of the last weights of the run."""
    state = checkpoint.read(checkpoint.resolve(folder / "run@last"))["model"]
    return hashlib.sha256(b"".join(value.numpy().tobytes() for value in state.values())).hexdigest()


def read_run(folder: Path) -> str:
    """What ``status``, ``ls`` and ``report`` do."""
    found = status.read_status(folder / "run")
    text = "\n".join([status.describe(found), status.table([found], folder)])
    assert text.replace("\n", "").isprintable()
    with contextlib.redirect_stdout(io.StringIO()):
        write_page([str(folder / "run")], str(folder / "page.html"))
    assert SCRIPT not in (folder / "page.html").read_text()
    return "shown"


def resume(folder: Path) -> str:
    """The run goes on: to the weights of the undisturbed run, or not at all."""
    done = in_process.run(folder, *RUN, check=None)
    said = [line for line in done.stderr.splitlines() if line.startswith("fcmae pretrain: ")]
    if done.returncode == 0:
        assert "Traceback" not in done.stderr
        assert digest(folder) == UNDISTURBED()["sha256"].decode()
        return "resumed"
    assert done.returncode in (1, 2), done.returncode
    assert said, done.stderr
    raise UsageError(said[-1])


@contextlib.contextmanager
def as_it_was(folder: Path) -> Iterator[None]:
    """Times of folders and files, and the place of the data, are as when the listing was made."""
    for path in sorted(folder.rglob("*"), reverse=True):
        os.utime(path, (1, 1))
    meta = listing._meta
    with (
        mock.patch.object(listing, "KEEP_FROM", 1),
        mock.patch.object(listing, "_meta", lambda root, ends: {**meta(root, ends), "root": "images"}),
        mock.patch.object(kept, "HOME", folder / "home"),
    ):
        yield


def listed(folder: Path) -> None:
    for name in ("cat/1.png", "cat/2.png", "dog/a/3.png"):
        (folder / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "images" / name).write_bytes(encoded(picture(8, 8), "PNG"))
    with as_it_was(folder):
        ImageFolder(folder / "images")


def read_listing(folder: Path) -> str:
    with as_it_was(folder), contextlib.redirect_stderr(io.StringIO()):
        source = ImageFolder(folder / "images")
    found = [(os.path.relpath(source.describe(i), folder), source.label(i)) for i in range(len(source))]
    assert found == [("images/cat/1.png", 0), ("images/cat/2.png", 0), ("images/dog/a/3.png", 1)], found
    return "listed"


def indexed(folder: Path) -> None:
    (folder / "a.tar").write_bytes(archive(("0.cls", b"1"), ("1.png", encoded(picture(8, 8), "PNG")), ("1.cls", b"0")))
    with as_it_was(folder):
        WebDataset(folder / "a.tar")


def read_index(folder: Path) -> str:
    with as_it_was(folder), contextlib.redirect_stderr(io.StringIO()):
        source = WebDataset(folder / "a.tar")
    found = [(source.label(i), source[i].image.data[:4]) for i in range(len(source))]
    assert found == [(1, b"\x89PNG"), (0, b"\x89PNG")], found
    return "indexed"


class Extract:
    """An extractor of the same features."""

    def __init__(self) -> None:
        from fcmae.distributed import World

        self.world, self.width = World(0, 1, 0, 1, torch.device("cpu")), 3

    def __call__(self, source: object) -> Features:
        return Features(torch.arange(6.0).view(2, 3), torch.tensor([0, 1]))


def extracted(folder: Path) -> Features:
    with mock.patch.object(CachedExtractor, "_describe", return_value="wanted"):
        return CachedExtractor(Extract(), folder / "features", {})(None)  # type: ignore[arg-type]


def read_features(folder: Path) -> str:
    with contextlib.redirect_stderr(io.StringIO()):
        found = extracted(folder)
    assert all(torch.equal(a, b) for a, b in zip(found, Extract()(None), strict=True))
    return "features"


def prepare_here(folder: Path) -> None:
    """Relative paths, as what is written depends on them."""
    here = os.getcwd()
    os.chdir(folder)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            data, loader = PreparedDataConfig(path="images"), LoaderConfig(workers=1)
            prepare(PrepareConfig(data=data, loader=loader, out="out", samples_per_shard=2))
    finally:
        os.chdir(here)


def prepared(folder: Path) -> None:
    """``fcmae prepare``, killed before the second tar file."""
    for name in ("cat/1.png", "cat/2.png", "dog/3.png", "dog/4.png"):
        (folder / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "images" / name).write_bytes(encoded(picture(8, 8), "PNG"))
    prepare_here(folder)
    shutil.copy(folder / "out" / "manifest.json", folder / "expected.json")
    shards = json.loads((folder / "out" / "manifest.json").read_text())["shards"]
    (folder / "out" / "progress.jsonl").write_text(json.dumps(shards[0]) + "\n" + '{"name": "tr')
    (folder / "out" / "train-000001.tar").unlink()


def continue_prepare(folder: Path) -> str:
    prepare_here(folder)
    assert json.loads((folder / "out/manifest.json").read_text()) == json.loads((folder / "expected.json").read_text())
    return "prepared"


def below(folder: str) -> Callable[[Files, np.random.Generator], Files]:
    """A change of the files of a folder, or of those whose names begin so."""

    def change(files: Files, rng: np.random.Generator) -> Files:
        chosen = {name: content for name, content in files.items() if name.startswith(folder)}
        rest = {name: content for name, content in files.items() if name not in chosen}
        return {**rest, **mutated(chosen, rng)}

    return change


def studied(folder: Path) -> None:
    (folder / "study").mkdir()
    table = ["| labels | pretrained |", "|---|---|", "| 10 | 50.0 |"]
    (folder / "study" / "study.json").write_text(json.dumps({"sentence": "It helps.", "table": table, "cells": []}))
    (folder / "study" / "recipe.json").write_text(json.dumps({"config": {}, "cells": ["scratch_10_0", "auto_10_0"]}))
    (folder / "study" / "cells").mkdir()
    (folder / "study" / "cells" / "scratch_10_0.json").write_text("{}")
    Image.new("RGB", (16, 16)).save(folder / "study" / "study.png")


def read_study(folder: Path) -> str:
    """What ``status``, ``ls`` and ``report`` do."""
    found = status.read_any(folder / "study")
    text = "\n".join([status.describe(found), status.table([found], folder)])
    assert text.replace("\n", "").isprintable()
    write_page([str(folder / "study")], str(folder / "page.html"))
    assert SCRIPT not in (folder / "page.html").read_text()
    return "shown"


UNDISTURBED = made(undisturbed)
TARGETS = {
    "left.run": Target(made(interrupted), read_run, 2000),
    "left.resume": Target(made(interrupted), resume, 500, seconds=30, memory=300, needs=UNDISTURBED),
    "left.listing": Target(made(listed), read_listing, 2000, only(f".images{listing.SUFFIX}")),
    "left.index": Target(made(indexed), read_index, 2000, below(".a.tar")),
    "left.features": Target(made(extracted), read_features, 2000),
    "left.prepare": Target(made(prepared), continue_prepare, 500, below("out")),
    "left.study": Target(made(studied), read_study, 1000),
}
