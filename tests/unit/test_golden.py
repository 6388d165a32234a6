"""The golden files are outputs of the official code on MinkowskiEngine: reproducing them is reproducing it."""

from functools import partial

import pytest
import torch

from fcmae.doctor.agreement import agree
from fcmae.interchange import official
from fcmae.models import FCMAE, create_backbone
from fcmae.targets import Pixels
from tests.conftest import ENGINE_NAMES, GOLDEN, read_golden, relative_error

TOLERANCE = 1e-5


def golden_model(name: str, engine: str = "packed") -> tuple[FCMAE, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    meta, golden = read_golden(name)
    model = FCMAE(
        "convnextv2_atto",
        mask_ratio=meta["mask_ratio"],
        targets={"pixels": partial(Pixels, norm="patch" if meta["norm_pix_loss"] else "none")},
        decoder_embed_dim=meta["decoder_embed_dim"],
        decoder_depth=meta["decoder_depth"],
        engine=engine,
        grn_scope="batch",
        depths=meta["depths"],
        dims=meta["dims"],
    )
    params = {key.removeprefix("param."): value for key, value in golden.items() if key.startswith("param.")}
    model.load_state_dict(official.from_pretraining(params, model.state_dict()))
    return model, params, golden


@pytest.mark.parametrize("engine", ENGINE_NAMES)
@pytest.mark.parametrize("name", ["fcmae_224", "fcmae_96_raw"])
def test_pretraining(name, engine):
    model, _, golden = golden_model(name, engine)
    out = model(golden["input.imgs"].float(), golden["input.mask"].bool())
    out.loss.backward()
    assert relative_error(out.loss, golden["output.loss"].squeeze()) < TOLERANCE
    assert relative_error(out.pred, golden["output.pred"].flatten(2).transpose(1, 2)) < TOLERANCE
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    grads = official.to_pretraining(grads)
    assert {f"grad.{n}" for n in grads} == {n for n in golden if n.startswith("grad.")}
    for grad_name, grad in grads.items():
        assert relative_error(grad, golden[f"grad.{grad_name}"]) < TOLERANCE, grad_name


@pytest.mark.parametrize("name", ["fcmae_224", "fcmae_96_raw"])
def test_len_keep_is_the_official_one(name):
    model, _, golden = golden_model(name)
    assert model.len_keep(*golden["input.imgs"].shape[-2:]) == int((golden["input.mask"][0] == 0).sum())


def test_official_names_round_trip_bit_exactly():
    model, params, _ = golden_model("fcmae_224")
    back = official.to_pretraining(model.state_dict())
    assert back.keys() == params.keys()
    for name, value in params.items():
        assert torch.equal(back[name], value), name


def test_classifier():
    meta, golden = read_golden("convnextv2_classifier")
    model = create_backbone("convnextv2_atto", num_classes=10, depths=meta["depths"], dims=meta["dims"]).eval()
    params = {key.removeprefix("param."): value for key, value in golden.items() if key.startswith("param.")}
    model.load_state_dict(official.from_classifier(params, model.state_dict()))
    with torch.no_grad():
        assert relative_error(model(golden["input.imgs"]), golden["output.logits"]) < TOLERANCE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.pop("mask_token"), "missing.*mask_token"),
        (lambda p: p.update(extra=torch.zeros(1)), "unexpected.*extra"),
        (lambda p: p.update({"pred.bias": torch.zeros(7)}), r"other shapes.*pred.bias \[7\] for \[3072\]"),
    ],
)
def test_a_state_dict_that_does_not_fit_is_refused_by_name(change, message):
    model, params, _ = golden_model("fcmae_224")
    change(params)
    with pytest.raises(ValueError, match=message):
        official.from_pretraining(params, model.state_dict())


def test_doctor_passes_and_fails(tmp_path, capsys):
    from safetensors.torch import save_file

    assert agree(sorted(GOLDEN.glob("*.safetensors"))) == 0
    assert "everything agrees" in capsys.readouterr().out
    meta, golden = read_golden("fcmae_96_raw")
    golden["grad.mask_token"] *= 1.001
    import json

    save_file(golden, tmp_path / "wrong.safetensors", {"meta": json.dumps(meta)})
    assert agree([tmp_path / "wrong.safetensors"]) > 0
    assert "FAIL" in capsys.readouterr().out
