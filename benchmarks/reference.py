"""docs/config.md: every key of every command, made from the dataclasses. ``make reference`` writes it."""

import ast
import contextlib
import dataclasses
import inspect
import itertools
import json
import re
import sys
import textwrap
import traceback
from collections.abc import Iterator
from typing import Any
from unittest import mock

from fcmae.config.commands import COMMANDS
from fcmae.config.compose import compose

REQUIRED = {name: ["checkpoint=RUN"] for name in ("evaluate", "knn", "probe")} | {"prepare": ["out=FOLDER"]}
"""What a command cannot be composed without."""
INTRODUCTION = """\
# Config keys

Every key of the commands that take `KEY=VALUE`. This page is made from the code by `make reference`; do not edit it.

```
fcmae pretrain data.path=photos optim.lr=1e-3 data.image_size=[96,128] trainer.max_steps=null
fcmae pretrain model=demo data=fashion_mnist debug=default --cfg job     # prints the composed config and runs nothing
```

`GROUP.KEY=VALUE` sets one key, `GROUP=NAME` takes the file `conf/GROUP/NAME.yaml`, and `experiment=NAME` a file of
`conf/experiment`. `hydra.run.dir=FOLDER` is the run directory. Defaults below apply without such files. `null` means
none, or chosen by the program as the key says. In `finetune`, a key of `data` or `model` whose default is `null` there
takes its value from the run `init_from`, or without one the default of `pretrain`. `evaluate`, `knn` and `probe` take
the keys of `data` from the checkpoint; keys that you give replace them.
"""
TYPES = {"Any": "mixed"}
HEADER = ["| key | type | default | values | meaning |", "|---|---|---|---|---|"]


@dataclasses.dataclass
class Section:
    """The keys that one dataclass adds to one group; ``values`` are the composed ones of each command that has it."""

    schema: type
    group: str
    values: dict[str, Any] = dataclasses.field(default_factory=dict)
    allowed: dict[str, dict[str, None]] = dataclasses.field(default_factory=dict)

    def lines(self) -> Iterator[str]:
        """Markdown: a heading, what the group is, and a row for each key."""
        yield f"## {self.group or 'Top level'}: {', '.join(self.values)}"
        yield _markdown(inspect.getdoc(self.schema) or "")
        rows = []
        for name, (kind, meaning) in documented(self.schema).items():
            key = f"{self.group}.{name}" if self.group else name
            allowed = "; ".join(self.allowed.get(key, ["true, false"] if kind == "bool" else []))
            cells = [f"`{key}`", TYPES.get(kind, kind), self._default(name), allowed, _markdown(meaning)]
            rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        yield "\n".join([*HEADER, *rows])

    def _default(self, name: str) -> str:
        if any(given.startswith(f"{name}=") for command in self.values for given in REQUIRED.get(command, ())):
            return "required"
        texts = {command: _yaml(getattr(values, name)) for command, values in self.values.items()}
        if len(set(texts.values())) == 1:
            return f"`{next(iter(texts.values()))}`"
        return ", ".join(f"`{text}` in {command}" for command, text in texts.items())


def documented(schema: type) -> dict[str, tuple[str, str]]:
    """Type and docstring of each key that a dataclass itself defines, in order.

    Left out are keys that are groups, and those of a base class with another type or default only.
    """
    groups = {field.name for field in dataclasses.fields(schema) if _is_group(field.default_factory)}
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(schema))).body
    assert isinstance(definition, ast.ClassDef)
    keys = {}
    for statement, after in itertools.pairwise([*definition.body, ast.Pass()]):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            text = str(after.value.value) if is_text else ""  # type: ignore[attr-defined]
            keys[statement.target.id] = (ast.unparse(statement.annotation), " ".join(text.split()))
    inherited = {name for base in schema.__mro__[1:] for name in getattr(base, "__annotations__", ())}
    return {name: entry for name, entry in keys.items() if name not in groups and (entry[1] or name not in inherited)}


def sections() -> list[Section]:
    """Of all commands, in their order."""
    found: dict[tuple[type, str], Section] = {}
    for command in COMMANDS:
        with _recorded() as allowed:
            cfg = compose(command, REQUIRED.get(command))
        for group, values in _groups(cfg):
            for schema in reversed(type(values).__mro__):
                if not dataclasses.is_dataclass(schema) or schema.__module__ == "types" or not documented(schema):
                    continue
                section = found.setdefault((schema, group), Section(schema, group))
                section.values[command] = values
                for (key, owner), texts in allowed.items():
                    if not _is_of_another(owner, key, schema):
                        section.allowed.setdefault(key, {}).update(texts)
    return list(found.values())


def render() -> str:
    """The page."""
    return "\n\n".join([INTRODUCTION.rstrip(), *(line for section in sections() for line in section.lines())]) + "\n"


def _is_of_another(owner: type | None, key: str, schema: type) -> bool:
    """Whether the class that checks a key has one of that name itself, in a group that another command has."""
    if owner is None or not dataclasses.is_dataclass(owner) or issubclass(owner, schema):
        return False
    return key.rpartition(".")[2] in (field.name for field in dataclasses.fields(owner))


def _groups(cfg: Any) -> Iterator[tuple[str, Any]]:
    yield "", cfg
    for field in dataclasses.fields(cfg):
        if _is_group(field.default_factory):
            yield field.name, getattr(cfg, field.name)


def _is_group(factory: Any) -> bool:
    return dataclasses.is_dataclass(factory) and isinstance(factory, type)


@contextlib.contextmanager
def _recorded() -> Iterator[dict[tuple[str, type | None], dict[str, None]]]:
    """What :func:`fcmae.config.checks.check` calls allowed in this block, by the key and the class that checks it."""
    allowed: dict[tuple[str, type | None], dict[str, None]] = {}

    def record(key: str, value: Any, ok: bool, text: str) -> None:
        callers = (frame.f_locals for frame, _ in traceback.walk_stack(None))
        owner = next((type(names["self"]) for names in callers if "self" in names), None)
        allowed.setdefault((key, owner), {})[re.sub(r" \([\d.]+\)", "", text)] = None

    with contextlib.ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith("fcmae.config.") and hasattr(module, "check"):
                stack.enter_context(mock.patch.object(module, "check", record))
        yield allowed


def _yaml(value: Any) -> str:
    return json.dumps(value) if not isinstance(value, str) else value


def _markdown(text: str) -> str:
    return re.sub(r"\bNone\b", "null", " ".join(text.split()).replace("``", "`"))


if __name__ == "__main__":
    sys.stdout.write(render())
