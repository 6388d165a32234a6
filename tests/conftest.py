"""What several tests share: golden files, small models, the command line in a process of its own."""

import functools
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from safetensors import safe_open

from fcmae import opening
from tests import in_process, preloaded, quick_hydra  # noqa: F401
from tests.cpu_time import pytest_runtest_protocol, pytest_terminal_summary  # noqa: F401

TESTS = Path(__file__).parent
GOLDEN = TESTS / "golden"

_ended = 0
gc.set_threshold(10_000, 20, 20)  # the default looks for cycles after 700 new objects
torch.set_num_threads(1)  # the networks are tiny: a second thread waits, and waits at full load

ENGINE_NAMES = ("packed", "masked", pytest.param("minkowski", marks=pytest.mark.minkowski))
"""For parametrised tests; what needs MinkowskiEngine is run by ``-m minkowski``."""


def pytest_collection_finish() -> None:
    """A run ends with a full collection, which need not go through all modules and tests."""
    gc.freeze()


def pytest_runtest_logfinish() -> None:
    """Nor through what was imported since."""
    global _ended
    _ended += 1
    if _ended % 400 == 0:
        gc.collect()
        gc.freeze()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def other_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is another user than the one that the files of the test belong to."""
    monkeypatch.setattr(opening, "_user", lambda: os.geteuid() + 1)
    monkeypatch.setattr(opening, "ROOT", -1)


def read_golden(name: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The metadata and tensors of a golden file."""
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        return json.loads(file.metadata()["meta"]), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """``||value - reference|| / ||reference||`` in float64."""
    return ((value.double() - reference.double()).norm() / reference.double().norm().clamp(min=1e-30)).item()


Command = Callable[..., subprocess.CompletedProcess]
HANDLED = "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", HANDLED)


def start_python(
    folder: Path,
    *args: str,
    ranks: int = 1,
    threads: int = 1,
    fresh: bool = False,
    stdout: IO | int = subprocess.DEVNULL,
    stderr: IO | int = subprocess.DEVNULL,
    variables: Mapping[str, str] | None = None,
) -> subprocess.Popen | preloaded.Process:
    """Starts ``python ARGS`` in ``folder``, as ranks of one launch for several. It leads a session of its own.

    Args:
        threads: they decide the order of summation.
        fresh: start an interpreter, which takes seconds, for several ranks by torchrun; needed where imports are the
            point. torchrun itself has everything imported.
        variables: environment variables besides those of this process.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), **(variables or {})}
    if ranks > 1 and (fresh or not preloaded.is_possible()):
        args, ranks, fresh = (*TORCHRUN, f"--nproc_per_node={ranks}", *args), 1, False
    if fresh or not preloaded.is_possible():
        command = [sys.executable, *args]
        return subprocess.Popen(
            command, cwd=folder, env=environment, stdout=stdout, stderr=stderr, start_new_session=True
        )
    with open(os.devnull, "wb") as nowhere:
        files = [nowhere if file == subprocess.DEVNULL else file for file in (stdout, stderr)]
        return preloaded.Process(args, folder, environment, ranks, *files)


def run_python(
    folder: Path, *args: str, check: int | None = 0, timeout: int = 1500, **kwargs: Any
) -> subprocess.CompletedProcess:
    """Runs ``python ARGS`` to its end; ``kwargs`` are those of :func:`start_python`. ``check`` is the exit code."""
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        process = start_python(folder, *args, stdout=stdout, stderr=stderr, **kwargs)
        try:
            code = process.wait(timeout)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        for file in (stdout, stderr):
            file.seek(0)
        done = subprocess.CompletedProcess(args, code, stdout.read(), stderr.read())
    if check is not None:
        assert done.returncode == check, done.stdout + done.stderr
    return done


@pytest.fixture
def fcmae(tmp_path: Path) -> Command:
    """Runs ``fcmae ARGS`` as a user would, in an empty folder and a process of its own; see :func:`run_python`."""

    def run(*args: str, **kwargs: Any) -> subprocess.CompletedProcess:
        return run_python(tmp_path, "-m", "fcmae.cli", *args, **kwargs)

    return run


@pytest.fixture
def fcmae_here(tmp_path: Path) -> Command:
    """Runs ``fcmae ARGS`` in an empty folder and in this process, where modules can be patched; see in_process.py."""
    return functools.partial(in_process.run, tmp_path)


TINY = (
    "model=demo",
    "model.dims=[8,12,16,24]",
    "model.depths=[1,1,1,1]",
    "data=synthetic",
    "data.image_size=32",
    "data.length=24",
    "loader.workers=0",
    "optim.global_batch_size=8",
    "optim.lr=1e-3",
    "precision=float32",
    "trainer.log_every=1",
    "trainer.checkpoint_every_epochs=1",
    "trainer.eval_every_epochs=1",
    "logger=quiet",
    "logger.progress=false",
)
"""Overrides for a run of a second."""
TINY_PRETRAIN = (
    *("pretrain", *TINY, "model.decoder_embed_dim=16", "schedule.epochs=3", "schedule.warmup_epochs=1"),
    "trainer.eval_every_epochs=3",  # pictures take long
)
TINY_FINETUNE = ("finetune", *TINY, "augment=none", "schedule.epochs=2")
