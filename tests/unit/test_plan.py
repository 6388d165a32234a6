"""A plan divides every global batch among any number of ranks and micro-batches."""

import itertools

import pytest
import torch

from fcmae.data.plan import BatchPlan, MicroBatches, Padding
from fcmae.errors import UsageError

CPU = torch.device("cpu")


def parts_of(plan: BatchPlan) -> list[range]:
    """In the order of the samples."""
    return [plan.part(micro, rank) for micro in range(plan.accum_steps) for rank in range(plan.world_size)]


@pytest.mark.parametrize(("crops", "pairs"), [(1, False), (3, False), (1, True)])
def test_parts_hold_each_sample_once_and_differ_by_one_unit(crops, pairs):
    for count, ranks, most in itertools.product(range(1, 20), range(1, 8), (None, 1, 2, 5)):
        size, unit = count * crops, 2 if pairs else crops
        micro = None if most is None else most * unit
        plan = BatchPlan.create(100, size, micro, ranks, 0, crops, pairs)
        parts = parts_of(plan)
        assert [position for part in parts for position in part] == list(range(size))
        assert all(part.start % unit == 0 for part in parts)
        assert max(map(len, parts)) <= plan.micro_batch_size <= (micro or size + size % unit)
        assert max(map(len, parts)) - min(map(len, parts)) <= unit
        assert plan.padding == len(parts) * plan.micro_batch_size - size
        assert sum(map(plan.share, range(ranks))) == pytest.approx(ranks)


@pytest.mark.parametrize(("ranks", "micro", "accumulated"), [(1, 16, 4), (2, 16, 2), (4, 4, 4), (8, None, 1)])
def test_sizes_that_divide_have_no_padding(ranks, micro, accumulated):
    plan = BatchPlan.create(100, 64, micro, ranks, 0)
    size = micro or 8
    assert (plan.micro_batch_size, plan.accum_steps, plan.padding) == (size, accumulated, 0)
    assert parts_of(plan) == [range(first, first + size) for first in range(0, 64, size)]
    assert Padding(plan, 0, CPU)(0, [torch.ones(size)])[0].sum() == size


def test_micro_batches_are_no_larger_than_they_must_be():
    """Three ranks of at most 10 take three each of a batch of 64; of 8 they hold as much."""
    plan = BatchPlan.create(100, 64, 10, 3, 0)
    assert (plan.micro_batch_size, plan.accum_steps, plan.padding) == (8, 3, 8)
    assert str(plan) == "64 = 3 x 8 x 3 - 8 of padding"


@pytest.mark.parametrize(
    ("size", "ranks", "micro", "pairs"), [(64, 3, None, False), (10, 3, 2, True), (2, 3, None, True), (7, 1, 3, True)]
)
def test_padding_repeats_the_last_sample_and_weighs_nothing(size, ranks, micro, pairs):
    """The weighted mean over micro-batches and ranks is the mean over the samples."""
    plan = BatchPlan.create(100, size, micro, ranks, 0, 1, pairs)
    losses = torch.rand(size)
    total = torch.zeros(())
    for rank in range(ranks):
        padding = Padding(plan, rank, CPU)
        for micro in range(plan.accum_steps):
            read = plan.read(micro, rank)
            filled, weight = padding(micro, [losses[read.start : read.stop]])
            assert len(filled) == len(weight) == plan.micro_batch_size
            assert torch.equal(filled[: len(read)], losses[read.start : read.stop])
            assert (filled[len(read) :] == losses[read.stop - 1]).all()
            assert int(weight.count_nonzero()) == len(plan.part(micro, rank))
            total += (filled * weight).mean() / plan.accum_steps / ranks
    torch.testing.assert_close(total, losses.mean())


def test_what_is_read_for_a_rank_without_samples_is_the_first_of_the_step():
    plan = BatchPlan.create(100, 2, None, 3, 0)
    keys = [next(iter(MicroBatches(plan, rank, 5, 6))) for rank in range(3)]
    empty = [rank for rank in range(3) if not plan.part(0, rank)]
    assert len(empty) == 1
    assert keys.pop(empty[0]) == plan.global_batch(5)[:1]
    assert keys[0] + keys[1] == plan.global_batch(5)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((9, 10, None, 1, 0), "global_batch_size must be at most 9, the number of training images; got 10"),
        (
            (24, 8, None, 1, 0, 3),
            "global_batch_size must be a multiple of data.crops_per_image=3, such as 6 or 9; got 8",
        ),
        ((24, 8, 2, 1, 0, 4), "micro_batch_size must be at least 4 with data.crops_per_image=4; got 2"),
        ((24, 8, 1, 1, 0, 1, True), r"micro_batch_size must be at least 2 with augment.mixup or .* \(pairs\); got 1"),
    ],
)
def test_sizes_that_do_not_fit_are_named(args, message):
    with pytest.raises(UsageError, match=message):
        BatchPlan.create(*args)
