"""``encoder.safetensors`` in every command that takes a checkpoint, random weights, and weights without a run."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import fcmae
from fcmae.checkpoints import checkpoint, encoder
from fcmae.cli import main
from fcmae.config import BackboneConfig, compose
from fcmae.errors import CheckpointError
from fcmae.interchange.convert import import_weights
from fcmae.interchange.official import to_pretraining
from fcmae.models.build import build_fcmae, load, model_of, random_encoder
from tests.conftest import TESTS, TINY_FINETUNE, TINY_PRETRAIN
from tests.results import assert_same

DATA = ("data.in_chans=2", "data.bit_depth=12", "data.mean=[0.3,0.4]", "data.std=[0.1,0.2]")
UNTOLD = [o for o in TINY_FINETUNE if not o.startswith(("model", "data.image_size"))]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A pretraining run of three steps on two channels."""
    folder = tmp_path_factory.mktemp("encoder") / "run"
    average = ("optim.ema_decay=0.5", "schedule.epochs=1", "trainer.eval_every_epochs=null")
    assert main([*TINY_PRETRAIN, *DATA, *average, f"hydra.run.dir={folder}"]) == 0
    return folder


@pytest.fixture
def file(run, tmp_path):
    """Its encoder file, away from the run."""
    return shutil.copy(run / "encoder.safetensors", tmp_path / "encoder.safetensors")


def test_the_encoder_file_says_what_the_run_says(run, file):
    state, whole = checkpoint.read(file), checkpoint.read(checkpoint.resolve(run))
    assert_same(state["model"], encoder.backbone_weights(whole))
    for group, names in encoder.KEYS.items():
        for name in names:
            said, ours = state["config"][group][name], whole["config"][group][name]
            assert (list(said) if isinstance(said, tuple) else said) == ours, name
    assert checkpoint.describe(file, state) == f"checkpoint {file} (step 3)"
    assert checkpoint.header(file)["config"] == state["config"]
    assert_same(fcmae.load(file).state_dict(), fcmae.load(run).backbone.state_dict())


def test_features_of_the_encoder_file_are_those_of_the_run(run, file, capsys):
    for command in (("knn", "k=3"), ("probe", "epochs=1", "warmup_epochs=0")):
        results = []
        for given in (file, run):
            images = () if given == run else ("data.name=synthetic", "data.length=24")
            assert main([*command, f"checkpoint={given}", "cache=null", *images]) == 0
            results.append(json.loads(capsys.readouterr().out))
        assert results[0] == results[1]


def test_the_encoder_file_is_fine_tuned(run, file, tmp_path, capsys):
    for name, given in (("file", file), ("run", run)):
        assert main([*UNTOLD, f"init_from={given}", f"hydra.run.dir={tmp_path}/{name}", "schedule.epochs=1"]) == 0
    assert "taken from init_from: model.backbone=convnextv2_atto model.depths=[1, 1, 1, 1]" in capsys.readouterr().err
    states = [checkpoint.read(checkpoint.resolve(tmp_path / name)) for name in ("file", "run")]
    assert_same(states[0]["model"], states[1]["model"])
    assert {**states[0]["config"], "init_from": 0} == {**states[1]["config"], "init_from": 0}


@pytest.mark.parametrize("to", ["timm", "official"])
def test_the_encoder_file_is_exported(file, tmp_path, capsys, to):
    if to == "official":  # which has a stem of stride 4 only
        file = tmp_path / "four.safetensors"
        state = random_encoder(BackboneConfig(depths=[1, 1, 1, 1], dims=[8, 12, 16, 24]), 3, seed=1)
        config = {"model": state["config"]["model"], "data": {**data_keys(), "image_size": [64, 64]}}
        encoder.write(file, {**state, "config": config, "step": 7})
    assert main(["export", str(file), "--to", to, "--out", str(tmp_path / to), "--no-check"]) == 0
    assert "weights imported from" in (tmp_path / to / "README.md").read_text()


def data_keys():
    """What an encoder file says of ordinary images."""
    return {
        "in_chans": 3,
        "bit_depth": 8,
        "dtype": "uint",
        "normalize": "dataset",
        "low": None,
        "high": None,
        "mean": [0.5] * 3,
        "std": [0.2] * 3,
        "nodata": None,
        "pad": 0,
        "crop_pct": 0.875,
    }


def test_commands_that_need_more_say_why_not(file, tmp_path, capsys):
    assert main(["evaluate", f"checkpoint={file}"]) == 2
    assert "is of the task 'encoder' and has no classifier; fine-tune it" in capsys.readouterr().err
    assert main(["reconstruct", str(file), str(tmp_path), "--out", f"{tmp_path}/x.png"]) == 2
    assert "is of the task 'encoder' and has no decoder; give a pretraining run" in capsys.readouterr().err


def damaged(path, **metadata):
    """The file's weights with other metadata, None = without that key."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        known = {**file.metadata(), **metadata}
    save_file(tensors, path, {name: value for name, value in known.items() if value is not None})


def said(path, **changes):
    """The JSON in the metadata with some keys of ``data`` and ``model`` changed."""
    with safe_open(path, "pt") as file:
        text = json.loads(file.metadata()["fcmae"])
    for key, value in changes.items():
        group = "model" if key in text["model"] or key == "hidden" else "data"
        text[group][key] = value
    return json.dumps(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depths": [1, 1, 9999, 1]}, r"says model.depths=\[1, 1, 9999, 1\]; its weights have \[1, 1, 1, 1\]"),
        ({"dims": [8, 12, 16, 99999]}, r"says model.dims=.*its weights have"),
        ({"in_chans": 3, "mean": [0.5] * 3, "std": [0.5] * 3}, "says data.in_chans=3; its weights have 2"),
        ({"mean": ["a", "b"]}, "metadata that this version of fcmae did not write: data.mean"),
        ({"std": [0, 0]}, "did not write: data.std"),
        ({"image_size": "${oc.env:HOME}"}, "did not write"),
        ({"backbone": {"a": 1}}, "did not write: model.backbone"),
        ({"hidden": 1}, "did not write: unknown keys"),
        ({"source": {"_target_": "os.system"}}, "did not write: unknown keys"),
    ],
)
def test_metadata_that_nobody_wrote_is_refused(file, changes, message):
    damaged(file, fcmae=said(file, **changes))
    with pytest.raises(CheckpointError, match=message):
        checkpoint.read(file)


def test_keys_that_came_later_are_those_of_all_files_before(file):
    expected = checkpoint.read(file)["config"]
    text = json.loads(said(file))
    for group, later in (("model", ("strides", "timm")), ("data", encoder.PLAIN)):
        text[group] = {name: value for name, value in text[group].items() if name not in later}
    damaged(file, fcmae=json.dumps(text))
    assert checkpoint.read(file)["config"] == expected


@pytest.mark.parametrize("text", ["", "[]", "{", "9" * 5000, "[" * 60000, '{"model": 1, "data": 2}', " " * 70000])
def test_metadata_that_is_no_json_of_ours_is_refused(file, text):
    damaged(file, fcmae=text)
    with pytest.raises(CheckpointError, match="has metadata that this version of fcmae did not write"):
        checkpoint.read(file)


def test_files_that_hold_something_else_are_refused(file, tmp_path):
    save_file({"w": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="its metadata has no backbone"):
        checkpoint.read(tmp_path / "other.safetensors")
    save_file({"w": torch.zeros(3)}, tmp_path / "other.safetensors", {"backbone": "convnextv2_atto"})
    with pytest.raises(CheckpointError, match="does not hold the weights of a timm ConvNeXt"):
        checkpoint.read(tmp_path / "other.safetensors")
    damaged(file, fcmae=None, backbone="resnet50")
    with pytest.raises(CheckpointError, match="not a ConvNeXt known to timm"):
        load(file)
    file.write_bytes(file.read_bytes()[:100])
    for path in (file, tmp_path / "missing.safetensors", tmp_path):
        with pytest.raises(CheckpointError, match=r"cannot be read|no checkpoint"):
            checkpoint.read(path)


def test_a_network_that_the_file_names_takes_no_memory_of_its_own(file):
    """The weights are those of a tiny network, the name is that of a huge one."""
    damaged(file, fcmae=None, backbone="convnextv2_huge")
    with pytest.raises(CheckpointError, match="the weights in .* do not fit the model"):
        load(file)


def test_old_encoder_files_take_what_they_do_not_say_from_the_user(tmp_path, capsys):
    old = TESTS / "old" / "encoder.safetensors"
    assert_same(fcmae.load(old).state_dict(), checkpoint.read(old)["model"])
    given = ("data.name=synthetic", "data.length=24", "data.image_size=32", "k=1", "cache=null")
    assert main(["knn", f"checkpoint={old}", *given]) == 0
    assert f"{old} does not say data.bit_depth, data.image_size, data.mean, data.std; the" in capsys.readouterr().err
    assert main([*UNTOLD, "data.image_size=32", f"init_from={old}", f"hydra.run.dir={tmp_path}/run"]) == 0
    taken = "model.backbone=convnextv2_atto model.depths=[1, 1, 1, 1] model.dims=[4, 6, 8, 12] model.stem_stride=1"
    assert f"taken from init_from: {taken} data.in_chans=3\n" in capsys.readouterr().err
    assert main(["export", str(old), "--to", "timm", "--out", f"{tmp_path}/timm"]) == 2
    assert "was written by version 0.1.0 and does not say data.bit_depth" in capsys.readouterr().err


def test_random_weights_are_those_that_pretraining_begins_with(capsys, tmp_path, run):
    network = BackboneConfig(depths=[1, 1, 1, 1], dims=[8, 12, 16, 24], stem_stride=1)
    first, again, other = (random_encoder(network, 3, seed) for seed in (0, 0, 1))
    assert_same(first["model"], again["model"])
    cfg = compose("pretrain", ["model=demo", "model.depths=[1,1,1,1]", "model.dims=[8,12,16,24]"])
    assert_same(first["model"], build_fcmae(cfg).backbone.state_dict())
    assert not torch.equal(first["model"]["stem.0.weight"], other["model"]["stem.0.weight"])
    given = ("model=demo", "data.name=synthetic", "data.length=24", "data.image_size=32", "k=3", f"cache={tmp_path}")
    results = []
    for seed in (0, 1, 0):
        assert main(["knn", "checkpoint=random", f"seed={seed}", *given]) == 0
        printed = capsys.readouterr()
        assert f"random weights of convnextv2_atto, drawn with seed={seed}" in printed.err
        assert printed.err.count("features read from") == (2 if len(results) == 2 else 1)  # two are the same images
        results.append(json.loads(printed.out))
    assert results[0] == results[2]
    assert main(["probe", "checkpoint=random", "data=synthetic", *given[:-2], "epochs=1", "warmup_epochs=0"]) == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("knn", "checkpoint=random"), "model.backbone must be a network, such as model=convnextv2_atto"),
        (("knn", "checkpoint=random", "model.backbone=resnet50", "data.length=9"), "not a ConvNeXt known to timm"),
        (
            ("probe", "checkpoint=x", "model=demo"),
            "model.backbone must be unset unless checkpoint=random; got",
        ),
        (("evaluate", "checkpoint=random"), "no checkpoint or run directory random"),
    ],
)
def test_random_weights_need_a_network_and_checkpoints_none(capsys, args, message):
    assert main(list(args)) == 2
    assert message in capsys.readouterr().err


def test_other_channels_than_the_networks_are_refused(run, capsys):
    assert main(["knn", f"checkpoint={run}", "data.in_chans=1", "data.mean=[0.5]", "data.std=[0.5]"]) == 2
    assert f"data.in_chans is 1; {run}/checkpoints/step_00000003.pt has 2" in capsys.readouterr().err


def test_imported_weights_in_a_run_directory_are_no_run(tmp_path, capsys):
    """A sparse checkpoint of the official code, imported: it has no optimizer, and no best evaluation."""
    model = fcmae.FCMAE("convnextv2_atto", decoder_embed_dim=16, depths=(1, 1, 1, 1))
    torch.save({"model": to_pretraining(model.state_dict())}, tmp_path / "sparse.pth")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    import_weights(tmp_path / "sparse.pth", "official", tmp_path / "run" / "checkpoints" / "step_00000000.pt")
    assert main([*TINY_PRETRAIN, f"hydra.run.dir={tmp_path}/run"]) == 2
    held = f"the newest checkpoint in {tmp_path}/run/checkpoints holds weights without an optimizer's state"
    assert held in capsys.readouterr().err
    assert_same(fcmae.load(tmp_path / "run").state_dict(), model.state_dict())
    assert model_of(checkpoint.read(checkpoint.resolve(f"{tmp_path}/run@last")), tmp_path) is not None
