"""URLs in the place of paths: which kinds can be read. Nothing here opens one."""

import re
from collections.abc import Sequence
from urllib.parse import urlsplit

from fcmae.errors import UsageError, shown

SCHEMES = {"s3": "s3fs", "gs": "gcsfs", "http": "aiohttp", "https": "aiohttp", "hf": "huggingface_hub"}
"""The kinds of URLs, and the package that fsspec needs for each."""
PIPE = "pipe:"
"""Begins a command whose output is read."""
_URL = re.compile(r"([a-z][a-z0-9+.-]+)(::|://)", re.IGNORECASE)


def is_url(path: str) -> bool:
    """Whether a path is a URL, of a kind that can be read or not."""
    return _URL.match(path) is not None


def is_command(path: str) -> bool:
    """Whether a path is a command whose output is read: ``pipe:COMMAND``."""
    return path.startswith(PIPE)


def is_remote(path: str) -> bool:
    """Whether a path is a URL or a command."""
    return is_url(path) or is_command(path)


def check_url(url: str) -> str:
    """The URL's scheme. Raises UsageError for other kinds of URLs, and for a password in it."""
    match = _URL.match(url)
    assert match is not None
    scheme = match[1].lower()
    if scheme not in SCHEMES or match[2] == "::":
        raise UsageError(f"{shown(url)} must be a path, {PIPE}COMMAND or a URL of {', '.join(SCHEMES)}")
    if "@" in urlsplit(url).netloc:
        raise UsageError(
            f"a {scheme} URL must not hold a user or a password, which checkpoints would keep; the environment "
            f"variables and files of {SCHEMES[scheme]} take them"
        )
    return scheme


def join(url: str, name: str) -> str:
    """The URL of a file beside ``url``."""
    return f"{url.partition('?')[0].rpartition('/')[0]}/{name}"


def tell_apart(places: Sequence[str]) -> list[str]:
    """The last parts of several different paths or URLs, as many as tell them apart."""
    parts = [place.rstrip("/").split("/") for place in places]
    names: list[str] = []
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-depth:]) for each in parts]
        if len(set(names)) == len(names):
            break
    return names


def expand_braces(pattern: str) -> list[str]:
    """Expands ``a-{00..02}`` and ``{a,b}`` as a shell does."""
    match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if match is None:
        return [pattern]
    first, last, choices = match.groups()
    if choices is None:
        parts = [str(i).zfill(len(first)) for i in range(int(first), int(last) + 1)]
    else:
        parts = choices.split(",")
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return [expanded for part in parts for expanded in expand_braces(head + part + tail)]
