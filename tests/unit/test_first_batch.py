"""A CUDA graph is recorded while workers read the first batch: from what looks like it, and without a trace."""

import os
import signal
import time

import pytest
import torch

from fcmae.cli import main
from fcmae.data.loading import TrainBatches, Workers, deaths_told_later, explained
from fcmae.data.pixels.crops import Box
from fcmae.data.pixels.decode import Encoded
from fcmae.data.pixels.on_device import Undecoded
from fcmae.data.plan import BatchPlan
from fcmae.errors import WorkerError
from fcmae.training import loop, step
from fcmae.training.cuda_graphs import EagerBackward
from tests.conftest import TINY_FINETUNE, TINY_PRETRAIN
from tests.results import assert_same, newest

MIXED = ("augment.mixup=0.8", "augment.cutmix=1.0", "model.drop_path_rate=0.5")


class OnCPU(EagerBackward):
    """Stands for a graph: a recording runs the pass, and leaves gradients for replays to overwrite."""

    def __init__(self, run, model, *_):
        super().__init__(run, model)
        self.recorded, said[:] = False, []

    def record(self, batch):
        said.append(looks(batch))
        self.run(batch, True)
        self.recorded = True

    def __call__(self, batch, last=True):
        assert self.recorded
        said.append(looks(batch))
        return super().__call__(batch, last)


said: list = []


def looks(parts):
    return [(part.shape, part.dtype, part.stride()) for part in parts]


@pytest.mark.parametrize(
    "command",
    [
        pytest.param((*TINY_PRETRAIN, "data.crops_per_image=2"), id="pretrain"),
        pytest.param((*TINY_FINETUNE, *MIXED, "trainer.micro_batch_size=6"), id="finetune"),  # of 8: with padding
    ],
)
def test_a_run_is_the_same_to_the_bit(command, tmp_path, monkeypatch):
    args = [*command, "trainer.max_steps=1", "loader.workers=1"]
    assert main([*args, f"hydra.run.dir={tmp_path}/eager"]) == 75
    monkeypatch.setattr(step, "GraphedBackward", OnCPU)
    monkeypatch.setattr(loop, "use_cuda_graph", lambda *_: True)
    monkeypatch.setattr(TrainBatches, "__next__", taken(TrainBatches.__next__))
    assert main([*args, f"hydra.run.dir={tmp_path}/graphed"]) == 75
    made_up, first, real, *_ = said
    assert first == "taken"
    assert made_up == real
    assert_same(newest(tmp_path / "graphed")["model"], newest(tmp_path / "eager")["model"])


def taken(function):
    def run(self):
        said.append("taken")
        return function(self)

    return run


class Samples(torch.utils.data.Dataset):
    def __init__(self, read):
        self.read = read

    def __getitem__(self, key):
        return (self.read(),)


def batches(read, workers=1):
    return TrainBatches(Samples(read), BatchPlan.create(8, 4, 4, 1, seed=0), 0, range(1), Workers(workers, timeout=60))


def torn():
    raise ValueError("of a transform")


def undecoded():
    """As with data.decode_on=gpu: the device would have to decode the file once per sample."""
    return Undecoded(Encoded(b"of a file", "a.jpg"), [Box(0, 0, 2, 2, False)], (2, 2))


def test_what_cannot_be_copied_is_left_to_the_workers():
    assert batches(zeros).made_up() is not None
    assert batches(zeros, workers=0).made_up() is None
    assert batches(torn).made_up() is None
    assert batches(undecoded).made_up() is None


def zeros():
    return torch.zeros(3, 2, 2)


def test_the_death_of_a_worker_meanwhile_is_told_at_once():
    """Torch raises it wherever this process is, and the sample's reader would take it for an error of its own."""
    here = os.getpid()

    def read():
        if os.getpid() != here:
            time.sleep(0.2)
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            time.sleep(1)
        except RuntimeError:
            pytest.fail("inside the reader")
        return zeros()

    with pytest.raises(WorkerError, match="killed by signal"), explained(), deaths_told_later():
        batches(read).made_up()
