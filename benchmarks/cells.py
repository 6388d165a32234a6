"""Photographs of solar cells as folders, for studies with few and unbalanced labels (docs/learning.md).

    pip download --no-deps elpv-dataset
    python -m benchmarks.cells elpv_dataset-*.whl cells             # needs no network

Writes 2,000 training and 624 test images, of the classes defect (a probability above 0.5) and fine, as JPEGs of
quality 80: ``cells/train`` and ``cells/test``. The tables ``cells/train.csv`` and ``cells/test.csv`` name the same
images, with the probability of a defect and the kind of cell, ``mono`` or ``poly``. The images may be used for
measuring, not shipped (CC BY-NC-SA).
"""

import argparse
import csv
import io
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

TRAIN = 2000


def prepare(wheel: Path, out: Path) -> None:
    """The images of the package ``elpv-dataset``, a wheel, as folders of a folder per class, and as tables."""
    with zipfile.ZipFile(wheel) as archive:
        (labels,) = [name for name in archive.namelist() if name.endswith("data/labels.csv")]
        rows = list(csv.reader(io.StringIO(archive.read(labels).decode()), delimiter=" ", skipinitialspace=True))
        order = np.random.RandomState(0).permutation(len(rows))
        tables: dict[str, list[tuple[str, ...]]] = {"train": [], "test": []}
        for place, index in enumerate(order):
            name, probability, kind = rows[index]
            part = "train" if place < TRAIN else "test"
            file = out / part / ("defect" if float(probability) > 0.5 else "fine") / f"{Path(name).stem}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(f"{labels.rpartition('/')[0]}/{name}") as image:
                Image.open(image).convert("L").save(file, quality=80)
            tables[part].append((file.relative_to(out).as_posix(), probability, kind))
    for part, images in tables.items():
        with (out / f"{part}.csv").open("w", newline="") as table:
            csv.writer(table, lineterminator="\n").writerows([("path", "probability", "kind"), *images])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    prepare(given.wheel, given.out)


if __name__ == "__main__":
    main()
