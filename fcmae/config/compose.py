"""Hydra's composition of conf/ from Python."""

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from fcmae.config.commands import COMMANDS
from fcmae.config.quoting import quoted
from fcmae.config.typed import explain, to_typed
from fcmae.errors import ConfigError


def conf_dir() -> Path:
    """The folder of YAML files: conf/ at the top of a checkout, fcmae/conf in an installed wheel."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "pretrain.yaml").is_file():
            return folder
    raise ConfigError(f"the package's conf/ is missing beside {package}; install it again")


@functools.cache
def register_schemas() -> None:
    """Makes the schemas known to Hydra as ``schema/COMMAND``."""
    from hydra.core.config_store import ConfigStore

    for name, schema in COMMANDS.items():
        ConfigStore.instance().store(name=name, node=schema, group="schema", package="_global_")


def compose(command: str, overrides: list[str] | None = None) -> Any:
    """The typed config of a command, as the command line would get it. Raises ConfigError."""
    quoted_overrides = quoted(overrides or [])
    try:
        return to_typed(_composed(command, quoted_overrides), COMMANDS[command])
    except ConfigError:
        raise
    except _mistakes() as error:
        raise ConfigError(every_mistake(command, quoted_overrides, error)) from error


def _mistakes() -> tuple[type[Exception], ...]:
    """What Hydra raises of overrides and files."""
    from hydra.errors import HydraException

    return HydraException, OmegaConfBaseException, YAMLError, ValueError


def _composed(command: str, overrides: list[str]) -> DictConfig:
    import hydra

    register_schemas()
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return hydra.compose(command, overrides)


def every_mistake(
    command: str, overrides: list[str], error: Exception, also: Callable[[Any], object] | None = None
) -> str:
    """What is wrong in overrides that cannot be composed, a line each: Hydra stops at the first.

    What it stopped at is left out until the rest can be composed, and its values can be checked.

    Args:
        error: what Hydra raised.
        also: see :func:`to_typed`.
    """
    mistakes, left = [explain(error)], list(overrides)
    dropped: list[str] = []
    while True:
        blamed, error_without = _blame(command, left, mistakes[-1])
        if blamed is None:
            break
        left.remove(blamed)
        dropped.append(_key(blamed))
        if error_without is not None:
            mistakes.append(explain(error_without))
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


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")
