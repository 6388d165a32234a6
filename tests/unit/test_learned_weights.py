"""Weights of targets that are learned: the loss, what is logged and saved, and a resumed run."""

import math
import shutil

import pytest
import torch
from safetensors.torch import load_file

from fcmae.config import compose
from fcmae.interchange.official import to_pretraining
from fcmae.models import FCMAE
from fcmae.models.build import build_fcmae, load, mismatch, with_loss_weights
from fcmae.optim.adamw import param_groups
from fcmae.targets import Pixels
from tests.conftest import TINY_PRETRAIN
from tests.results import assert_same, metrics_of, newest

LEARNED = ("target=[pixels,laplacian]", "target.pixels.weight=learned", "target.laplacian.weight=learned")
RUN = (*TINY_PRETRAIN, *LEARNED, "optim.lr=0.1", "optim.weight_decay=0.5", "optim.ema_decay=0.9")


def model_with(weights):
    model = FCMAE("convnextv2_atto", decoder_embed_dim=8, depths=(1, 1, 1, 1), targets=dict.fromkeys(weights, Pixels))
    model.target_weights = weights
    return model


def test_a_learned_weight_is_that_of_the_part_it_is_large_for():
    model = model_with({"a": "learned", "b": 0.5, "c": "learned"})
    assert [name for name, _ in model.named_parameters() if name.startswith("log_var_")] == [
        "log_var_a",
        "log_var_c",
    ]
    imgs, mask = torch.randn(2, 3, 64, 64), torch.tensor([[True, False, True, False]] * 2)
    out = model(imgs, mask)
    torch.testing.assert_close(out.loss, out.parts["a"] + 0.5 * out.parts["b"] + out.parts["c"])
    assert model.learned_weights() == {"a": 1, "c": 1}
    with torch.no_grad():
        model.log_var_a += 2
    out = model(imgs, mask)
    expected = math.exp(-2) * out.parts["a"] + 2 + 0.5 * out.parts["b"] + out.parts["c"]
    torch.testing.assert_close(out.loss, expected)
    out.loss.backward()
    # The loss is least where the variance is the part itself.
    torch.testing.assert_close(model.log_var_a.grad, 1 - math.exp(-2) * out.parts["a"])
    torch.testing.assert_close(model.log_var_c.grad, 1 - out.parts["c"])
    assert model.learned_weights()["a"] == pytest.approx(math.exp(-2))


def test_fixed_weights_have_no_parameter():
    assert not [name for name in model_with({"a": 1.0, "b": 2.0}).state_dict() if "log_var" in name]


def test_a_learned_weight_is_not_decayed_nor_in_the_official_layout():
    cfg = compose("pretrain", ["data.path=x", "model=demo", "data.image_size=32", *LEARNED])
    groups = {
        name: group["weight_decay"] for group in param_groups(build_fcmae(cfg), cfg.optim) for name in group["names"]
    }
    assert groups["log_var_pixels"] == groups["log_var_laplacian"] == 0
    official = to_pretraining(model_with({"pixels": "learned"}).state_dict())
    assert "pred.weight" in official
    assert not [name for name in official if "log_var" in name or name == "pixels"]


@pytest.mark.slow
def test_learned_weights_are_logged_saved_averaged_and_resumed(tmp_path, fcmae_here):
    fcmae_here(*RUN, "hydra.run.dir=whole")
    fcmae_here(*RUN, "hydra.run.dir=cut", "trainer.max_steps=4", check=75)
    shutil.copytree(tmp_path / "cut", tmp_path / "changed")
    fcmae_here(*RUN, "hydra.run.dir=cut")
    whole, cut = newest(tmp_path / "whole"), newest(tmp_path / "cut")
    names = ["log_var_pixels", "log_var_laplacian"]
    for state in ("model", "ema"):
        assert_same(whole[state], cut[state])
        assert all(whole[state][name] != 0 for name in names)
    assert not whole["model"][names[0]].equal(whole["ema"][names[0]])
    before, after = whole["optimizer"]["state"], cut["optimizer"]["state"]
    assert all(value.equal(after[i][name]) for i, entry in before.items() for name, value in entry.items())
    logged = metrics_of(tmp_path / "cut")
    steps = [line for line in logged if "weight_pixels" in line]
    assert [line["step"] for line in steps] == list(range(1, 10))
    weight = math.exp(-whole["model"][names[1]].item())
    assert steps[-1]["weight_laplacian"] == pytest.approx(weight, rel=1e-5)
    first = steps[0]
    assert first["loss"] == pytest.approx(first["loss_pixels"] + first["loss_laplacian"], rel=1e-5)
    assert load(tmp_path / "whole").learned_weights()["laplacian"] != 1  # of the averaged model
    assert not [name for name in load_file(tmp_path / "whole" / "encoder.safetensors") if "log_var" in name]

    resumed_with_other_targets(tmp_path, fcmae_here)


def resumed_with_other_targets(tmp_path, fcmae_here):
    """A changed recipe is offered only where the weights fit, as they do where a learned weight becomes fixed."""
    changed, allow = (*TINY_PRETRAIN, *RUN[-3:], "hydra.run.dir=changed"), "trainer.allow_changed_recipe=true"
    said = fcmae_here(*changed, "target=hog", check=2).stderr
    assert allow not in said
    assert f"which do not fit these: init_from={tmp_path / 'changed'} and another hydra.run.dir" in said
    fcmae_here(*changed, LEARNED[0], allow, "trainer.max_steps=5", check=75)
    assert not [name for name in newest(tmp_path / "changed")["ema"] if "log_var" in name]


def test_weights_fit_whichever_of_their_targets_weights_are_learned():
    weights = model_with({"a": "learned", "b": 2.0}).state_dict()
    for other in ({"a": 1.0, "b": 1.0}, {"a": 1.0, "b": "learned"}, {"a": "learned", "b": "learned"}):
        model = model_with(other)
        assert mismatch(model, weights)
        assert not mismatch(model, with_loss_weights(weights, model))
    model = model_with({"a": "learned", "c": 1.0})
    assert "decoder.pred_c" in mismatch(model, with_loss_weights(weights, model))


def test_a_wrong_weight_is_refused(fcmae_here):
    said = fcmae_here(*TINY_PRETRAIN, "target.pixels.weight=learnt", check=2).stderr
    assert "target.pixels.weight must be a positive number or learned; got 'learnt'" in said
