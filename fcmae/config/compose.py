"""Composes conf/ with Hydra, and collects every mistake in the overrides."""

import dataclasses
import functools
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from fcmae.config import own
from fcmae.config.commands import COMMANDS
from fcmae.config.typed import explain, to_typed
from fcmae.errors import ConfigError

PATHS = (
    "data.path",
    "data.val_path",
    "data.target_path",
    "data.val_target_path",
    "data.annotations",
    "data.val_annotations",
    "init_from",
    "checkpoint",
    "out",
    "labels",
    "per_class",
    "confusion",
    "cache",
    "hydra.run.dir",
    "hydra.sweep.dir",
)
"""Keys that hold one path, or several."""


OPEN = ("mask", "target", "objective", "data.source", "data.val_source", "logger.sinks", "model.timm", "others")
"""Keys that hold names of the user's own: a class ``_target_`` and its arguments, or others that no schema knows."""


def conf_dir() -> Path:
    """The folder of YAML files: conf/ at the top of a checkout, fcmae/conf in an installed wheel."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "pretrain.yaml").is_file():
            return folder
    raise ConfigError(f"the package's conf/ is missing beside {package}; install it again")


def help_text(command: str, about: str) -> str:
    """What ``fcmae COMMAND --help`` prints: the groups of the package's configs and their options.

    Hydra's own page takes 7 s: it copies all schemas for every line.
    """
    root = conf_dir()
    groups: dict[str, list[str]] = {}
    for file in sorted(root.glob("*/**/*.yaml")):
        groups.setdefault(file.parent.relative_to(root).as_posix(), []).append(file.stem)
    groups.pop("hydra", None)
    options = "\n".join(f"  {group}={'|'.join(names)}" for group, names in groups.items())
    return (
        f"fcmae {command}: {about}\n\nOverrides are KEY=VALUE. Groups and their options:\n{options}\n\n"
        f"`fcmae {command} --cfg job` prints the config, -m sweeps over values (docs/sweeps.md), and --hydra-help\n"
        "shows Hydra's flags. docs/config.md explains every key."
    )


def register_schema(command: str) -> None:
    """Registers with Hydra the command's schema, as ``schema/COMMAND``, and what the experiments ``own/*`` compute.

    One schema at a time: Hydra copies all that it has whenever it composes a config.
    """
    from hydra.core.config_store import ConfigStore

    OmegaConf.register_new_resolver("own", own.resolve, replace=True)
    ConfigStore.instance().repo["schema"] = {f"{command}.yaml": _schema(command)}


@functools.cache
def _schema(command: str) -> Any:
    from hydra.core.config_store import ConfigNode

    node = OmegaConf.structured(COMMANDS[command])
    return ConfigNode(f"{command}.yaml", node, group="schema", package="_global_", provider=None)


def compose(command: str, overrides: list[str] | None = None, also: Callable[[Any], object] | None = None) -> Any:
    """The typed config of a command, as the command line would get it. Raises ConfigError.

    Args:
        also: see :func:`to_typed`.
    """
    quoted_overrides = quoted(overrides or [])
    if mistakes := misread(command, overrides or []):
        raise ConfigError("\n".join(mistakes))
    try:
        return to_typed(_composed(command, quoted_overrides), COMMANDS[command], also)
    except ConfigError:
        raise
    except _mistakes() as error:
        raise ConfigError(every_mistake(command, quoted_overrides, error, also)) from error


def misread(command: str, overrides: list[str]) -> list[str]:
    """Mistakes that Hydra would accept: no target, a target twice, a number for true or false, or for no float."""
    lines = []
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        names = [name.strip() for name in value.strip("[]").split(",")]
        if re.search(r"\d{309}", value):
            lines.append(f"{key}: a number must have at most 308 digits; got {value[:20]}...")
        elif key == "target" and value.startswith("[") and ("" in names or len(set(names)) < len(names)):
            lines.append(f"target must be one or several different targets; got {value}")
        elif re.fullmatch(r"-?[\d.]+", value) and value not in ("0", "1") and _is_switch(COMMANDS[command], key):
            lines.append(f"{key} must be true or false; got {value}")
    return lines


def _is_switch(schema: Any, key: str) -> bool:
    """Whether a key holds true or false."""
    for name in key.split("."):
        schema = get_type_hints(schema).get(name) if dataclasses.is_dataclass(schema) else None
    return bool in (schema, *get_args(schema))


def _mistakes() -> tuple[type[Exception], ...]:
    """The errors that Hydra raises for overrides and files."""
    from hydra.errors import HydraException

    # Hydra asserts, or uses a value of another type, where an override is no name or gives a key to a value.
    return HydraException, OmegaConfBaseException, YAMLError, ValueError, AssertionError, TypeError


def _composed(command: str, overrides: list[str]) -> DictConfig:
    import hydra
    from hydra.core.config_store import ConfigStore
    from hydra.core.global_hydra import GlobalHydra

    # Of this command, or of the application that calls us.
    running, schema = GlobalHydra.instance().hydra, ConfigStore.instance().repo.get("schema", {})
    GlobalHydra.instance().clear()
    try:
        register_schema(command)
        with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
            return hydra.compose(command, overrides)
    finally:
        GlobalHydra.instance().hydra = running
        ConfigStore.instance().repo["schema"] = schema


def every_mistake(
    command: str, overrides: list[str], error: Exception, also: Callable[[Any], object] | None = None
) -> str:
    """Every mistake in overrides that cannot be composed, one line each. Hydra stops at the first: that override is
    left out, until the rest can be composed and its values checked.

    Args:
        error: what Hydra raised.
        also: see :func:`to_typed`.
    """
    mistakes, left = [explain(error)], list(overrides)
    unclear = isinstance(error, (AssertionError, TypeError))
    dropped: list[str] = []
    while True:
        blamed, error_without = _blame(command, left, mistakes[-1])
        if blamed is None:
            break
        if unclear:
            mistakes[-1] = f"{blamed}: no such key or value; docs/config.md lists all keys"
        left = [other for other in left if other != blamed]  # it may be given twice
        dropped += [_key(blamed)] if "=" in blamed else _meant(left)
        if error_without is not None:
            mistakes.append(explain(error_without))
            unclear = isinstance(error_without, (AssertionError, TypeError))
            continue
        try:
            to_typed(_composed(command, left), COMMANDS[command], also)
        except ConfigError as values:
            mistakes += [line for line in values.mistakes if re.split(r"[ :]", line)[0] not in dropped]
        break
    return "\n".join(dict.fromkeys(mistakes))


def _blame(command: str, overrides: list[str], message: str) -> tuple[str | None, Exception | None]:
    """The override without which composing gives another result than ``message``, and what it then raises."""
    for override in sorted(overrides, key=lambda override: _key(override) not in message):
        try:
            _composed(command, [other for other in overrides if other != override])
        except _mistakes() as error:
            if explain(error) != message:
                return override, error
        else:
            return override, None
    return None, None


def _meant(others: list[str]) -> list[str]:
    """What a path without its key may be: these keys are not also told to be missing."""
    return list({"checkpoint", "data.path"} - set(map(_key, others)))


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def quoted(overrides: list[str]) -> list[str]:
    """Overrides for Hydra: special characters in paths are quoted, ~ is expanded, arguments of a class may be added."""
    return [_quoted(override) for override in overrides]


def _quoted(override: str) -> str:
    key, equals, value = override.partition("=")
    if key.startswith(tuple(f"{name}." for name in OPEN)) or (key in OPEN and value.startswith("{")):
        return f"++{override}"
    if not equals or key.lstrip("+") not in PATHS or _is_known(override, value):
        return override
    if value.startswith("[") and value.endswith("]"):
        parts = ",".join(_in_quotes(part.strip()) for part in value[1:-1].split(","))
        return f"{key}=[{parts}]"
    return f"{key}={_in_quotes(value)}"


def _in_quotes(path: str) -> str:
    if len(path) > 1 and path[0] == path[-1] in ("'", '"'):
        return path
    escaped = os.path.expanduser(path).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def _is_known(override: str, value: str) -> bool:
    """Whether Hydra's grammar parses an override as intended: a word, a list, or a sweep that is not a path."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        parsed = OverridesParser.create().parse_override(override)
    except HydraException:
        return False
    return not (parsed.is_sweep_override() and os.path.exists(value))
