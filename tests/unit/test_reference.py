"""docs/config.md is what the dataclasses say, and they say something of every key."""

import re
from pathlib import Path

import pytest

from benchmarks import reference
from fcmae.config import COMMANDS

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def page() -> str:
    return reference.render()


def test_the_page_is_up_to_date(page):
    assert (DOCS / "config.md").read_text() == page, "run `make reference`"


def test_every_key_is_explained(page):
    rows = [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in page.splitlines() if "| `" in line
    ]
    assert len(rows) > 100
    assert [row[0] for row in rows if not row[-1]] == []
    assert [row[0] for row in rows if row[1] == "str" and "one of" in row[3] and not row[3].split("one of ")[1]] == []


def test_keys_of_every_command_are_there(page):
    for command in COMMANDS:
        assert re.search(rf"^## .*\b{command}\b", page, re.MULTILINE), command
    for key in ("data.crop_scale", "data.hflip", "data.pad", "precision", "optim.ema_decay", "init_from"):
        assert f"| `{key}` |" in page
    assert "| `checkpoint` | str | required |" in page
    assert "`4096` in pretrain, `1024` in finetune" in page
