"""After every test of faults: no process, shared memory or temporary file is left (row 12 of docs/reliability.md)."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.runs import COMMANDS, finish, processes, wait_until, weights_sha256


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/faults" in str(item.path):
            item.add_marker("faults")


@pytest.fixture(autouse=True)
def _nothing_left(tmp_path: Path) -> Iterator[None]:
    shared = set(Path("/dev/shm").iterdir())
    yield
    try:
        wait_until(lambda: not list(processes(tmp_path)), 10)
        assert not list(tmp_path.rglob("*.tmp"))
        ours = {path for path in set(Path("/dev/shm").iterdir()) - shared if path.name.startswith(("torch_", "psm_"))}
        assert not ours
    finally:
        for pid, _ in processes(tmp_path):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory):
    """The SHA-256 of the weights at the end of an undisturbed run: ``undisturbed(command, ranks)``."""
    known: dict[tuple[str, int], str] = {}

    def result(command: str, ranks: int) -> str:
        if (command, ranks) not in known:
            folder = tmp_path_factory.mktemp("undisturbed")
            finish(folder, *COMMANDS[command], "hydra.run.dir=run", ranks=ranks)
            known[command, ranks] = weights_sha256(folder / "run")
        return known[command, ranks]

    return result
