"""Hydra reads the files of a combination of groups once per process, not at every command.

Composing takes as long as the training of a tiny network. Values that are overridden are applied every time, as Hydra
does it; so are combinations with folders of configs other than the package's, whose files tests change.
"""

import copy
import dataclasses
from typing import Any

from hydra._internal import config_loader_impl
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import CachingConfigRepository, ConfigRepository
from hydra._internal.defaults_list import DefaultsList
from hydra._internal.hydra import Hydra

from fcmae.config import conf_dir

_LISTS: dict[Any, DefaultsList] = {}
_CONFIGS: dict[int, Any] = {}
"""By the id of a list of defaults that is kept in _LISTS."""


def _own(repo: Any) -> bool:
    paths = {source.path for source in repo.get_sources() if source.scheme() == "file"}
    return paths == {str(conf_dir())}


def _defaults_list(repo: Any, config_name: str, overrides_list: list, **how: bool) -> DefaultsList:
    def of_values(override: Any) -> bool:
        return isinstance(override.value(), dict) or not repo.group_exists(override.key_or_group)

    groups = [one for one in overrides_list if one.is_sweep_override() or not of_values(one)]
    key = config_name, tuple(one.input_line for one in groups), tuple(how.items())
    if not _own(repo) or any(one.is_sweep_override() for one in groups):
        return _create_defaults_list(repo=repo, config_name=config_name, overrides_list=overrides_list, **how)
    if key not in _LISTS:
        _LISTS[key] = _create_defaults_list(repo=repo, config_name=config_name, overrides_list=groups, **how)
    values = [one for one in overrides_list if one not in groups]
    return dataclasses.replace(_LISTS[key], config_overrides=values)


def _composed(self: ConfigLoaderImpl, defaults: list, repo: Any) -> Any:
    if not any(known.defaults is defaults for known in _LISTS.values()):
        return _compose_config(self, defaults, repo)
    if id(defaults) not in _CONFIGS:
        _CONFIGS[id(defaults)] = _compose_config(self, defaults, repo)
    return copy.deepcopy(_CONFIGS[id(defaults)])


def _mode(self: Hydra, config_name: str, overrides: list[str]) -> Any:
    """Whether to sweep, which Hydra composes the whole config for; a command line without the key decides by itself."""
    return _get_mode(self, config_name, overrides) if any("hydra.mode" in one for one in overrides) else None


def _keep(self: CachingConfigRepository, delegate: ConfigRepository) -> None:
    """Without a copy of every schema: Hydra replaces the list of sources, and changes none."""
    self.delegate, self.cache = copy.copy(delegate), {}


_create_defaults_list = config_loader_impl.create_defaults_list
_compose_config = ConfigLoaderImpl._compose_config_from_defaults_list
_get_mode = Hydra.get_mode
config_loader_impl.create_defaults_list = _defaults_list
ConfigLoaderImpl._compose_config_from_defaults_list = _composed
Hydra.get_mode = _mode
CachingConfigRepository.__init__ = _keep
