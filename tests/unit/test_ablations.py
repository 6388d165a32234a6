"""``benchmarks.ablations``: the comparison that leaks, and a run at toy size that is cut and continued."""

import pytest
import torch

from benchmarks import ablations
from benchmarks.ablations import ABLATIONS, last, leaking, main, zero_filled
from fcmae.config import compose
from fcmae.engines import ENGINES
from fcmae.models import create_backbone

TOY = (
    *("data=synthetic", "data.length=40", "data.image_size=32", "loader.workers=0", "model=demo"),
    *("model.dims=[8,12,16,24]", "model.depths=[1,1,1,1]", "model.decoder_embed_dim=16", "precision=float32"),
    *("optim.global_batch_size=8", "schedule.epochs=1", "schedule.warmup_epochs=0", "score.labels=[2]"),
    *("score.steps=2", "score.precision=float32", "score.auto.l2=[0.1]"),
)


def test_zero_filled_images_leak_where_engines_do_not():
    """With nothing masked it computes what an engine does; a hidden neighbour changes what it computes."""
    backbone = create_backbone("convnextv2_atto", depths=[1, 1, 1, 1], dims=[8, 12, 16, 24], patch_size=1).eval()
    imgs = torch.randn(2, 3, 32, 32)
    nothing = torch.zeros(2, 16, dtype=torch.bool)
    with torch.no_grad():
        (ours,) = zero_filled(backbone, imgs, nothing, keep=16, patch_size=8)
        (theirs,) = ENGINES["packed"](backbone, imgs, nothing, keep=16, patch_size=8)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        half = nothing.clone()
        half[:, ::2] = True
        assert zero_filled(backbone, imgs, half, keep=8, patch_size=8)[0].shape == (2, 8, 1, 1, 24)
        (leaky,) = zero_filled(backbone, imgs, half, keep=8, patch_size=8)
        (exact,) = ENGINES["packed"](backbone, imgs, half, keep=8, patch_size=8)
        assert (leaky - exact).abs().max() > 0.01
    before = ENGINES["masked"]
    with leaking(True):
        assert ENGINES["masked"] is zero_filled
    assert ENGINES["masked"] is before


@pytest.mark.slow
def test_every_variant_composes():
    variants = {variant for _, of in ABLATIONS.values() for variant in of}
    for variant in variants:
        if variant.supervised:
            given = [*ablations.DATA, *ablations.NETWORK, *variant.overrides, *ablations.SUPERVISED]
            assert compose("study", last(given)).arms == ["scratch"]
        else:
            given = [*ablations.DATA, *ablations.NETWORK, *ablations.PRETRAINING, *variant.overrides]
            assert compose("pretrain", last(given)).data.size == (64, 64)
    assert last(["a=1", "model=x", "model=y"]) == ["a=1", "model=y"]


@pytest.mark.slow
def test_an_ablation_at_toy_size_is_cut_and_continued(tmp_path, capsys, monkeypatch):
    args = ["sparse", "--out", str(tmp_path), "--seeds", "1"]
    assert main([*args, "--minutes", "0", *TOY]) == 75  # nothing fits
    assert main([*args, "--part", "1/2", *TOY]) == 0
    pretrained, pretrain = [], ablations.pretrain
    monkeypatch.setattr(
        ablations, "pretrain", lambda cfg, run: pretrained.append(cfg.engine.name) or pretrain(cfg, run)
    )
    assert main([*args, *TOY]) == 0
    assert pretrained == ["masked"]  # the other is done
    table = capsys.readouterr().out
    assert "| zero_filled | 1 | " in table
    monkeypatch.setattr(ablations, "SUPERVISED", ("labels=[2]", "arms=[scratch]", "optim.global_batch_size=8"))
    assert main(["grn", "--out", str(tmp_path), "--seeds", "1", *TOY]) == 0
    assert "| v1_supervised | 1 | " in capsys.readouterr().out
