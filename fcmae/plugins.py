"""Classes that a config names: ``_target_`` and the arguments to call it with.

One mechanism for every seam: sources, masks, targets, objectives, loggers, transforms. A class is checked against the
seam's protocol before it is called, and a class that a file names, not the user, is refused.
"""

import contextlib
import hashlib
import importlib.util
import inspect
import pkgutil
import re
import sys
import traceback
from collections.abc import Collection, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from fcmae.errors import ConfigError, FCMAEError, UsageError

NAMED_BY = "_named_by_"
"""Entry of an object that a file names, not the user; its value is the file."""
LOADED = "fcmae_plugin_"
"""What the modules of files are called."""
INSTALLED = re.compile(rf"{re.escape(str(Path(__file__).parent))}[/\\]|.*[/\\]((site|dist)-packages|lib[/\\]python)")
"""Files that are not the user's: ours, of installed packages, and Python's."""
GIVEN = "fcmae.data.sources.dataset.GivenDataset"
"""What a config has for a dataset that was given from Python, which no file can bring back."""
OURS = re.compile(r"fcmae\.(masks|targets|tasks\.objectives)\.\w+")
"""Classes of the package that a file may name."""


def is_named(value: Any) -> bool:
    """Whether a config's value has the form that :func:`create` takes."""
    return isinstance(value, dict) and isinstance(value.get("_target_"), str)


def is_ours(given: Any) -> bool:
    """Whether a config's value names a class of the package."""
    return is_named(given) and OURS.fullmatch(given["_target_"]) is not None


def named_by(file: Path, given: dict[str, Any], allow: Collection[str] = ()) -> dict[str, Any]:
    """An object that ``file`` names, marked so that :func:`create` refuses it, unless it is ours or in ``allow``."""
    return given if is_ours(given) or given["_target_"] in allow else {**given, NAMED_BY: str(file)}


def class_name(made: object) -> str:
    """What messages call the class of an object: PACKAGE.CLASS or FILE.py:CLASS."""
    kind = type(made)
    module = sys.modules.get(kind.__module__)
    if kind.__module__.startswith(LOADED) and module is not None and module.__file__ is not None:
        return f"{Path(module.__file__).name}:{kind.__qualname__}"
    return f"{kind.__module__}.{kind.__qualname__}"


def create(given: dict[str, Any] | None, key: str, protocol: type[Any], **more: Any) -> Any:
    """Calls the class ``_target_`` with the other entries.

    Args:
        given: ``_target_``, which is ``PACKAGE.CLASS`` or ``FILE.py:CLASS``, and keyword arguments.
        key: full key of the config, for errors.
        protocol: a class whose public methods and annotated attributes the object must have.
        more: arguments that the framework adds.

    Raises ConfigError, naming key and class, if the class is missing, lacks a part of the protocol or refuses the
    arguments.
    """
    if given is None:
        raise ConfigError(f"{key} is not set; give {key}._target_=PACKAGE.CLASS and its arguments")
    arguments = dict(given)
    target = arguments.pop("_target_")
    if NAMED_BY in arguments:
        named = ascii(target)[1:-1]
        if target == GIVEN:
            raise ConfigError(
                f"{arguments[NAMED_BY]} had a dataset of Python as its {key}; give it again in Python, or images by "
                f"{key.replace('source', 'path')}"
            )
        raise ConfigError(
            f"{arguments[NAMED_BY]} names the class {named} as its {key}; code that a file names is not run. Give "
            f"{key} yourself, or if you trust this class: --allow {named} or allow=[{named}]"
        )
    found = _find(target, key)
    methods, attributes = members(protocol)
    lacking = [name for name in methods if not _has(found, name)]
    if not isinstance(found, type) or lacking:
        kind = "is a class" if isinstance(found, type) else f"is a {type(found).__name__}"
        raise ConfigError(
            f"{key}._target_ is {target!r}, which must be a class with the methods {', '.join(methods)}; "
            f"it {kind}{' without ' + ', '.join(lacking) if lacking else ''}"
        )
    for name in methods:
        _check_signature(found, name, protocol, f"{key}._target_ is {target!r}, whose {name}")
    try:
        made = found(**more, **arguments)
    except ConfigError as error:  # a check of the constructor names its argument alone
        lines = [line if "." in line.split(" ")[0] else f"{key}.{line}" for line in error.mistakes]
        raise ConfigError("\n".join(lines)) from error
    except UsageError:
        raise
    except TypeError as error:
        takes = [name for name in _arguments(found) if name not in more]
        raise ConfigError(
            f"{key}: {target} does not take these arguments: {error}; it takes {', '.join(takes) or 'none'}"
        ) from error
    except (OSError, ValueError) as error:
        if str(error).split(" ")[0] in _arguments(found):
            raise ConfigError(f"{key}.{error}") from error
        raise ConfigError(f"{key}: {target} refuses these arguments: {error}") from error
    lacking = [name for name in attributes if not hasattr(made, name)]
    if lacking:
        raise ConfigError(f"{key}: {target} must have the attribute{'s' * (len(lacking) > 1)} {', '.join(lacking)}")
    return made


def _arguments(found: type) -> list[str]:
    """The names of a class's arguments, as its signature states them."""
    try:
        return list(inspect.signature(found).parameters)
    except ValueError:  # a class in C
        return []


def members(protocol: type) -> tuple[list[str], list[str]]:
    """Names of a protocol's methods and of its annotated attributes, in the order in which it states them."""
    methods = [
        name
        for name, value in vars(protocol).items()
        if inspect.isfunction(value) and (not name.startswith("_") or name in ("__call__", "__len__", "__getitem__"))
    ]
    return methods, [name for name in inspect.get_annotations(protocol) if not name.startswith("_")]


def _has(found: Any, method: str) -> bool:
    """Whether a class has a method; every class can be called itself, so ``__call__`` must be in its own."""
    classes = found.__mro__ if isinstance(found, type) else ()
    given = next((vars(kind)[method] for kind in classes if method in vars(kind)), None)
    return callable(given) or isinstance(given, classmethod | staticmethod)


def _check_signature(found: type, method: str, protocol: type, what: str) -> None:
    """Raises ConfigError if a method cannot be called with the arguments that the protocol names."""
    names = list(inspect.signature(getattr(protocol, method)).parameters)
    bound = isinstance(inspect.getattr_static(found, method), classmethod | staticmethod)
    try:
        signature = inspect.signature(getattr(found, method))
    except ValueError:  # a method in C
        return
    try:
        signature.bind(*names[bound:])
    except TypeError as error:
        raise ConfigError(f"{what} must take ({', '.join(names[1:])}); it takes {signature} ({error})") from error


def brings_code(config: Any) -> bool:
    """Whether a config, of plain values, names a class that is not the package's."""
    if isinstance(config, dict):
        return (is_named(config) and not is_ours(config)) or any(map(brings_code, config.values()))
    return isinstance(config, (list, tuple)) and any(map(brings_code, config))


@contextlib.contextmanager
def failures_explained(doing: str) -> Iterator[None]:
    """In this block an error of code that a config names is a UsageError of one line, with its file and line."""
    try:
        yield
    except (FCMAEError, OSError, MemoryError):
        raise
    except Exception as error:
        if "out of memory" in str(error):
            raise
        frames = traceback.extract_tb(error.__traceback__)
        theirs = [frame for frame in frames if not INSTALLED.match(frame.filename)] or frames
        where = f"{theirs[-1].filename}, line {theirs[-1].lineno}"
        said = " ".join(str(error).split())
        raise UsageError(f"{doing} fails: {type(error).__name__}: {said} ({where})") from error


def _find(target: str, key: str) -> Any:
    file, colon, name = target.rpartition(":")
    try:
        if colon and file.endswith(".py"):
            return getattr(_load(Path(file)), name)
        return pkgutil.resolve_name(target)
    except (ImportError, AttributeError, ValueError, OSError, SyntaxError) as error:
        raise ConfigError(
            f"{key}._target_ is {target!r}; expected a class that Python finds, PACKAGE.CLASS or FILE.py:CLASS "
            f"({error})"
        ) from error


def _load(file: Path) -> ModuleType:
    """The module in a file, loaded once per process."""
    path = file.resolve()
    name = f"{LOADED}{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None or not path.is_file():
            raise FileNotFoundError(f"no file {file}")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # before it runs, so that its classes can be pickled
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]
