"""What lasts long but makes progress does not run into trainer.hang_timeout: evaluations, monitors, saves, resuming."""

import itertools

import pytest

from fcmae.checkpoints import checkpoint
from fcmae.cli import main
from fcmae.evaluation import classify, features
from fcmae.training import run
from tests.conftest import TINY_FINETUNE, TINY_PRETRAIN


class Beats:
    """Stands in for the watchdog, and counts."""

    GRACE = 1.0
    count = 0

    def __init__(self, *_):
        pass

    def beat(self):
        Beats.count += 1

    def close(self):
        pass


@pytest.fixture
def beats(monkeypatch):
    monkeypatch.setattr(run, "Watchdog", Beats)
    return lambda: Beats.count


@pytest.mark.parametrize(
    ("module", "args"),
    [
        (classify, TINY_FINETUNE),
        (features, (*TINY_PRETRAIN, "monitor=knn", "monitor.knn_every_epochs=1", "monitor.knn_k=1")),
    ],
)
def test_each_batch_of_an_evaluation_counts(monkeypatch, tmp_path, beats, module, args):
    seen: list[int] = []
    batches = module.batches

    def counted(*args, **kwargs):
        for batch in batches(*args, **kwargs):
            seen.append(beats())
            yield batch

    monkeypatch.setattr(module, "batches", counted)
    steps = ("trainer.micro_batch_size=2", "trainer.max_steps=3", f"hydra.run.dir={tmp_path}/run")
    assert main([*args, *steps]) == 75
    assert len(seen) >= 12
    assert all(before < after for before, after in itertools.pairwise(seen))


@pytest.mark.parametrize("part", ["_save_with_checksum", "_verify"])
def test_each_part_of_a_checkpoint_that_is_written_or_read_counts(monkeypatch, tmp_path, beats, part):
    counts: list[int] = []
    original = getattr(checkpoint, part)

    def counted(*args):
        before = beats()
        original(*args)
        counts.append(beats() - before)

    monkeypatch.setattr(checkpoint, part, counted)
    for steps in (3, 4):
        assert main([*TINY_PRETRAIN, f"trainer.max_steps={steps}", f"hydra.run.dir={tmp_path}/run"]) == 75
    assert len(counts) >= 1
    assert min(counts) >= (10 if part == "_save_with_checksum" else 1)
