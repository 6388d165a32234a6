"""Photographs of solar cells as folders, for studies with few and unbalanced labels (docs/learning.md).

    pip download --no-deps elpv-dataset
    python -m benchmarks.cells elpv_dataset-*.whl cells             # needs no network

Writes 2,000 training and 624 test images, of the classes defect (a probability above 0.5) and fine, as JPEGs of
quality 80: ``cells/train`` and ``cells/test``. The images may be used for measuring, not shipped (CC BY-NC-SA).
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
    """The images of the package ``elpv-dataset``, a wheel, as folders ``train`` and ``test`` of a folder per class."""
    with zipfile.ZipFile(wheel) as archive:
        (labels,) = [name for name in archive.namelist() if name.endswith("data/labels.csv")]
        rows = list(csv.reader(io.StringIO(archive.read(labels).decode()), delimiter=" ", skipinitialspace=True))
        order = np.random.RandomState(0).permutation(len(rows))
        for place, index in enumerate(order):
            name, probability = rows[index][0], float(rows[index][1])
            kind = "defect" if probability > 0.5 else "fine"
            file = out / ("train" if place < TRAIN else "test") / kind / f"{Path(name).stem}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(f"{labels.rpartition('/')[0]}/{name}") as image:
                Image.open(image).convert("L").save(file, quality=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    prepare(given.wheel, given.out)


if __name__ == "__main__":
    main()
