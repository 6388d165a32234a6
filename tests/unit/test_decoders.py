"""``model.decoder`` and ``model.pred_patch_size``."""

import re
from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fcmae
from fcmae.bench.arithmetic import decoder_products
from fcmae.checkpoints import checkpoint
from fcmae.config import FCMAEConfig, PretrainConfig, compose, from_dict
from fcmae.errors import ConfigError
from fcmae.evaluation.reconstruct import reconstruct
from fcmae.masks.patches import patchify, unpatchify
from fcmae.models import FCMAE, create_backbone
from fcmae.models.backbone import stage_shapes
from fcmae.models.unet import UNet
from fcmae.targets import Pixels, Seen
from fcmae.tasks import initial
from fcmae.tasks.pretraining import Pretraining
from fcmae.training.run import pretrain
from tests.conftest import TINY_PRETRAIN
from tests.results import assert_same

TINY = {"depths": [1, 1, 1, 1], "dims": [8, 12, 16, 24], "decoder_embed_dim": 16}


def tiny(**kwargs):
    return FCMAE("convnextv2_atto", **{**TINY, **kwargs})


@pytest.mark.parametrize(
    ("decoder", "sizes"), [("light", (1, 2, 4, 8, 16, 32)), ("unet", (4, 8, 16, 32))], ids=["light", "unet"]
)
def test_predictions_are_per_patch_of_that_size(decoder, sizes):
    imgs = torch.randn(2, 3, 96, 64)
    for size in sizes:
        model = tiny(decoder=decoder, pred_patch_size=size)
        out = model(imgs)
        patches = 96 * 64 // size**2
        assert out.pred.shape == (2, patches, 3 * size**2)
        assert out.mask.shape == (2, 6)
        assert model.targets["pixels"].to_pixels(out.pred, imgs).shape == imgs.shape
        out.loss.backward()
        for name, param in model.named_parameters():
            if not name.startswith("backbone.head."):
                assert param.grad.abs().sum() > 0, name
                assert param.grad.stride() == param.stride(), name


def test_a_decoder_may_have_no_block():
    tiny(decoder_depth=0)(torch.randn(2, 3, 64, 64)).loss.backward()


@pytest.mark.parametrize("decoder", ["light", "unet"])
@pytest.mark.parametrize("size", [4, 16, 32])
def test_a_patch_of_the_prediction_lies_where_its_pixels_do(decoder, size):
    """The head, without weights, predicts its bias: the number of the patch inside its site, or the same for all."""
    model = tiny(decoder=decoder, pred_patch_size=size)
    with torch.no_grad():
        model.decoder.pred.weight.zero_()
        if decoder == "light":
            inside = torch.randn(1, 3, 32, 32)
            model.decoder.pred.bias.copy_(patchify(inside, size).flatten())
            expected = inside.repeat(2, 1, 3, 2)
        else:
            inside = torch.randn(1, 3, size, size)
            model.decoder.pred.bias.copy_(patchify(inside, size).flatten())
            expected = inside.repeat(2, 1, 96 // size, 64 // size)
    pred = model(torch.randn(2, 3, 96, 64)).pred
    torch.testing.assert_close(unpatchify(pred, size, 96, 64), expected)


@pytest.mark.parametrize("size", [4, 16])
def test_the_loss_is_over_the_predicted_patches_of_masked_patches(size):
    model = tiny(decoder="unet", pred_patch_size=size, mask_patch_size=64)
    imgs = torch.randn(1, 3, 128, 64)
    mask = torch.tensor([[True, False]])
    out = model(imgs, mask)
    errors = (out.pred - model.targets["pixels"](Seen(imgs))[0]).square().mean(-1).view(128 // size, 64 // size)
    torch.testing.assert_close(out.loss, errors[: 64 // size].mean())


def test_a_hidden_pixel_reaches_no_prediction():
    model = tiny(decoder="unet", pred_patch_size=4).eval()
    imgs, mask = torch.randn(1, 3, 64, 64), torch.tensor([[True, False, True, False]])
    other = imgs.clone()
    other[..., :32] = torch.randn(1, 3, 64, 32)
    assert torch.equal(model(imgs, mask).pred, model(other, mask).pred)


def test_the_unet_sees_the_finest_stage():
    """What only the first stage knows, such as the order of pixels within a coarser site, reaches the prediction."""
    model = tiny(decoder="unet", pred_patch_size=4)
    imgs, mask = torch.randn(1, 3, 64, 64), torch.zeros(1, 4, dtype=torch.bool)
    features = model.engine(model.backbone, imgs, mask, keep=4, patch_size=32, all_stages=True)
    before = model.decoder(features, mask.view(1, 2, 2), torch.arange(4)[None])["pixels"]
    features[0] = features[0].flip(2)
    after = model.decoder(features, mask.view(1, 2, 2), torch.arange(4)[None])["pixels"]
    assert (before - after).norm() > 1e-2 * before.norm()


def test_light_is_what_it_was():
    """The same names, numbers and random draws as without the keys; the golden tests compare the values."""
    torch.manual_seed(0)
    before = tiny().state_dict()
    torch.manual_seed(0)
    now = tiny(decoder="light", pred_patch_size=32).state_dict()
    assert before.keys() == now.keys()
    assert all(torch.equal(value, now[name]) for name, value in before.items())
    old = from_dict(PretrainConfig, {"model": {"backbone": "convnextv2_atto", "decoder_embed_dim": 512}})
    assert (old.model.decoder, old.model.pred_patch_size, old.model.decoder_embed_dim) == ("light", None, 512)


def test_the_width_by_default_is_the_decoders():
    for command, width in ((["model.decoder=unet"], 128), ([], 512), (["model.decoder=unet", "model=demo"], 128)):
        assert compose("pretrain", command).model.decoder_embed_dim == width
    assert FCMAE("convnextv2_atto", decoder="unet", depths=[1, 1, 1, 1]).decoder.unet.width == 128


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"decoder": "large"}, "model.decoder must be one of light, unet; got 'large'"),
        ({"decoder": "unet", "decoder_depth": 2}, "model.decoder_depth must be 1 with model.decoder=unet; got 2"),
        ({"decoder": "unet", "init": "official"}, "model.init must be timm with model.decoder=unet"),
        ({"pred_patch_size": 0}, "model.pred_patch_size must be a positive number; got 0"),
    ],
)
def test_mistakes_name_the_key(given, message):
    with pytest.raises(ConfigError, match=message):
        from_dict(FCMAEConfig, given, prefix="model")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("model.pred_patch_size=12", "a divisor of 32, the total stride; got 12"),
        ("model.decoder=unet model.pred_patch_size=2", "a multiple of 4, the stride of the first stage.*; got 2"),
        ("model.decoder=unet model.stem_stride=2 model.pred_patch_size=2", "a multiple of 4.*; got 2"),
        ("model.decoder=unet model.strides=[2,2,2,2] model.pred_patch_size=1", "divisor of 16.*multiple of 2.*; got 1"),
    ],
)
def test_sizes_that_do_not_fit_are_mistakes(given, message):
    with pytest.raises(ConfigError, match=f"^model.pred_patch_size must be .*{message}$"):
        compose("pretrain", given.split())


@pytest.mark.parametrize("stem", [1, 2, 4])
@pytest.mark.parametrize("strides", [None, [2, 2, 2, 2]])
def test_the_config_knows_the_strides_of_the_first_and_last_stage(stem, strides):
    cfg = FCMAEConfig(stem_stride=stem, strides=strides, depths=[1, 1, 1, 1], dims=[8, 8, 8, 8])
    _, of_stages = stage_shapes(create_backbone(cfg.backbone, **cfg.backbone_kwargs()))
    assert (cfg.first_stride, cfg.total_stride) == (of_stages[0], of_stages[-1])


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="must be a divisor of 32, the backbone's total stride; got 12"):
        tiny(pred_patch_size=12)
    with pytest.raises(ValueError, match="total stride and a multiple of 4, the stride of its first stage; got 2"):
        tiny(decoder="unet", pred_patch_size=2)
    with pytest.raises(ValueError, match="decoder must be one of light, unet; got 'large'"):
        FCMAE(create_backbone("convnextv2_atto"), decoder="large")


@pytest.mark.parametrize(("decoder", "size"), [("light", 32), ("light", 8), ("unet", 32), ("unet", 4)])
def test_the_benchmark_counts_the_decoders_products(decoder, size):
    """With nothing masked, the products of linear layers are those that torch counts, less the depthwise ones."""
    model = tiny(decoder=decoder, pred_patch_size=size).double()  # torch does not count oneDNN's products of float32
    imgs, mask = torch.randn(1, 3, 64, 64, dtype=torch.float64), torch.zeros(1, 4, dtype=torch.bool)
    features = model.engine(model.backbone, imgs, mask, keep=4, patch_size=32, all_stages=model.decoder.all_stages)
    with FlopCounterMode(display=False) as counter:
        model.decoder(features, mask.view(1, 2, 2), torch.arange(4)[None])
    counts = counter.get_flop_counts()["Global"]
    linear = sum(count for operation, count in counts.items() if "conv" not in str(operation))
    assert 2 * decoder_products(model, keep=4, num_patches=4) == linear


RUN = (
    *TINY_PRETRAIN[1:],
    "model.dims=[8,12,16,24]",
    "model.depths=[1,1,1,1]",
    "schedule.epochs=1",
    "schedule.warmup_epochs=0",
)


@pytest.mark.parametrize(("strides", "ema"), [("null", 0.5), ("[2,1,2,2]", None)])
def test_the_unet_of_a_run_can_be_carried_over(strides, ema, tmp_path):
    keys = [
        f"model.strides={strides}",
        "model.decoder=unet",
        "schedule.warmup_epochs=0",
        "trainer.eval_every_epochs=null",
    ]
    pretrain(compose("pretrain", [*RUN, *keys, f"optim.ema_decay={ema or 'null'}"]), tmp_path)
    state = checkpoint.read(checkpoint.resolve(tmp_path))
    trained = fcmae.load(tmp_path).decoder.unet  # the averaged weights, too
    unet = UNet(trained.dims, trained.strides, 16)
    assert initial._load_unet(unet, state) == " and its U-Net"
    assert_same(unet.state_dict(), trained.state_dict())
    if ema:
        assert not torch.equal(unet.norm.weight, state["model"]["decoder.unet.norm.weight"])
    other = UNet(trained.dims, trained.strides, 8)
    assert "has one of another width (objective.width=16 would take it)" in initial._load_unet(other, state)


def test_a_run_with_the_light_decoder_has_no_unet():
    state = {"task": "pretrain", "model": tiny().state_dict(), "ema": None}
    assert initial._load_unet(UNet([8, 12], [4, 8], 16), state) == "; the U-Net is new"


@pytest.mark.parametrize(("size", "large"), [(32, True), (16, False)])
def test_heads_larger_than_the_backbone_are_mentioned(size, large):
    small = ("model.backbone=convnextv2_atto", "model.depths=[1,1,1,1]", "model.decoder=unet", "data=synthetic")
    strides = ("model.strides=[4,2,2,2]", f"model.pred_patch_size={size}", "data.image_size=128")
    notes = Pretraining(compose("pretrain", [*small, *strides])).notes
    assert bool(notes) == large
    assert not large or re.match(r"the decoder's heads have [0-9.]+ M .* a smaller model.pred_patch_size makes", *notes)


@pytest.mark.parametrize(("decoder", "size"), [("light", 8), ("unet", 4)])
def test_a_picture_shows_predicted_patches_where_mask_patches_are_hidden(decoder, size):
    model = tiny(decoder=decoder, pred_patch_size=size, targets={"pixels": partial(Pixels, norm="none")}).eval()
    with torch.no_grad():
        model.decoder.pred.weight.zero_()
        model.decoder.pred.bias.fill_(0.25)
    imgs, mask = torch.randn(1, 3, 64, 64), torch.tensor([[True, False, False, True]])
    (drawn,), hidden = reconstruct(model, imgs, mask)
    assert torch.equal(drawn.pred, torch.full_like(imgs, 0.25))
    assert torch.equal(hidden, mask.view(1, 1, 2, 2).repeat_interleave(32, 2).repeat_interleave(32, 3))
