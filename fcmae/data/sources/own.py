"""A source of one's own, by the name of its class."""

import pkgutil
from typing import Any

from fcmae.data.sources.base import Source
from fcmae.errors import ConfigError, UsageError

METHODS = ("__len__", "__getitem__", "label", "describe", "classes")


def create_own(given: dict[str, Any] | None, key: str) -> Source:
    """Calls ``_target_``, a class that Python can import, with the other entries.

    Raises ConfigError if it is missing, cannot be imported, does not take the arguments or is not a source.
    """
    if given is None:
        raise ConfigError(f"{key} is not set; give {key}._target_=PACKAGE.CLASS and its arguments")
    arguments = dict(given)
    target = arguments.pop("_target_")
    try:
        create = pkgutil.resolve_name(target)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"{key}._target_ is {target!r}; allowed is a class that Python finds, PACKAGE.CLASS ({error})"
        ) from error
    try:
        source = create(**arguments)
    except UsageError:
        raise
    except TypeError as error:
        raise ConfigError(f"{key}: {target} does not take these arguments: {error}") from error
    missing = [name for name in METHODS if not hasattr(source, name)]
    if missing:
        raise ConfigError(f"{key}: {target} is not a source of images; it lacks {', '.join(missing)}")
    return source
