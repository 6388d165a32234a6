"""Every source x type of pixels: read, crop, resume, prepare, ranks. docs/tests.md has the table."""

import random
import re
from pathlib import Path

import pytest
import torch

from fcmae.config import LoaderConfig, PrepareConfig
from fcmae.config.prepare import PreparedDataConfig
from fcmae.data.pixels.decode import PixelFormat, open_image, to_tensor
from fcmae.data.pixels.transforms import pretrain_transform
from fcmae.data.plan import BatchPlan
from fcmae.data.prepare.command import prepare
from fcmae.data.samples import MaskedImages
from fcmae.data.sources import train_source
from tests import source_matrix as matrix

for package in ("zarr", "h5py", "tifffile", "imagecodecs"):
    pytest.importorskip(package)
CELLS = list(matrix.cells())
KINDS = list(dict.fromkeys(cell[0] for cell in CELLS))


def is_default(source, dtype, check, way):
    """Each source, check and way with one type, which differs from one to the next."""
    if matrix.SOURCES[source].slow or way == "with a worker":
        return False
    ways = [(c, w) for c, ways in matrix.CHECKS.items() for w in ways]
    return dtype == matrix.TYPES[(KINDS.index(source) + ways.index((check, way))) % len(matrix.TYPES)]


def check_equal(found, expected):
    assert len(found) == len(expected) > 0
    assert all(torch.equal(a, b) for x, y in zip(found, expected, strict=True) for a, b in zip(x, y, strict=True))


def check(source, dtype, what, way, folder):
    more = {"pad": {"fit": "pad"}, "zoom": {"crop_zoom": [1.0, 1.5]}}.get(way, {})
    made = matrix.SOURCES[source].make(folder, dtype)
    cfg = matrix.data_config(dtype, **made, **more)
    to = PixelFormat.of(cfg)
    images = [to_tensor(image.copy(), to) for image in matrix.values(dtype)]
    if what in ("read", "crop"):
        found = train_source(cfg)
        assert len(found) == matrix.COUNT
        crop = pretrain_transform(cfg)
        for index, image in enumerate(images):
            if what == "read":
                assert torch.equal(open_image(found[index].image, to).pixels(1), image)
            else:
                ours, theirs = (crop(x, random.Random(index).random) for x in (found[index].image, image))
                assert torch.equal(ours, theirs)
    elif what == "resume":
        start = 1 if way == "in the first epoch" else 4
        check_equal(matrix.batches(cfg, start, workers=int(way == "with a worker")), matrix.batches(cfg)[start:])
    elif what == "prepare":
        data = PreparedDataConfig(**{**matrix.config(dtype), **made})
        prepare(PrepareConfig(data=data, out=str(folder / "out"), shuffle=False, loader=LoaderConfig(workers=0)))
        prepared = matrix.data_config(dtype, name="webdataset", path=str(folder / "out"))
        check_equal(matrix.batches(prepared), matrix.batches(cfg))
    else:
        ranks = int(way)
        shares = [matrix.batches(cfg, ranks=ranks, rank=rank) for rank in range(ranks)]
        joined = [[torch.cat(parts) for parts in zip(*step, strict=True)] for step in zip(*shares, strict=True)]
        dataset = MaskedImages(train_source(cfg), pretrain_transform(cfg), (1, 1), seed=0)
        plan = BatchPlan.create(matrix.COUNT, 2, 2, 1, seed=0)
        steps = [[dataset[key] for key in plan.global_batch(step)] for step in range(6)]
        check_equal(joined, [[torch.stack(parts) for parts in zip(*step, strict=True)] for step in steps])


@pytest.mark.parametrize(
    "cell",
    [pytest.param(cell, marks=() if is_default(*cell) else pytest.mark.slow, id=" ".join(cell)) for cell in CELLS],
)
def test_a_source(cell, tmp_path):
    check(*cell, tmp_path)


def test_the_table_counts_these_tests():
    """`python -m tests.source_matrix` writes it."""
    page = (Path(__file__).parents[2] / "docs" / "tests.md").read_text()
    found = re.search(r"^\| source \| type \|.*?(?=\n\n)", page, re.MULTILINE | re.DOTALL)
    assert found is not None
    assert found[0].splitlines() == matrix.lines()
