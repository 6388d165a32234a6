"""``fcmae export`` and ``fcmae import`` as a user runs them, on runs of a second."""

import json

import pytest
import torch

from fcmae.cli import main
from fcmae.interchange.network import Network
from tests import interchange as made
from tests.conftest import TINY_FINETUNE, TINY_PRETRAIN, run_python
from tests.results import assert_same

STEM = ("model.stem_stride=4", "data.image_size=64")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with the runs ``pre`` and ``fine``."""
    folder = tmp_path_factory.mktemp("runs")
    common = ("schedule.epochs=1", "schedule.warmup_epochs=0", *STEM)
    run_python(folder, "-m", "fcmae.cli", *TINY_PRETRAIN, *common, "hydra.run.dir=pre")
    fine = ("init_from=pre", "optim.ema_decay=0.5", "hydra.run.dir=fine")
    run_python(folder, "-m", "fcmae.cli", *TINY_FINETUNE, *common, *fine)
    return folder


@pytest.mark.parametrize("library", ["official", "timm"])
def test_export_and_import(runs, tmp_path, capsys, library):
    for run, file in (("pre", "convnextv2_atto_fcmae.pt"), ("fine", "convnextv2_atto_ft.pt")):
        out = tmp_path / run
        assert main(["export", str(runs / run), "--to", library, "--out", str(out), "--license", "mit"]) == 0
        assert "checked with timm" in capsys.readouterr().out
        source = out / file if library == "official" else out
        back = tmp_path / f"{run}.pt"
        assert main(["import", str(source), "--from", library, "--out", str(back)]) == 0
        assert_same(Network.read(back).weights, Network.read(runs / run).weights)
        card = (out / "README.md").read_text()
        assert card.startswith('---\nlicense: "mit"\n')
        for part in ("## Data", "## Recipe", "| loss |", "## How to load it", "trained with torch", "## Licence"):
            assert part in card
        assert str(runs) not in card + str(torch.load(source, weights_only=True) if library == "official" else "")


def test_the_raw_weights(runs, tmp_path):
    for flag, ema in ((["--no-ema"], False), ([], True)):
        out = tmp_path / str(ema)
        assert main(["export", str(runs / "fine"), "--to", "timm", "--out", str(out), "--no-check", *flag]) == 0
        assert main(["import", str(out), "--from", "timm", "--out", str(tmp_path / f"{ema}.pt")]) == 0
        assert_same(made.weights_in(tmp_path / f"{ema}.pt"), Network.read(runs / "fine", ema).weights)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_transformers(runs, tmp_path, capsys):
    pytest.importorskip("transformers")
    assert main(["export", str(runs / "fine"), "--to", "transformers", "--out", str(tmp_path / "out")]) == 0
    assert "checked with transformers" in capsys.readouterr().out
    assert main(["import", str(tmp_path / "out"), "--from", "transformers", "--out", str(tmp_path / "back.pt")]) == 0
    assert_same(made.weights_in(tmp_path / "back.pt"), Network.read(runs / "fine").weights)


@pytest.mark.slow
def test_finetuning_and_evaluation_go_on_from_what_was_imported(runs, tmp_path, fcmae):
    main(["export", str(runs / "pre"), "--to", "official", "--out", str(tmp_path / "out"), "--no-check"])
    for file in ("checkpoint-3.pth", "convnextv2_atto_fcmae.pt"):
        main(["import", str(tmp_path / "out" / file), "--from", "official", "--out", str(tmp_path / f"{file}.ours")])
    start = (f"init_from={tmp_path}/convnextv2_atto_fcmae.pt.ours", "optim.lr=1e-12", "schedule.min_lr=0")
    fcmae(*TINY_FINETUNE, *STEM, *start, "trainer.max_steps=1", "hydra.run.dir=run", check=75)
    tuned = Network.read(tmp_path / "run").weights
    for name, value in made.backbone_of(made.weights_in(tmp_path / "checkpoint-3.pth.ours")).items():
        torch.testing.assert_close(tuned[name], value, rtol=0, atol=1e-9)
    main(["export", str(runs / "fine"), "--to", "timm", "--out", str(tmp_path / "timm"), "--no-check"])
    main(["import", str(tmp_path / "timm"), "--from", "timm", "--out", str(tmp_path / "classifier.pt")])
    data = ("data.name=synthetic", "data.length=24")
    imported = json.loads(fcmae("evaluate", "checkpoint=classifier.pt", "report=null", *data).stdout)
    ours = json.loads(fcmae("evaluate", f"checkpoint={runs}/fine", "report=null").stdout)
    assert imported["top1"] == ours["ema_top1"]


def test_mistakes_end_with_one_line_and_code_2(runs, tmp_path, capsys):
    names = tmp_path / "names.txt"
    names.write_text("a\nb\n")
    main(["export", str(runs / "fine"), "--to", "official", "--out", str(tmp_path / "out"), "--no-check"])
    source = str(tmp_path / "out" / "convnextv2_atto_ft.pt")
    capsys.readouterr()
    for command, message in (
        (["export", "nowhere", "--to", "timm", "--out", str(tmp_path / "x")], "no checkpoint or run directory nowhere"),
        (["export", str(runs / "fine"), "--to", "timm", "--out", str(runs)], "exists; name a directory"),
        (["export", str(runs / "fine"), "--to", "timm", "--out", "x", "--half"], "go with --to onnx only"),
        (["import", "nowhere.pt", "--from", "official", "--out", "x.pt"], "no file nowhere.pt"),
        (["import", "nowhere", "--from", "timm", "--out", "x.pt"], "nowhere has neither model.safetensors"),
        (
            ["import", source, "--from", "official", "--out", "x.pt", "--classes", str(names)],
            "2 class names for 10 classes",
        ),
    ):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
