"""The demo fits its training to the machine."""

from pathlib import Path

import pytest

from fcmae.demo import Plan, _table


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


@pytest.mark.parametrize(("epochs", "said"), [(0.5, True), (2.0, False)])
def test_a_shortened_pretraining_is_told_with_its_result(epochs, said):
    names = ("knn_before", "knn_after", "finetune_scratch", "finetune_pretrained", "seconds", "images_per_second")
    table = _table({**dict.fromkeys(names, 50.0), "pretrain_epochs": epochs}, 500, Path("demo"))
    assert ("shortened to 0.5 of 2 epochs" in table) == said
