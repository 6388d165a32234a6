"""The engine on MinkowskiEngine. What compares it with the others is in test_engines and test_golden, same marker."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch

from fcmae.cli import main
from fcmae.config import compose, to_dict
from fcmae.doctor.agreement import agree
from fcmae.engines import available_engines, get_engine
from fcmae.errors import ConfigError
from fcmae.masks.patches import random_mask
from fcmae.models import FCMAE
from fcmae.models.build import build_fcmae, model_of
from fcmae.training.cuda_graphs import use_cuda_graph
from tests.conftest import TINY_PRETRAIN, relative_error

MESSAGE = r"engine minkowski: not installed \(.*launch/install_minkowski.sh builds and installs MinkowskiEngine\)"


@pytest.mark.minkowski
def test_the_number_of_threads_stays():
    assert torch.get_num_threads() == 1
    FCMAE("convnextv2_atto", engine="minkowski")(torch.randn(2, 3, 64, 64), random_mask(torch.rand(2, 4), 2))
    assert torch.get_num_threads() == 1


@pytest.fixture
def absent(monkeypatch):
    """Python without MinkowskiEngine, installed or not."""
    monkeypatch.setitem(sys.modules, "MinkowskiEngine", None)
    sys.modules["fcmae.engines.minkowski"]._import.cache_clear()


def test_an_installed_wheel_names_its_own_installer(absent, tmp_path, monkeypatch):
    script = tmp_path / "fcmae" / "launchers" / "install_minkowski.sh"
    script.parent.mkdir(parents=True)
    script.touch()
    module = sys.modules["fcmae.engines.minkowski"]
    monkeypatch.setattr(module, "__file__", str(tmp_path / "fcmae" / "engines" / "minkowski.py"))
    with pytest.raises(ImportError, match=re.escape(f"({script} builds and installs MinkowskiEngine)")):
        module.load()


def test_absent_it_is_one_line_that_says_how_to_get_it(absent):
    assert list(available_engines()) == ["packed", "masked"]
    with pytest.raises(ImportError, match=MESSAGE):
        get_engine("minkowski")
    with pytest.raises(ImportError, match=MESSAGE):
        FCMAE("convnextv2_atto", engine="minkowski")


def test_absent_commands_say_so_and_measure_nothing(absent, fcmae, tmp_path, capsys):
    assert main(["bench", "step", "device=cpu", "engines=[packed,minkowski]"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("fcmae bench: engine minkowski: not installed (")
    (tmp_path / "MinkowskiEngine.py").write_text("raise ModuleNotFoundError(name='MinkowskiEngine')")
    done = fcmae(*TINY_PRETRAIN, "engine=minkowski", check=2)
    assert done.stderr.startswith("fcmae pretrain: engine minkowski: not installed (")
    assert done.stderr.count("\n") == 1


def test_absent_doctor_skips_it(absent, capsys):
    assert agree([]) == 0
    assert "skip cpu engine minkowski: not installed (" in capsys.readouterr().out


def test_absent_its_checkpoints_load_all_the_same(absent):
    cfg = compose("pretrain", ["model=demo", "data=fashion_mnist", "data.image_size=32"])
    weights = build_fcmae(cfg).state_dict()
    cfg.engine.name = "minkowski"
    model = model_of({"task": "pretrain", "config": to_dict(cfg), "model": weights}, Path("checkpoint.pt"))
    assert model.engine is get_engine("packed")


def test_it_is_never_recorded_in_a_cuda_graph():
    """Without a GPU: what the loop decides there."""
    device = torch.device("cuda")
    for engine, graphed in (("packed", True), ("minkowski", False)):
        cfg = compose("pretrain", ["model=demo", f"engine={engine}"])
        assert use_cuda_graph(cfg, device) is graphed
    cfg.trainer.cuda_graph = True
    with pytest.raises(ConfigError, match="must be false or null with engine=minkowski"):
        use_cuda_graph(cfg, device)


@pytest.mark.minkowski
def test_three_steps_of_the_command_equal_packed(fcmae, tmp_path):
    losses = {}
    for engine in ("packed", "minkowski"):
        fcmae(*TINY_PRETRAIN, f"engine={engine}", "trainer.max_steps=3", f"hydra.run.dir={engine}", check=75)
        lines = (tmp_path / engine / "metrics.jsonl").read_text().splitlines()
        losses[engine] = [json.loads(line)["loss"] for line in lines]
    assert len(losses["packed"]) == 3
    assert losses["minkowski"] == pytest.approx(losses["packed"], rel=1e-5)


@pytest.mark.minkowski
def test_bench_step_measures_it(tmp_path):
    shape = ["models=[convnextv2_atto]", "image_size=64", "batch_size=2", "repeats=1", "warm_up=1"]
    file = tmp_path / "bench.json"
    engines = "engines=[packed,masked,minkowski]"
    assert main(["bench", "step", "device=cpu", "precision=float32", *shape, engines, "--json", str(file)]) == 0
    assert [row["engine"] for row in json.loads(file.read_text())["results"]] == ["packed", "masked", "minkowski"]


@pytest.mark.minkowski
def test_doctor_checks_it(capsys):
    assert agree([]) == 0
    out = capsys.readouterr().out
    assert "ok   cpu engine minkowski = masked, convnextv2_atto" in out
    assert "skip" not in out


@pytest.mark.minkowski
def test_recomputing_stages_and_compiling_change_nothing():
    imgs, mask = torch.randn(2, 3, 64, 64), random_mask(torch.rand(2, 4), 2)
    results = []
    for stages in ((), (1, 3)):
        torch.manual_seed(0)
        model = FCMAE("convnextv2_atto", engine="minkowski", decoder_embed_dim=16)
        model.recompute_stages = stages
        model(imgs, mask).loss.backward()
        results.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for name, grad in results[0].items():
        assert relative_error(grad, results[1][name]) < 1e-5, name
    kwargs = {"keep": 2, "patch_size": 32}
    visible = [model.engine(model.backbone, imgs, mask, compiled=compiled, **kwargs)[-1] for compiled in (False, True)]
    assert relative_error(*visible) < 1e-6


@pytest.mark.minkowski
def test_it_leaves_the_random_state_alone():
    model = FCMAE("convnextv2_atto", engine="minkowski", decoder_embed_dim=16, dims=(5, 6, 7, 9))
    imgs, mask = torch.randn(2, 3, 64, 64), random_mask(torch.rand(2, 4), 2)
    state = torch.get_rng_state()
    model(imgs, mask)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.minkowski
def test_it_has_no_copy_of_the_weights():
    """What an optimizer does to timm's parameters in place is what the next call computes with."""
    model = FCMAE("convnextv2_atto", engine="minkowski", decoder_embed_dim=16)
    imgs, mask = torch.randn(2, 3, 64, 64), random_mask(torch.rand(2, 4), 2)
    model(imgs, mask)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn_like(param), alpha=0.1)
    ours = model(imgs, mask).pred
    model.engine = get_engine("masked")
    assert relative_error(ours, model(imgs, mask).pred) < 1e-5
