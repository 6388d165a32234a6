"""What the package offers in Python: public names, models that are checked, saved models of the user's loop."""

import json
from functools import partial

import pytest
import timm
import torch

import fcmae
from fcmae.cli import main
from fcmae.engines import ENGINES
from fcmae.errors import UsageError, WeightsError
from fcmae.targets import Pixels
from tests.conftest import TINY_FINETUNE
from tests.interchange import pretrained
from tests.results import assert_same

SMALL = {"depths": (1, 1, 1, 1), "dims": (8, 12, 16, 24)}


def test_the_public_names_are_listed_and_there():
    assert {"FCMAE", "load", "save", "__version__"} <= set(dir(fcmae))
    for name in fcmae.__all__:
        assert getattr(fcmae, name).__name__ == name
    with pytest.raises(AttributeError, match="module 'fcmae' has no attribute 'lode'"):
        fcmae.lode  # noqa: B018


def test_a_users_backbone_is_not_changed():
    backbone = timm.create_model("convnextv2_atto", num_classes=7, **SMALL)
    before = {name: (param.requires_grad, param.clone()) for name, param in backbone.named_parameters()}
    model = fcmae.FCMAE(backbone, decoder_embed_dim=16)
    model(torch.randn(2, 3, 64, 64)).loss.backward()
    for name, param in backbone.named_parameters():
        assert param.requires_grad == before[name][0], name
        assert torch.equal(param, before[name][1]), name
        assert (param.grad is None) == name.startswith("head."), name


def test_a_loaded_backbone_has_no_frozen_parameter(tmp_path):
    pretrained(tmp_path / "run.pt")
    backbone = fcmae.load(tmp_path / "run.pt").backbone
    backbone.reset_classifier(5)
    assert all(param.requires_grad for param in backbone.parameters())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("mask_ratio", 1.0, r"mask_ratio must be in \[0, 1\); got 1.0"),
        ("mask_ratio", -0.1, "got -0.1$"),
        ("mask_patch_size", 48, "mask_patch_size must be a multiple of the backbone's total stride, 32; got 48"),
        ("mask_patch_size", 0, "mask_patch_size must be .*; got 0"),
        ("engine", "dense", "engine must be one of packed, masked, minkowski; got 'dense'"),
        ("grn_scope", "gpu", "grn_scope must be one of image, batch; got 'gpu'"),
        ("recompute_stages", [5], r"recompute_stages must be stages, 1 to 4; got \[5\]"),
    ],
)
def test_attributes_are_checked_after_construction_too(name, value, message):
    model = fcmae.FCMAE("convnextv2_atto", decoder_embed_dim=16, **SMALL)
    before = getattr(model, name)
    with pytest.raises(ValueError, match=message):
        setattr(model, name, value)
    assert getattr(model, name) == before


def test_attributes_take_what_the_constructor_takes():
    model = fcmae.FCMAE("convnextv2_atto", decoder_embed_dim=16, **SMALL)
    model.engine = "masked"
    assert model.engine is ENGINES["masked"]
    model.mask_ratio, model.grn_scope, model.mask_patch_size = 0.5, "batch", 64
    assert model(torch.randn(2, 3, 128, 128)).mask.float().mean() == 0.5


@pytest.mark.parametrize(
    ("name", "sizes"), [("convnextv2_atto", SMALL), ("convnext_tiny", SMALL), ("convnextv2_base", SMALL)]
)
def test_a_model_of_the_users_own_loop_is_saved(tmp_path, name, sizes):
    """Exports, loads and fine-tunes; layers differ between the small and the large sizes."""
    backbone = timm.create_model(name, in_chans=2, num_classes=3, **sizes)
    targets = {"pixels": partial(Pixels, norm="none")}
    model = fcmae.FCMAE(backbone, mask_ratio=0.5, mask_patch_size=64, decoder_embed_dim=16, targets=targets)
    model(torch.randn(2, 2, 128, 128)).loss.backward()
    file = tmp_path / "own.pt"
    fcmae.save(model, file, image_size=(64, 128), mean=[0.4, 0.5], std=[0.1, 0.2], bit_depth=12)
    loaded = fcmae.load(file)
    assert_same(loaded.state_dict(), {k: v for k, v in model.state_dict().items() if "head.fc" not in k})
    mask = torch.tensor([[True, False]] * 2)
    imgs = torch.randn(2, 2, 64, 128)
    assert torch.equal(loaded(imgs, mask).loss, model.eval()(imgs, mask).loss)
    assert main(["export", str(file), "--to", "timm", "--out", str(tmp_path / "timm")]) == 0
    written = json.loads((tmp_path / "timm" / "config.json").read_text())
    assert written["pretrained_cfg"]["mean"] == [0.4, 0.5]
    assert written["pretrained_cfg"]["input_size"] == [2, 64, 128]


def test_a_saved_model_is_fine_tuned_and_a_saved_classifier_evaluated(tmp_path, capsys):
    small = {**SMALL, "patch_size": 1}
    model = fcmae.FCMAE("convnextv2_atto", decoder_embed_dim=16, **small)
    fcmae.save(model, tmp_path / "own.pt", image_size=32)
    assert main([*TINY_FINETUNE, f"init_from={tmp_path}/own.pt", f"hydra.run.dir={tmp_path}/run"]) == 0
    classifier = timm.create_model("convnextv2_atto", num_classes=10, **small)
    fcmae.save(classifier, tmp_path / "classifier.pt", image_size=32)
    capsys.readouterr()
    assert main(["evaluate", f"checkpoint={tmp_path}/classifier.pt", "data.name=synthetic", "data.length=20"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 20


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"in_chans": 4, "num_classes": 2}, "mean and std must be given for a model of 4 channels"),
        ({"num_classes": 0}, "model must be an FCMAE or a timm ConvNeXt with a classifier; got ConvNeXt"),
        ({"num_classes": 3, "kernel_sizes": 5}, "kernel_size"),
    ],
)
def test_what_a_checkpoint_cannot_hold_is_refused(tmp_path, kwargs, message):
    model = timm.create_model("convnextv2_atto", **SMALL, **kwargs)
    with pytest.raises((UsageError, WeightsError), match=message):
        fcmae.save(model, tmp_path / "own.pt")
    assert not list(tmp_path.iterdir())
