"""Who may import whom, by the syntax tree of every file."""

import ast
import gc
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from fcmae.imports import quick_imports

PACKAGE = Path(__file__).parents[2] / "fcmae"
FILES = sorted(PACKAGE.rglob("*.py"))

# part of the package: what of the package it may import
ALLOWED = {
    "errors": set(),
    "opening": set(),
    "files": {"errors", "opening", "processes"},
    "imports": set(),
    "interrupt": set(),
    "launch": set(),
    "processes": set(),
    "randomness": set(),
    "grid": set(),
    "masking": {"grid"},
    "loss": {"masking"},
    "toolchain": {"errors"},
    "memory": {"errors"},
    "kernels": {"kernels", "opening", "toolchain"},
    "engines": {"engines", "kernels", "masking"},
    "models": {"models", "engines", "kernels", "masking", "loss"},
    "interchange": {"interchange", "config", "data", "engines", "errors", "files", "models", "opening", "training"},
    "precision": {"errors"},
    "config": {"config", "errors", "files", "grid", "precision"},
    "data": {"data", "config", "errors", "files", "interrupt", "launch", "opening", "processes", "randomness"},
}
PURE = {"masking", "loss", "kernels"}
ONLY_IN = {
    "wandb": {"training/wandb_logger.py"},
    "MinkowskiEngine": {"engines/minkowski.py"},
    "triton": {"kernels", "bench"},
    "hydra": {"config/compose.py", "config/quoting.py", "hydra_run.py"},
    "datasets": {"data/sources/huggingface.py"},
    "onnxruntime": {"interchange/onnx_format.py"},
    "transformers": {"interchange/transformers_format.py"},
}


def imports(file: Path) -> set[str]:
    """Dotted names of all imported modules, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names.add(node.module)
    return names


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports(file):
    relative = file.relative_to(PACKAGE)
    part = relative.parts[0].removesuffix(".py")
    modules = imports(file)
    internal = {m.split(".")[1] for m in modules if m.startswith("fcmae.")}
    external = {m.split(".")[0] for m in modules if not m.startswith("fcmae")}
    assert "cli" not in internal or part == "cli"
    if part in ALLOWED:
        assert internal <= ALLOWED[part]
    if part in PURE:
        assert external <= {"torch", "triton", *sys.stdlib_module_names}
    for name, places in ONLY_IN.items():
        if name in external:
            assert str(relative) in places or relative.parts[0] in places


def test_contributing_has_the_same_rules():
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", text, re.MULTILINE)
    assert {part: set(re.findall(r"`(\w+)`", allowed)) for part, allowed in rows} == ALLOWED
    for module, places in ONLY_IN.items():
        assert all(f"`{place}`" in text for place in places), module


def test_the_garbage_collector_rests_during_imports(monkeypatch):
    """And leaves alone what they made; where nothing was imported, it goes on as before."""
    before = gc.get_freeze_count()
    try:
        with quick_imports():
            assert not gc.isenabled()
        assert gc.get_freeze_count() == before
        with quick_imports():
            monkeypatch.setitem(sys.modules, "made_by_this_test", ModuleType("made_by_this_test"))
        assert gc.get_freeze_count() > before
        assert gc.isenabled()
        gc.disable()
        with quick_imports():
            pass
        assert not gc.isenabled()
    finally:
        gc.unfreeze()
        gc.enable()
