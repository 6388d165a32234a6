"""The short form of ``make soak``: what a run uses does not grow."""

import statistics

import pytest

from benchmarks import soak
from tests.conftest import start_python

STEPS = 240


@pytest.mark.slow
def test_what_a_run_uses_stays_the_same(tmp_path):
    """In the last quarter not more than before. Memory: by less than 2 % of the mean in all."""
    soak.write_images(tmp_path)
    (tmp_path / "tmp").mkdir()
    args = soak.overrides(tmp_path, STEPS, "cpu")
    often = (
        "trainer.checkpoint_every_epochs=2",
        "trainer.eval_every_epochs=4",
        "monitor.knn_every_epochs=4",
    )
    run = start_python(tmp_path, "-m", "fcmae.cli", "pretrain", *args, *often, "trainer.log_every=5")
    samples = list(soak.watch(run.pid, lambda: run.poll() is not None, tmp_path, 0.05))
    assert run.wait() == 0
    running = [one for one in samples if STEPS // 4 < one["step"] < STEPS]
    early = [one for one in running if one["step"] < 3 * STEPS // 4]
    late = [one for one in running if one["step"] >= 3 * STEPS // 4]
    for what in ("shared memory, MiB", "handles", "threads"):
        assert at_rest(late, what) <= at_rest(early, what), what
    assert max(len(one["processes"]) for one in late) <= max(len(one["processes"]) for one in early)
    assert max(one["files"] for one in late) <= max(one["files"] for one in early)
    memory = [fit for fit in soak.fits(samples, tmp_path / "run") if fit.name.endswith(": memory, MiB")]
    assert memory
    for fit in memory:
        assert fit.change < 2 or fit.name.startswith("all"), fit  # all: workers of an evaluation come and go


def at_rest(samples, what):
    """What the process with the most uses at quiet moments: the lowest tenth of the samples.

    Not the median: an evaluation adds workers, pipes and files, and about half of the samples fall into one.
    """
    used = [max(one[what] for one in sample["processes"].values()) for sample in samples]
    return statistics.quantiles(used, n=10)[0]
