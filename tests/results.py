"""What a run left in its folder."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fcmae.checkpoints import checkpoint


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """The lines of its metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def newest(run: str | os.PathLike[str]) -> dict[str, Any]:
    """The state in its newest checkpoint."""
    return checkpoint.read(checkpoint.resolve(f"{os.fspath(run)}@last"))


def weights(run: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The model in that."""
    return newest(run)["model"]


def weights_sha256(run: Path) -> str:
    """Of the weights in its newest checkpoint, name by name."""
    state = torch.load(max((run / "checkpoints").iterdir()), weights_only=True)
    digest = hashlib.sha256()
    for name, value in sorted(state["model"].items()):
        digest.update(name.encode())
        digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()


def assert_same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    """The same names with the same bits."""
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert value.dtype == b[name].dtype, name
        assert torch.equal(value, b[name]), name
