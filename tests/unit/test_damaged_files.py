"""Damaged files of every format and source: an error that names the file, or an image; no crash, no hang, no memory."""

import pytest

from tests.damaged_files import problems

pytest.importorskip("imagecodecs")
pytest.importorskip("pydicom")
pytest.importorskip("pillow_heif")
pytest.importorskip("tifffile")


def test_damaged_files_do_no_harm():
    count, wrong, _ = problems(14)
    assert count >= 300
    assert wrong == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_many_damaged_files_do_no_harm(seed):
    count, wrong, _ = problems(60, seed)
    assert count >= 1000
    assert wrong == []
