"""Limits on the shape of the code: length of files, arguments of functions, one place for what all share."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import fcmae

PACKAGE = Path(fcmae.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_ARGUMENTS = 10
MAX_LINES = 400


def of_package(pattern: str) -> set[str]:
    """The files in which a pattern is found."""
    return {str(file.relative_to(PACKAGE)) for file in FILES if re.search(pattern, file.read_text())}


def functions(file: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef):
            args = node.args
            named = [*args.posonlyargs, *args.args, *args.kwonlyargs]
            count = len([arg for arg in named if arg.arg not in ("self", "cls")])
            yield f"{file.relative_to(PACKAGE)}:{node.name}", count


def test_no_file_is_long():
    lines = {str(file.relative_to(PACKAGE)): len(file.read_text().splitlines()) for file in FILES}
    assert {name: count for name, count in lines.items() if count > MAX_LINES} == {}


def test_no_line_of_cuda_is_long():
    """ruff sees to Python's."""
    files = [*PACKAGE.rglob("*.cu*"), *Path(__file__).parent.glob("*.hpp")]
    assert len(files) > 4
    assert [file.name for file in files if any(len(line) > 120 for line in file.read_text().splitlines())] == []


def test_no_function_has_many_arguments():
    """Kernels aside: Triton's take a pointer and a stride for each tensor."""
    found = [(name, count) for file in FILES if "kernels" not in file.parts for name, count in functions(file)]
    assert [name for name, count in found if count > MAX_ARGUMENTS] == []


def test_the_folder_of_training_is_small():
    assert len(list((PACKAGE / "training").glob("*.py"))) <= 18


def test_training_and_benchmarks_share_one_step():
    assert of_package(r"= (Graphed|Eager)Backward\(") == {"training/step.py"}
    passes = of_package(r"\.backward\(\)")
    assert {name for name in passes if name.startswith(("training/", "bench/", "tasks/"))} == {"training/step.py"}


def test_one_place_writes_files_whole():
    assert of_package(r"os\.fsync\(|os\.replace\(") == {"files.py"}
    assert of_package(r"class \w*Hash\w*") == {"files.py"}
