"""The teacher target: what it predicts, that it stays out of everything that is saved, and mistakes."""

import shutil
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F

from fcmae.config import compose, portable
from fcmae.errors import ConfigError
from fcmae.models import FCMAE
from fcmae.models.build import load
from fcmae.targets import Seen, Teacher
from fcmae.tasks.pretraining import Pretraining
from fcmae.tasks.teachers import load_teachers
from tests.conftest import TINY_PRETRAIN
from tests.results import assert_same, newest

RESNET = ("target=teacher", "target.teacher.name=test_resnet", "target.teacher.checkpoint=teacher.pt")
VIT = ("target=teacher", "target.teacher.name=test_vit", "target.teacher.checkpoint=vit.safetensors")
DATA = ("data.mean=[0.3,0.4,0.5]", "data.std=[0.1,0.2,0.3]")
RUN = (*TINY_PRETRAIN, "schedule.epochs=2", *DATA, *RESNET, "target=[pixels,teacher]", "optim.ema_decay=0.9")


@pytest.fixture(autouse=True)
def weights(tmp_path, monkeypatch):
    """Files of two small networks; one with the classifier, as published files have it."""
    from safetensors.torch import save_file

    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": timm.create_model("test_resnet").state_dict()}, "teacher.pt")
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), "vit.safetensors")
    return tmp_path


def config(*overrides):
    return compose("pretrain", [*TINY_PRETRAIN[1:], *DATA, *overrides])


def teacher_of(*overrides):
    cfg = config(*overrides)
    features, _ = load_teachers(cfg)
    given = {name: value for name, value in cfg.target["teacher"].items() if name not in ("_target_", "weight")}
    target = Teacher(patch_size=8, in_chans=cfg.data.in_chans, **given)
    target.network = features["teacher"]
    return target


def by_hand(name, file, imgs, options=None):
    """Last feature map of timm's own network for images normalised as timm does."""
    network = timm.create_model(name, num_classes=0, **(options or {})).eval()
    weights = torch.load(file)["state_dict"] if file.endswith(".pt") else timm.models.load_state_dict(file)
    network.load_state_dict({key: value for key, value in weights.items() if not key.startswith("fc.")})
    raw = imgs * torch.tensor([0.1, 0.2, 0.3]).view(-1, 1, 1) + torch.tensor([0.3, 0.4, 0.5]).view(-1, 1, 1)
    mean, std = (torch.tensor(network.pretrained_cfg[key]).view(-1, 1, 1) for key in ("mean", "std"))
    return network.forward_features((raw - mean) / std)


@torch.no_grad()
def test_the_target_is_the_normalised_feature_map_on_the_grid_of_patches():
    imgs = torch.randn(2, 3, 64, 64)
    coarse = by_hand("test_resnet", "teacher.pt", imgs)  # 2 x 2, for 8 x 8 patches
    target = teacher_of(*RESNET, "data.image_size=64")
    given, valid = target(Seen(imgs))
    assert valid is None
    assert given.shape == (2, 64, coarse.shape[1])
    assert target.dim == coarse.shape[1]
    maps = F.interpolate(coarse, (8, 8), mode="bilinear").flatten(2).transpose(1, 2)
    torch.testing.assert_close(given, F.layer_norm(maps, (target.dim,)), rtol=1e-4, atol=1e-4)
    fine = teacher_of(*RESNET, "data.image_size=64")
    fine.patch_size = 64  # one patch: the mean of the map
    pooled = coarse.mean((2, 3))[:, None]
    torch.testing.assert_close(fine(Seen(imgs))[0], F.layer_norm(pooled, (target.dim,)), rtol=1e-4, atol=1e-4)
    assert target.to_pixels(given, imgs) is None


@torch.no_grad()
def test_a_vision_transformer_of_another_image_size_teaches():
    imgs = torch.randn(2, 3, 64, 64)
    target = teacher_of(*VIT, "data.image_size=64")
    assert target(Seen(imgs))[0].shape == (2, 64, 64)
    network = timm.create_model("test_vit", num_classes=0, dynamic_img_size=True).eval()
    network.load_state_dict(timm.models.load_state_dict("vit.safetensors"))
    network.norm = torch.nn.LayerNorm(64, elementwise_affine=False)
    raw = imgs * torch.tensor([0.1, 0.2, 0.3]).view(-1, 1, 1) + torch.tensor([0.3, 0.4, 0.5]).view(-1, 1, 1)
    mean, std = (torch.tensor(network.pretrained_cfg[key]).view(-1, 1, 1) for key in ("mean", "std"))
    tokens = network.forward_features((raw - mean) / std)[:, network.num_prefix_tokens :]
    target.patch_size = 16
    torch.testing.assert_close(target(Seen(imgs))[0], tokens, rtol=1e-3, atol=1e-3)


def test_some_channels_of_many_teach():
    many = ("data.in_chans=5", "data.mean=[0.1,0.2,0.3,0.4,0.5]", "data.std=[0.5,0.4,0.3,0.2,0.1]")
    imgs = torch.randn(1, 5, 32, 32)
    chosen = teacher_of(*RESNET, *many, "target.teacher.channels=[4,2,0]")(Seen(imgs))[0]
    alone = ("data.mean=[0.5,0.3,0.1]", "data.std=[0.1,0.3,0.5]")
    torch.testing.assert_close(chosen, teacher_of(*RESNET, *alone)(Seen(imgs[:, [4, 2, 0]]))[0])


@pytest.mark.parametrize("more", [{"dtype": "float32"}, {"mean": [], "std": []}])
def test_images_in_other_units_are_passed_on_as_the_encoder_gets_them(more):
    """A mean in the units of the files cannot be compared with one of pixels from 0 to 1."""
    imgs = torch.randn(1, 3, 32, 32)
    cfg = config(*RESNET)
    vars(cfg.data).update(more)
    features, _ = load_teachers(cfg)
    network = features["teacher"].network
    expected = network.forward_features(imgs)
    torch.testing.assert_close(features["teacher"](imgs), expected)


def test_only_masked_patches_learn_and_the_teacher_does_not():
    target = teacher_of(*RESNET)
    model = FCMAE("convnextv2_atto", decoder_embed_dim=8, depths=(1,) * 4, strides=(2, 2, 2, 1), targets={
        "teacher": lambda **_: target
    })  # fmt: skip
    mask = torch.tensor([[True, False] * 8] * 2)
    out = model.train()(torch.randn(2, 3, 32, 32), mask)
    out.preds["teacher"].retain_grad()
    out.loss.backward()
    assert ((out.preds["teacher"].grad != 0).any(-1) == mask).all()
    assert not target.network.training
    assert all(p.grad is None and not p.requires_grad for p in target.network.parameters())
    assert not [m for m in target.network.modules() if m.training]


def test_a_run_saves_nothing_of_the_teacher_and_resumes_with_the_same_one_only(weights, fcmae_here):
    said = fcmae_here(*RUN, "hydra.run.dir=whole").stderr
    assert "target.teacher: test_resnet of teacher.pt" in said
    fcmae_here(*RUN, "hydra.run.dir=cut", "trainer.max_steps=4", check=75)
    shutil.move("teacher.pt", "moved.pt")
    moved = (*RUN, "target.teacher.checkpoint=moved.pt", "hydra.run.dir=cut")
    fcmae_here(*moved)
    whole, cut = newest("whole"), newest("cut")
    without = Pretraining(config("target=pixels")).model.state_dict().keys()
    head = {"decoder.pred_teacher.weight", "decoder.pred_teacher.bias"}
    for state in ("model", "ema"):
        assert whole[state].keys() == without | head
        assert_same(whole[state], cut[state])
    names = {name for group in whole["optimizer"]["param_groups"] for name in group["names"]}
    assert names == {name for name in without if not name.startswith("backbone.head.")} | head
    recorded = whole["config"]["target"]["teacher"]
    assert len(recorded["sha256"]) == 64
    assert recorded["dim"] == whole["model"]["decoder.pred_teacher.bias"].numel()
    assert portable(whole["config"])["target"]["teacher"].keys() & {"checkpoint", "run", "sha256"} == {"sha256"}
    model = load("whole")  # without the file of the teacher
    model.predict(torch.randn(1, 3, 32, 32))
    with pytest.raises(ValueError, match="a Teacher has no network here; fcmae pretrain reads it"):
        model(torch.randn(1, 3, 32, 32))
    fcmae_here("reconstruct", "whole", "data.name=synthetic")
    torch.save(timm.create_model("test_resnet").state_dict(), "moved.pt")
    refused = fcmae_here(*moved, "schedule.epochs=4", check=2).stderr
    assert f"\n  target.teacher.sha256: '{recorded['sha256']}' -> '" in refused
    assert "target.teacher.checkpoint" not in refused
    taught = fcmae_here(*RUN, "target.teacher.checkpoint=null", "target.teacher.name=null",
                        "target.teacher.run=whole", "hydra.run.dir=next").stderr  # fmt: skip
    assert "target.teacher: " in taught
    assert newest("next")["config"]["target"]["teacher"]["dim"] == 24


def test_an_average_of_the_model_shares_the_network():
    from copy import deepcopy

    target = teacher_of(*RESNET)
    model = FCMAE("convnextv2_atto", depths=(1,) * 4, targets={"teacher": lambda **_: target})
    assert deepcopy(model).targets["teacher"].network is target.network


WRONG = {
    "nothing": (("target=teacher",), "target.teacher must have either name, .*; got name=None"),
    "both": ((*RESNET, "target.teacher.run=x"), "target.teacher must have either name"),
    "name": ((*RESNET, "target.teacher.name=resnet_x"), "target.teacher.name must be a network of timm .*'resnet_x'"),
    "no file": ((*RESNET, "target.teacher.checkpoint=no.pt"), "target.teacher.checkpoint: no file no.pt"),
    "no run": (("target=teacher", "target.teacher.run=no"), "target.teacher.run: no checkpoint or run directory no"),
    "other network": (
        (*RESNET, "target.teacher.name=test_efficientnet"),
        r"target.teacher.checkpoint: the weights in teacher.pt do not fit the model \(missing: ",
    ),
    "channels": (
        (*RESNET, "data.in_chans=1", "data.mean=[0.5]", "data.std=[0.5]"),
        r"takes 3 channels; got data.in_chans=1. Give .* such as target.teacher.channels=\[0, 0, 0\]",
    ),
    "chosen channels": (
        (*RESNET, "target.teacher.channels=[0,3,1]"),
        r"channels must be a list .* from 0 to 2 .*3, 1\]",
    ),
    "loss": ((*RESNET, "target.teacher.loss=ce"), "loss must be one of cosine, smooth_l1, mse; got 'ce'"),
    "size": (
        (*VIT, "target.teacher.name=test_vit", "data.image_size=40"),
        "target.teacher: the teacher gives no feature map for images of 40x40 px .*16",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_teacher_is_one_line_before_training(name):
    overrides, message = WRONG[name]
    with pytest.raises(ConfigError, match=message) as raised:
        Pretraining(config(*overrides))
    assert "\n" not in str(raised.value)


def test_without_a_network_a_download_says_what_to_do(monkeypatch):
    monkeypatch.setattr(timm, "create_model", partial(_offline))
    with pytest.raises(
        ConfigError, match=r"timm cannot create test_vit \(OSError: offline\); .*target.teacher.checkpoint"
    ):
        load_teachers(config("target=teacher", "target.teacher.name=test_vit"))


def _offline(*args, **kwargs):
    raise OSError("offline")
