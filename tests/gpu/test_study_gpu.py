"""``fcmae study`` on a GPU: many short trainings in one process, and several processes on one GPU."""

import json

import pytest
import torch

from tests.conftest import TINY_PRETRAIN

pytestmark = pytest.mark.gpu
STUDY = (
    *("study", "init_from=pre", "data=synthetic", "data.length=80", "loader.workers=1", "labels=[4,all]", "steps=20"),
    *("auto.folds=2", "auto.held_out=40", "auto.lrs=[1e-3]", "auto.layer_decays=[0.8]", "auto.l2=[0.1,1]"),
)


def test_a_study_in_one_process_and_in_two(fcmae, tmp_path):
    """Memory does not grow from training to training; processes that share the GPU measure the same to a few images."""
    fcmae(*TINY_PRETRAIN, "precision=auto", "trainer.device=cuda", "hydra.run.dir=pre")
    alone = fcmae(*STUDY, "seeds=2", "hydra.run.dir=alone")
    assert "20 of 20" in alone.stderr
    shared = fcmae(*STUDY, "seeds=2", "processes=2", "hydra.run.dir=shared")
    assert "20 of 20" in shared.stderr
    one, two = (json.loads((tmp_path / name / "study.json").read_text()) for name in ("alone", "shared"))
    for ours, theirs in zip(one["results"], two["results"], strict=True):
        assert (ours["arm"], ours["labels"], ours["seed"]) == (theirs["arm"], theirs["labels"], theirs["seed"])
        assert ours["metrics"]["top1"] == pytest.approx(theirs["metrics"]["top1"], abs=15)
    fcmae(*STUDY, "seeds=2", "processes=3", "hydra.run.dir=shared")  # nothing is left


def test_trainings_in_a_row_free_their_memory(tmp_path, monkeypatch):
    from fcmae.config import compose
    from fcmae.studies import cells
    from fcmae.studies.arms import make_plan

    monkeypatch.chdir(tmp_path)
    network = ["model=demo", "trainer.device=cuda", "arms=[scratch]", "labels=[all]", "seeds=6"]
    plan = make_plan(compose("study", [*STUDY[2:], *network]))
    cells.begin(plan, tmp_path / "study")
    held = []
    for cell in plan.cells():
        cells.measure(plan, cell, tmp_path / "study")
        torch.cuda.empty_cache()
        held.append(torch.cuda.memory_allocated())
    assert held[-1] <= held[1] + 2**22
