"""The table of docs/interchange.md: two Atto networks of a few training steps, each by way of every target.

``pytest -m slow -s tests/integration/test_interchange_table.py`` prints it; with the rows of TensorFlow if
``FCMAE_TF_PYTHON`` names the Python of an environment as test_tensorflow.py makes it.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from fcmae.errors import UsageError
from fcmae.interchange.convert import EXPORTS, IMPORTS, export, import_weights
from fcmae.interchange.network import Network
from tests.conftest import run_python
from tests.integration.test_tensorflow import outputs
from tests.interchange import weights_in
from tests.results import assert_same

SHORT = (
    "model=convnextv2_atto",
    "data=synthetic",
    "data.image_size=64",
    "data.length=80",
    "loader.workers=0",
    "optim.global_batch_size=4",
    "precision=float32",
    "schedule.epochs=1",
    "schedule.warmup_epochs=0",
    "trainer.eval_every_epochs=null",
    "optim.lr=1e-3",
    "logger=quiet",
)
RUNS = {
    "fine-tuned Atto": ("finetune", *SHORT, "augment=none"),
    "pretrained Atto, 4 channels, stem stride 2": (
        "pretrain",
        *SHORT,
        "data.in_chans=4",
        "data.mean=[0.5,0.5,0.5,0.5]",
        "data.std=[0.3,0.3,0.3,0.3]",
        "model.stem_stride=2",
    ),
}


def rows(run: Path, folder: Path) -> Iterator[tuple[str, str, str]]:
    """Target, largest difference with the library's version, what a round trip gives; or why it cannot be."""
    network = Network.read(run)
    for to in EXPORTS:
        try:
            check = export(run, to, folder / to)
        except UsageError as error:
            yield to, str(error).replace(str(network.path), "it"), ""
            continue
        for file in sorted((folder / to).glob("*.p*t*")) or [folder / to]:
            yield f"{to} {file.name}" if file.is_file() else to, str(check), round_trip(network, to, file, folder)
        if to == "transformers" and "FCMAE_TF_PYTHON" in os.environ:
            (differences,) = outputs(os.environ["FCMAE_TF_PYTHON"], {folder / to: network})
            for name, found in differences.items():
                yield name, f"transformers 4.37.2: {max(found.values()):.1e}", "same files"


def round_trip(network: Network, to: str, file: Path, folder: Path) -> str:
    """Imports what was exported and compares bits."""
    if to not in IMPORTS:
        return "no import"
    back = folder / f"{to}_{file.name}.back"
    import_weights(file, to, back)
    whole = network.fcmae is not None and file.suffix == ".pth"
    assert_same(weights_in(back), network.state["model"] if whole else network.weights)
    return "the same bits"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", RUNS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_table(tmp_path, name):
    run_python(tmp_path, "-m", "fcmae.cli", *RUNS[name], "hydra.run.dir=run")
    print(f"\n\n| {name} | check | export, then import |\n|---|---|---|")
    found = list(rows(tmp_path / "run", tmp_path))
    for row in found:
        print(f"| {' | '.join(row)} |")
    assert {target.split()[0] for target, _, _ in found} >= set(EXPORTS)
    held = {target.split()[0] for target, _, back in found if back == "the same bits"}
    assert held == (set(IMPORTS) - {"viscy"} if "fine" in name else {"timm"})  # VisCy has no classifier
