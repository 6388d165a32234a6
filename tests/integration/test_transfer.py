"""A pretrained backbone in other people's models: the code of docs/transfer.md on tiny data."""

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models.convnext import ConvNeXt
from torch import nn

import fcmae as package
from tests.conftest import TINY_PRETRAIN, run_python

PAGE = Path(__file__).parents[2] / "docs" / "transfer.md"
SHAPE = {"depths": (1, 1, 1, 1), "dims": (8, 12, 16, 24)}
"""Of the network that the fixture pretrains."""


def from_page(name: str) -> Any:
    """The function ``name`` of the page."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (block,) = [block for block in blocks if f"def {name}(" in block]
    namespace: dict[str, Any] = {}
    exec(compile(block, f"{PAGE}: {name}", "exec"), namespace)
    return namespace[name]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The directory of a pretraining run of 3 steps."""
    folder = tmp_path_factory.mktemp("pretrained")
    overrides = ["model.stem_stride=4", "data.image_size=64", "schedule.epochs=1", "schedule.warmup_epochs=0"]
    run_python(folder, "-m", "fcmae.cli", *TINY_PRETRAIN, *overrides, "hydra.run.dir=run")
    return folder / "run"


@pytest.fixture
def pretrained(run) -> ConvNeXt:
    return package.load(run).backbone


@pytest.fixture
def features(pretrained, tmp_path) -> nn.Module:
    """timm's features_only network with the weights of the checkpoint, which timm loads strictly."""
    torch.save(pretrained.state_dict(), tmp_path / "backbone.pth")
    overlay = {"file": str(tmp_path / "backbone.pth"), "num_classes": 0}
    return timm.create_model(
        "convnextv2_atto", features_only=True, pretrained=True, pretrained_cfg_overlay=overlay, **SHAPE
    )


def assert_same_maps(features: nn.Module, pretrained: ConvNeXt) -> None:
    imgs = torch.randn(2, 3, 64, 96)
    maps = features.eval()(imgs)
    expected = pretrained.forward_intermediates(imgs, intermediates_only=True)
    assert [x.shape[1] for x in maps] == features.feature_info.channels() == list(SHAPE["dims"])
    assert [64 // x.shape[2] for x in maps] == features.feature_info.reduction() == [4, 8, 16, 32]
    for x, y in zip(maps, expected, strict=True):
        assert torch.equal(x, y)


def train(model: nn.Module, backbone: nn.Module, loss_of: Any) -> list[float]:
    """Losses of three steps. Every weight of the backbone has a finite gradient, and the first layer's is not 0."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        for name, parameter in backbone.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
        assert next(backbone.parameters()).grad.abs().max() > 0
        optimizer.step()
        losses.append(loss.item())
    assert torch.tensor(losses).isfinite().all()
    return losses


def test_timm_features_only(features, pretrained):
    assert_same_maps(features, pretrained)


def test_timm_features_only_from_an_exported_directory(run, pretrained, tmp_path):
    convert = pytest.importorskip("fcmae.interchange.convert")
    convert.export(run, "timm", tmp_path / "exported")
    features = timm.create_model(f"local-dir:{tmp_path}/exported", pretrained=True, features_only=True)
    assert_same_maps(features, pretrained)


def test_torchvision_mask_rcnn(features):
    few = {"rpn_post_nms_top_n_train": 16, "rpn_post_nms_top_n_test": 8, "box_batch_size_per_image": 8}
    model = from_page("mask_rcnn")(features, 3, [0.5] * 3, [0.25] * 3, min_size=64, max_size=64, **few)
    imgs = [torch.rand(3, 64, 64), torch.rand(3, 48, 64)]
    targets = [
        {
            "boxes": torch.tensor([[4.0, 4.0, 40.0, 36.0], [20.0, 10.0, 60.0, 44.0]]),
            "labels": torch.tensor([1, 2]),
            "masks": torch.ones(2, *img.shape[1:], dtype=torch.uint8),
        }
        for img in imgs
    ]
    losses = train(model, features, lambda model: sum(model(imgs, targets).values()))
    assert losses[-1] < losses[0]
    found = model.eval()(imgs)
    assert [set(one) for one in found] == [{"boxes", "labels", "scores", "masks"}] * 2


def test_transformers_upernet(run, pretrained, tmp_path):
    convert = pytest.importorskip("fcmae.interchange.convert")
    pytest.importorskip("transformers")
    convert.export(run, "transformers", tmp_path / "exported")
    small = {"hidden_size": 16, "auxiliary_channels": 8}
    model = from_page("upernet")(tmp_path / "exported", 3, **small).eval()

    imgs, labels = torch.randn(2, 3, 64, 64), torch.randint(3, (2, 64, 64))
    with torch.inference_mode():
        maps = model.backbone(imgs, output_hidden_states=True).hidden_states[1:]
    for x, y in zip(maps, pretrained.forward_intermediates(imgs, intermediates_only=True), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-5 * y.abs().max().item())

    losses = train(model, model.backbone, lambda model: model(pixel_values=imgs, labels=labels).loss)
    assert losses[-1] < losses[0]
    assert model.eval()(pixel_values=imgs).logits.shape == (2, 3, 64, 64)
