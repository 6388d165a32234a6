"""Images that cannot be read, in real runs."""

import pytest

from tests.bad_files import encoded, picture
from tests.conftest import TINY_PRETRAIN
from tests.results import metrics_of

DATA = ("data=imagefolder", "data.path=images", "loader.workers=1")


@pytest.fixture
def images(tmp_path):
    for i in range(24):
        folder = tmp_path / "images" / ("cat", "dog")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i:02d}.jpg").write_bytes(encoded(picture(seed=i), "JPEG") if i % 12 else b"no image")


def metrics(folder):
    keys = ("step", "loss", "grad_norm", "bad_samples")
    return [{key: line[key] for key in keys} for line in metrics_of(folder) if "loss" in line]


def test_the_first_ends_a_run_with_one_line(fcmae, images):
    failed = fcmae(*TINY_PRETRAIN, *DATA, check=2)
    lines = [line for line in failed.stderr.splitlines() if "pretrain: " in line][-1:]
    assert lines[0].startswith("fcmae pretrain: cannot read the image images/cat/"), failed.stderr
    assert "Traceback" not in failed.stderr


def test_skipping_is_counted_and_does_not_depend_on_ranks_workers_or_restarts(fcmae, tmp_path, images):
    skip = (*TINY_PRETRAIN, *DATA, "loader.on_error=skip", "loader.max_bad=0.5")
    done = fcmae(*skip, "hydra.run.dir=one")
    assert done.stderr.count("images/cat/00.jpg: ") == done.stderr.count("images/cat/12.jpg: ") == 1
    expected = metrics(tmp_path / "one")
    assert sum(line["bad_samples"] for line in expected) >= 6  # two in each of three epochs
    fcmae(*skip, "hydra.run.dir=stopped", "trainer.max_steps=4", check=75)
    fcmae(*skip, "hydra.run.dir=stopped", "loader.workers=0", "loader.max_bad=0.6")
    assert metrics(tmp_path / "stopped") == expected
    fcmae(*skip, "hydra.run.dir=ranks", ranks=2)
    assert [line["bad_samples"] for line in metrics(tmp_path / "ranks")] == [line["bad_samples"] for line in expected]


def test_too_many_end_a_run_of_several_ranks_with_one_line(fcmae, images):
    failed = fcmae(*TINY_PRETRAIN, *DATA, "loader.on_error=skip", ranks=2, check=1)  # 1 is torchrun's
    message = "of 24 samples of an epoch could not be read; the share must be at most 0.001 (loader.max_bad)"
    assert failed.stderr.count(message) == 1
