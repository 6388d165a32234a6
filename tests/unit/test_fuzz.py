"""What fuzzing found (tests/fuzz/corpus) stays fixed, and every target reads its sound files."""

import functools

import pytest

from tests.fuzz.__main__ import CORPUS, TARGETS
from tests.fuzz.mutate import read_folder
from tests.hostile import measure

SLOW = ("configs", "saved", "weights", "left")
"""Targets that import libraries or train first."""
FOUND = sorted(folder.name for folder in CORPUS.iterdir())


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * name.startswith(SLOW)) for name in FOUND]
)
def test_what_was_found_is_refused_or_read(name):
    target = TARGETS[name]
    if target.needs is not None:
        target.needs()
    cases = {f"{case.name}": target.case(functools.partial(read_folder, case)) for case in (CORPUS / name).iterdir()}
    wrong = {case: target.wrong(taken) for case, taken in measure(cases).items()}
    assert {case: reason for case, reason in wrong.items() if reason} == {}


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
