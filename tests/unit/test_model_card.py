"""What a model card says about making the network's input."""

import json
import shutil

import numpy as np
import pytest
import torch

from fcmae.checkpoints import checkpoint
from fcmae.config import DataOverrides, EvaluateConfig
from fcmae.data.pixels.decode import read_file
from fcmae.data.pixels.transforms import eval_transform, normalize
from fcmae.errors import CheckpointError, FCMAEError
from fcmae.evaluation.run import evaluate
from fcmae.interchange import preprocessing
from fcmae.interchange.convert import export, import_weights
from fcmae.models.build import config_of
from tests import interchange as made


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """A classifier as both libraries have it."""
    folder = tmp_path_factory.mktemp("exports")
    made.finetuned(folder / "ours.pt")
    for library in ("timm", "transformers"):
        export(folder / "ours.pt", library, folder / library, check=False)
    return folder


@pytest.fixture
def exported(exports, tmp_path):
    """Copies the classifier of a library to the folder ``out``, to be changed."""
    return lambda library: shutil.copytree(exports / library, tmp_path / "out")


@pytest.mark.parametrize(
    ("in_chans", "image_size", "values", "raw"),
    [
        (1, 64, {"bit_depth": 12}, (110, 70)),
        (3, [64, 96], {"bit_depth": 16, "crop_pct": 0.8}, (90, 200)),
        (6, [96, 64], {"bit_depth": 16, "pad": 3}, (70, 90)),
        (2, 384, {"bit_depth": 9}, (60, 40)),
        (5, 32, {}, (40, 50)),
        (3, 32, {"channels": [2, 0, 4], "nodata": [0, None, 7]}, (40, 50)),
        (2, [32, 64], {"channels": {"input": [0, 5], "target": [1]}, "fit": "pad", "nodata": 0}, (40, 50)),
    ],
)
def test_the_steps_give_our_pixels(tmp_path, monkeypatch, in_chans, image_size, values, raw):
    data = made.data_config(in_chans, image_size, **values)
    kind = np.uint8 if data.bit_depth == 8 else np.uint16
    white = 2**data.bit_depth - 1
    pixels = np.random.default_rng(0).integers(white // 4, 3 * white // 4, (data.layout.of, *raw)).astype(kind)
    for channel, mark in zip(data.layout.input or (), data.marks or (), strict=False):
        if mark is not None:  # other sharp edges would show the rounding between the two passes of a resize
            pixels[channel, 5:20, 10:30] = mark
    np.save(tmp_path / "FILE.npy", pixels)
    monkeypatch.chdir(tmp_path)
    made_by_card: dict = {}
    exec(preprocessing.steps(data), made_by_card)
    ours = normalize(eval_transform(data)(read_file("FILE.npy")), data.mean, data.std)[None]
    assert made_by_card["imgs"].shape == ours.shape
    level = 1 / (255 if data.bit_depth == 8 else 65535)
    assert (made_by_card["imgs"] - ours).abs().max() < 2 * level / min(data.std)


def test_the_steps_read_ordinary_images(tmp_path, monkeypatch):
    from PIL import Image

    data = made.data_config(4, [64, 96])
    Image.fromarray((64 + torch.rand(70, 90, 4) * 128).byte().numpy()).save(tmp_path / "FILE", "PNG")
    monkeypatch.chdir(tmp_path)
    made_by_card: dict = {}
    exec(preprocessing.steps(data), made_by_card)
    ours = normalize(eval_transform(data)(read_file("FILE")), data.mean, data.std)
    assert (made_by_card["imgs"][0] - ours).abs().max() < 2 / 255 / min(data.std)


@pytest.mark.parametrize(
    ("to", "in_chans", "values", "said"),
    [
        ("timm", 3, {}, ""),
        ("timm", 1, {}, ""),
        ("timm", 1, {"bit_depth": 12}, "timm's create_transform reads 8 bits per channel, these images use 12"),
        ("timm", 6, {"bit_depth": 16}, "reads grey or RGB images, these have 6 channels"),
        ("timm", 3, {"pad": 2}, "does not pad (data.pad=2)"),
        ("timm", 3, {"fit": "pad"}, "does not pad (data.fit=pad)"),
        ("timm", 3, {"nodata": 0}, "does not replace pixels without a value (data.nodata=0)"),
        ("timm", 3, {"channels": [2, 1, 0]}, "does not choose channels [2, 1, 0] (data.channels)"),
        ("transformers", 3, {}, ""),
        ("transformers", 3, {"bit_depth": 16}, "The image processor reads 8 bits per channel, these images use 16"),
    ],
)
def test_where_the_other_librarys_transform_does_not_do_the_card_says_so(tmp_path, to, in_chans, values, said):
    made.pretrained(tmp_path / "ours.pt", made.data_config(in_chans, **values))
    export(tmp_path / "ours.pt", to, tmp_path / "out", check=False)
    card = (tmp_path / "out" / "README.md").read_text()
    assert said in card
    assert ("## Input" in card) == bool(said)
    assert ("create_transform(**" in card or "processor = " in card) == (not said)
    depth = values.get("bit_depth", 8)
    assert f"| channels | {in_chans} |\n| bits per channel | {depth} |" in card
    assert json.loads((tmp_path / "out" / "config.json").read_text())["fcmae"]["bit_depth"] == depth


@pytest.mark.parametrize("library", ["timm", "transformers"])
@pytest.mark.parametrize(
    "given", [{"bit_depth": 12, "pad": 2}, {"channels": [3, 0, 1], "nodata": [0, None, 255], "fit": "pad"}]
)
def test_what_other_libraries_lack_comes_back(tmp_path, library, given):
    cfg = made.data_config(**given)
    made.finetuned(tmp_path / "ours.pt", cfg)
    export(tmp_path / "ours.pt", library, tmp_path / "out", check=False)
    import_weights(tmp_path / "out", library, tmp_path / "back.pt")
    data = config_of(checkpoint.read(tmp_path / "back.pt"), tmp_path / "back.pt").data
    for name in ("bit_depth", "pad", "layout", "nodata", "fit"):
        assert getattr(data, name) == getattr(cfg, name)


@pytest.mark.parametrize("value", ["deep", 99, [8], {"a": 1}])
def test_a_config_of_others_with_a_bad_depth_is_refused_in_a_line(tmp_path, exported, value):
    exported("timm")
    file = tmp_path / "out" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "fcmae": {"bit_depth": value}}))
    with pytest.raises(FCMAEError, match="data.bit_depth"):
        import_weights(tmp_path / "out", "timm", tmp_path / "back.pt")


def test_metrics_are_those_of_the_checkpoint(tmp_path):
    """The best checkpoint is not the last: what came later is not its accuracy."""
    (tmp_path / "checkpoints").mkdir()
    made.finetuned(tmp_path / "checkpoints" / "step_00000007.pt")  # its step is 7
    lines = [{"step": 5, "loss": 3.0, "top1": 40.0}, {"step": 7, "top1": 50.0}, {"step": 9, "loss": 1.0, "top1": 30.0}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 7, "top1": 6')
    export(tmp_path / "checkpoints" / "step_00000007.pt", "timm", tmp_path / "out", check=False)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| loss | 3 (step 5) |\n| top1 | 50 (step 7) |" in card


@pytest.mark.parametrize(("image_size", "crop"), [(64, "0.8"), (384, "none, both sides are resized")])
def test_the_crop_of_the_card_and_of_what_comes_back_is_ours(tmp_path, image_size, crop):
    made.finetuned(tmp_path / "ours.pt", made.data_config(image_size=image_size, crop_pct=0.8))
    for library in ("timm", "transformers"):
        export(tmp_path / "ours.pt", library, tmp_path / library, check=False)
        assert f"| evaluation crop | {crop} |" in (tmp_path / library / "README.md").read_text()
        assert import_weights(tmp_path / library, library, tmp_path / f"{library}.pt") == []
        assert config_of(checkpoint.read(tmp_path / f"{library}.pt"), tmp_path / f"{library}.pt").data.crop_pct == 0.8


def test_another_evaluation_of_timm_is_said(tmp_path, exported):
    exported("timm")
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text())
    config["pretrained_cfg"] |= {"crop_mode": "border", "interpolation": "bilinear"}
    file.write_text(json.dumps(config))
    assert import_weights(tmp_path / "out", "timm", tmp_path / "back.pt") == [
        "timm evaluates these weights with crop_mode=border; here it is center, so accuracies may differ",
        "timm evaluates these weights with interpolation=bilinear; here it is bicubic, so accuracies may differ",
    ]


@pytest.mark.parametrize(
    ("change", "size", "crop_pct"),
    [
        ({"size": {"shortest_edge": 80}, "crop_size": {"height": 64, "width": 64}}, (64, 64), 0.8),
        ({"size": 80, "crop_size": 64}, (64, 64), 0.8),
        ({"size": {"height": 96, "width": 64}, "crop_size": None}, (96, 64), 0.875),
        ({"size": {"longest_edge": 96}}, (224, 224), 0.875),
        (
            {"size": {"height": 64, "width": 64}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": False},
            (64, 64),
            0.875,
        ),
    ],
)
def test_processors_of_any_kind_say_the_size(tmp_path, exported, change, size, crop_pct):
    exported("transformers")
    for name, values in (("config", {"fcmae": None}), ("preprocessor_config", {"crop_pct": None, **change})):
        file = tmp_path / "out" / f"{name}.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
    import_weights(tmp_path / "out", "transformers", tmp_path / "back.pt")
    data = config_of(checkpoint.read(tmp_path / "back.pt"), tmp_path / "back.pt").data
    assert (data.size, data.crop_pct) == (size, crop_pct)


def test_a_backbone_alone_cannot_be_evaluated(tmp_path):
    made.pretrained(tmp_path / "ours.pt")
    export(tmp_path / "ours.pt", "timm", tmp_path / "out", check=False)
    import_weights(tmp_path / "out", "timm", tmp_path / "back.pt")
    with pytest.raises(CheckpointError, match=r"back.pt has no classifier, only a backbone; fine-tune it, or use knn"):
        evaluate(EvaluateConfig(checkpoint=str(tmp_path / "back.pt"), data=DataOverrides(name="synthetic")))
