"""Packages depend downwards only. A module at the top level counts as a package of its own."""

import ast
import gc
import sys
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from types import ModuleType

import pytest

import fcmae
from fcmae.imports import quick_imports
from tests.conftest import run_python

ROOT = Path(fcmae.__file__).parent


def module_name(file: Path) -> str:
    return ".".join(("fcmae", *file.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")


MODULES = {module_name(file): file for file in ROOT.rglob("*.py")}


def imported(file: Path) -> set[str]:
    """Modules of the package that a file imports, inside functions too, but not for type checkers only."""
    found = set()
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "fcmae":
            for name in node.names:
                whole = f"{node.module}.{name.name}"
                found.add(whole if whole in MODULES else node.module)
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names if name.name in MODULES}
    return found


def package(module: str) -> str:
    """``data`` of ``fcmae.data.pixels.crops``; the package itself, which only re-exports, is ``fcmae``."""
    return [*module.split("."), "fcmae"][1]


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    graph = defaultdict(set)
    for module, file in MODULES.items():
        graph[package(module)] |= {package(other) for other in imported(file)} - {package(module)}
    return graph


def test_no_package_imports_itself_by_a_detour(graph):
    try:
        order = list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"packages import each other: {' -> '.join(reversed(error.args[1]))}")
    assert order.index("kernels") < order.index("engines") < order.index("models") < order.index("evaluation")
    assert order.index("evaluation") < order.index("tasks") < order.index("training")


# What a package may import, besides errors, files, opening, processes and the other small modules of the top level.
ALLOWED = {
    "kernels": set(),
    "masks": set(),
    "config": set(),
    "engines": {"kernels", "masks"},
    "targets": {"kernels", "masks"},
    "data": {"config", "kernels", "masks"},
    "checkpoints": {"config"},
    "optim": {"config", "engines"},
    "models": {"checkpoints", "config", "data", "engines", "kernels", "masks", "targets"},
    "report": {"config", "data"},
    "loggers": {"checkpoints", "config", "data", "report"},
    "interchange": {"checkpoints", "config", "data", "engines", "models", "targets"},
    "evaluation": {
        "checkpoints", "config", "data", "engines", "interchange", "loggers", "masks", "models", "optim", "targets",
    },
    "tasks": {
        "checkpoints", "config", "data", "engines", "evaluation", "interchange", "loggers", "masks", "models",
        "targets",
    },
    "training": {
        "checkpoints", "config", "data", "engines", "evaluation", "kernels", "loggers", "models", "optim", "tasks",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(ALLOWED))
def test_only_named_packages_are_imported(graph, name):
    folders = {folder.parent.name for folder in ROOT.glob("*/__init__.py")}
    assert graph[name] & folders <= ALLOWED[name]


def test_every_package_that_others_import_is_named(graph):
    folders = {folder.parent.name for folder in ROOT.glob("*/__init__.py")}
    # Nothing imports these but the command line.
    assert folders - set(ALLOWED) <= {"bench", "doctor", "studies"}
    assert not [name for name in ALLOWED if graph[name] & {"api", "bench", "doctor", "studies", "cli", "demo"}]


# A library, and the only files or packages that import it.
ONLY_IN = {
    "wandb": {"loggers/wandb.py"},
    "mlflow": {"loggers/mlflow.py"},
    "MinkowskiEngine": {"engines/minkowski.py"},
    "triton": {"kernels", "bench"},
    "hydra": {"config/compose.py", "hydra_run.py"},
    "h5py": {"data/arrays/hdf5.py"},
    "numcodecs": {"data/arrays/codecs.py"},
    "fsspec": {"data/remote/objects.py"},
    "aiohttp": {"data/remote/objects.py"},
    "pycocotools": {"data/pixels/instances.py", "evaluation/coco_metrics.py"},
    "datasets": {"data/sources/huggingface.py"},
    "onnxruntime": {"interchange/onnx_format.py"},
    "transformers": {"interchange/transformers_format.py"},
}
PURE = {"masks", "targets", "kernels"}
"""They import torch, Triton, and NVIDIA's ``cuda``, beside the standard library."""


def test_libraries_are_imported_in_their_places_only():
    wrong = []
    for file in MODULES.values():
        relative = file.relative_to(ROOT)
        for name in _libraries(file):
            places = ONLY_IN.get(name)
            if places is not None and not {str(relative), relative.parts[0]} & places:
                wrong.append((str(relative), name))
            if relative.parts[0] in PURE and name not in {"torch", "triton", "cuda", *sys.stdlib_module_names}:
                wrong.append((str(relative), name))
    assert wrong == []


def _libraries(file: Path) -> set[str]:
    """Top-level names of what a file imports from elsewhere, in functions, too."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names.add(node.module or "")
    return {name.split(".")[0] for name in names} - {"fcmae"}


def test_garbage_collection_pauses_during_imports(monkeypatch):
    """It then skips the imported objects; where nothing was imported, it continues as before."""
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


def test_a_config_mistake_is_found_without_importing_torch(tmp_path):
    """torch alone takes longer than composing the config and checking it."""
    script = (
        "import sys; from fcmae.cli import main\n"
        "assert main(['pretrain', '--help']) == 0 and 'hydra' not in sys.modules\n"
        "missing = [main([*command.split(), '--out', 'x.npz']) for command in\n"
        "           ('embed nowhere .', 'predict nowhere .', 'export nowhere --to timm')]\n"
        "code = max(main(['pretrain', 'optim.global_batch_size=-3']), *missing)\n"
        "sys.exit(code if 'torch' not in sys.modules else 'torch was imported')"
    )
    done = run_python(tmp_path, "-c", script, check=2, fresh=True)
    assert "optim.global_batch_size" in done.stderr
    assert done.stderr.count("no checkpoint or run directory nowhere") == 3
    assert "  mask=block|grid|random|weighted\n" in done.stdout
