"""The demo fits its training to the machine."""

import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from fcmae import demo
from fcmae.config import compose
from fcmae.demo import Plan, _table
from fcmae.models.build import build_fcmae


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


@pytest.mark.parametrize(("epochs", "said"), [(1.75, True), (2.0, False)])
def test_a_shortened_pretraining_is_told_with_its_result(epochs, said):
    names = ("knn_before", "knn_after", "finetune_scratch", "finetune_pretrained", "seconds", "images_per_second")
    table = _table({**dict.fromkeys(names, 50.0), "pretrain_epochs": epochs}, 500, Path("demo"))
    assert ("shortened to 1.75 of 2 epochs for this machine; the whole demo" in table) == said
    assert "fine-tuned with 500 labels, top-1" in table


@pytest.mark.parametrize(("speed", "finetunes"), [(986, True), (330, False), (100, False)])
def test_fine_tuning_is_left_out_where_it_would_say_nothing(monkeypatch, tmp_path, capsys, speed, finetunes):
    """Of too short a pretraining; the table says so, with the command for all of it."""
    tuned = []
    monkeypatch.setattr(demo, "_speed", lambda *given: speed)
    monkeypatch.setattr(demo, "median_speed", lambda *given: speed)
    monkeypatch.setattr(demo, "pick_device", lambda name: torch.device("cpu"))
    monkeypatch.setattr(demo, "train_source", lambda data: [0] * 60_000)
    monkeypatch.setattr(demo, "pretrain", lambda cfg, folder: folder / "checkpoints" / "step.pt")
    monkeypatch.setattr(demo, "finetune", lambda cfg, folder: tuned.append(folder.name) or folder / "checkpoints" / "a")
    monkeypatch.setattr(demo, "load", lambda path: build_fcmae(compose("pretrain", ["experiment=demo/pretrain"])))
    monkeypatch.setattr(demo, "_knn", lambda *given: 60.0)
    monkeypatch.setattr(demo, "_top1", lambda folder: 65.0)
    monkeypatch.setattr(demo, "_plot_loss", lambda *given: None)
    monkeypatch.setattr(demo.Pretraining, "__init__", lambda task, cfg: None)
    monkeypatch.setattr(demo.Pretraining, "picture", lambda *given: SimpleNamespace(image=Image.new("RGB", (4, 4))))
    summary = demo.run(tmp_path, minutes=460 / 60)
    said = capsys.readouterr().out
    assert tuned == ["finetune", "scratch"] * finetunes
    assert ("finetune_scratch" in summary) == ("fine-tuned with 100 labels, top-1" in said) == finetunes
    assert ("[5/5]" in said) == finetunes == ("[3/3]" not in said)
    minutes = Plan.whole(speed)
    assert Plan.for_cpu(speed, 60 * minutes).pretrain_epochs == 2
    line = f"too few to compare fine-tuning with 100 labels; the whole demo: fcmae demo --minutes {minutes} ("
    assert (line in said) != finetunes


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["demo"], "fcmae demo --out demo"),  # its own limit
        (["demo", "DATA=x", "MINUTES=12"], "fcmae demo --out demo --data x --minutes 12"),
        (["chaos"], "tests.chaos minutes=20"),
    ],
)
def test_minutes_of_make_are_for_the_target_that_is_made(given, told):
    root = Path(__file__).parents[2]
    done = subprocess.run(
        ["make", "-n", *given], cwd=root, text=True, capture_output=True, check=True, env={"PATH": os.environ["PATH"]}
    )
    assert " ".join(done.stdout.splitlines()[-1].split()).endswith(told)
