"""Runs of 20 steps whose results are kept: whoever changes the computation sees it, and says so in CHANGELOG.md.

``tests/golden/runs.json`` has the loss of every step, and the SHA-256 of the final weights by platform and torch.
``python -m tests.golden_runs`` (``make golden-update``) writes it; for other losses or other weights it wants
``--because LINE``, the line of CHANGELOG.md that explains them.
"""

import argparse
import csv
import hashlib
import json
import platform
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image

from tests import in_process
from tests.coco_files import write_coco
from tests.conftest import TINY_FINETUNE, TINY_PRETRAIN
from tests.dense_files import write_squares
from tests.results import metrics_of, newest

FILE = Path(__file__).parent / "golden" / "runs.json"
CHANGELOG = Path(__file__).parents[1] / "CHANGELOG.md"
STEPS = 20
TOLERANCE = 1e-6
"""Relative, of losses on a platform whose weights are not known."""
COMPARED = {"finetune detect": 5}
"""Steps whose losses are compared there, if not all: a detector samples boxes by their scores, and one that rounding
puts above another changes all that follows, by 3e-4 with AVX2 instead of AVX-512."""
LENGTH = (
    "data.length=16",
    "schedule.epochs=10",
    "trainer.eval_every_epochs=null",
    "trainer.checkpoint_every_epochs=5",
)
PRETRAIN = (*TINY_PRETRAIN, *LENGTH)
FINETUNE = (*TINY_FINETUNE, *LENGTH)
TABLE = ("data=table", "data.path=table.csv", "data.root=images")
FOUR = ("optim.global_batch_size=4", "schedule.epochs=5", "objective.width=8")
SQUARES = (*FOUR, "data.name=imagefolder", "data.path=images")
PIECES = "data.channels={input: [0, 1], target: [2], classes: [3]}"
"""Of images of four channels."""
RUNS: dict[str, Sequence[str]] = {
    "pretrain pixels": PRETRAIN,
    "pretrain hog": (*PRETRAIN, "target=hog", "target.hog.cell=4"),
    "pretrain laplacian": (*PRETRAIN, "target=laplacian"),
    "pretrain channels": (
        *PRETRAIN,
        "target=channels",
        "data.in_chans=2",
        "data.mean=[0.5,0.5]",
        "data.std=[0.25,0.25]",
        "data.source={_target_: fcmae.data.sources.Synthetic, length: 16, in_chans: 4, size: [40, 40]}",
        PIECES,
    ),
    "pretrain teacher": (
        *PRETRAIN,
        "target=teacher",
        "target.teacher.name=test_convnext",
        "target.teacher.checkpoint=teacher.pt",
    ),
    "pretrain labels": (*PRETRAIN, "target=[pixels,labels]", "target.labels.weight=learned"),
    "pretrain unet": (*PRETRAIN, "model.decoder=unet", "mask=block", "optim.ema_decay=0.9", "model.pred_patch_size=8"),
    "finetune classify": (*FINETUNE, "augment.mixup=0.8", "optim.ema_decay=0.9", "model.drop_path_rate=0.1"),
    "finetune regress": (*FINETUNE, *TABLE, "objective=regress", "data.label_column=[number]"),
    "finetune multilabel": (*FINETUNE, *TABLE, "objective=multilabel", "data.label_column=[a,b]"),
    "finetune segment": (*FINETUNE, *SQUARES, "objective=segment", "objective.classes=3", "data.target_path=masks"),
    "finetune translate": (
        *(*FINETUNE, *SQUARES, "objective=translate", "objective.channels=2", "data.target_path=targets"),
        "objective.loss=l1+mse",
    ),
    "finetune detect": (
        *(
            *FINETUNE,
            *FOUR,
            "data.name=coco",
            "objective=detect",
            "data.annotations=objects.json",
            "objective.detections=4",
        ),
        "data.path=objects",
    ),
}
"""The command of each run, in a folder of :func:`write_data`."""


def here() -> str:
    """What bits depend on: the machine, its vector instructions, torch."""
    return f"{sys.platform}-{platform.machine()} {torch.backends.cpu.get_cpu_capability()} torch-{torch.__version__}"


def write_data(folder: Path) -> None:
    """Images and what belongs to them, always the same."""
    write_squares(folder, 16)
    write_coco(folder, 16)
    (folder / "images").rename(folder / "both")
    (folder / "both" / "s").rename(folder / "images")
    (folder / "both").rename(folder / "objects")
    (folder / "masks" / "s").rename(folder / "maps")
    (folder / "masks").rmdir()
    (folder / "maps").rename(folder / "masks")
    (folder / "targets").mkdir()
    with (folder / "table.csv").open("w") as file:
        rows = csv.writer(file)
        rows.writerow(("image", "number", "a", "b"))
        for number in range(16):
            name = f"{number}.png"
            np.save(
                folder / "targets" / f"{number}.npy",
                np.asarray(Image.open(folder / "images" / name), np.float32)[..., :2].transpose(2, 0, 1),
            )
            rows.writerow((name, number / 7, number % 2, "" if number == 3 else number // 8))
    generator = torch.Generator().manual_seed(0)
    weights = timm.create_model("test_convnext").state_dict()
    drawn = {name: 0.1 * torch.randn(weights[name].shape, generator=generator) for name in sorted(weights)}
    torch.save(drawn, folder / "teacher.pt")


def run(name: str, folder: Path) -> tuple[list[float], str]:
    """The loss of every step, and the SHA-256 of the final weights."""
    out = folder / name
    in_process.run(folder, *RUNS[name], f"hydra.run.dir='{out}'")
    lines = metrics_of(out)
    losses = [line["loss"] for line in lines if "loss" in line]
    state = newest(out)
    digest = hashlib.sha256()
    for kind in ("model", "ema"):
        for key, value in (state[kind] or {}).items():
            digest.update(f"{key} {value.dtype} {list(value.shape)}".encode())
            digest.update(value.contiguous().numpy().tobytes())
    return losses, digest.hexdigest()


def read() -> dict[str, Any]:
    """``losses`` by run; ``sha256`` by platform and run; ``because``, the line of CHANGELOG.md that explains the last
    change; ``of``, a checksum of both."""
    return json.loads(FILE.read_text())


def checksum(kept: dict[str, Any]) -> str:
    """Of the line that explains the last change, and of the losses since then."""
    said = json.dumps([kept["because"], kept["losses"]], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()


def is_in_changelog(line: str) -> bool:
    return len(line) > 20 and line in " ".join(CHANGELOG.read_text().split())


def is_close(name: str, losses: list[float], kept: list[float] | None) -> bool:
    """Whether losses of a run are those that are kept, up to rounding."""
    if kept is None or len(losses) != len(kept):
        return False
    pairs = list(zip(losses, kept, strict=True))[: COMPARED.get(name)]
    return all(abs(a - b) <= TOLERANCE * abs(b) for a, b in pairs)


def update(because: str | None) -> int:
    """Writes the file, unless other results are not explained. Returns the exit code."""
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder))
        found = {name: run(name, Path(folder)) for name in RUNS}
    kept = read() if FILE.exists() else {"because": "", "losses": {}, "sha256": {}}
    losses, known = kept["losses"], kept["sha256"].get(here())
    if known is None:
        changed = [name for name, (values, _) in found.items() if not is_close(name, values, losses.get(name))]
    else:
        changed = [name for name, (_, sha) in found.items() if known.get(name) != sha]
    if changed:
        if not is_in_changelog(because or "") or because == kept["because"]:
            print(f"other results: {', '.join(changed)}; name the new line of CHANGELOG.md that says why")
            return 1
        # Other platforms compare losses until somebody runs this there.
        kept = {"because": because, "losses": {name: values for name, (values, _) in found.items()}, "sha256": {}}
    kept["sha256"][here()] = {name: sha for name, (_, sha) in found.items()}
    kept["of"] = checksum(kept)
    FILE.write_text(json.dumps(kept, indent=1) + "\n")
    print(f"{FILE}: {len(found)} runs on {here()}, {len(changed)} changed")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser("python -m tests.golden_runs", description=__doc__)
    parser.add_argument("--because", metavar="LINE", help="of CHANGELOG.md, needed if results change")
    parser.add_argument("--show", metavar="NAME", help="only print the result of this run, as JSON")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.show is None:
        return update(given.because)
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder))
        print(json.dumps(run(given.show, Path(folder))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
