"""VisCy's encoder: names, planes and stems, what it cannot hold, the way back. test_clients.py runs the real one."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fcmae.checkpoints import checkpoint
from fcmae.errors import UsageError, WeightsError
from fcmae.interchange.convert import export, import_weights
from fcmae.interchange.network import Given, Network
from fcmae.interchange.viscy_format import SCALE
from tests import interchange as made

STRIDES = {"strides": [2, 2, 2, 2]}
UNBIASED = {"timm": {"conv_bias": False}}
"""As a network is pretrained for VisCy."""


def pretrained(path, in_chans=5, bias=False, **model):
    """A checkpoint whose depthwise convolutions have zero bias, unless asked."""
    weights = made.pretrained(path, made.data_config(in_chans), **model)
    state = checkpoint.read(path)
    if not bias:
        zero = {name: torch.zeros_like(value) for name, value in weights.items() if name.endswith("conv_dw.bias")}
        checkpoint.write_atomically(path, {**state, "model": {**weights, **zero}})
    return path


@pytest.mark.parametrize(
    ("in_chans", "planes", "model"),
    [
        (5, 5, STRIDES),
        (4, 2, {**STRIDES, **UNBIASED}),
        (3, 1, {}),
        (3, 1, {"strides": [4, 2, 2], "depths": [1, 1, 2], "dims": [8, 16, 24]}),
    ],
)
def test_what_is_exported_comes_back(tmp_path, in_chans, planes, model):
    path = pretrained(tmp_path / "ours.pt", in_chans, **model)
    export(path, "viscy", tmp_path / "out", planes=planes)
    ours = Network.read(path)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    stem = ours.weights["stem.0.weight"]
    assert weights["stem.conv3d.weight"].shape == (8, in_chans // planes, planes, *stem.shape[2:])
    arguments = json.loads((tmp_path / "out" / "config.json").read_text())["arguments"]
    assert arguments["in_channels"] * arguments["in_stack_depth"] == in_chans
    assert "FullyConvolutionalMAE(out_channels=1, **arguments)" in (tmp_path / "out" / "README.md").read_text()
    for number, source in enumerate((tmp_path / "out", tmp_path / "whole.ckpt")):
        whole = {f"model.encoder.{name}": value for name, value in weights.items()}
        torch.save({"state_dict": {**whole, "model.decoder.count": torch.tensor(3)}}, tmp_path / "whole.ckpt")
        given = Given(mean=ours.cfg.data.mean, std=ours.cfg.data.std)
        notes = import_weights(source, "viscy", tmp_path / f"{number}.pt", given)
        assert len(notes) == (1 if planes == 1 else 2)
        back = Network.read(tmp_path / f"{number}.pt")
        assert back.weights.keys() >= ours.weights.keys()
        for name, value in back.weights.items():
            same = ours.weights.get(name, torch.zeros_like(value))
            torch.testing.assert_close(value, same, rtol=1e-6, atol=0)
        imgs = ours.fixed_input()
        torch.testing.assert_close(back.outputs(imgs)["features"], ours.outputs(imgs)["features"], rtol=0, atol=1e-5)


def test_planes_are_the_fastest_of_our_channels(tmp_path):
    path = pretrained(tmp_path / "ours.pt", 6, **STRIDES)
    export(path, "viscy", tmp_path / "out", planes=3)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    ours = Network.read(path).weights["stem.0.weight"] * SCALE
    assert torch.equal(weights["stem.conv3d.weight"][:, 1, 2], ours[:, 1 * 3 + 2])
    stack = torch.randn(1, 2, 1, 4, 4).expand(-1, -1, 3, -1, -1)  # equal planes
    conv3d = nn.functional.conv3d(stack, weights["stem.conv3d.weight"], stride=(3, 2, 2))[:, :, 0]
    conv2d = nn.functional.conv2d(stack[:, :, 0], weights["stem.conv2d.weight"], stride=2)
    torch.testing.assert_close(conv3d, conv2d)


def test_the_scale_makes_up_for_the_other_eps():
    x = 0.01 * torch.randn(5, 12, dtype=torch.float64)
    theirs = nn.functional.layer_norm(SCALE * x, (12,), eps=1e-5)
    torch.testing.assert_close(theirs, nn.functional.layer_norm(x, (12,), eps=1e-6))


@pytest.mark.parametrize(
    ("model", "planes", "error", "message"),
    [
        (
            {**STRIDES, "bias": True},
            1,
            WeightsError,
            "has biases in its depthwise convolutions; VisCy's have none",
        ),
        ({"stem_stride": 2}, 1, WeightsError, r"has strides \[4, 2, 2, 2\] with a stem of 2; VisCy has strides k"),
        ({"strides": [4, 2, 1, 2]}, 1, WeightsError, r"has strides \[4, 2, 1, 2\]"),
        ({"backbone": "convnext_atto"}, 1, WeightsError, "holds a ConvNeXt V1; VisCy's encoder is a V2"),
        (STRIDES, 3, UsageError, "--planes must divide the 5 channels of .*; got 3"),
    ],
)
def test_what_viscy_cannot_hold_is_refused(tmp_path, model, planes, error, message):
    path = pretrained(tmp_path / "ours.pt", **model)
    with pytest.raises(error, match=message):
        export(path, "viscy", tmp_path / "out", planes=planes)
    assert not (tmp_path / "out").exists()


def test_other_files_are_refused(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(WeightsError, match=r"a.safetensors has no stem.conv3d.weight: it is not an encoder of VisCy's"):
        import_weights(tmp_path / "a.safetensors", "viscy", tmp_path / "back.pt")
    export(pretrained(tmp_path / "ours.pt", **STRIDES), "viscy", tmp_path / "out", planes=5)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    save_file({**weights, "stages.9.x": torch.zeros(1)}, tmp_path / "b.safetensors")
    given = Given(mean=[0.5] * 5, std=[0.5] * 5)
    with pytest.raises(WeightsError, match=r"unexpected \['stages.9.x'\]"):
        import_weights(tmp_path / "b.safetensors", "viscy", tmp_path / "back.pt", given)
    save_file({**weights, "stem.conv3d.weight": weights["stem.conv3d.weight"][:4]}, tmp_path / "c.safetensors")
    with pytest.raises(WeightsError, match="has a stem that cuts the stack into 2 parts"):
        import_weights(tmp_path / "c.safetensors", "viscy", tmp_path / "back.pt", given)
