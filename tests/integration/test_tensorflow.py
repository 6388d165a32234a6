"""TensorFlow's and PyTorch's classes of Transformers 4 read what is exported.

Both are gone from current environments, so the test makes one of its own: Python 3.11, a minute, 2 GB.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fcmae.interchange.convert import export
from fcmae.interchange.network import Network
from tests import interchange as made

PACKAGES = ("tensorflow-cpu==2.15.1", "transformers==4.37.2", "numpy<2", "torch==2.13.0")
TOLERANCE = 1e-4
SCRIPT = Path(__file__).with_name("tensorflow_outputs.py")


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """The interpreter of an environment with PACKAGES; ``FCMAE_TF_PYTHON`` names one that is there already."""
    if "FCMAE_TF_PYTHON" in os.environ:
        return os.environ["FCMAE_TF_PYTHON"]
    python311 = shutil.which("python3.11")
    if python311 is None or subprocess.run([python311, "--version"], capture_output=True, check=False).returncode:
        pytest.skip("TensorFlow 2.15 needs Python 3.11, which is not installed")
    folder = tmp_path_factory.mktemp("tensorflow")
    python = str(folder / "bin" / "python")
    subprocess.run([python311, "-m", "venv", "--without-pip", folder], check=True)
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-compile"]
    subprocess.run([*pip, *PACKAGES], check=True)
    return python


def outputs(python: str, networks: Mapping[Path, Network]) -> list[dict[str, dict[str, float]]]:
    """By folder, for each class of Transformers 4, the largest difference of each output from ours.

    One process reads all folders: importing TensorFlow takes longest.
    """
    for folder, network in networks.items():
        imgs = network.fixed_input()
        tensors = {"imgs": imgs, **network.outputs(imgs)}
        save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "ours.safetensors")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [python, str(SCRIPT), *map(str, networks)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


EXPECTED = {
    "fine": {"TFConvNextV2ForImageClassification": {"logits"}, "ConvNextV2ForImageClassification": {"logits"}},
    "pre": {"TFConvNextV2Model": {"features", "pooled"}, "ConvNextV2Model": {"features", "pooled"}},
}


@pytest.mark.tf
@pytest.mark.timeout(900)
def test_transformers_4(python, tmp_path):
    networks = {}
    for in_chans, stride in ((3, 4), (4, 1)):
        data = made.data_config(in_chans)
        for kind, make in (("fine", made.finetuned), ("pre", made.pretrained)):
            folder = tmp_path / f"{kind}-{in_chans}"
            make(tmp_path / f"{folder.name}.pt", data, stem_stride=stride)
            export(tmp_path / f"{folder.name}.pt", "transformers", folder, check=False)
            networks[folder] = Network.read(tmp_path / f"{folder.name}.pt")
    for folder, found in zip(networks, outputs(python, networks), strict=True):
        print(found)
        assert {name: set(differences) for name, differences in found.items()} == EXPECTED[folder.name.split("-")[0]]
        assert max(max(differences.values()) for differences in found.values()) < TOLERANCE


@pytest.mark.tf
@pytest.mark.timeout(900)
def test_torch_2_13_reads_the_official_files(python, tmp_path):
    """The official scripts read their files by ``torch.load(...)["model"]``."""
    weights = made.pretrained(tmp_path / "pre.pt")
    export(tmp_path / "pre.pt", "official", tmp_path / "out", check=False)
    code = "import sys, torch; print(len(torch.load(sys.argv[1], weights_only=True)['model']))"
    file = tmp_path / "out" / "checkpoint-7.pth"
    done = subprocess.run([python, "-c", code, str(file)], capture_output=True, text=True, check=True)
    assert int(done.stdout) == len(torch.load(file, weights_only=True)["model"]) == len(weights) - 2
