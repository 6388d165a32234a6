"""Row 5: the number of ranks, workers and micro-batches changes, the samples of a step do not."""

import pytest

from tests.faults.runs import COMMANDS, SHORT, finish
from tests.results import metrics_of


def losses(run_dir):
    """By step; lines of evaluation have none."""
    return {line["step"]: line["loss"] for line in metrics_of(run_dir) if "loss" in line}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("command", ["pretrain"] if SHORT else ["pretrain", "finetune"])
def test_two_ranks_then_one_then_four_then_two(tmp_path, reference, command):
    """The losses of 100 steps (28 in the short form) are those of one rank.

    That the samples are the same is in tests/unit/test_data.py.
    """
    args = (*COMMANDS[command], "trainer.log_every=1", "trainer.eval_every_epochs=100", "hydra.run.dir=changing")
    steps = 7 if SHORT else 25
    stages = [
        (2, ("loader.workers=1",)),
        (1, ("trainer.micro_batch_size=2",)),
        (4, ("loader.workers=0",)),
        (2, ("trainer.micro_batch_size=1", "loader.workers=2")),
    ]
    for number, (ranks, others) in enumerate(stages, 1):
        finish(
            tmp_path, *args, f"trainer.max_steps={steps * number}", *others, ranks=ranks, expect=1 if ranks > 1 else 75
        )
    changing = losses(tmp_path / "changing")
    assert list(changing) == list(range(1, 4 * steps + 1))
    steady = losses(reference(command, 1))
    assert changing == pytest.approx({step: steady[step] for step in changing}, rel=1e-5)
