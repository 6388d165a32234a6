"""Hydra's composition of conf/ from Python."""

from pathlib import Path
from typing import Any

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


def register_schemas() -> None:
    """Makes the schemas known to Hydra as ``schema/COMMAND``."""
    from hydra.core.config_store import ConfigStore

    for name, schema in COMMANDS.items():
        ConfigStore.instance().store(name=name, node=schema, group="schema", package="_global_")


def compose(command: str, overrides: list[str] | None = None) -> Any:
    """The typed config of a command, as the command line would get it. Raises ConfigError."""
    import hydra
    from hydra.errors import HydraException

    register_schemas()
    try:
        with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
            return to_typed(hydra.compose(command, quoted(overrides or [])), COMMANDS[command])
    except ConfigError:
        raise
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError) as error:
        raise ConfigError(explain(error)) from error
