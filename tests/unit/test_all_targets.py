"""All kinds of targets at once: packed is masked, resumed is uninterrupted, and micro-batches change nothing."""

import json
from functools import partial

import pytest
import timm
import torch
from torch import nn

from fcmae.config import compose
from fcmae.errors import ConfigError
from fcmae.masks.patches import random_mask
from fcmae.models import FCMAE
from fcmae.targets import Hog, Labels, Laplacian, Pixels, Seen, Teacher, part
from fcmae.tasks import pretraining
from tests.conftest import TINY_PRETRAIN
from tests.results import assert_same, metrics_of, newest

NAMES = ("pixels", "laplacian", "hog", "teacher", "labels")
ALL = (
    f"target=[{','.join(NAMES)}]",
    "target.pixels.norm=channel",
    "target.pixels.loss=smooth_l1",
    "target.hog.loss=cosine",
    "target.hog.cell=4",
    "target.hog.weight=learned",
    "target.teacher.name=test_convnext",
    "target.teacher.checkpoint=teacher.pt",
    "target.labels.weight=learned",
    "target.laplacian.weight=0.3",
)
RUN = (*TINY_PRETRAIN, *ALL, "schedule.epochs=2", "optim.ema_decay=0.9", "mask=block")


class Averages(nn.Module):
    """A teacher that needs no file."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 12, 16, 16)

    def forward(self, imgs):
        return self.conv(imgs)


def model_of(engine, decoder="light", side=32, chans=2):
    torch.manual_seed(1)
    teacher = Teacher(side, chans, dim=12)
    teacher.network = Averages().eval().requires_grad_(False)
    targets = {
        "pixels": Pixels,
        "laplacian": partial(Laplacian, norm="channel", loss="l1"),
        "hog": Hog,
        "teacher": lambda **_: teacher,
        "labels": partial(Labels, dim=3),
        "numbers": partial(Labels, loss="mse", dim=1),
    }
    size = {"depths": (1, 1, 1, 1), "dims": (8, 12, 16, 24), "in_chans": chans, "decoder_embed_dim": 16}
    model = FCMAE("convnextv2_atto", engine=engine, targets=targets, decoder=decoder, pred_patch_size=side, **size)
    model.target_weights = {**model.target_weights, "hog": "learned", "labels": "learned"}
    return model.double()


@pytest.mark.parametrize(("holes", "decoder", "side"), [(False, "light", 32), (True, "unet", 8), (True, "light", 16)])
def test_packed_predicts_and_learns_what_masked_does(holes, decoder, side):
    torch.manual_seed(0)
    imgs = torch.randn(3, 2, 64, 64, dtype=torch.float64)
    mask = random_mask(torch.rand(3, 4), 2)
    valid = torch.rand(3, 1, 64, 64) > 0.2 if holes else None
    results = []
    for engine in ("packed", "masked"):
        model = model_of(engine, decoder, side)
        out = model(imgs, mask, 2, valid=valid, label=torch.tensor([2, -1, 0]))
        out.loss.backward()
        results.append((out, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (packed, grads), (masked, expected) = results
    for name, pred in packed.preds.items():
        torch.testing.assert_close(pred, masked.preds[name], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(packed.parts[name], masked.parts[name], rtol=1e-5, atol=1e-5)
    assert {"log_var_hog", "log_var_labels", "decoder.pred_teacher.weight"} <= grads.keys() == expected.keys()
    for name, grad in grads.items():
        scale = expected[name].abs().max()
        torch.testing.assert_close(grad / scale, expected[name] / scale, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("holes", [False, True])
def test_targets_compile_without_a_break(holes):
    """What ``torch.compile`` cannot trace would end a compiled run; the teacher runs as it is."""
    torch.manual_seed(0)
    mask = random_mask(torch.rand(3, 4), 2)
    valid = torch.rand(3, 1, 64, 64) > 0.2 if holes else None
    seen = Seen(torch.randn(3, 2, 64, 64), valid, label=torch.tensor([2, -1, 0]))
    compiled = torch.compile(part, dynamic=False, fullgraph=True, backend="eager")
    for name, target in model_of("packed").targets.items():
        if getattr(target, "compiles", True):
            pred = torch.randn(3, 4, target.dim)
            torch.testing.assert_close(compiled(target, seen, pred, mask), part(target, seen, pred, mask), msg=name)
    torch.compiler.reset()


def test_a_run_resumes_to_the_bit_and_micro_batches_add_up(tmp_path, monkeypatch, fcmae_here):
    monkeypatch.chdir(tmp_path)
    torch.save(timm.create_model("test_convnext").state_dict(), "teacher.pt")
    fcmae_here(*RUN, "hydra.run.dir=whole")
    fcmae_here(*RUN, "hydra.run.dir=cut", "trainer.max_steps=4", "loader.workers=1", check=75)
    fcmae_here(*RUN, "hydra.run.dir=cut")
    whole, cut = newest("whole"), newest("cut")
    for state in ("model", "ema"):
        assert_same(whole[state], cut[state])
    steps = metrics_of(tmp_path / "whole")
    parts = [line for line in steps if "loss_hog" in line]
    assert len(parts) == 6
    for line in parts:
        assert {f"loss_{name}" for name in NAMES} | {"weight_hog", "weight_labels"} <= line.keys()
    first = parts[0]
    fixed = first["loss_pixels"] + first["loss_teacher"] + 0.3 * first["loss_laplacian"]
    assert first["loss"] == pytest.approx(fixed + first["loss_hog"] + first["loss_labels"], rel=1e-5)
    fcmae_here(*RUN, "hydra.run.dir=parts", "trainer.micro_batch_size=3", "trainer.max_steps=3", check=75)
    again = metrics_of(tmp_path / "parts")
    for line, expected in zip([line for line in again if "loss_hog" in line], parts[:3], strict=True):
        for name in ("loss", "weight_hog", "weight_labels", *(f"loss_{name}" for name in NAMES)):
            assert line[name] == pytest.approx(expected[name], rel=1e-4), name
    assert line["weight_hog"] != 1


NUMBERS = "mse, l1, smooth_l1"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("target.pixels.norm=image", "norm must be one of patch, channel, none; got 'image'"),
        ("target.pixels.loss=ce", f"loss must be one of {NUMBERS}; got 'ce'"),
        ("target=laplacian target.laplacian.norm=image", "norm must be one of patch, channel, none; got 'image'"),
        ("target=laplacian target.laplacian.loss=ce", f"loss must be one of {NUMBERS}; got 'ce'"),
        ("target=hog target.hog.loss=bce", f"loss must be one of {NUMBERS}, cosine; got 'bce'"),
        ("target=hog target.hog.cell=3", "cell must divide the 8 px of a predicted patch; got 3"),
        ("target=labels target.labels.loss=cosine", f"loss must be one of ce, bce, {NUMBERS}; got 'cosine'"),
    ],
)
def test_a_wrong_argument_is_one_line_before_images_are_listed(overrides, message, monkeypatch):
    monkeypatch.setattr(pretraining, "train_source", lambda *_: pytest.fail("images were listed"))
    words = overrides.split()
    name = words[-1].split(".")[1]
    with pytest.raises(ConfigError, match=f"^target.{name}.{message}$"):
        pretraining.Pretraining(compose("pretrain", [*TINY_PRETRAIN[1:], *words]))


@pytest.mark.slow
def test_two_ranks_learn_the_same_weights_as_one(tmp_path, fcmae, fcmae_here):
    """An exchange of gradients has buckets of scalars, too."""
    torch.save(timm.create_model("test_convnext").state_dict(), tmp_path / "teacher.pt")
    run = (*RUN, "schedule.epochs=1", "schedule.warmup_epochs=0", "trainer.eval_every_epochs=null")
    fcmae_here(*run, "hydra.run.dir=ranks1")
    fcmae(*run, "hydra.run.dir=ranks2", ranks=2)
    logs = [(tmp_path / f"ranks{ranks}" / "metrics.jsonl").read_text().splitlines() for ranks in (1, 2)]
    one, two = ([line for line in map(json.loads, log) if "loss_hog" in line] for log in logs)
    assert one[-1]["weight_hog"] != 1
    for name in ("loss", "weight_hog", "weight_labels", *(f"loss_{name}" for name in NAMES)):
        assert two[-1][name] == pytest.approx(one[-1][name], rel=1e-4), name
