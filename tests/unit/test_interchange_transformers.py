"""Transformers reads what is exported, its classes give our outputs, and the same bits come back."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision.transforms.v2.functional import pil_to_tensor

from fcmae.data.pixels.transforms import eval_transform, normalize
from fcmae.errors import WeightsError
from fcmae.interchange import transformers_format
from fcmae.interchange.convert import export, import_weights
from fcmae.interchange.network import SIZES, Network, Structure
from fcmae.models import create_backbone
from tests import interchange as made
from tests.results import assert_same

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-5


def close(theirs: torch.Tensor, ours: torch.Tensor) -> None:
    torch.testing.assert_close(theirs, ours, rtol=0, atol=TOLERANCE)


@pytest.fixture
def exported(tmp_path):
    """Exports a checkpoint of 3 channels and returns it with the directory."""

    def run(kind, data=None, **model):
        getattr(made, kind)(tmp_path / "ours.pt", data, **model)
        assert export(tmp_path / "ours.pt", "transformers", tmp_path / "out").error < TOLERANCE
        return Network.read(tmp_path / "ours.pt"), tmp_path / "out"

    return run


@pytest.mark.parametrize(("in_chans", "stride", "backbone"), [(3, 4, "convnextv2_atto"), (5, 1, "convnextv2_tiny")])
def test_classifier_and_its_loss(exported, in_chans, stride, backbone):
    data = made.data_config(in_chans=in_chans)
    network, folder = exported("finetuned", data, stem_stride=stride, backbone=backbone)
    model = transformers.ConvNextV2ForImageClassification.from_pretrained(folder).eval()
    config = transformers.ConvNextV2Config.from_pretrained(folder)
    assert (config.num_channels, config.patch_size) == (in_chans, stride)
    assert config.id2label == dict(enumerate(made.CLASSES))
    imgs, labels = network.fixed_input(), torch.tensor([2, 0])
    with torch.no_grad():
        out = model(imgs, labels=labels)
    close(out.logits, network.outputs(imgs)["logits"])
    close(out.loss, F.cross_entropy(network.outputs(imgs)["logits"], labels))


def test_backbone_by_every_class(exported):
    network, folder = exported("pretrained")
    imgs = network.fixed_input()
    ours = network.outputs(imgs)
    stages = network.model.forward_intermediates(imgs, intermediates_only=True)
    with torch.no_grad():
        out = transformers.ConvNextV2Model.from_pretrained(folder).eval()(imgs, output_hidden_states=True)
        layers = {"out_features": ["stage1", "stage3", "stage4"]}
        by_name = transformers.ConvNextV2Backbone.from_pretrained(folder, **layers).eval()(imgs).feature_maps
        by_index = transformers.ConvNextV2Backbone.from_pretrained(folder, out_indices=[1, 3, 4]).eval()(imgs)
    close(out.last_hidden_state, ours["features"])
    close(out.pooler_output, ours["pooled"])
    assert len(out.hidden_states) == 5
    for theirs, stage in zip(out.hidden_states[1:], stages, strict=True):
        close(theirs, stage)
    for theirs, same, stage in zip(by_name, by_index.feature_maps, [stages[0], stages[2], stages[3]], strict=True):
        # their backbone ends each map with a norm of its own, untrained
        normed = F.layer_norm(stage.permute(0, 2, 3, 1), [stage.shape[1]], eps=1e-6).permute(0, 3, 1, 2)
        close(theirs, normed)
        close(same, normed)


def test_convnext_of_the_first_version(exported):
    network, folder = exported("finetuned", backbone="convnext_tiny")
    model = transformers.ConvNextForImageClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        close(model(network.fixed_input()).logits, network.outputs(network.fixed_input())["logits"])


@pytest.mark.parametrize("name", [name for name in SIZES if name.startswith("convnextv2_")])
def test_names_and_shapes_of_every_size(name):
    with torch.device("meta"):
        ours = create_backbone(name, num_classes=7)
        structure = Structure.of(ours)
        config = transformers.ConvNextV2Config(
            depths=structure.depths, hidden_sizes=structure.dims, num_labels=structure.num_classes
        )
        theirs = transformers.ConvNextV2ForImageClassification(config).state_dict()
    converted = transformers_format.to_transformers(ours.state_dict(), 2)
    assert {key: value.shape for key, value in converted.items()} == {k: v.shape for k, v in theirs.items()}


@pytest.mark.parametrize(
    ("kind", "backbone"),
    [("finetuned", "convnextv2_atto"), ("finetuned", "convnext_tiny"), ("pretrained", "convnextv2_tiny")],
)
def test_the_same_bits_come_back(exported, tmp_path, kind, backbone):
    network, folder = exported(kind, made.data_config(4, [64, 96], crop_pct=0.8), backbone=backbone)
    import_weights(folder, "transformers", tmp_path / "back.pt")
    back = Network.read(tmp_path / "back.pt")
    assert_same(back.weights, network.weights)
    assert back.classes == network.classes
    assert back.backbone_config.backbone == backbone
    for key in ("in_chans", "size", "mean", "std"):
        assert getattr(back.cfg.data, key) == getattr(network.cfg.data, key)
    assert back.cfg.data.crop_pct == pytest.approx(0.8)


def test_a_directory_that_transformers_wrote(exported, tmp_path):
    network, folder = exported("finetuned")
    model = transformers.ConvNextV2ForImageClassification.from_pretrained(folder)
    model.config.layer_norm_eps = 1e-12  # its default
    model.save_pretrained(tmp_path / "theirs")
    notes = import_weights(tmp_path / "theirs", "transformers", tmp_path / "back.pt")
    assert notes == ["the final norm has eps 1e-12 in these files and 1e-06 here"]
    assert_same(Network.read(tmp_path / "back.pt").weights, network.weights)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("convnextv2.layernorm.bias"), "missing.*convnextv2.layernorm.bias"),
        (lambda w: w.update(extra=torch.ones(1)), "unexpected.*extra"),
        (lambda w: w.update({"classifier.bias": torch.ones(4)}), r"classifier.bias \[4\] for \[3\]"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(exported, tmp_path, change, message):
    _, folder = exported("finetuned")
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(WeightsError, match=message):
        import_weights(folder, "transformers", tmp_path / "back.pt")


def test_configs_that_do_not_fit_are_refused(exported, tmp_path):
    _, folder = exported("finetuned")
    config = json.loads((folder / "config.json").read_text())
    for change, message in (
        ({"model_type": "resnet"}, "model_type 'resnet'"),
        ({"hidden_act": "relu"}, "hidden_act 'relu'"),
        ({"patch_size": 2}, "patch_size 2; must be 1 or 4"),
    ):
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(WeightsError, match=message):
            import_weights(folder, "transformers", tmp_path / "back.pt")


def test_a_stem_of_stride_2_is_refused(tmp_path):
    made.pretrained(tmp_path / "ours.pt", stem_stride=2)
    with pytest.raises(WeightsError, match="stem stride 2, after which timm downsamples before the first stage too"):
        export(tmp_path / "ours.pt", "transformers", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def processed(exported, data, raw=(420, 300)):
    """An image of ``raw`` pixels as their processor and our evaluation make it."""
    _, folder = exported("finetuned", data)
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    pixels = (torch.rand(*raw, data.in_chans) * 255).byte().numpy()
    image = Image.fromarray(np.squeeze(pixels))
    ours = normalize(eval_transform(data)(pil_to_tensor(image)), data.mean, data.std)
    return processor(image, return_tensors="pt")["pixel_values"][0], ours


@pytest.mark.parametrize(("image_size", "in_chans"), [(64, 3), (64, 1), (64, 4), (384, 3), ([384, 416], 3)])
def test_the_image_processor_gives_our_pixels(exported, image_size, in_chans):
    """Transformers 5 resizes with torchvision as we do: equal up to the rounding of the normalisation."""
    close(*processed(exported, made.data_config(in_chans, image_size, crop_pct=0.8)))


def test_for_other_sizes_than_squares_the_image_processor_suits_images_of_that_aspect_ratio(exported, tmp_path):
    """It can only resize both sides to a size: the card says so."""
    data = made.data_config(3, [64, 96], crop_pct=0.8)
    close(*processed(exported, data, (280, 420)))
    assert "does not keep the aspect ratio" in (tmp_path / "out" / "README.md").read_text()


def test_the_image_processor_crops_one_pixel_earlier_if_an_odd_number_is_cut_off(exported):
    """71 x 99 px to 64 x 64: torchvision rounds the half pixel (to even), Transformers cuts it off."""
    theirs, ours = processed(exported, made.data_config(image_size=64, crop_pct=0.9))
    close(theirs[:, 1:, 1:], ours[:, :-1, :-1])
