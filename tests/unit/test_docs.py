"""README, CONTRIBUTING and docs/: paths, names, keys, links exist, commands have a valid config, examples run."""

import ast
import functools
import re
import shlex
from collections import defaultdict
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fcmae
from fcmae.config import COMMANDS
from fcmae.config.compose import compose
from fcmae.data.pixels.decode import PixelFormat
from fcmae.data.sources.own import create_own
from fcmae.errors import ConfigError
from tests.unit.test_imports import MODULES, imported, package

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
ARCHITECTURE = ROOT / "docs" / "architecture.md"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]*)\)")
FILE_ENDINGS = ("safetensors", "onnx", "data")
FILE = re.compile(r"^(?:fcmae|conf|tests|docs|benchmarks|launch)/[\w/.*-]*(?:::(\w+))?$")


@functools.cache
def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return FENCE.sub("", page.read_text())


@functools.cache
def code_blocks(page: Path) -> list[str]:
    return [block for language, block in FENCE.findall(page.read_text()) if language == ""]


@functools.cache
def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@functools.cache
def defined(file: Path) -> set[str]:
    """Names that a module defines: functions, classes, methods as ``Class.method``, variables."""
    names: set[str] = set()

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(prefix + node.name)
                if isinstance(node, ast.ClassDef):
                    visit(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names.update(prefix + target.id for target in targets if isinstance(target, ast.Name))
            elif isinstance(node, ast.ImportFrom | ast.Import):
                names.update(prefix + (name.asname or name.name) for name in node.names)

    visit(ast.parse(file.read_text()).body, "")
    return names


@functools.cache
def keys() -> set[str]:
    """Every key of docs/config.md, which another test compares with the dataclasses."""
    return set(re.findall(r"^\| `([\w.]+)` \|", (ROOT / "docs" / "config.md").read_text(), re.MULTILINE))


def quoted(page: Path) -> list[str]:
    """What stands in backticks."""
    return re.findall(r"`([^`\n]+)`", prose(page))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    dead = []
    for target in LINK.findall(prose(page)):
        if target.startswith(("http:", "https:", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            dead.append(target)
    assert dead == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_exist(page):
    missing = []
    for text in quoted(page):
        match = FILE.match(text)
        if not match or re.search(r"[A-Z]{3,}", text):
            continue
        path, _, name = text.partition("::")
        files = list(ROOT.glob(path))
        if not files or (name and not any(name in defined(file) for file in files)):
            missing.append(text)
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_of_the_package_exist(page):
    missing = []
    for text in quoted(page):
        match = re.match(r"^(fcmae(?:\.\w+)+)", text)
        if not match or match[1].endswith(".cli"):
            continue
        parts = match[1].split(".")
        for cut in range(len(parts), 0, -1):
            if (module := ".".join(parts[:cut])) in MODULES:
                rest = ".".join(parts[cut:])
                break
        if rest and rest not in defined(MODULES[module]) | (set(fcmae.__all__) if module == "fcmae" else set()):
            missing.append(text)
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_keys_exist(page):
    """``GROUP.KEY`` in backticks, and ``GROUP.KEY=`` in a command."""
    texts = [text.partition("=")[0] for text in quoted(page)]
    texts += [text for block in code_blocks(page) for text in re.findall(r"([\w.]+)=", block)]
    groups = {key.partition(".")[0] for key in keys() if "." in key}
    found = [text.split(".") for text in texts if re.fullmatch(r"[a-z_]+\.[a-z_0-9.]+", text)]
    found = [parts for parts in found if parts[0] in groups and parts[-1] not in FILE_ENDINGS]
    unknown = {".".join(parts) for parts in found if not {parts[0], ".".join(parts[:2])} & keys()}
    assert unknown - {"model.target_weights"} == set()  # an attribute in Python


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_of_groups_exist(page):
    """``GROUP=NAME``, ``experiment=NAME``."""
    lines = [line for block in code_blocks(page) for line in block.splitlines() if "--config-dir" not in line]
    pattern = re.compile(r"(?<![\w.])([a-z]+)=([a-z0-9][a-z0-9_/]*)(?![\w.:@])")
    chosen = [
        (ROOT / "conf" / group, name) for text in [*quoted(page), *lines] for group, name in pattern.findall(text)
    ]
    assert [
        f"{group.name}={name}" for group, name in chosen if group.is_dir() and not list(group.glob(f"{name}.yaml"))
    ] == []


def test_pages_that_code_and_configs_name_exist():
    files = [file for folder in ("fcmae", "conf", "launch", "benchmarks") for file in (ROOT / folder).rglob("*")]
    texts = {file: file.read_text() for file in files if file.suffix in (".py", ".yaml", ".sh", ".sbatch")}
    named = {(file.name, page) for file, text in texts.items() for page in re.findall(r"\bdocs/\w+\.md", text)}
    assert [pair for pair in named if not (ROOT / pair[1]).exists()] == []


def hydra_commands(page: Path) -> list[tuple[str, list[str]]]:
    """Commands that take ``KEY=VALUE``, with their overrides; sweeps and the user's own groups are left out."""
    found = []
    for line in "\n".join(code_blocks(page)).replace("\\\n", " ").splitlines():
        match = re.search(r"\bfcmae(?:\.cli)? (\w+) ", line)
        if not match or match[1] not in COMMANDS or {"-m", "--multirun", "--config-dir"} & set(line.split()):
            continue
        words = shlex.split(line[match.end() :], comments=True)
        found.append((match[1], [word for word in words if "=" in word and not word.endswith("=...")]))
    return found


@pytest.mark.parametrize("page", [page for page in PAGES if hydra_commands(page)], ids=lambda page: page.name)
def test_commands_have_a_valid_config(page):
    wrong = {}
    for command, overrides in hydra_commands(page):
        try:
            compose(command, [override for override in overrides if not override.startswith("hydra")])
        except ConfigError as error:
            wrong[f"{command} {' '.join(overrides)}"] = str(error)
    assert wrong == {}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_runs_that_follow_up_commands_take_are_in_their_folder(page):
    """``name=X`` makes ``runs/X/TIME``, which ``checkpoint=runs/X`` does not find."""
    blocks = "\n".join(code_blocks(page))
    named = re.findall(r"^fcmae [^\n]*(?:\\\n[^\n]*)*\sname=(\w+)", blocks, re.MULTILINE)
    assert [name for name in named if re.search(rf"\bruns/{name}\b", page.read_text() + blocks)] == []


def test_python_of_the_readme(tmp_path, monkeypatch, capsys):
    """On smaller images."""
    (code,) = [block for language, block in FENCE.findall((ROOT / "README.md").read_text()) if language == "python"]
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code.replace("8, 3, 224, 224", "2, 3, 64, 64").replace("1, 3, 224, 224", "1, 3, 64, 64"), names)
    assert names["loss"].isfinite()
    assert names["mask"].dtype == torch.bool
    assert [x.shape[-1] for x in names["maps"]] == [16, 8, 4, 2]
    assert "unexpected_keys=[]" in capsys.readouterr().out


def test_the_source_of_the_plugins_page(tmp_path):
    (code,) = [
        block for _, block in FENCE.findall((ROOT / "docs" / "plugins.md").read_text()) if "class Cells" in block
    ]
    (tmp_path / "cells.py").write_text(code)
    np.save(tmp_path / "cells.npy", np.arange(2 * 6 * 8, dtype=np.uint8).reshape(2, 1, 6, 8))
    given = {"_target_": f"{tmp_path}/cells.py:Cells", "images": f"{tmp_path}/cells.npy"}
    source = create_own(given, "data.source", PixelFormat(in_chans=1))
    assert len(source) == 2
    assert source.describe(1) == "cell 1"
    sample = source[1]
    assert sample.label is None
    assert torch.equal(sample.image, torch.arange(48, 96, dtype=torch.uint8).view(1, 6, 8))


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 180


def test_where_things_are():
    """Each row of the table has a file, and names in it."""
    table = ARCHITECTURE.read_text().partition("## Where things are")[2]
    rows = [line.split("|")[1:-1] for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 34
    wrong = []
    for what, where, names, key in rows:
        paths = [ROOT / path for path in re.findall(r"`(fcmae/[\w/]+(?:\.py)?)`", where)]
        files = [file for path in paths for file in (path.glob("*.py") if path.is_dir() else [path]) if file.is_file()]
        there = set().union(*map(defined, files)) | keys()
        wrong += [] if files else [(what.strip(), where.strip())]
        wrong += [(what.strip(), name) for name in re.findall(r"`([\w.]+)`", names + key) if name not in there]
    assert wrong == []


def test_the_way_of_an_image_is_there():
    text = ARCHITECTURE.read_text()
    way = text[text.index("## The way of an image") : text.index("## Where things are")]
    paths = re.findall(r"`([a-z_]+/[\w/]*(?:\.py)?)`", way)
    assert len(paths) >= 10
    assert [path for path in paths if not (ROOT / "fcmae" / path.removeprefix("fcmae/")).exists()] == []


def test_every_package_is_described():
    folders = {file.parent.name for file in (ROOT / "fcmae").glob("*/__init__.py")}
    table = ARCHITECTURE.read_text().partition("| package of")[2].partition("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", table)) - {"fcmae"} >= folders


def drawn_packages() -> str:
    """The diagram of packages in Mermaid, without arrows that follow from others."""
    folders = {file.parent.name for file in (ROOT / "fcmae").glob("*/__init__.py")}
    graph: dict[str, set[str]] = defaultdict(set)
    for module, file in MODULES.items():
        if package(module) in folders:
            graph[package(module)] |= {package(other) for other in imported(file)} & folders - {package(module)}
    reached: dict[str, set[str]] = {}
    for name in TopologicalSorter(graph).static_order():
        reached[name] = graph[name].union(*(reached[other] for other in graph[name]))
    lines = [
        f"    {name} --> {other}"
        for name in sorted(graph)
        for other in sorted(graph[name])
        if not any(other in reached[between] for between in graph[name])
    ]
    return "\n".join(["graph TD", *lines])


def test_the_diagram_shows_the_imports():
    (drawn,) = [block for language, block in FENCE.findall(ARCHITECTURE.read_text()) if language == "mermaid"]
    expected = drawn_packages()
    assert drawn.strip() == expected, f"put this into docs/architecture.md:\n{expected}"
