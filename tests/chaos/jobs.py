"""The commands that are disturbed: their arguments, the files they read, and what they must leave in the end."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.bad_files import picture
from tests.coco_files import write_coco
from tests.conftest import TINY
from tests.dense_files import write_squares

RUN = "disk/run"
TRAINED = ("trainer.checkpoint_every_epochs=0.5", "trainer.eval_every_epochs=2", "loader.workers=1")
TRAINED += ("trainer.hang_timeout=60", "precision=float32", f"hydra.run.dir={RUN}")
LABELLED = ("data.name=imagefolder", "data.path=disk/data/train", "data.val_path=disk/data/val")
DENSE = ("data.name=imagefolder", "data.path=disk/data/squares/images", "data.target_path=disk/data/squares/masks")
DENSE += ("data.val_path=disk/data/squares/images", "data.val_target_path=disk/data/squares/masks")
TABLE = ("data.name=table", "data.path=disk/data/table.csv", "data.val_path=disk/data/table.csv")
OBJECTS = ("data.name=coco", "data.path=disk/data/objects/images", "data.annotations=disk/data/objects/objects.json")
OBJECTS += ("data.val_path=disk/data/objects/images", "data.val_annotations=disk/data/objects/objects.json")


def write_data(folder: Path) -> None:
    """Small images for every job: two classes, squares with their maps, squares as objects, a table of numbers."""
    for part, count in (("train", 48), ("val", 16)):
        for i in range(count):
            path = folder / part / "ab"[i % 2] / f"{i:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(40, 48, seed=i + 100 * (part == "val")).save(path)
    write_squares(folder / "squares", count=16)
    write_coco(folder / "objects", count=16)
    numbers = np.random.default_rng(0).random((48, 2)).round(3)
    rows = [f"train/{'ab'[i % 2]}/{i:02d}.png,{a},{b},{round(a)}" for i, (a, b) in enumerate(numbers.tolist())]
    (folder / "table.csv").write_text("\n".join(["path,depth,width,deep", *rows, ""]))


TIMED = ("images_per_second", "data_wait", "memory_gib", "seconds_left", "checkpoint_stall_seconds", "time")


@dataclass(frozen=True)
class Job:
    """A command and its result.

    Args:
        args: of ``fcmae``. Paths are relative to the job's folder, in which ``disk`` is disturbed and ``start`` holds
            the results of the jobs in ``needs``.
        result: a digest of what the command leaves in the folder.
        images: the files that are deleted and replaced, below ``disk/data``; none for a command that goes on without.
        resumes: continues where it was; else it begins again, and what it wrote before is whole or not there.
    """

    name: str
    args: tuple[str, ...]
    result: Callable[[Path], str]
    ranks: tuple[int, ...] = (1,)
    images: str = "train"
    resumes: bool = True
    out: str = RUN
    needs: tuple[str, ...] = ()

    @property
    def command(self) -> str:
        return self.args[0]


def weights(folder: Path) -> str:
    """Of the newest checkpoint, of the exported encoder, and of every loss and score on the way."""
    digest = hashlib.sha256()
    run = folder / RUN
    state = torch.load(sorted((run / "checkpoints").glob("step_*.pt"))[-1], weights_only=True)
    tensors = dict(state["model"])
    if (run / "encoder.safetensors").is_file():
        tensors |= {f"encoder.{name}": value for name, value in load_file(run / "encoder.safetensors").items()}
    for name, value in sorted(tensors.items()):
        digest.update(name.encode() + value.contiguous().numpy().tobytes())
    digest.update(json.dumps(sorted(scores(run).items())).encode())
    return digest.hexdigest()


def scores(run: Path) -> dict[str, float]:
    """By step and name. An evaluation that was stopped is made again; it must come to the same."""
    found: dict[str, float] = {}
    for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        for name, value in line.items():
            if name not in TIMED and found.setdefault(f"{line['step']:05d} {name}", value) != value:
                raise ValueError(f"{name} of step {line['step']} is {found[name]}, and {value} the second time")
    return found


def files(folder: Path) -> str:
    """Of all files below ``disk/out``, by name, without those that a command keeps for itself."""
    digest = hashlib.sha256()
    out = folder / "disk" / "out"
    for path in sorted(out.rglob("*") if out.is_dir() else [out]):
        if path.is_file() and "fcmae-index" not in path.name:
            digest.update(str(path.relative_to(out)).encode() + path.read_bytes())
    return digest.hexdigest()


def rows(folder: Path) -> str:
    """Of the arrays in ``disk/out.npz``."""
    digest = hashlib.sha256()
    with np.load(folder / "disk" / "out.npz", allow_pickle=False) as arrays:
        for name in sorted(arrays):
            digest.update(name.encode() + arrays[name].tobytes())
    return digest.hexdigest()


def cells(folder: Path) -> str:
    """Of what a study measured, without how long that took."""
    found = json.loads((folder / RUN / "study.json").read_text())
    results = [{name: value for name, value in cell.items() if name != "seconds"} for cell in found["results"]]
    return hashlib.sha256(json.dumps({**found, "results": results}, sort_keys=True).encode()).hexdigest()


def page(folder: Path) -> str:
    """Of a report, without the time at which it was written."""
    text = (folder / "disk" / "out.html").read_text()
    return hashlib.sha256(re.sub(r", written [-0-9]+ [0-9:]+", "", text).encode()).hexdigest()


def content(name: str) -> Callable[[Path], str]:
    return lambda folder: hashlib.sha256((folder / "disk" / name).read_bytes()).hexdigest()


def tiny(command: str, *args: str, epochs: int) -> tuple[str, ...]:
    return (command, *TINY, *args, f"schedule.epochs={epochs}", "schedule.warmup_epochs=1", *TRAINED)


FINETUNE = ("augment=none", "init_from=start/pretrain")
FROZEN = ("checkpoint=start/pretrain", "out=disk/out.json", "cache=disk/features", "batch_size=4", "loader.workers=1")
AGAIN = {"resumes": False}
JOBS = (
    Job("pretrain", tiny("pretrain", *LABELLED, "model.decoder_embed_dim=16", "monitor.knn_every_epochs=2",
                         "monitor.knn_k=5", epochs=8), weights, (1, 2, 3, 4)),
    Job("classify", tiny("finetune", *LABELLED, *FINETUNE, epochs=8), weights, (1, 2, 4), needs=("pretrain",)),
    Job("segment", tiny("finetune", *DENSE, *FINETUNE, "objective=segment", "objective.classes=3",
                        "objective.width=16", epochs=8), weights, (1, 2), "squares/images/s", needs=("pretrain",)),
    Job("translate", tiny("finetune", *DENSE, *FINETUNE, "objective=translate", "objective.channels=1",
                          "objective.width=16", epochs=8), weights, (1, 3), "squares/masks/s", needs=("pretrain",)),
    Job("regress", tiny("finetune", *TABLE, *FINETUNE, "objective=regress", "data.label_column=[depth,width]",
                        epochs=8), weights, (1, 2), needs=("pretrain",)),
    Job("multilabel", tiny("finetune", *TABLE, *FINETUNE, "objective=multilabel", "data.label_column=[deep]",
                           epochs=8), weights, (1, 2), needs=("pretrain",)),
    Job("detect", tiny("finetune", *OBJECTS, *FINETUNE, "objective=detect", "objective.width=8",
                       "objective.detections=4", epochs=8), weights, (1, 2), "objects/images", needs=("pretrain",)),
    Job("study", ("study", *TINY, *LABELLED, *FINETUNE, "trainer.eval_every_epochs=null", "labels=[4]", "seeds=1",
                  "arms=[pretrained_probe,finetuned]", "steps=24", f"hydra.run.dir={RUN}"),
        cells, needs=("pretrain",)),
    Job("prepare", ("prepare", "data.path=disk/data/train", "out=disk/out", "samples_per_shard=2", "loader.workers=1"),
        files, images="", out="disk/out"),
    Job("prepare in processes", ("prepare", "data.path=disk/data/train", "out=disk/out", "samples_per_shard=2",
                                 "loader.workers=2"), files, images="", out="disk/out"),
    Job("evaluate", ("evaluate", "checkpoint=start/classify", "out=disk/out.json", "report=null", "batch_size=4",
                     "data.val_path=disk/data/val", "loader.workers=1"), content("out.json"), (1, 2), "val",
        out="disk/out.json", needs=("classify",), **AGAIN),
    Job("knn", ("knn", *FROZEN, *LABELLED), content("out.json"), out="disk/out.json", needs=("pretrain",), **AGAIN),
    Job("probe", ("probe", *FROZEN, *LABELLED, "epochs=20"), content("out.json"), (1, 2), "val", out="disk/out.json",
        needs=("pretrain",), **AGAIN),
    Job("reconstruct", ("reconstruct", "start/pretrain", "disk/data/val", "--out", "disk/out.png"), content("out.png"),
        images="val", out="disk/out.png", needs=("pretrain",), **AGAIN),
    Job("report", ("report", "start/pretrain", "--out", "disk/out.html"), page, images="",
        out="disk/out.html", needs=("pretrain",), **AGAIN),
    Job("embed", ("embed", "start/pretrain", "disk/data/train", "--out", "disk/out.npz", "--batch-size=4"), rows,
        (1, 2), out="disk/out.npz", needs=("pretrain",), **AGAIN),
    Job("predict", ("predict", "start/classify", "disk/data/train", "--out", "disk/out.csv", "--batch-size=4"),
        content("out.csv"), (1,), out="disk/out.csv", needs=("classify",), **AGAIN),
    Job("export", ("export", "start/classify", "--to", "timm", "--out", "disk/out"), files, images="",
        out="disk/out", needs=("classify",), **AGAIN),
)  # fmt: skip


def prepare_folder(folder: Path, data: Path, start: Path) -> None:
    """The folder of a job: ``disk`` with its own copy of the data, and ``start``."""
    (folder / "disk").mkdir(parents=True)
    shutil.copytree(data, folder / "disk" / "data")
    (folder / "start").symlink_to(start)


def rewrite(path: Path) -> None:
    """Replaces an image by the same pixels in other bytes, as a tool does that synchronises folders."""
    temporary = path.with_name(f"{path.name}.new")
    with Image.open(path) as image:
        image.load()
        image.save(temporary, "PNG", compress_level=1 + len(path.read_bytes()) % 9)
    temporary.replace(path)
