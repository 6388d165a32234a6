"""``model.timm``: other arguments of timm's ConvNeXt, in every engine, checkpoint and export."""

import inspect

import pytest
import timm
import torch
from timm.models.convnext import ConvNeXt

import fcmae
from fcmae.checkpoints import checkpoint
from fcmae.config import BackboneConfig, compose, from_dict
from fcmae.config.timm_arguments import REFUSED, TIMM_ARGUMENTS
from fcmae.engines import ENGINES, total_stride
from fcmae.engines.dense import dense
from fcmae.errors import ConfigError, UsageError, WeightsError
from fcmae.interchange.convert import export
from fcmae.interchange.foreign import read_foreign
from fcmae.interchange.network import Structure
from fcmae.masks.patches import random_mask
from fcmae.models import create_backbone
from fcmae.training.run import finetune, pretrain
from tests.conftest import TINY_FINETUNE, TINY_PRETRAIN, relative_error

CASES = (
    {"kernel_sizes": 5}, {"kernel_sizes": [3, 5, 7, 9]}, {"conv_bias": False}, {"act_layer": "silu"},
    {"conv_mlp": True}, {"use_grn": True}, {"ls_init_value": None}, {"norm_eps": 1e-5}, {"head_norm_first": True},
)  # fmt: skip


def test_every_argument_of_timm_may_be_set_or_is_refused_with_a_reason():
    assert {*TIMM_ARGUMENTS, *REFUSED} == {*inspect.signature(ConvNeXt.__init__).parameters} - {"self"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"conv_bais": False}, "model.timm.conv_bais is unknown; must be one of act_layer, conv_bias, "),
        ({"stem_type": "overlap"}, "model.timm.stem_type must not be set: .*timm's other stems overlap patches"),
        ({"depths": [1, 1, 1, 1]}, "model.timm.depths must not be set: set model.depths"),
        ({"conv_bias": 1}, "model.timm.conv_bias must be true or false; got 1"),
        ({"kernel_sizes": 4}, "model.timm.kernel_sizes must be an odd integer, or a list of 4, one per stage; got 4"),
        ({"kernel_sizes": [3, 3, 3]}, "model.timm.kernel_sizes must be an odd integer, or a list of 4"),
        ({"act_layer": 3}, "model.timm.act_layer must be timm's name of an activation; got 3"),
        ({"norm_eps": 0}, "model.timm.norm_eps must be a positive number; got 0"),
        ([], "model.timm must be arguments of timm's ConvNeXt by name; got"),
    ],
)
def test_mistakes_name_the_key(given, message):
    with pytest.raises(ConfigError, match=message):
        from_dict(BackboneConfig, {"timm": given}, prefix="model")


def test_an_unknown_activation_is_named():
    with pytest.raises(ValueError, match="model.timm.act_layer must be an activation of timm, .*; got 'gellu'"):
        create_backbone("convnextv2_atto", act_layer="gellu")


@pytest.mark.parametrize(
    ("kwargs", "strides"),
    [
        *((case, None) for case in CASES),
        ({"kernel_sizes": [3, 5, 7]}, [4, 2, 2]),
        ({"kernel_sizes": [3, 5, 7, 3, 9]}, [2] * 5),
    ],
    ids=str,
)
def test_packed_is_masked_is_dense_is_timm(kwargs, strides):
    n = len(strides or range(4))
    backbone = create_backbone("convnext_tiny", strides=strides, depths=[1] * n, dims=[8, 12, 16, 24, 24][:n], **kwargs)
    backbone.double()
    for param in backbone.parameters():
        torch.nn.init.normal_(param, std=0.3)
    kernels = [stage.blocks[0].conv_dw.kernel_size[0] for stage in backbone.stages]
    given = kwargs.get("kernel_sizes", 7)
    assert kernels == (given if isinstance(given, list) else [given] * n)
    side = total_stride(backbone)
    imgs = torch.randn(1, 3, 2 * side, 2 * side, dtype=torch.float64)
    mask = random_mask(torch.rand(1, 4), 2)
    packed, masked = (
        ENGINES[name](backbone, imgs, mask, keep=2, patch_size=side, all_stages=True) for name in ("packed", "masked")
    )
    timms = backbone.forward_intermediates(imgs, intermediates_only=True, norm=True)
    for ours, theirs in [*zip(packed, masked, strict=True), *zip(dense(backbone, imgs), timms, strict=True)]:
        assert relative_error(ours, theirs) < 1e-12


NETWORK = ("model.timm.conv_bias=false", "model.timm.act_layer=silu", "model.timm.kernel_sizes=[3,5,5,7]")
ARGUMENTS = {"conv_bias": False, "act_layer": "silu", "kernel_sizes": [3, 5, 5, 7]}


def test_from_pretraining_to_exports(tmp_path):
    run = tmp_path / "pretrain"
    short = ("schedule.epochs=1", "schedule.warmup_epochs=0", "trainer.eval_every_epochs=null")
    pretrain(compose("pretrain", [*TINY_PRETRAIN[1:], *short, *NETWORK]), run)
    file = checkpoint.resolve(run)
    assert checkpoint.read(file)["config"]["model"]["timm"] == ARGUMENTS
    imgs = torch.randn(2, 3, 32, 32)
    backbone = fcmae.load(run).backbone
    expected = backbone.forward_features(imgs)
    assert not any(name.endswith("conv_dw.bias") for name in backbone.state_dict())
    assert torch.equal(fcmae.load(run / "encoder.safetensors").forward_features(imgs), expected)

    with pytest.raises(UsageError, match="model.timm"):
        pretrain(compose("pretrain", [*TINY_PRETRAIN[1:], *short]), run)
    with pytest.raises(ConfigError, match=r"model.timm is .*; .* has \{\}|model.timm is \{\}; .* has"):
        pretrain(compose("pretrain", [*TINY_PRETRAIN[1:], *short, f"init_from={run}"]), tmp_path / "other")

    tiny = [key for key in TINY_FINETUNE[1:] if not key.startswith("model")]
    encoder = run / "encoder.safetensors"
    finetune(compose("finetune", [*tiny, "schedule.epochs=1", f"init_from={encoder}"]), tmp_path / "finetune")
    assert not any(name.endswith("conv_dw.bias") for name in fcmae.load(tmp_path / "finetune").state_dict())
    with pytest.raises(ConfigError, match="model.timm is {'conv_bias': True}; .* has {'conv_bias': False"):
        finetune(compose("finetune", [*tiny, f"init_from={run}", "model.timm.conv_bias=true"]), tmp_path / "wrong")

    export(run, "timm", tmp_path / "timm")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    assert torch.equal(theirs.forward_features(imgs), expected)
    assert read_foreign(str(tmp_path / "timm"))["config"]["model"]["timm"] == ARGUMENTS
    for library in ("official", "transformers"):
        with pytest.raises(WeightsError, match="export it to timm or onnx"):
            export(run, library, tmp_path / library)


@pytest.mark.parametrize("strides", [(2, 2, 2, 2), (4, 2, 2), (4, 2, 2, 2)])
def test_what_a_library_cannot_build_names_a_format_that_holds_it(strides):
    """Without biases, and with strides that timm cannot build, timm is no way out."""
    count = len(strides)
    model = create_backbone(
        "convnextv2_atto", depths=[1] * count, dims=[8] * count, strides=list(strides), conv_bias=False
    )
    known = "timm or onnx" if strides == (4, 2, 2, 2) else "onnx"
    with pytest.raises(WeightsError, match=f"export it to {known}, or use encoder.safetensors and fcmae.load"):
        Structure.of(model)
