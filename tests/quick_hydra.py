"""Hydra reads the files of a combination of groups once per process, not at every command.

Composing takes as long as the training of a tiny network. Values that are overridden are applied every time, as Hydra
does it; so are combinations with folders of configs other than the package's, whose files tests change. The text of an
override is parsed once, and so is the config of a checkpoint.
"""

import copy
import dataclasses
import functools
import json
import pickle
import types
from collections.abc import Callable
from typing import Any

from hydra._internal import config_loader_impl
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import CachingConfigRepository, ConfigRepository
from hydra._internal.defaults_list import DefaultsList
from hydra._internal.hydra import Hydra
from hydra.core import utils
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override

from fcmae.config import conf_dir, typed
from fcmae.config.checks import mistaken

_LISTS: dict[Any, DefaultsList] = {}
_CONFIGS: dict[int, Callable[[], Any]] = {}
"""By the id of a list of defaults that is kept in _LISTS."""
_TYPED: dict[Any, Any] = {}
"""By schema and values."""


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
        _CONFIGS[id(defaults)] = _copier(_compose_config(self, defaults, repo))
    return _CONFIGS[id(defaults)]()


def _copier(config: Any) -> Callable[[], Any]:
    """Makes copies, if possible in a quarter of the time of ``copy.deepcopy``."""
    try:
        return functools.partial(pickle.loads, pickle.dumps(config))
    except pickle.PicklingError:  # of a class that was made by a function
        return functools.partial(copy.deepcopy, config)


def _mode(self: Hydra, config_name: str, overrides: list[str]) -> Any:
    """Whether to sweep, which Hydra composes the whole config for; a command line without the key decides by itself."""
    return _get_mode(self, config_name, overrides) if any("hydra.mode" in one for one in overrides) else None


def _searchpath(self: ConfigLoaderImpl, config_name: str | None, parsed: list[Override], repo: Any) -> None:
    """None of the package's commands has ``hydra.searchpath``, for which Hydra reads its file once more."""
    if not _own(repo) or any(one.get_key_element() == "hydra.searchpath" for one in parsed):
        _process_searchpath(self, config_name, parsed, repo)


@functools.cache
def _parsed(text: str) -> Override:
    return _parse_rule(OverridesParser.create(), text, "override")


def _parse(self: OverridesParser, s: str, rule_name: str) -> Any:
    return copy.copy(_parsed(s)) if rule_name == "override" else _parse_rule(self, s, rule_name)


def _typed(schema: type, values: dict[str, Any]) -> Any:
    try:
        key = schema, json.dumps(values)
    except (TypeError, ValueError):
        return _merged(schema, values)
    if key not in _TYPED:
        typed_values = _merged(schema, values)
        if mistaken():
            return typed_values
        _TYPED[key] = typed_values
    return copy.deepcopy(_TYPED[key])


def _keep(self: CachingConfigRepository, delegate: ConfigRepository) -> None:
    """Without a copy of every schema: Hydra replaces the list of sources, and changes none."""
    self.delegate, self.cache = copy.copy(delegate), {}


_create_defaults_list = config_loader_impl.create_defaults_list
_compose_config = ConfigLoaderImpl._compose_config_from_defaults_list
_get_mode = Hydra.get_mode
_process_searchpath = ConfigLoaderImpl._process_config_searchpath
_parse_rule = OverridesParser.parse_rule
_merged = typed._merged
config_loader_impl.create_defaults_list = _defaults_list
ConfigLoaderImpl._compose_config_from_defaults_list = _composed
Hydra.get_mode = _mode
CachingConfigRepository.__init__ = _keep
ConfigLoaderImpl._process_config_searchpath = _searchpath
OverridesParser.parse_rule = _parse
typed._merged = _typed
vars(utils)["copy"] = types.SimpleNamespace(deepcopy=lambda config: _copier(config)())
