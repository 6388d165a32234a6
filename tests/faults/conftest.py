"""After every test of faults: no process, shared memory or temporary file is left (row 13 of docs/tests.md)."""

import contextlib
import functools
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.runs import COMMANDS, TINY, finish, processes, wait_until
from tests.results import weights_sha256


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
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Path]:
    """The directory of a run that nothing disturbed, made once: ``reference(command, ranks)``."""

    @functools.cache
    def run_dir(command: str, ranks: int) -> Path:
        folder = tmp_path_factory.mktemp(f"undisturbed_{command}_{ranks}_")
        finish(folder, *COMMANDS[command], "trainer.log_every=1", "hydra.run.dir=run", ranks=ranks)
        return folder / "run"

    return run_dir


@pytest.fixture(scope="session")
def undisturbed(reference: Callable[[str, int], Path]) -> Callable[[str, int], str]:
    """The SHA-256 of the weights at the end of an undisturbed run: ``undisturbed(command, ranks)``."""
    return lambda command, ranks: weights_sha256(reference(command, ranks))


@pytest.fixture(scope="session")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Path], None]:
    """``begun(command, run_dir)`` makes a run directory as the tiny run leaves it that is stopped after step 3.

    The run is made once, and copied.
    """

    @functools.cache
    def original(command: str) -> Path:
        folder = tmp_path_factory.mktemp(f"begun_{command}_")
        finish(folder, *TINY[command], "hydra.run.dir=run", "trainer.max_steps=3", expect=75)
        return folder / "run"

    return lambda command, run_dir: shutil.copytree(original(command), run_dir, dirs_exist_ok=True)
