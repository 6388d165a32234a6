"""Turns a Hydra config or a nested dict into an instance of its schema, and errors of OmegaConf into one line."""

import dataclasses
import difflib
import functools
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from fcmae.config.checks import collected, mistake
from fcmae.config.plain import check_plain
from fcmae.config.renamed import renamed
from fcmae.errors import ConfigError, reason_of

T = TypeVar("T")
UNFIT = re.compile(r"In '([^']+)': ConfigKeyError raised while composing config:.*full_key: (\S+)", re.DOTALL)
"""Hydra's error for a file with keys that a command's schema lacks."""
SEVERAL = re.compile(r"Ambiguous value for argument '(.*)'\s*1\. To use it as a list", re.DOTALL)
"""Hydra's error for ``KEY=A,B``."""
ABSENT = re.compile(
    r"Could not find '(\w+)/([^']+)'\s+Available options in '\1':\s*(.*?)\s*(?:Config search|$)", re.DOTALL
)
"""Hydra's error for a group that has no such file."""
OTHER_TYPE = re.compile(
    r"In '([^']+)': ValidationError raised while composing config:\s+Merge error: (\w+) is not a sub"
)
"""Hydra's error for a file that holds a list or a number."""
NO_NUMBER = re.compile(r"Value (.+) of type '\w+' could not be converted to (Float|Integer)$")
"""OmegaConf's error for a value of another type."""
LISTED = 8
"""A schema with at most so many keys is listed whole where a key is unknown."""
RUN_FOLDER = "hydra.run.dir"
ELSEWHERE = {
    **dict.fromkeys(("out", "out_dir", "output_dir", "run_dir"), RUN_FOLDER),
    **dict.fromkeys(("learning_rate", "base_lr"), "optim.lr"),
    **dict.fromkeys(("num_workers", "num_loader_workers"), "loader.workers"),
    **dict.fromkeys(("train_dir", "data_path", "dataset"), "data.path"),
}
"""What keys are called in other libraries, and here."""
NEAREST = 5
"""So many experiments are named where one is unknown."""


def to_typed(cfg: DictConfig, schema: type[T], also: Callable[[T], object] | None = None) -> T:
    """The composed config as an instance of its schema.

    Args:
        also: further checks of the instance, in which values may be wrong.

    Raises ConfigError with all values that are missing or out of range and all keys that are unknown.
    """
    typed: Any = None
    with collected() as mistakes:
        try:
            typed = OmegaConf.to_object(cfg)
            _check_keys(cfg)
            if also is not None:
                also(typed)
        except ConfigError as error:
            mistakes += error.mistakes
        except OmegaConfBaseException as error:
            mistakes.append(explain(error))
        except Exception:
            if not mistakes:  # otherwise because of one of them
                raise
    if mistakes and typed is None:
        raise ConfigError("\n".join(dict.fromkeys(mistakes)))
    if mistakes:
        mistake("\n".join(dict.fromkeys(mistakes)))
    assert isinstance(typed, schema)
    return typed


def _check_keys(cfg: DictConfig, prefix: str = "") -> None:
    """A mistake for each key that a schema lacks: Hydra adds those that are given as ``+key=value``."""
    schema = OmegaConf.get_type(cfg)
    if not dataclasses.is_dataclass(schema):
        return
    for key in map(str, cfg):
        if key not in schema.__dataclass_fields__:
            mistake(_unknown(f"{prefix}{key}", schema, OmegaConf.get_type(cfg._get_root())))
            continue
        value = cfg._get_node(key)
        if isinstance(value, DictConfig) and not value._is_none():
            _check_keys(value, f"{prefix}{key}.")


def from_dict(schema: type[T], values: dict[str, Any], prefix: str = "") -> T:
    """A schema's instance from a nested dict, names and types checked.

    The values may come from a file: they must be plain, and none is resolved. Raises ConfigError naming the full key.
    """
    check_plain(values, prefix)
    try:
        return _merged(schema, values)
    except OmegaConfBaseException as error:
        raise ConfigError(describe(error, prefix)) from error


def _merged(schema: type[T], values: dict[str, Any]) -> T:
    return to_typed(OmegaConf.merge(_unset(schema), values), schema)  # type: ignore[arg-type]


@functools.cache
def _unset(schema: type) -> DictConfig:
    """A schema with its defaults, which OmegaConf takes long to make, and copies to merge."""
    return OmegaConf.structured(schema)


def from_dotlist(schema: type[T], overrides: list[str], group: str) -> T:
    """A group's instance from overrides ``GROUP.KEY=VALUE``. Raises ConfigError naming the full key."""
    try:
        given = OmegaConf.from_dotlist([override.removeprefix(f"{group}.") for override in overrides])
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(f"{' '.join(overrides)}: {explain(error)}") from error
    return from_dict(schema, OmegaConf.to_container(given), prefix=group)  # type: ignore[arg-type]  # a dict


def to_dict(cfg: Any) -> dict[str, Any]:
    """A typed config as a nested dict of plain values, for config.yaml and checkpoints."""
    return {field.name: _plain(getattr(cfg, field.name)) for field in dataclasses.fields(cfg)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, (list, tuple)) else value


def describe(error: Exception, prefix: str = "") -> str:
    """One line for an error of OmegaConf, with the full key."""
    key = ".".join(part for part in (prefix, getattr(error, "full_key", None) or "") if part)
    reason = reason_of(error)
    owner = getattr(error, "object_type", None)
    if "not in" in reason and owner is not None and dataclasses.is_dataclass(owner):
        node = getattr(error, "parent_node", None)
        root = owner if node is None else OmegaConf.get_type(node._get_root())
        return _unknown(key, owner, root, prefix)
    number = NO_NUMBER.match(reason)
    if number:
        return f"{key} must be {'an integer' if number[2] == 'Integer' else 'a number'}; got {number[1]}"
    return f"{key}: {reason}" if key else reason


def _unknown(key: str, owner: Any, root: Any, prefix: str = "") -> str:
    """The message for a key that ``owner`` lacks, a part of ``root``. The keys of ``root`` begin with ``prefix``."""
    if message := renamed(key):
        return message
    names = [field.name for field in dataclasses.fields(owner)]
    if len(names) <= LISTED or not owner.__module__.startswith("fcmae.config."):  # docs/config.md has only these
        return f"{key}: unknown key; must be one of {', '.join(names)}"
    start = f"{prefix}." if prefix else ""
    keys = [*_keys(root if dataclasses.is_dataclass(root) else owner), *(names if "." not in key else [])]
    similar = _similar(key, [f"{start}{name}" for name in dict.fromkeys(keys)])
    others = commands_with(key) if "." in key or not similar else ""
    hint = f"it is a key of {others}; " if others else f"did you mean {' or '.join(similar)}? " if similar else ""
    return f"{key}: unknown key; {hint}docs/config.md lists all keys, and --cfg job prints those of a command"


def commands_with(key: str) -> str:
    """The commands that have a full key, for a message."""
    from fcmae.config.commands import COMMANDS

    return ", ".join(f"fcmae {name}" for name, schema in COMMANDS.items() if key in _keys(schema))


def _keys(schema: Any) -> Iterator[str]:
    """The full keys of a schema."""
    kinds = get_type_hints(schema)
    for field in dataclasses.fields(schema):
        kind = kinds[field.name]
        yield from (f"{field.name}.{key}" for key in _keys(kind)) if dataclasses.is_dataclass(kind) else [field.name]


def _similar(key: str, keys: list[str]) -> list[str]:
    """At most three keys that may be meant: of the same name in another group, or of a similar one."""
    name = key.rpartition(".")[2]
    known = ELSEWHERE.get(name)
    if known in keys or (known == RUN_FOLDER and "optim.lr" in keys):
        return [str(known)]

    def similarity(other: str) -> float:
        other_name = other.rpartition(".")[2]
        names = difflib.SequenceMatcher(None, name, other_name).ratio() + 0.5 * f"_{other_name}".endswith(f"_{name}")
        return names + difflib.SequenceMatcher(None, key, other).ratio()

    found = sorted(((similarity(other), other) for other in keys), reverse=True)
    best = found[0][0]
    return [other for value, other in found[:3] if value > max(1.3, best - 0.3)]


def _experiments(name: str) -> list[str]:
    """The names of the experiments, the most similar to ``name`` first."""
    from fcmae.config.compose import conf_dir

    folder = conf_dir() / "experiment"
    names = [str(file.relative_to(folder).with_suffix("")) for file in folder.rglob("*.yaml")]
    name = name.removeprefix("experiment/")
    return sorted(names, key=lambda other: (-difflib.SequenceMatcher(None, name, other).ratio(), other))


def explain(error: Exception) -> str:
    """One line for whatever Hydra or OmegaConf raised while composing."""
    cause: BaseException | None = error
    while isinstance(cause, InterpolationResolutionError):
        cause = cause.__context__
    if isinstance(cause, ConfigError):  # of the images that experiment=own/* looks at
        return str(cause)
    cause = error
    while cause is not None and not (isinstance(cause, OmegaConfBaseException) and getattr(cause, "full_key", None)):
        cause = cause.__cause__
    if isinstance(cause, Exception):
        return describe(cause)
    if isinstance(error, yaml.YAMLError):
        return f"not YAML: {' '.join(str(error).split())}"
    override = getattr(error, "override", None)
    if override and "=" not in override:
        if os.path.exists(override):
            is_run = override.endswith(".pt") or os.path.isdir(os.path.join(override, "checkpoints"))
            return f"{override}: not an override; write {'checkpoint' if is_run else 'data.path'}={override}"
        return f"{override}: not an override; write KEY=VALUE, such as checkpoint=RUN or data.path=FOLDER"
    if override:
        reason = reason_of(error)
        return f"{override}: not an override ({reason}); values with spaces or brackets are quoted: 'KEY=\"VALUE\"'"
    missing = str(getattr(error, "missing_cfg_file", None) or "")
    if missing.startswith("experiment/"):
        nearest = ", ".join(_experiments(missing)[:NEAREST])
        return f"Could not find {missing!r}; the nearest are {nearest} (docs/recipes.md and conf/experiment have all)"
    absent = ABSENT.search(str(error))
    if absent:
        group, given, names = absent[1], absent[2], sorted(absent[3].split())
        close = difflib.get_close_matches(given, names, 1)
        if close:
            return f"{group} is {given!r}; did you mean {close[0]}? It must be one of {', '.join(names)}"
        return f"{group} must be one of {', '.join(names)}; got {given!r}"
    several = SEVERAL.match(str(error))
    if several:
        key, _, values = several[1].partition("=")
        return (
            f"{key} must be one value; got {values}. Write a list as {key}=[{values}]; -m starts a run with each value"
        )
    unfit = UNFIT.match(str(error))
    if unfit:
        others = commands_with(unfit[2])
        owner = f"; it is for {others}" if others else ""
        return f"{unfit[1]}: " + (renamed(unfit[2]) or f"this command has no key {unfit[2]}{owner}")
    other = OTHER_TYPE.match(str(error))
    if other:
        return f"{other[1]} must hold keys and values; got a {other[2]}"
    if "Config group override must be" in str(error):
        return f"a group such as data, optim or trainer must be set to a name ({str(error).split('. ')[-1]})"
    message = str(error).split("Config search path:")[0]
    hint = "; it needs pip install 'fcmae[slurm]'" if "hydra/launcher/submitit" in message else ""
    return " ".join(line.strip() for line in message.splitlines() if line.strip()).rstrip(".") + hint
