"""Random command lines of the Hydra commands: exit code 0 or 2, one line per mistake, and nothing made before.

Hypothesis draws them from the dataclasses of :mod:`fcmae.config`. Training stops where the first sample would be read.
"""

import contextlib
import dataclasses
import functools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints
from unittest import mock

import hypothesis
from hypothesis import strategies as st

from fcmae.config import COMMANDS, compose, conf_dir
from fcmae.errors import ConfigError
from fcmae.training import run as training
from fcmae.training import setup
from tests import in_process
from tests.conftest import TINY_FINETUNE, TINY_PRETRAIN
from tests.fuzz.files import made
from tests.fuzz.mutate import Files, write_folder
from tests.fuzz.target import Target

ARGUMENTS = "arguments.json"
BLOCK = 50
"""Command lines that are drawn together."""
EVALUATED = ("checkpoint=../run", "data.name=synthetic", "data.length=6", "loader.workers=0", "device=cpu")
BASE: dict[str, tuple[str, ...]] = {
    "pretrain": TINY_PRETRAIN[1:],
    "finetune": TINY_FINETUNE[1:],
    "study": ("data.path=../images", "init_from=../run", "hydra.run.dir=study"),
    "evaluate": (*EVALUATED, "report=null"),
    "knn": EVALUATED,
    "probe": (*EVALUATED, "epochs=1", "warmup_epochs=0"),
    "prepare": ("data.path=../images", "out=out", "loader.workers=1"),
}
"""Overrides by which a command is quick."""
WORDS = (
    *"auto null none true None x=y a,b 1,2 -1 1e400 nan inf 0x10 1_000 [ ] { } ' \" \\ # : ??? $ @ ~ * ? - --".split(),
    *"${ ${oc.env:HOME} ${now:%Y} ${nothing} ${.name} ${data} ../x /proc/none/a /dev/null os.system a.py:B".split(),
    *"fcmae.masks.RandomMask choice(1,2) range(1,3) glob(*) interval(0,1) run@best <script> %s %(x)s é 日本".split(),
    *("", "a b", "\udcff", "\x1b[2J", "\n", "\t", "\u202e", "x" * 5000),
)
NUMBERS = (
    0,
    1,
    -1,
    2,
    3,
    7,
    31,
    32,
    64,
    256,
    2**31 - 1,
    2**31,
    2**53,
    2**63 - 1,
    2**63,
    2**64,
    10**30,
    10**400,
    -(2**63),
)
FLOATS = "0.0 -0.0 1e-300 1e300 -1e-9 0.5 1.0 0.999999 1.0000001 nan inf -inf 1e999".split()
OPTIONS = (
    "-m --multirun --cfg --cfg=job --help -h -c job --config-dir=x --info --resolve --package=x --shell-completion "
    "hydra=x hydra.run.dir= hydra.run.dir=x/y hydra.sweep.dir=s hydra/launcher=basic hydra.job.chdir=true "
    "hydra.mode=MULTIRUN hydra.verbose=true"
).split()


def keys(schema: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Full names and types of the keys of a dataclass."""
    hints = get_type_hints(schema)
    for field in dataclasses.fields(schema):
        kind = hints[field.name]
        yield f"{prefix}{field.name}", kind
        if dataclasses.is_dataclass(kind):
            yield from keys(kind, f"{prefix}{field.name}.")


def groups() -> dict[str, list[str]]:
    """Names of the files of each config group."""
    found: dict[str, list[str]] = {}
    for file in sorted(conf_dir().rglob("*.yaml")):
        parts = file.relative_to(conf_dir()).with_suffix("").parts
        if len(parts) > 1:
            found.setdefault(parts[0], []).append("/".join(parts[1:]))
    return found


@functools.cache
def anything() -> st.SearchStrategy[str]:
    """A value as somebody types it."""
    text = st.text(st.characters(exclude_characters="\0/~", exclude_categories=["Cs"]), max_size=12)
    simple = st.one_of(
        st.sampled_from(WORDS), st.sampled_from(NUMBERS).map(str), st.sampled_from(FLOATS), text, st.integers().map(str)
    )
    return st.recursive(
        simple,
        lambda part: st.one_of(
            st.lists(part, max_size=4).map(lambda parts: f"[{','.join(parts)}]"),
            st.dictionaries(st.sampled_from(("_target_", "a", "1", "é", "norm", "weight")), part, max_size=3).map(
                lambda parts: "{" + ",".join(f"{key}:{value}" for key, value in parts.items()) + "}"
            ),
        ),
        max_leaves=5,
    )


def fitting(kind: Any) -> st.SearchStrategy[str]:
    """A value of a key's type, often an extreme one."""
    kinds = get_args(kind) or (kind,)
    options: list[st.SearchStrategy[str]] = []
    for one in kinds:
        if one is bool:
            options.append(st.sampled_from(("true", "false")))
        elif one is int:
            options += [st.sampled_from(NUMBERS).map(str), st.integers(0, 100).map(str)]
        elif one is float:
            options += [st.sampled_from(FLOATS), st.floats(0, 1).map(str), st.floats().map(str)]
        elif one is type(None):
            options.append(st.just("null"))
        elif one is str:
            options.append(st.sampled_from(WORDS))
        elif get_args(one) or kind is Any:
            numbers = st.one_of(st.sampled_from(NUMBERS[:12]).map(str), st.sampled_from(FLOATS))
            options.append(st.lists(numbers, max_size=5).map(lambda parts: f"[{','.join(parts)}]"))
    return st.one_of(*options, anything()) if options else anything()


@functools.cache
def overrides(command: str) -> st.SearchStrategy[list[str]]:
    """One to four overrides of a command."""
    known = list(keys(COMMANDS[command]))
    files = [f"{group}={name}" for group, names in groups().items() for name in names]
    valued = st.sampled_from(known).flatmap(lambda key: fitting(key[1]).map(lambda value: f"{key[0]}={value}"))
    prefixed = st.tuples(st.sampled_from(("", "", "", "", "+", "++", "~")), valued).map("".join)
    misspelt = st.tuples(st.sampled_from(known), st.sampled_from(("x", ".", ".x", "_", " ", "=", "@"))).map(
        lambda pair: f"{pair[0][0]}{pair[1]}=1"
    )
    odd = st.one_of(anything(), st.sampled_from(OPTIONS))
    one = st.one_of(prefixed, prefixed, prefixed, prefixed, st.sampled_from(files), misspelt, odd)
    return st.lists(one, min_size=1, max_size=4)


@functools.cache
def generated(seed: int, block: int) -> list[list[str]]:
    """:data:`BLOCK` command lines."""
    found: list[list[str]] = []
    line = st.sampled_from(sorted(BASE)).flatmap(lambda c: overrides(c).map(lambda given: [c, *given]))

    @hypothesis.seed(10_000 * seed + block)
    @hypothesis.settings(
        max_examples=BLOCK,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(line)
    def collect(arguments: list[str]) -> None:
        found.append(arguments)

    collect()
    return [found[number % len(found)] for number in range(BLOCK)]


class Lines(Target):
    """Command lines of Hypothesis instead of changed files."""

    def prepare(self, seed: int, numbers: Sequence[int]) -> None:
        super().prepare(seed, numbers)
        for number in numbers:
            self.changed("", seed, number)
        for command, base in BASE.items():
            compose(command, [one for one in base if not one.startswith("hydra.")])  # kept for processes that fork

    def changed(self, name: str, seed: int, number: int) -> Files:
        given = generated(seed, (number - 1) // BLOCK)[(number - 1) % BLOCK] if number else ["pretrain"]
        return {ARGUMENTS: json.dumps(given).encode()}


def with_base(command: str, given: list[str]) -> list[str]:
    """The overrides after those of :data:`BASE` whose keys they do not have.

    Where data is read there are no loader workers: cases run in daemonic processes, which may have none.
    """
    if BASE[command][: len(EVALUATED)] == EVALUATED:
        given = [one for one in given if not one.startswith("loader.workers=")]
    named = {override.partition("=")[0].lstrip("+~") for override in given}
    base = [one for one in BASE[command] if one.partition("=")[0] not in named]
    return [command, *base, *given]


@contextlib.contextmanager
def dry() -> Iterator[None]:
    """Training ends before the first sample is read; the batches, the schedule and the network have been made."""

    def stop(task: Any, run_dir: Path, world: Any, watchdog: Any, stop: Any) -> Path:
        asked = task.cfg.trainer.micro_batch_size
        setup.create_schedule(task.cfg, setup.create_plan(task, world, None if asked == "auto" else asked))
        return run_dir

    with (
        mock.patch.object(training, "train", stop),
        mock.patch.object(training, "fit_schedule"),
        mock.patch("fcmae.studies.run.study", return_value=None),
    ):
        yield


def read(folder: Path) -> str:
    command, *given = json.loads((folder / ARGUMENTS).read_text())
    write_folder(folder, THERE())
    here = folder / "here"
    here.mkdir()
    with dry():
        done = in_process.run(here, *with_base(command, given), check=None)
    lines = done.stderr.splitlines()
    assert "Traceback" not in done.stderr, done.stderr[-500:]
    if done.returncode == 0:
        return "accepted"
    told = [line for line in lines if line.startswith(f"fcmae {command}: ")]
    assert told, f"exit code {done.returncode} without a line: {done.stderr[-300:]}"
    assert done.returncode == 2 or "memory" in told[-1], f"exit code {done.returncode}: {told[-1]}"
    kept = (
        {"multirun", "runs"} if {"-m", "--multirun"} & {*given} else set()
    )  # a sweep keeps how each of its jobs ended
    made_here = sorted({*os.listdir(here)} - kept)
    assert done.returncode != 2 or not made_here, f"created {made_here}; {told[-1]}"
    assert all(line.isprintable() for line in told), repr(told)
    raise ConfigError("\n".join(told))


def there(folder: Path) -> None:
    """What command lines may name: a run and images."""
    from tests.bad_files import encoded, picture

    in_process.run(folder, *TINY_FINETUNE, "hydra.run.dir=run")
    (folder / "images" / "cat").mkdir(parents=True)
    (folder / "images" / "cat" / "a.png").write_bytes(encoded(picture(), "PNG"))


THERE = made(there)
TARGETS = {"configs": Lines(lambda: {ARGUMENTS: b'["pretrain"]'}, read, 2000, memory=3000, seconds=30, needs=THERE)}
