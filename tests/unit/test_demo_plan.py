"""The demo fits its training to the machine."""

import pytest

from fcmae.demo import Plan


@pytest.mark.parametrize(("speed", "pretraining", "finetuning"), [(986, 2.0, 60), (330, 0.82, 60), (100, 0.5, 60)])
def test_a_slower_machine_trains_for_fewer_epochs(speed, pretraining, finetuning):
    """986 images/s: two fast cores; 330: two without AVX-512; 100: slower than any machine that it was tried on."""
    plan = Plan.for_cpu(speed, 460)
    assert plan == Plan(speed, pytest.approx(pretraining, abs=0.05), pytest.approx(finetuning, abs=2))
    share = plan.pretrain_epochs / Plan.RECIPE[0]
    if share > Plan.LEAST:
        assert (share * Plan.PRETRAINING + Plan.REST) / speed < 460


def test_on_a_gpu_the_epochs_of_pretraining_fit_into_its_seconds():
    assert Plan.for_gpu(12_000, 60_000, 100).pretrain_epochs == 40
    assert Plan.for_gpu(1, 60_000, 100).pretrain_epochs == 2
    assert Plan.for_gpu(1e6, 60_000, 100).pretrain_epochs == 60
