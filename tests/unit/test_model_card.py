"""What a model card says about making the network's input."""

import json

import numpy as np
import pytest
import torch

from fcmae.data.pixels import read_file
from fcmae.data.transforms import eval_transform, normalize
from fcmae.errors import FCMAEError
from fcmae.interchange import preprocessing
from fcmae.interchange.convert import export, import_weights
from fcmae.training import checkpoint
from fcmae.training.build import config_of
from tests import interchange as made


@pytest.mark.parametrize(
    ("in_chans", "image_size", "values", "raw"),
    [
        (1, 64, {"bit_depth": 12}, (110, 70)),
        (3, [64, 96], {"bit_depth": 16, "crop_pct": 0.8}, (90, 200)),
        (6, [96, 64], {"bit_depth": 16, "pad": 3}, (70, 90)),
        (2, 384, {"bit_depth": 9}, (60, 40)),
        (5, 32, {}, (40, 50)),
    ],
)
def test_the_steps_give_our_pixels(tmp_path, monkeypatch, in_chans, image_size, values, raw):
    data = made.data_config(in_chans, image_size, **values)
    kind = np.uint8 if data.bit_depth == 8 else np.uint16
    white = 2**data.bit_depth - 1
    pixels = np.random.default_rng(0).integers(white // 4, 3 * white // 4, (in_chans, *raw)).astype(kind)
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
def test_bit_depth_and_padding_come_back(tmp_path, library):
    made.finetuned(tmp_path / "ours.pt", made.data_config(bit_depth=12, pad=2))
    export(tmp_path / "ours.pt", library, tmp_path / "out", check=False)
    import_weights(tmp_path / "out", library, tmp_path / "back.pt")
    data = config_of(checkpoint.read(tmp_path / "back.pt"), tmp_path / "back.pt").data
    assert (data.bit_depth, data.pad) == (12, 2)


@pytest.mark.parametrize("value", ["deep", 99, [8], {"a": 1}])
def test_a_config_of_others_with_a_bad_depth_is_refused_in_a_line(tmp_path, value):
    made.finetuned(tmp_path / "ours.pt")
    export(tmp_path / "ours.pt", "timm", tmp_path / "out", check=False)
    file = tmp_path / "out" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "fcmae": {"bit_depth": value}}))
    with pytest.raises(FCMAEError, match="data.bit_depth"):
        import_weights(tmp_path / "out", "timm", tmp_path / "back.pt")
