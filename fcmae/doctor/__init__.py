"""``fcmae doctor``: lists versions, warns of problems of the machine, and compares the engines."""

import platform
from pathlib import Path

import torch

from fcmae.doctor.agreement import agree
from fcmae.doctor.machine import findings, version_of

PACKAGES = ("fcmae", "torch", "torchvision", "timm", "hydra-core", "triton", "wandb", "MinkowskiEngine")


def run(golden: list[Path]) -> int:
    """Prints the report. Returns 0, or 1 if engines disagree; problems of the machine are only warnings."""
    for name in PACKAGES:
        print(f"{name:16} {version_of(name) or 'not installed'}")
    print(f"{'python':16} {platform.python_version()} on {platform.platform()}")
    for index in range(torch.cuda.device_count()):
        print(f"{f'cuda:{index}':16} {torch.cuda.get_device_name(index)}")
    for finding in findings():
        print(finding)
    return 1 if agree(golden) else 0
