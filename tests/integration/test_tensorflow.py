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
from typing import Any

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


def outputs(python: str, networks: Mapping[Path, Network], *official: Path) -> list[Any]:
    """By folder, for each class of Transformers 4, the largest difference of each output from ours.

    One process reads all folders, and says how many tensors each ``official`` file has: importing TensorFlow and torch
    takes longest.
    """
    for folder, network in networks.items():
        imgs = network.fixed_input()
        tensors = {"imgs": imgs, **network.outputs(imgs)}
        save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "ours.safetensors")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [python, str(SCRIPT), *map(str, (*networks, *official))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


EXPECTED = {
    "fine": {"TFConvNextV2ForImageClassification": {"logits"}, "ConvNextV2ForImageClassification": {"logits"}},
    "pre": {"TFConvNextV2Model": {"features", "pooled"}, "ConvNextV2Model": {"features", "pooled"}},
}


@pytest.mark.tf
@pytest.mark.timeout(900)
def test_transformers_4_and_torch_2_13(python, tmp_path):
    """The official scripts read their files by ``torch.load(...)["model"]``, here in torch 2.13."""
    weights = made.pretrained(tmp_path / "pre.pt")
    export(tmp_path / "pre.pt", "official", tmp_path / "out", check=False)
    official = tmp_path / "out" / "checkpoint-7.pth"
    networks = {}
    for in_chans, stride in ((3, 4), (4, 1)):
        data = made.data_config(in_chans)
        for kind, make in (("fine", made.finetuned), ("pre", made.pretrained)):
            folder = tmp_path / f"{kind}-{in_chans}"
            make(tmp_path / f"{folder.name}.pt", data, stem_stride=stride)
            export(tmp_path / f"{folder.name}.pt", "transformers", folder, check=False)
            networks[folder] = Network.read(tmp_path / f"{folder.name}.pt")
    *differences, tensors = outputs(python, networks, official)
    assert tensors == len(torch.load(official, weights_only=True)["model"]) == len(weights) - 2
    for folder, found in zip(networks, differences, strict=True):
        print(found)
        assert {name: set(each) for name, each in found.items()} == EXPECTED[folder.name.split("-")[0]]
        assert max(max(each.values()) for each in found.values()) < TOLERANCE
