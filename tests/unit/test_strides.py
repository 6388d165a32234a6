"""``model.strides``: any total stride from 4 to 64, three to five stages, in every engine, checkpoint and export."""

import pytest
import torch

import fcmae
from fcmae.cli import main
from fcmae.config import BackboneConfig, from_dict
from fcmae.engines import ENGINES, total_stride
from fcmae.engines.dense import dense
from fcmae.errors import ConfigError, WeightsError
from fcmae.interchange.convert import export
from fcmae.kernels import gather_patches
from fcmae.masks.patches import random_mask, visible_indices
from fcmae.models import FCMAE, create_backbone
from fcmae.models.backbone import strides_of
from fcmae.optim.adamw import layer_index
from tests.conftest import TINY_FINETUNE, TINY_PRETRAIN, relative_error
from tests.results import assert_same, newest

DEPTHS, DIMS = [1, 2, 1, 1, 1], [8, 12, 16, 16, 24]
STRIDES = (
    [4, 2, 2, 2], [2, 2, 2, 2], [1, 2, 2, 2], [4, 2, 2, 1], [4, 1, 2, 2], [8, 2, 2, 2], [1, 2, 2, 1],
    [4, 2, 2], [2, 2, 2], [2, 2, 2, 2, 2], [2, 1, 2, 1, 2],
)  # fmt: skip


@pytest.mark.parametrize("name", ["convnextv2_atto", "convnext_tiny"])
@pytest.mark.parametrize("strides", STRIDES, ids=str)
def test_packed_is_masked_is_dense(name, strides):
    n = len(strides)
    backbone = create_backbone(name, strides=strides, depths=DEPTHS[:n], dims=DIMS[:n])
    assert strides_of(backbone) == strides
    model = FCMAE(backbone, decoder_embed_dim=16, decoder_depth=1).double()
    side = model.patch_size
    imgs = torch.randn(2, 3, 4 * side, 3 * side, dtype=torch.float64)
    mask, keep = model.random_mask(imgs)
    grads = []
    for engine in ("packed", "masked"):
        model.engine = engine
        model.zero_grad()
        out = model(imgs, mask, keep)
        out.loss.backward()
        grads.append((out.pred, {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(grads[0][0], grads[1][0], rtol=1e-9, atol=1e-9)
    for key, value in grads[0][1].items():
        torch.testing.assert_close(
            value, grads[1][1][key], rtol=1e-8, atol=1e-11, msg=lambda text, key=key: f"{key}: {text}"
        )
    maps = dense(backbone.eval(), imgs)
    for ours, theirs in zip(maps, backbone.forward_intermediates(imgs, intermediates_only=True), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    assert [len(imgs[0, 0]) // m.shape[2] for m in maps] == [info["reduction"] for info in backbone.feature_info]


@pytest.mark.parametrize(
    ("name", "dtype", "tolerance"),
    [("convnextv2_atto", torch.float64, 1e-9), ("convnext_tiny", torch.float32, 1e-5)],
    ids=["v2", "v1"],
)
@pytest.mark.parametrize("strides", STRIDES, ids=str)
def test_features_of_all_stages_are_those_of_masked_and_dense(name, strides, dtype, tolerance):
    n = len(strides)
    backbone = create_backbone(name, strides=strides, depths=DEPTHS[:n], dims=DIMS[:n]).to(dtype)
    for param in backbone.parameters():
        torch.nn.init.normal_(param, std=0.3)
    side = total_stride(backbone)
    imgs = torch.randn(2, 3, 2 * side, side, dtype=dtype)
    for keep in (1, 2):
        mask = random_mask(torch.rand(2, 2), keep)
        kwargs = {"keep": keep, "patch_size": side, "all_stages": True}
        results = [ENGINES[engine](backbone, imgs, mask, **kwargs) for engine in ("packed", "masked")]
        if keep == 2:  # nothing is masked
            index = visible_indices(mask, keep)
            results.append([gather_patches(x, index, 2, 1) for x in dense(backbone, imgs)])
        directions = [torch.randn_like(f) for f in results[0]]
        grads = []
        for features in results:
            backbone.zero_grad()
            torch.autograd.backward(features, directions)
            grads.append({key: p.grad for key, p in backbone.named_parameters() if p.grad is not None})
        for features, grad in zip(results[1:], grads[1:], strict=True):
            for stage in range(n):
                assert relative_error(results[0][stage], features[stage]) < tolerance, stage
            assert grad.keys() == grads[0].keys()
            for key, value in grad.items():
                assert relative_error(grads[0][key], value) < tolerance, key


def test_timms_network_is_timms():
    """The weights of timm's network have the names and shapes of one with timm's strides."""
    plain, ours = create_backbone("convnextv2_atto"), create_backbone("convnextv2_atto", strides=[4, 2, 2, 2])
    shapes = [{name: value.shape for name, value in model.state_dict().items()} for model in (plain, ours)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"strides": [2, 2]}, "model.strides"),
        ({"strides": [2, 2, 2, 16]}, "model.strides"),
        ({"strides": [8, 8, 8]}, "model.strides"),
        ({"strides": [2, 2, 2]}, "model.depths"),
        ({"strides": [2, 2, 2], "depths": [1, 1, 1], "dims": [8, 8, 8, 8]}, "model.dims"),
        ({"depths": [1, 1, 1]}, "model.depths"),
    ],
)
def test_mistakes_name_the_key(given, message):
    with pytest.raises(ConfigError, match=message):
        from_dict(BackboneConfig, given, prefix="model")


@pytest.mark.parametrize("depths", [(3, 3, 9), (3, 3, 27, 3), (2, 2, 4, 2, 2)])
def test_layer_decay_counts_any_stages(depths):
    for kind in ("single", "group"):
        layers = [
            layer_index(f"stages.{s}.blocks.{b}.norm.weight", depths, kind)[0]
            for s in range(len(depths)) for b in range(depths[s])
        ]  # fmt: skip
        head = layer_index("head.fc.weight", depths, kind)[1]
        assert layers == sorted(layers)
        assert set(range(1, head)) == set(layers)


@pytest.mark.parametrize(
    ("strides", "sizes"),
    [
        pytest.param([2, 2, 2, 2], (), id="16", marks=pytest.mark.slow),
        pytest.param([4, 2, 2], ("model.depths=[1,1,1]", "model.dims=[8,12,16]"), id="three stages"),
    ],
)
def test_from_pretraining_to_features(strides, sizes, tmp_path, capsys):
    """Pretraining, resuming, the encoder file, fine-tuning, and what each export says."""
    small = [o for o in TINY_PRETRAIN if not o.startswith(("model.stem_stride", "data.image_size"))]
    args = [*small, f"model.strides={strides}".replace(" ", ""), *sizes, "data.image_size=48", "schedule.epochs=1"]
    args.append("trainer.eval_every_epochs=null")
    assert main([*args, f"hydra.run.dir={tmp_path}/whole"]) == 0
    assert main([*args, f"hydra.run.dir={tmp_path}/run", "trainer.max_steps=1"]) == 75
    assert main([*args, f"hydra.run.dir={tmp_path}/run"]) == 0
    states = [newest(tmp_path / name) for name in ("whole", "run")]
    assert_same(states[0]["model"], states[1]["model"])
    encoder = fcmae.load(tmp_path / "run" / "encoder.safetensors")
    assert strides_of(encoder) == strides
    assert_same(encoder.state_dict(), fcmae.load(tmp_path / "run").backbone.state_dict())
    fine = [o for o in TINY_FINETUNE if not o.startswith(("model", "data.image_size"))]
    for start in ("run", "run/encoder.safetensors"):
        out = tmp_path / f"fine{len(start)}"
        assert main([*fine, f"init_from={tmp_path}/{start}", f"hydra.run.dir={out}", "schedule.epochs=1"]) == 0
        assert strides_of(fcmae.load(out)) == strides
    for to in ("timm", "transformers", "official"):
        with pytest.raises(WeightsError, match="strides"):
            export(tmp_path / "run", to, tmp_path / to)
