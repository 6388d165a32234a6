"""Official and timm's files: what is written loads there, gives our outputs, and comes back with the same bits."""

import argparse
import json
import sys
from functools import partial

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import fcmae
from fcmae.config import DataConfig
from fcmae.data.pixels.transforms import eval_transform, normalize
from fcmae.errors import UsageError, WeightsError
from fcmae.interchange import official
from fcmae.interchange.convert import export, import_weights
from fcmae.interchange.network import SIZES, Given, Structure
from fcmae.models import create_backbone
from tests import interchange as made
from tests.conftest import read_golden
from tests.results import assert_same


@pytest.mark.slow
def test_the_table_of_sizes_is_timms():
    for name in SIZES:
        with torch.device("meta"):
            model = create_backbone(name)
        assert Structure.of(model).backbone_config() == {"backbone": name, "stem_stride": 4}


@pytest.mark.parametrize("act", ["gelu_tanh", "quick_gelu", partial(torch.nn.GELU, approximate="tanh")], ids=str)
def test_an_approximation_of_gelu_is_not_exported_as_gelu(act):
    with torch.device("meta"):
        model = create_backbone("convnextv2_atto", act_layer=act)
    with pytest.raises(WeightsError, match="other libraries have 7 x 7 and exact GELU"):
        Structure.of(model)


@pytest.mark.parametrize("backbone", ["convnextv2_atto", "convnextv2_tiny", "convnext_tiny"])
@pytest.mark.parametrize("library", ["official", "timm"])
def test_a_classifier_comes_back_with_the_same_bits(tmp_path, library, backbone):
    weights = made.finetuned(tmp_path / "ours.pt", backbone=backbone)
    result = export(tmp_path / "ours.pt", library, tmp_path / "out")
    assert result.error == 0
    source = tmp_path / "out" / (f"{backbone}_ft.pt" if library == "official" else "")
    import_weights(source, library, tmp_path / "back.pt")
    assert_same(made.weights_in(tmp_path / "back.pt"), weights)
    ours, back = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("ours", "back"))
    assert back["classes"] == made.CLASSES
    for key in ("in_chans", "image_size", "mean", "std", "crop_pct"):
        assert back["config"]["data"][key] == ours["config"]["data"][key]
    assert isinstance(fcmae.load(tmp_path / "back.pt"), timm.models.ConvNeXt)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"export A=1\n", "cannot be read: "),
        (b"", "cannot be read: "),
        (None, "cannot be read: it is no file of torch, or h"),
    ],
)
def test_what_is_no_file_of_weights_is_said(tmp_path, content, message):
    file = tmp_path / "x.pt"
    torch.save({"model": print}, file) if content is None else file.write_bytes(content)
    with pytest.raises(WeightsError, match=message):
        import_weights(file, "official", tmp_path / "ours.pt")


def test_no_file_is_overwritten(tmp_path):
    made.finetuned(tmp_path / "ours.pt")
    export(tmp_path / "ours.pt", "timm", tmp_path / "out")
    before = (tmp_path / "ours.pt").read_bytes()
    with pytest.raises(UsageError, match="--out .*ours.pt exists; name a file that is new"):
        import_weights(tmp_path / "out", "timm", tmp_path / "ours.pt")
    assert (tmp_path / "ours.pt").read_bytes() == before
    with pytest.raises(UsageError, match="--out .*ours.pt/x cannot be written"):
        import_weights(tmp_path / "out", "timm", tmp_path / "ours.pt" / "x")
    with pytest.raises(UsageError, match="--out .*ours.pt/x cannot be made: Not a directory"):
        export(tmp_path / "ours.pt", "timm", tmp_path / "ours.pt" / "x")


@pytest.mark.parametrize("kwargs", [{}, {"stem_stride": 2}, {"stem_stride": 1, "backbone": "convnextv2_tiny"}])
def test_a_backbone_by_way_of_timm(tmp_path, kwargs):
    weights = made.pretrained(tmp_path / "ours.pt", made.data_config(in_chans=4), **kwargs)
    assert export(tmp_path / "ours.pt", "timm", tmp_path / "out").error == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["pretrained_cfg"]["first_conv"] is None  # timm before 1.0.31 would replace its weights
    import_weights(tmp_path / "out", "timm", tmp_path / "back.pt")
    assert_same(made.weights_in(tmp_path / "back.pt"), made.backbone_of(weights))


@pytest.mark.parametrize("kwargs", [{}, {"stem_stride": 2}, {"stem_stride": 1}, {"backbone": "convnext_tiny"}])
def test_a_file_of_timms_alone_says_its_architecture(tmp_path, kwargs):
    """As timm's model.state_dict() is saved; with a config.json of timm beside it, everything else is known too."""
    weights = made.finetuned(tmp_path / "ours.pt", **kwargs)
    export(tmp_path / "ours.pt", "timm", tmp_path / "out", check=False)
    torch.save({"state_dict": weights}, tmp_path / "alone.pth")
    for file, given in ((tmp_path / "out" / "model.safetensors", None), (tmp_path / "alone.pth", Given(made.CLASSES))):
        back = tmp_path / f"{file.stem}.pt"
        import_weights(file, "timm", back, given)
        assert_same(made.weights_in(back), weights)
        state = torch.load(back, weights_only=True)
        assert state["classes"] == made.CLASSES
        assert state["config"]["data"]["mean"] == (made.data_config().mean if given is None else DataConfig().mean)
        assert fcmae.load(back)(torch.zeros(1, 3, 64, 64)).shape == (1, 3)


def test_files_of_timm_and_of_the_official_code_are_told_apart(tmp_path):
    made.finetuned(tmp_path / "ours.pt")
    export(tmp_path / "ours.pt", "timm", tmp_path / "timm", check=False)
    export(tmp_path / "ours.pt", "official", tmp_path / "official", check=False)
    files = {"official": tmp_path / "timm" / "model.safetensors", "timm": next((tmp_path / "official").glob("*_ft.pt"))}
    says = {
        "official": "has the names of timm: import it with --from timm",
        "timm": "official code; import it with --from",
    }
    for library, file in files.items():
        with pytest.raises(WeightsError, match=says[library]):
            import_weights(file, library, tmp_path / "back.pt")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(WeightsError, match="does not hold a ConvNeXt of timm, whose names begin with stem.0"):
        import_weights(tmp_path / "other.pt", "timm", tmp_path / "back.pt")


@pytest.mark.parametrize("in_chans", [3, 4])
def test_both_official_layouts_of_a_pretraining_checkpoint(tmp_path, in_chans):
    weights = made.pretrained(tmp_path / "ours.pt", made.data_config(in_chans))
    assert export(tmp_path / "ours.pt", "official", tmp_path / "out").error == 0
    import_weights(tmp_path / "out" / "checkpoint-7.pth", "official", tmp_path / "sparse.pt")
    assert_same(made.weights_in(tmp_path / "sparse.pt"), weights)
    assert isinstance(fcmae.load(tmp_path / "sparse.pt"), fcmae.FCMAE)
    import_weights(tmp_path / "out" / "convnextv2_atto_fcmae.pt", "official", tmp_path / "dense.pt")
    assert_same(made.weights_in(tmp_path / "dense.pt"), made.backbone_of(weights))
    dense = torch.load(tmp_path / "out" / "convnextv2_atto_fcmae.pt", weights_only=True)["model"]
    assert dense["stages.0.0.grn.gamma"].shape == (1, 1, 1, 32)
    assert not any(name.startswith(("norm.", "head.")) for name in dense)


@pytest.mark.parametrize(("name", "kind"), [("fcmae_96_raw", "sparse"), ("convnextv2_classifier", "dense")])
def test_golden_official_weights_alone_say_what_they_are(tmp_path, name, kind):
    """As the official scripts save them, the arguments included, and as safetensors."""
    meta, golden = read_golden(name)
    weights = {key.removeprefix("param."): value for key, value in golden.items() if key.startswith("param.")}
    torch.save({"model": weights, "args": argparse.Namespace(epochs=800)}, tmp_path / "official.pth")
    save_file(weights, tmp_path / "official.safetensors")
    for file in ("official.pth", "official.safetensors"):
        import_weights(tmp_path / file, "official", tmp_path / f"{file}.ours")
        model = fcmae.load(tmp_path / f"{file}.ours")
        if kind == "dense":
            with torch.no_grad():
                torch.testing.assert_close(model(golden["input.imgs"]), golden["output.logits"], rtol=1e-5, atol=1e-6)
        else:
            assert model.grn_scope == "batch"
            model.targets["pixels"].norm = "patch" if meta["norm_pix_loss"] else "none"
            loss = model(golden["input.imgs"].float(), golden["input.mask"].bool()).loss
            torch.testing.assert_close(loss, golden["output.loss"].squeeze(), rtol=1e-5, atol=0)


def test_official_files_of_a_published_size_get_timms_name(tmp_path):
    weights = made.finetuned(tmp_path / "ours.pt", depths=None, dims=None)
    file = tmp_path / "atto.pt"
    torch.save({"model": official.to_classifier(weights)}, file)
    import_weights(file, "official", tmp_path / "back.pt", Given(classes=["x", "y", "z"]))
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert back["config"]["model"]["backbone"] == "convnextv2_atto"
    assert back["config"]["model"]["dims"] is None
    assert back["classes"] == ["x", "y", "z"]
    assert_same(back["model"], weights)


def test_other_channels_need_their_normalisation(tmp_path):
    weights = made.finetuned(tmp_path / "ours.pt", made.data_config(in_chans=2))
    torch.save({"model": official.to_classifier(weights)}, tmp_path / "official.pt")
    with pytest.raises(WeightsError, match="2 channels are normalised; give --mean and --std"):
        import_weights(tmp_path / "official.pt", "official", tmp_path / "back.pt")
    said = Given(mean=[0.5, 0.4], std=[0.1, 0.2], image_size=64)
    import_weights(tmp_path / "official.pt", "official", tmp_path / "back.pt", said)
    assert torch.load(tmp_path / "back.pt", weights_only=True)["config"]["data"]["mean"] == [0.5, 0.4]


def _edit_official(folder, change):
    content = torch.load(folder / "convnextv2_atto_ft.pt", weights_only=True)
    change(content["model"])
    torch.save(content, folder / "convnextv2_atto_ft.pt")
    return folder / "convnextv2_atto_ft.pt"


def _edit_timm(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("library", "edit", "change", "message"),
    [
        ("official", _edit_official, lambda w: w.pop("norm.weight"), "missing.*norm.weight"),
        ("official", _edit_official, lambda w: w.pop("stages.1.1.grn.beta"), "missing.*stages.1.1.grn.beta"),
        ("official", _edit_official, lambda w: w.update(extra=torch.ones(1)), "unexpected.*extra"),
        ("official", _edit_official, lambda w: w.pop("stages.3.0.dwconv.weight"), "missing stages.3.0.dwconv.weight"),
        (
            "official",
            _edit_official,
            lambda w: w.update({"stages.0.0.pwconv1.weight": w["stages.0.0.pwconv1.weight"].T.contiguous()}),
            r"other shapes.*stages.0.0.pwconv1.weight \[8, 32\] for \[32, 8, 1, 1\]",
        ),
        ("official", _edit_official, lambda w: w.update({"norm.bias": w["norm.bias"].double()}), "16 bits: norm.bias"),
        ("timm", _edit_timm, lambda w: w.pop("head.norm.bias"), "missing.*head.norm.bias"),
        ("timm", _edit_timm, lambda w: w.update(extra=torch.ones(1)), "unexpected.*extra"),
        ("timm", _edit_timm, lambda w: w.update({"stem.0.bias": torch.ones(3)}), r"stem.0.bias \[3\] for \[8\]"),
    ],
)
def test_files_that_do_not_fit_are_refused_by_name(tmp_path, library, edit, change, message):
    made.finetuned(tmp_path / "ours.pt")
    export(tmp_path / "ours.pt", library, tmp_path / "out", check=False)
    with pytest.raises(WeightsError, match=message):
        import_weights(edit(tmp_path / "out", change), library, tmp_path / "back.pt")
    assert not (tmp_path / "back.pt").exists()


def test_what_a_format_cannot_hold_is_refused(tmp_path):
    made.finetuned(tmp_path / "stride1.pt", stem_stride=1)
    with pytest.raises(WeightsError, match="strides .* only; .*: export it to timm or onnx"):
        export(tmp_path / "stride1.pt", "official", tmp_path / "out")
    made.finetuned(tmp_path / "tiny_hnf.pt", backbone="convnext_tiny_hnf")
    with pytest.raises(WeightsError, match="other libraries have"):
        export(tmp_path / "tiny_hnf.pt", "official", tmp_path / "out")
    # a backbone whose final norm was trained, as a classifier of timm's without its last layer has
    made.finetuned(tmp_path / "ours.pt")
    export(tmp_path / "ours.pt", "timm", tmp_path / "timm")
    config = json.loads((tmp_path / "timm" / "config.json").read_text())
    (tmp_path / "timm" / "config.json").write_text(json.dumps({**config, "num_classes": 0}))
    _edit_timm(tmp_path / "timm", lambda w: [w.pop(name) for name in ("head.fc.weight", "head.fc.bias")])
    import_weights(tmp_path / "timm", "timm", tmp_path / "backbone.pt")
    with pytest.raises(WeightsError, match="would lose the trained head.norm.weight"):
        export(tmp_path / "backbone.pt", "official", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.endswith(".tmp")) == []


def test_a_directory_that_is_not_empty_is_left_alone(tmp_path):
    made.finetuned(tmp_path / "ours.pt")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(UsageError, match="exists; name a directory that is new or empty"):
        export(tmp_path / "ours.pt", "timm", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_files_with_code_in_them_are_refused(tmp_path):
    torch.save({"model": {"a": print}}, tmp_path / "official.pt")
    with pytest.raises(WeightsError, match="cannot be read"):
        import_weights(tmp_path / "official.pt", "official", tmp_path / "back.pt")


@pytest.mark.parametrize("image_size", [64, [64, 96], 384])
def test_timms_transform_gives_our_pixels(tmp_path, image_size):
    """To one level in 255: timm resizes with Pillow, we with torchvision."""
    from PIL import Image
    from torchvision.transforms.v2.functional import pil_to_tensor

    data = made.data_config(image_size=image_size)
    made.finetuned(tmp_path / "ours.pt", data)
    export(tmp_path / "ours.pt", "timm", tmp_path / "out", check=False)
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    assert model.pretrained_cfg["label_names"] == made.CLASSES
    assert model.pretrained_cfg["first_conv"] == "stem.0"
    transform = made.timms_transform(**timm.data.resolve_model_data_config(model))
    image = Image.fromarray((torch.rand(300, 420, 3) * 255).byte().numpy())
    ours = normalize(eval_transform(data)(pil_to_tensor(image)), data.mean, data.std)
    assert (transform(image) - ours).abs().max() < 1.01 / 255 / min(data.std)


def test_without_the_other_library_one_line_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    made.finetuned(tmp_path / "ours.pt")
    result = export(tmp_path / "ours.pt", "transformers", tmp_path / "out")
    assert str(result) == "not checked: Transformers is not installed: pip install 'fcmae[transformers]'"
