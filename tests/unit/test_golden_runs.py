"""Runs of 20 steps give the results that tests/golden/runs.json keeps (tests/golden_runs.py)."""

import json

import pytest

from tests import golden_runs
from tests.conftest import run_python

QUICK = ("pretrain pixels", "pretrain labels", "finetune classify")
CASES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in golden_runs.RUNS]


@pytest.mark.parametrize("name", CASES)
def test_a_run_gives_what_it_gave_before(name, tmp_path):
    """Its bits on a platform that is known, else its losses. In a new process, as golden-update."""
    kept = golden_runs.read()
    losses, sha = json.loads(run_python(tmp_path, "-m", "tests.golden_runs", "--show", name).stdout.splitlines()[-1])
    known = kept["sha256"].get(golden_runs.here(), {}).get(name)
    said = "the computation changed; if that is meant: make golden-update BECAUSE='the line of CHANGELOG.md'"
    assert len(losses) == golden_runs.STEPS
    if known is None:
        assert golden_runs.is_close(name, losses, kept["losses"][name]), said
    else:
        assert sha == known, said


def test_the_last_change_is_explained_in_the_changelog():
    """Who changes the file by hand has to change the line as well."""
    kept = golden_runs.read()
    assert kept["losses"].keys() == golden_runs.RUNS.keys()
    assert golden_runs.checksum(kept) == kept["of"]
    assert golden_runs.is_in_changelog(kept["because"])


def test_other_results_need_a_line(tmp_path, monkeypatch, capsys):
    """And none is needed where nothing changed, such as for another platform."""
    results = {"a": ([1.0, 0.5], "x"), "b": ([2.0], "y")}
    log, file = tmp_path / "CHANGELOG.md", tmp_path / "runs.json"
    log.write_text("- The first line of a change.\n- The second line,\n  of another change.\n")
    monkeypatch.setattr(golden_runs, "RUNS", dict.fromkeys(results))
    monkeypatch.setattr(golden_runs, "FILE", file)
    monkeypatch.setattr(golden_runs, "CHANGELOG", log)
    monkeypatch.setattr(golden_runs, "write_data", lambda folder: None)
    monkeypatch.setattr(golden_runs, "run", lambda name, folder: results[name])

    def update(because=None):
        code = golden_runs.update(because)
        return code, json.loads(file.read_text()) if file.exists() else None

    first, second = "The first line of a change.", "The second line, of another change."
    assert update("No such line in the changelog.")[0] == 1
    code, kept = update(first)
    assert (code, kept["sha256"]) == (0, {golden_runs.here(): {"a": "x", "b": "y"}})
    monkeypatch.setattr(golden_runs, "here", lambda: "another machine")
    assert update()[0] == 0
    results["a"] = ([1.0, 0.6], "z")
    for because in (None, first):
        assert update(because)[0] == 1
    assert "other results: a" in capsys.readouterr().out
    code, kept = update(second)
    assert (code, list(kept["sha256"]), kept["because"]) == (0, ["another machine"], second)
    results["b"] = ([2.0], "other bits of the same losses")
    assert update(second)[0] == 1
