"""A CUDA graph is recorded while workers read the first batch: from what looks like it, and without a trace."""

import pytest
import torch

from fcmae.cli import main
from fcmae.data.loading import TrainBatches, Workers
from fcmae.data.plan import BatchPlan
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


class Torn(torch.utils.data.Dataset):
    def __init__(self, torn):
        self.torn = torn

    def __getitem__(self, key):
        if self.torn:
            raise ValueError("of a transform")
        return (torch.zeros(3, 2, 2),)


def test_what_cannot_be_read_is_left_to_the_workers():
    plan = BatchPlan.create(8, 4, 4, 1, seed=0)
    for workers, torn, found in ((0, False, False), (1, True, False), (1, False, True)):
        batches = TrainBatches(Torn(torn), plan, 0, range(1), Workers(workers))
        assert (batches.made_up() is not None) == found
