"""Which device a command uses, what it says about it, and that it leaves the others alone."""

import os
from pathlib import Path

import pytest
import torch

from fcmae import cli, distributed, hydra_run
from fcmae.data.cores import MOST_WORKERS
from fcmae.training.saver import HostCopy
from tests.conftest import TINY_PRETRAIN

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def gpu_machine(monkeypatch):
    """A machine with a GPU, whose context nobody may open."""

    def opened() -> None:
        raise AssertionError("a CUDA context was opened")

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: os.environ["CUDA_VISIBLE_DEVICES"] != "")
    monkeypatch.setattr(torch.cuda, "_lazy_init", opened)


@pytest.mark.usefixtures("gpu_machine")
def test_a_run_on_the_cpu_opens_no_gpu(tmp_path, monkeypatch):
    """Neither training, its pictures and checkpoints, nor evaluation."""
    monkeypatch.chdir(tmp_path)
    command, *overrides = TINY_PRETRAIN
    overrides += ["trainer.device=cpu", "optim.ema_decay=0.9", "schedule.epochs=1", "hydra.run.dir=run"]
    assert hydra_run.run(command, overrides, cli._HYDRA[command], alone=True) == 0
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert hydra_run.run("knn", ["checkpoint=run", "device=cpu", "k=1"], cli._HYDRA["knn"], alone=True) == 0


@pytest.mark.usefixtures("gpu_machine")
def test_saving_a_state_of_the_cpu_opens_no_gpu():
    """In a program that uses the GPU for something else too."""
    state = {"weight": torch.ones(2), "moments": [torch.zeros(3)]}
    assert torch.equal(HostCopy()(state)["weight"], state["weight"])


@pytest.mark.parametrize(("device", "said"), [("auto", True), ("cpu", False)])
def test_an_accelerator_that_is_left_unused_is_named(device, said, monkeypatch, capsys):
    """An Apple GPU, or another one that torch knows."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    assert distributed.connect(device).device.type == "cpu"
    line = "device=auto takes the CPU: fcmae does not run on this machine's accelerator (mps)\n"
    assert capsys.readouterr().err == (line if said else "")


def test_the_documents_name_the_number_of_loader_processes():
    assert f"at most {MOST_WORKERS}" in (DOCS / "data_speed.md").read_text()
    for page in ("faq.md", "slurm.md"):  # they link to it
        assert "](data_speed.md" in (DOCS / page).read_text(), page
