"""The table of docs/scale.md: pretraining on many GPUs on paper, from results of `fcmae bench step`.

python benchmarks/scale.py benchmarks/convnextv2_*-h200-*.json
"""

import argparse
import json
from pathlib import Path

import torch

from fcmae.models import FCMAE

IMAGES = 1_281_167
GLOBAL_BATCH = 4096
JPEG_BYTES = 110e3
"""ImageNet's mean file."""
BACKWARD = 2 / 3
"""Share of a step in which gradients can be exchanged while something else is computed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, help="of the packed engine; of several rows the fastest counts")
    parser.add_argument("--gpus", type=int, default=64)
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=1600)
    given = parser.parse_args()
    fastest: dict[tuple[str, str], dict] = {}
    for report in (json.loads(file.read_text()) for file in given.files):
        for row in (row for row in report["results"] if row["engine"] == "packed"):
            key = row["model"], report["machine"].get("gpu", report["machine"]["cpu"])
            if key not in fastest or row["images_per_second"] > fastest[key]["images_per_second"]:
                fastest[key] = row
    print("| model | GPU | measured at batch | img/s per GPU | step, ms | all-reduce, MB | network per node, GB/s | "
          "data, GB/s | GPU-hours | days |\n|---|---|---|---|---|---|---|---|---|---|")  # fmt: skip
    for (model, gpu), row in sorted(fastest.items(), key=lambda item: gradient_bytes(item[0][0])):
        print(line(model, gpu, row, given.gpus, given.gpus_per_node, given.epochs))


def line(model: str, gpu: str, row: dict, gpus: int, gpus_per_node: int, epochs: int) -> str:
    """A row of the table; docs/scale.md explains each column."""
    speed = row["images_per_second"]
    step = GLOBAL_BATCH / gpus / speed
    nodes = gpus / gpus_per_node
    traffic = 2 * (nodes - 1) / nodes * gradient_bytes(model)
    hours = epochs * (IMAGES // GLOBAL_BATCH) * step / 3600
    cells = [
        *(model, gpu, row["batch_size"], f"{speed:,.0f}", f"{step * 1e3:.1f}", f"{gradient_bytes(model) / 1e6:.0f}"),
        *(f"{traffic / (BACKWARD * step) / 1e9:.0f}", f"{gpus * speed * JPEG_BYTES / 1e9:.1f}"),
        *(f"{hours * gpus:,.0f}", f"{hours / 24:.2f}"),
    ]
    return f"| {' | '.join(map(str, cells))} |"


def gradient_bytes(model: str) -> int:
    """float32, encoder and decoder."""
    with torch.device("meta"):
        params = FCMAE(model).named_parameters()
        return 4 * sum(p.numel() for name, p in params if not name.startswith("backbone.head."))


if __name__ == "__main__":
    main()
