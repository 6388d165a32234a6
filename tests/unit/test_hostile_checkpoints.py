"""Checkpoints and files of other libraries that are made to do harm, read in a child process that is measured."""

import re

import pytest

from tests.hostile import measure
from tests.hostile_checkpoints import CHECKPOINTS


@pytest.fixture(scope="module")
def taken():
    return measure(CHECKPOINTS)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_hostile_file_of_weights_is_refused_in_memory_of_its_size(name, taken):
    case, what = CHECKPOINTS[name], taken[name]
    assert re.search(case.says, what.said, re.DOTALL), what
    assert what.memory <= max(case.memory, 2 * what.size / 2**20), what
