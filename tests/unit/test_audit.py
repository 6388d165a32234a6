"""``.ci/audit`` with tools that only print what the real ones printed."""

import importlib.machinery
import importlib.util
import json
import sys
from pathlib import Path

import pytest

LOADER = importlib.machinery.SourceFileLoader("audit", str(Path(__file__).parents[2] / ".ci" / "audit"))
COMPARED = {"name": "a", "version": "1", "vulns": []}
BAD = {"name": "b", "version": "2", "vulns": [{"id": "CVE-1", "fix_versions": ["3"]}]}
UNKNOWN = {"name": "c", "skip_reason": "Dependency not found on PyPI and could not be audited: c (1)"}


@pytest.fixture(scope="module")
def script():
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("audit", LOADER))
    sys.dont_write_bytecode, before = True, sys.dont_write_bytecode
    LOADER.exec_module(module)
    sys.dont_write_bytecode = before
    return module


def tool(folder, name, text, error=""):
    (folder / name).write_text(f"#!/bin/sh\necho '{error}' >&2\ncat <<'END'\n{text}\nEND\n")
    (folder / name).chmod(0o700)


@pytest.mark.parametrize(
    ("found", "code", "said"),
    [
        ([COMPARED, BAD, UNKNOWN], 1, ["b 2: CVE-1, fixed in 3", "2 of 3 packages", "not compared: c;"]),
        ([COMPARED, UNKNOWN], 0, ["1 of 2 packages", "not compared: c;"]),
        ([UNKNOWN], 2, ["not audited: pypi.org must be reached itself"]),
        (None, 2, ["not audited: ConnectionError: no route"]),
    ],
)
def test_what_was_compared_is_said_and_nothing_compared_is_no_success(script, tmp_path, capsys, found, code, said):
    text = "" if found is None else json.dumps({"dependencies": found})
    tool(tmp_path, "pip-audit", text, "Traceback\nConnectionError: no route")
    assert script.audit(tmp_path, Path(sys.executable)) == code
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(said)
    assert all(line.startswith(begin) for line, begin in zip(lines, said, strict=True))


def test_the_list_of_components_names_no_folder_of_this_machine(script, tmp_path):
    web, local = ({"type": "distribution", "url": url} for url in ("https://pypi.org/a", "file:///home/me/a"))
    parts = [{"name": "a", "externalReferences": [web, local]}, {"name": "b"}]
    tool(
        tmp_path, "cyclonedx-py", json.dumps({"specVersion": "1.6", "metadata": {"component": {}}, "components": parts})
    )
    script.write_sbom(tmp_path, Path(sys.executable), tmp_path / "sbom.json")
    listed = json.loads((tmp_path / "sbom.json").read_text())
    assert [part["externalReferences"] for part in listed["components"]] == [[web], []]
