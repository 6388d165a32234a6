"""What several tests share: golden files, small models, the command line in a process of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

TESTS = Path(__file__).parent
GOLDEN = TESTS / "golden"


ENGINE_NAMES = ("packed", "masked", pytest.param("minkowski", marks=pytest.mark.minkowski))
"""For parametrised tests; what needs MinkowskiEngine is run by ``-m minkowski``."""


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def read_golden(name: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The metadata and tensors of a golden file."""
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        return json.loads(file.metadata()["meta"]), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """``||value - reference|| / ||reference||`` in float64."""
    return ((value.double() - reference.double()).norm() / reference.double().norm().clamp(min=1e-30)).item()


Command = Callable[..., subprocess.CompletedProcess]


def run_python(
    folder: Path, *args: str, ranks: int = 1, check: int | None = 0, threads: int = 1, timeout: int = 240
) -> subprocess.CompletedProcess:
    """Runs ``python ARGS`` in ``folder``, under torchrun for several ranks. Threads decide the order of summation."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [*launcher, *args], cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )
    if check is not None:
        assert done.returncode == check, done.stdout + done.stderr
    return done


@pytest.fixture
def fcmae(tmp_path: Path) -> Command:
    """Runs ``fcmae ARGS`` as a user would, in an empty folder."""

    def run(*args: str, **kwargs: Any) -> subprocess.CompletedProcess:
        return run_python(tmp_path, "-m", "fcmae.cli", *args, **kwargs)

    return run


TINY = (
    "model=demo",
    "model.dims=[8,12,16,24]",
    "model.depths=[1,1,1,1]",
    "data=synthetic",
    "data.image_size=32",
    "data.length=24",
    "data.workers=0",
    "trainer.global_batch_size=8",
    "optim.lr=1e-3",
    "trainer.precision=float32",
    "trainer.log_every=1",
    "trainer.checkpoint_every_epochs=1",
    "trainer.eval_every_epochs=1",
    "logger=quiet",
    "logger.progress=false",
)
"""Overrides for a run of a second."""
TINY_PRETRAIN = ("pretrain", *TINY, "model.decoder_embed_dim=16", "schedule.epochs=3", "schedule.warmup_epochs=1")
TINY_FINETUNE = ("finetune", *TINY, "augment=none", "schedule.epochs=2")
