"""Where memory runs out: one line that names the key to change."""

import gc
import weakref

import pytest
import torch

from fcmae import memory
from fcmae.cli import main
from fcmae.errors import OutOfMemory
from fcmae.evaluation.features import Extractor
from fcmae.tasks import finetuning
from fcmae.tasks.finetuning import Finetuning
from fcmae.tasks.pretraining import Pretraining
from tests.conftest import TINY_FINETUNE, TINY_PRETRAIN

CUDA = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.1 GiB\nof which more"
ONE_STEP = ("schedule.epochs=0.4", "schedule.warmup_epochs=0", "trainer.eval_every_epochs=null")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A pretrained and a fine-tuned run of one step."""
    folder = tmp_path_factory.mktemp("runs")
    assert main([*TINY_PRETRAIN, *ONE_STEP, f"hydra.run.dir={folder}/pretrained"]) == 0
    assert main([*TINY_FINETUNE, *ONE_STEP, f"hydra.run.dir={folder}/fine"]) == 0
    return folder


def no_memory(*_, **__):
    raise torch.OutOfMemoryError(CUDA)


def short_of_memory():
    return memory.explained(torch.device("cpu"), lambda: "set less")


def fails(args: list[str], capsys) -> str:
    capsys.readouterr()
    assert main(args) == 1
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("command", "sizes", "used"), [(TINY_PRETRAIN, [], 8), (TINY_FINETUNE, ["trainer.micro_batch_size=4"], 4)]
)
def test_in_training(command, sizes, used, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Pretraining, "loss", no_memory)
    monkeypatch.setattr(Finetuning, "loss", no_memory)
    line = fails([*command, *ONE_STEP, *sizes, f"hydra.run.dir={tmp_path}/run"], capsys)
    assert line.startswith(f"fcmae {command[0]}: out of memory on the CPU (this process held up to ")
    assert f"trainer.micro_batch_size is {used}; set a smaller one, or trainer.micro_batch_size=auto" in line


def test_in_an_evaluation_during_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(finetuning, "predictions", no_memory)
    line = fails([*TINY_FINETUNE, "schedule.epochs=0.4", f"hydra.run.dir={tmp_path}/run"], capsys)
    assert "trainer.micro_batch_size is 8; set a smaller one" in line


def test_with_one_sample_at_a_time(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Pretraining, "loss", no_memory)
    line = fails([*TINY_PRETRAIN, "trainer.micro_batch_size=1", f"hydra.run.dir={tmp_path}/run"], capsys)
    assert "trainer.micro_batch_size is 1; set engine.recompute_stages=[1,2,3,4]" in line


def test_a_command_that_failed_holds_no_memory(tmp_path, monkeypatch):
    """Objects that exist at its start may be frozen (quick_imports). A sweep or a notebook continues."""
    held = []

    def fail(*_):
        gc.freeze()
        tensor = torch.zeros(1)
        held.append(weakref.ref(tensor))
        raise OutOfMemory("none left")

    monkeypatch.setattr("fcmae.training.run.pretrain", fail)
    try:
        assert main([*TINY_PRETRAIN, f"hydra.run.dir={tmp_path}/run"]) == 1
        gc.collect()
        assert held[0]() is None
    finally:
        gc.unfreeze()


@pytest.mark.parametrize("command", ["knn", "probe"])
def test_in_features(command, runs, monkeypatch, capsys):
    monkeypatch.setattr(Extractor, "_pool", no_memory)
    line = fails([command, f"checkpoint={runs}/pretrained", "cache=null", "batch_size=16"], capsys)
    assert "batch_size is 16; set a smaller one" in line
    assert ("train_batch_size (now 1024)" in line) == (command == "probe")


def test_in_evaluate(runs, monkeypatch, capsys):
    monkeypatch.setattr("fcmae.evaluation.run.predictions", no_memory)
    line = fails(["evaluate", f"checkpoint={runs}/fine"], capsys)
    assert line.startswith("fcmae evaluate: out of memory on the CPU")
    assert "batch_size is 256, or 16 for maps and boxes; set a smaller one" in line


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (CUDA, True),
        ("CUDA error: out of memory", True),
        ("CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("NCCL error in: ProcessGroupNCCL.cpp: Cuda failure 2 'out of memory'", True),
        ("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory", True),
        ("CUDA error: an illegal memory access was encountered", False),
    ],
)
def test_which_errors_are_of_memory(message, expected):
    error = RuntimeError(message)
    with pytest.raises(OutOfMemory if expected else RuntimeError) as caught, short_of_memory():
        raise error
    assert caught.value is error or "\n" not in str(caught.value)


def test_an_error_that_follows_from_one_of_memory():
    """As the end of a CUDA graph's recording raises its own."""
    error = RuntimeError("CUDA error: operation failed due to a previous error during capture")
    error.__context__ = torch.OutOfMemoryError(CUDA)
    with pytest.raises(OutOfMemory, match="set less$"), short_of_memory():
        raise error
