import json

import pytest
import torch

from fcmae.cli import main

STEP = ["bench", "step", "models=[convnextv2_atto]", "device=cpu", "precision=float32", "batch_size=2", "image_size=64"]


def test_step_measures_every_engine_and_writes_json(tmp_path, capsys):
    assert main([*STEP, "repeats=2", "warm_up=1", "--json", str(tmp_path / "out" / "step.json")]) == 0
    printed = capsys.readouterr().out
    assert "packed is" in printed
    report = json.loads((tmp_path / "out" / "step.json").read_text())
    assert [row["engine"] for row in report["results"]] == ["packed", "masked", "timm"]
    assert all(row["images_per_second"] > 0 for row in report["results"])
    assert report["machine"]["torch"]
    assert report["config"]["batch_size"] == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_kernels_need_a_gpu(capsys):
    assert main(["bench", "kernels"]) == 2
    assert "bench kernels needs a GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("engines=[sparse]", "engines is 'sparse'; allowed is some of packed, masked, minkowski, timm"),
        ("batch=3", "batch: unknown key; allowed is one of models, engines"),
        ("repeats=0", "repeats is 0; allowed is a positive integer"),
        ("models=[resnet18]", "not a ConvNeXt known to timm"),
    ],
)
def test_a_mistake_is_named(override, message, capsys):
    assert main([*STEP, override]) == 2
    assert message in capsys.readouterr().err
