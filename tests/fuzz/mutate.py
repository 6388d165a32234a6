"""Random changes of files: bytes, and values in what is JSON."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.damaged_files import KINDS, damage

Files = dict[str, bytes]
"""The files of a folder: content by relative path."""

EXTREMES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 2**64, 10**400, 1e308, -0.0, 1e-320),
    *map(float, ("nan", "inf", "-inf")),
    *("", "a", "0", "nan", "../../etc/passwd", "/etc/passwd", "x\0y", "\ud800", "\x1b[2J", "a\nb"),
    *("é" * 300, "x" * 70_000, "<script>alert(1)</script>", "${oc.env:HOME}", "os.system"),
    *("pipe:touch TOUCHED", "http://127.0.0.1:9/a"),
    *([], {}, [[]], [None], [0], [-1, 2**40], ["../x"], {"": 0}, list(range(3000))),
    {"_target_": "os.system", "command": "touch TOUCHED"},
    json.loads("[" * 30 + "]" * 30),
)


def mutated(files: Files, rng: np.random.Generator) -> Files:
    """The files with one of them changed, often where their structure is; rarely missing or empty."""
    names = sorted(files)
    texts = [name for name in names if _is_json(name)]
    name = str(rng.choice(texts if texts and rng.random() < 0.5 else names))
    chance = rng.random()
    if chance < 0.02:
        return {other: content for other, content in files.items() if other != name}
    if chance < 0.03:
        return {**files, name: b""}
    if _is_json(name) and chance < 0.7:
        return {**files, name: mutated_json(files[name], rng)}
    if len(files[name]) < 2:
        return {**files, name: rng.bytes(8)}
    return {**files, name: damage(files[name], KINDS[int(rng.integers(len(KINDS)))], rng)}


def _is_json(name: str) -> bool:
    return Path(name).name in (".zarray", ".zattrs", ".zgroup") or name.endswith((".json", ".jsonl"))


def mutated_json(content: bytes, rng: np.random.Generator) -> bytes:
    """JSON, or lines of JSON, with a value changed."""
    lines = content.splitlines()
    try:
        json.loads(content)
        lines = [content]
    except ValueError:
        pass
    if not lines:
        return b"{}"
    at = int(rng.integers(len(lines)))
    try:
        value = json.loads(lines[at])
    except ValueError:
        return content
    lines[at] = json.dumps(changed(value, rng)).encode()
    return b"\n".join(lines) + b"\n"


def changed(value: Any, rng: np.random.Generator) -> Any:
    """A copy of nested dicts and lists in which one value is an extreme one, missing, doubled or another one's."""
    places = list(_places(value))
    if not places:
        return pick(EXTREMES, rng)
    path = places[int(rng.integers(len(places)))]
    kind = rng.random()
    if kind < 0.15:
        return _with(value, path, None, remove=True)
    if kind < 0.3:
        other = places[int(rng.integers(len(places)))]
        return _with(value, path, _at(value, other))
    if kind < 0.4 and isinstance(_at(value, path), (int, float)):
        return _with(value, path, _at(value, path) + pick((1, -1, 0.5, 10**9), rng))
    return _with(value, path, pick(EXTREMES, rng))


def pick(values: Any, rng: np.random.Generator) -> Any:
    return values[int(rng.integers(len(values)))]


def _places(value: Any, path: tuple = ()) -> Any:
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from _places(item, (*path, key))


def _at(value: Any, path: tuple) -> Any:
    for key in path:
        value = value[key]
    return value


def _with(value: Any, path: tuple, new: Any, remove: bool = False) -> Any:
    copied = value.copy()
    if len(path) > 1:
        copied[path[0]] = _with(value[path[0]], path[1:], new, remove)
    elif remove:
        del copied[path[0]]
    else:
        copied[path[0]] = new
    return copied


def read_folder(folder: Path) -> Files:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def write_folder(folder: Path, files: Files) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
