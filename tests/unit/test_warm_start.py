"""Pretraining and fine-tuning that begin with given weights: our own, and those of other libraries."""

import logging

import pytest
import timm
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file

from fcmae.checkpoints import checkpoint
from fcmae.cli import main
from fcmae.config import compose
from fcmae.errors import CheckpointError, ConfigError, WeightsError
from fcmae.interchange import foreign, official
from fcmae.interchange.convert import export
from fcmae.interchange.network import Network
from fcmae.models.build import build_fcmae
from fcmae.tasks.initial import Start, adapt_stem, check_network, find_start, load_initial, settle
from tests.conftest import TINY_FINETUNE, TINY_PRETRAIN
from tests.results import assert_same

PRETRAIN = (*TINY_PRETRAIN, "model.stem_stride=4", "data.image_size=64")  # as the official code needs
SHORT = ("schedule.epochs=1", "trainer.eval_every_epochs=null")
UNTOLD = [o for o in TINY_FINETUNE if not o.startswith(("model", "data.image_size"))]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("warm") / "run"
    assert main([*PRETRAIN, *SHORT, f"hydra.run.dir={folder}"]) == 0
    return folder


@pytest.fixture(scope="module")
def exports(run, tmp_path_factory):
    """Every form of the run's weights that init_from takes."""
    folder = tmp_path_factory.mktemp("exports")
    for to in ("timm", "transformers", "official"):
        export(run, to, folder / to, check=False)
    network = Network.read(run)
    dense, sparse = (folder / "official" / name(network) for name in (official.dense_file, official.sparse_file))
    return {
        "run": run,
        "checkpoint": checkpoint.resolve(run),
        "encoder": run / "encoder.safetensors",
        "timm": folder / "timm",
        "timm file": folder / "timm" / "model.safetensors",
        "transformers": folder / "transformers",
        "official dense": dense,
        "official sparse": sparse,
    }


FORMS = ("run", "checkpoint", "encoder", "timm", "timm file", "transformers", "official dense", "official sparse")


@pytest.mark.parametrize("form", FORMS)
def test_pretraining_begins_with_given_weights(exports, form):
    """The backbone to the bit, and the decoder where there is one, from every form."""
    cfg = compose("pretrain", [*PRETRAIN[1:], f"init_from={exports[form]}", "seed=5"])
    model = build_fcmae(cfg)
    new = {name: value.clone() for name, value in model.decoder.state_dict().items()}
    said = load_initial(model, find_start(cfg).path, "strict")
    theirs = checkpoint.read(exports["checkpoint"])["model"]
    for name, value in model.backbone.state_dict().items():
        if not name.startswith("head."):
            assert torch.equal(value, theirs[f"backbone.{name}"]), name
    if form in ("run", "checkpoint", "official sparse"):
        assert "of its decoder" in said
        assert_same(
            model.decoder.state_dict(), {k.removeprefix("decoder."): v for k, v in theirs.items() if "decoder" in k}
        )
    else:
        assert said.endswith("the decoder is new")
        assert_same(model.decoder.state_dict(), new)


def test_a_run_says_what_it_began_with_and_never_reads_it_again(exports, tmp_path, capsys):
    args = [*PRETRAIN, *SHORT, f"hydra.run.dir={tmp_path}/run", "trainer.checkpoint_every_epochs=0.3"]
    sparse = tmp_path / "weights.pt"
    sparse.write_bytes(exports["official sparse"].read_bytes())
    assert main([*args, f"init_from={sparse}", "trainer.max_steps=1"]) == 75
    told = capsys.readouterr().err
    assert f"loaded the backbone of {sparse} and" in told
    assert f"licence of {sparse}: cc-by-nc-4.0" in told
    sparse.unlink()
    assert main([*args, f"init_from={sparse}"]) == 0
    state = checkpoint.read(checkpoint.resolve(tmp_path / "run"))
    assert state["origin"] == {"weights": str(sparse), "license": "cc-by-nc-4.0"}
    # what comes of it keeps the licence
    fine = [*UNTOLD, f"init_from={tmp_path}/run", f"hydra.run.dir={tmp_path}/fine", "schedule.epochs=1"]
    assert main(fine) == 0
    export(tmp_path / "fine", "timm", tmp_path / "out", check=False)
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'license: "cc-by-nc-4.0"' in card
    assert "| initial weights | weights.pt |" in card


def test_a_fine_tuning_run_begins_with_weights_of_timm(exports, tmp_path, capsys):
    assert main([*UNTOLD, f"init_from={exports['timm']}", f"hydra.run.dir={tmp_path}/fine", "schedule.epochs=1"]) == 0
    assert "taken from init_from: model.backbone=" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["repeat", "mean", "new"])
@pytest.mark.parametrize("channels", [1, 2, 5])
def test_a_stem_takes_another_number_of_channels(how, channels):
    weight, new = torch.rand(4, 3, 2, 2), torch.rand(4, channels, 2, 2)
    adapted = adapt_stem(weight, new, how)
    assert adapted.shape == new.shape
    if how == "new":
        assert torch.equal(adapted, new)
    elif how == "mean":  # an image whose channels are equal gives what it gave
        torch.testing.assert_close(adapted.sum(dim=1), weight.sum(dim=1))
    else:
        torch.testing.assert_close(adapted[:, channels - 1], weight[:, (channels - 1) % 3] * 3 / channels)


def test_other_channels_are_refused_or_adapted(exports, tmp_path, capsys):
    many = ("data.in_chans=5", "data.mean=[.5,.5,.5,.5,.5]", "data.std=[.2,.2,.2,.2,.2]")
    begin = (f"init_from={exports['run']}", *SHORT, "trainer.max_steps=1")
    args = [*PRETRAIN, *many, *begin]
    assert main([*args, f"hydra.run.dir={tmp_path}/a"]) == 2
    told = capsys.readouterr().err
    assert "data.in_chans is 5" in told
    assert "init_channels=repeat|mean|new" in told
    assert main([*args, "init_channels=mean", f"hydra.run.dir={tmp_path}/a"]) == 75
    assert "its stem adapted from 3 to 5 channels (mean)" in capsys.readouterr().err
    fine = [*UNTOLD, *many, f"init_from={exports['run']}", "init_channels=repeat", "trainer.max_steps=1"]
    assert main([*fine, f"hydra.run.dir={tmp_path}/b"]) == 75
    assert "its stem adapted from 3 to 5 channels (repeat)" in capsys.readouterr().err


def test_weights_of_another_network_are_refused(exports, tmp_path):
    cfg = compose("pretrain", [*PRETRAIN[1:], f"init_from={exports['timm']}", "model.dims=[8,12,16,32]"])
    with pytest.raises(ConfigError, match=r"model.dims is \[8, 12, 16, 32\]; .* has \["):
        main_task(cfg)
    cfg = compose("pretrain", [*PRETRAIN[1:], f"init_from={exports['timm']}", "model.dims=null"])
    with pytest.raises(CheckpointError, match="do not fit the model"):
        load_initial(build_fcmae(cfg), find_start(cfg).path, "strict")


def main_task(cfg):
    from fcmae.tasks.pretraining import Pretraining

    return Pretraining(cfg, find_start(cfg))


def test_weights_by_a_name_of_timm(monkeypatch, tmp_path):
    """The download itself is timm's; a failed one and an unknown name are one line."""
    made = timm.create_model("convnextv2_atto.fcmae", pretrained=False, num_classes=0)
    with monkeypatch.context() as patch:
        patch.setattr(foreign.timm, "create_model", lambda *_, **__: made)
        state = foreign.read_foreign("timm:convnextv2_atto.fcmae")
        assert state["origin"] == {"weights": "timm:convnextv2_atto.fcmae", "license": "cc-by-nc-4.0"}
        cfg = compose("pretrain", ["model=convnextv2_atto", "data=synthetic", "init_from=timm:convnextv2_atto.fcmae"])
        model = build_fcmae(cfg)
        load_initial(model, find_start(cfg).path, "strict")
        assert_same(model.backbone.state_dict(), made.state_dict())
    with pytest.raises(WeightsError, match=r"convnextv2_ato.fcmae is not .* did you mean timm:convnextv2_atto"):
        foreign.read_foreign("timm:convnextv2_ato.fcmae")

    def fail(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(foreign.timm, "create_model", fail)
    with pytest.raises(WeightsError, match=r"cannot be downloaded \(OSError: no route to host\)"):
        foreign.read_foreign("timm:convnextv2_atto.fcmae")


HUB_MODEL = ["model=convnextv2_atto", "init_from=timm:convnextv2_atto.fcmae", "data=synthetic", "data.image_size=64"]


def test_a_download_is_known_by_its_licence_to_the_end(monkeypatch, tmp_path, capsys):
    """From the hub, of which only the request for the file is replaced, to the model card of an export."""
    made = timm.create_model("convnextv2_atto", pretrained=False, num_classes=0)
    save_file(made.state_dict(), tmp_path / "model.safetensors")
    asked = []

    def download(repo_id, filename, **_):
        asked.append((repo_id, filename))
        return str(tmp_path / filename)

    monkeypatch.setattr(timm.models._hub, "hf_hub_download", download)
    run = ["pretrain", *HUB_MODEL, *SHORT, "optim.global_batch_size=2", "data.length=4", "optim.lr=0.001"]
    run += ["trainer.max_steps=1", "schedule.warmup_epochs=0", "loader.workers=0", f"hydra.run.dir={tmp_path}/run"]
    assert main(run) == 75
    assert set(asked) == {("timm/convnextv2_atto.fcmae", "model.safetensors")}
    assert "licence of timm:convnextv2_atto.fcmae: cc-by-nc-4.0" in capsys.readouterr().err
    origin = checkpoint.read(checkpoint.resolve(tmp_path / "run"))["origin"]
    assert origin == {"weights": "timm:convnextv2_atto.fcmae", "license": "cc-by-nc-4.0"}
    export(tmp_path / "run", "timm", tmp_path / "out", check=False)
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'license: "cc-by-nc-4.0"' in card
    assert "| initial weights | timm:convnextv2_atto.fcmae |" in card


def test_without_a_network_a_download_fails_in_one_line(monkeypatch, tmp_path, capsys):
    told = []

    def fail(*_, **__):
        told.append(logging.getLogger("huggingface_hub.utils").isEnabledFor(logging.WARNING))
        raise LocalEntryNotFoundError("cannot locate the file on the Hub. Please check\nyour connection.")

    monkeypatch.setattr(timm.models._hub, "hf_hub_download", fail)
    assert main(["pretrain", *HUB_MODEL, f"hydra.run.dir={tmp_path}/run"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("fcmae pretrain: timm:convnextv2_atto.fcmae cannot be downloaded (LocalEntryNotFoundError: ")
    assert line.endswith("cannot locate the file on the Hub); without a network, give a file or directory of it")
    assert not any(told), "a line for each time that the hub is tried again"


def test_dinov3(tmp_path):
    """Transformers' names of DINOv3's ConvNeXt, outputs compared with Transformers'."""
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "DINOv3ConvNextConfig"):
        pytest.skip("a version of Transformers without DINOv3")
    config = transformers.DINOv3ConvNextConfig(
        hidden_sizes=[8, 12, 16, 24], depths=[1, 2, 1, 1], layer_scale_init_value=0.5
    )
    theirs = transformers.DINOv3ConvNextModel(config).eval()
    for value in theirs.parameters():
        torch.nn.init.normal_(value, std=0.2)
    theirs.save_pretrained(tmp_path / "dino")
    state = foreign.read_foreign(str(tmp_path / "dino"))
    ours = timm.create_model("convnext_tiny", depths=[1, 2, 1, 1], dims=[8, 12, 16, 24], num_classes=0).eval()
    ours.load_state_dict(state["model"])
    imgs = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        out = theirs(imgs, output_hidden_states=True)
        torch.testing.assert_close(ours.forward_features(imgs), out.hidden_states[-1], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours(imgs), out.pooler_output, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("theirs", "ours", "message"),
    [
        ({"stem_stride": 1, "strides": None}, ["model.strides=[1,2,2,2]"], None),
        ({"stem_stride": 4, "strides": [1, 2, 2, 2]}, ["model.stem_stride=1"], None),
        ({"stem_stride": 1, "strides": [2, 2, 2, 2]}, ["model.strides=[2,2,2,2]"], None),
        (
            {"stem_stride": 4, "strides": None},
            ["model.strides=[2,2,2,2]"],
            r"model.strides=\[2, 2, 2, 2\]; x has model",
        ),
        (
            {"stem_stride": 1, "strides": None},
            ["model.stem_stride=4"],
            "model.stem_stride=4; x has model.stem_stride=1",
        ),
    ],
)
def test_strides_are_compared_however_they_are_given(theirs, ours, message):
    start = Start("x", {"model": theirs, "data": {}})
    for command, compare in ("pretrain", check_network), ("finetune", settle):
        cfg = compose(command, ["data=synthetic", "data.image_size=64", *ours])
        if message is None:
            compare(cfg, start)
        else:
            with pytest.raises(ConfigError, match=message):
                compare(cfg, start)
