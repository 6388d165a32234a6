"""What fuzzing found (tests/fuzz/corpus) stays fixed, and every target reads its sound files."""

import pytest

from tests.fuzz.__main__ import CORPUS, TARGETS, found_again

ELSEWHERE = ("configs", "saved", "weights", "left.resume")
"""Targets that import libraries or train first, so only ``make fuzz`` reads what was found with them."""
FOUND = sorted(folder.name for folder in CORPUS.iterdir() if not folder.name.startswith(ELSEWHERE))


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found_is_refused_or_read(name):
    assert found_again(name) == {}


def test_targets_are_those_of_the_issue():
    kinds = {name.partition(".")[0] for name in TARGETS}
    assert {"image", "weights", "left", "configs", "tar", "csv", "parquet", "coco", "saved"} <= kinds


@pytest.mark.parametrize("name", ["a/b.json", ".zarray"])
def test_json_is_changed_as_json(name):
    import json

    import numpy as np

    from tests.fuzz.mutate import mutated

    files = {name: json.dumps({"a": [1, {"b": "x"}], "c": 2}).encode()}
    results = [mutated(files, np.random.default_rng(number)).get(name, b"") for number in range(60)]
    assert len(set(results)) > 30
    assert results == [mutated(files, np.random.default_rng(number)).get(name, b"") for number in range(60)]
