"""Hooks of mkdocs: pages of the site that are no files of docs/, and links that leave docs/."""

import contextlib
import io
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
OUTSIDE = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Files at the top of the checkout, and their pages."""
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):(?=<code)")
"""Sphinx's roles in docstrings."""
FENCE = re.compile(r"(^```.*?^```)", re.DOTALL | re.MULTILINE)


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    pages = {page: (ROOT / name).read_text() for name, page in OUTSIDE.items()}
    pages |= {"api.md": api_page(), "cli.md": cli_page()}
    for page, text in pages.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    at = page.file.src_uri
    source = next((name for name, other in OUTSIDE.items() if other == at), f"docs/{at}")
    parts = FENCE.split(markdown)  # code stays as it is
    return "".join(part if number % 2 else translated(part, source, at) for number, part in enumerate(parts))


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    return ROLE.sub("", html)


def translated(markdown: str, source: str, at: str) -> str:
    """Links relative to the file ``source`` of the checkout as links relative to the page ``at``.

    Of a link to a file that has no page only the text is left.
    """

    def link(match: re.Match[str]) -> str:
        image, text, target = match.groups()
        path, _, anchor = target.partition("#")
        if not path or "://" in path or path.startswith("mailto:"):
            return match[0]
        file = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        page = OUTSIDE.get(file) or (file.removeprefix("docs/") if file.startswith("docs/") else None)
        if page is None:
            return text
        relative = posixpath.relpath(page, posixpath.dirname(at) or ".")
        return f"{image}[{text}]({relative}{'#' + anchor if anchor else ''})"

    return LINK.sub(link, markdown)


def api_page() -> str:
    """The public names, whose docstrings mkdocstrings reads."""
    names = re.search(r"__all__ = \[(.*?)\]", (ROOT / "fcmae" / "__init__.py").read_text(), re.DOTALL)
    assert names is not None
    listed = "\n\n".join(f"::: fcmae.{name}" for name in re.findall(r'"(\w+)"', names[1]))
    return f"# Python reference\n\nThe public functions and classes; [how to use them](python.md).\n\n{listed}\n"


def cli_page() -> str:
    """The commands; of those with plain flags their help."""
    sys.path.insert(0, str(ROOT))
    from fcmae import cli

    rows = "\n".join(f"| `fcmae {name}` | {_escaped(text)} |" for name, text in cli.COMMANDS.items())
    helps = "\n\n".join(f"## fcmae {name}\n\n```\n{_help(cli, name)}\n```" for name in cli._TOOLS)
    return (
        "# Commands\n\nCommands with `[overrides]` take `KEY=VALUE`; [config.md](config.md) has all keys, and "
        f"`--cfg job` prints the composed config.\n\n| command | what it does |\n|---|---|\n{rows}\n\n{helps}\n"
    )


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("[", "\\[")


def _help(cli: Any, name: str) -> str:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        cli._TOOLS[name](["--help"])
    return said.getvalue().strip()
