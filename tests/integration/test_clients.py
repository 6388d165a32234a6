"""Real clients read what is exported: VisCy's FullyConvolutionalMAE, and U-Nets of segmentation-models-pytorch.

They do not belong in the environment of development, so the test makes one of its own, which has torch and what else it
needs from the running one by path.
"""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests import interchange as made
from tests.unit.test_viscy import UNBIASED, pretrained

ROOT = Path(__file__).parents[2]
PACKAGES = ("segmentation-models-pytorch==0.6.0", "monai>=1.5.2", "pytorch-metric-learning", "transformers>=4.40")
VISCY = ("--no-deps", "--ignore-requires-python", "viscy-models==0.1.0")
"""It asks for Python 3.12, and runs on 3.11."""
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """The interpreter of an environment with the clients; ``FCMAE_CLIENTS_PYTHON`` names one that is there already."""
    if "FCMAE_CLIENTS_PYTHON" in os.environ:
        return os.environ["FCMAE_CLIENTS_PYTHON"]
    if sys.version_info < (3, 11):
        pytest.skip("viscy-models needs Python 3.11")
    folder = tmp_path_factory.mktemp("clients")
    python = str(folder / "bin" / "python")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    site = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-compile"]
    for packages in (PACKAGES, VISCY):
        subprocess.run([*pip, "-c", ROOT / "constraints.txt", *packages], check=True)
    return python


@pytest.mark.clients
@pytest.mark.timeout(1800)
def test_clients_compute_our_features(python, tmp_path):
    strides, dims = {"strides": [2, 2, 2, 2]}, [8, 16, 32, 64]  # VisCy's decoder needs widths that double
    pretrained(tmp_path / "plane.pt", 1, dims=dims)
    pretrained(tmp_path / "planes.pt", 10, dims=dims, **strides, **UNBIASED)
    made.pretrained(tmp_path / "timm.pt", made.data_config(4))
    made.pretrained(tmp_path / "stride16.pt", made.data_config(4), **strides)
    command = [python, "-m", "tests.integration.clients", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert {client: set(differences) for client, differences in found.items()} == {
        "viscy 2D": {"check", "stages", "back"},
        "viscy 3D": {"check", "stages", "back"},
        "viscy's own": {"stages"},
        "smp": {"32", "16"},
        "smp, pretrained at 16": {"stages"},
    }
    assert max(max(differences.values()) for differences in found.values()) < TOLERANCE
