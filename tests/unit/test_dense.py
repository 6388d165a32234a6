"""The dense engine against timm's forward: outputs and every gradient."""

import pytest
import timm
import torch
from torch._subclasses import FakeTensor, FakeTensorMode

from fcmae.engines import dense as engine
from fcmae.engines import tiles
from fcmae.engines.dense import dense
from tests.conftest import relative_error


def network(name: str, **kwargs) -> torch.nn.Module:
    """A small network whose layer scale and GRN are far from their initial values."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, depths=(1, 1, 2, 1), dims=(8, 16, 24, 32), **kwargs)
    for param in model.parameters():
        torch.nn.init.normal_(param, std=0.1)
    return model


def gradients(model: torch.nn.Module, features: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    model.forward_head(features).square().sum().backward()
    return [param.grad.clone() for param in model.parameters()]


@pytest.fixture(params=["sites", "tiles"])
def layout(request, monkeypatch):
    """How a map is kept: on a CPU as sites, on a GPU in tiles."""
    if request.param == "tiles":
        layouts = engine._layouts

        def tiled(backbone, imgs):
            for height, width, _ in layouts(backbone, imgs):
                side = next(s for s in tiles.SIDES if height % s == width % s == 0)
                yield tiles.Layout(height, width, side)

        monkeypatch.setattr(engine, "_layouts", tiled)


def test_first_stage_with_a_downsampling_layer():
    """timm gives it one where the stem's stride is 2."""
    model, imgs = network("convnextv2_atto", patch_size=2), torch.randn(1, 3, 64, 96)
    assert relative_error(dense(model, imgs)[-1], model.forward_features(imgs)) < 1e-5


# 70 x 100 px leave sides of 17 x 25, 8 x 12, 4 x 6 and 2 x 3 sites, each with a rest that is ignored.
@pytest.mark.usefixtures("layout")
@pytest.mark.parametrize("size", [(64, 96), (70, 100)])
@pytest.mark.parametrize("name", ["convnextv2_atto", "convnext_atto"])
def test_equals_timm(name, size):
    model, imgs = network(name), torch.randn(2, 3, *size)
    expected = model.forward_features(imgs)
    grads = gradients(model, expected)
    stages = model.forward_intermediates(imgs, intermediates_only=True)
    maps = dense(model, imgs)
    assert relative_error(maps[-1], expected) < 1e-5
    for actual, wanted in zip(maps, stages, strict=True):
        assert relative_error(actual, wanted) < 1e-5
    for actual, wanted in zip(gradients(model, maps[-1]), grads, strict=True):
        assert relative_error(actual, wanted) < 1e-5


def test_recomputed_stages_have_the_same_gradients():
    model, imgs = network("convnextv2_atto"), torch.randn(2, 3, 64, 64)
    expected = gradients(model, dense(model, imgs)[-1])
    actual = gradients(model, dense(model, imgs, recompute_stages=[1, 2, 3, 4])[-1])
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_drop_path_is_the_backbones():
    model, imgs = network("convnextv2_atto", drop_path_rate=0.5).train(), torch.randn(8, 3, 32, 32)
    torch.manual_seed(1)
    expected = model.forward_features(imgs)
    torch.manual_seed(1)
    assert relative_error(dense(model, imgs)[-1], expected) < 1e-5


def test_images_smaller_than_the_stride_are_refused():
    with pytest.raises(ValueError, match="16 x 64 px leave a stage without a site"):
        dense(network("convnextv2_atto"), torch.randn(1, 3, 16, 64))


def test_tables_that_a_cuda_graph_reads_are_kept(monkeypatch):
    """However many others are made later: their memory must not be given to others."""
    monkeypatch.setattr(tiles, "_recorded", {})
    layout, cpu = tiles.Layout(4, 4, 2), torch.device("cpu")
    tables = tiles.all_visible(2, layout, cpu)
    assert tiles._recorded == {}
    for name in ("is_initialized", "is_current_stream_capturing"):
        monkeypatch.setattr(torch.cuda, name, lambda: True)
    assert tiles.all_visible(2, layout, cpu) is tables
    tiles.places(torch.tensor([[0], [1]]), 2, 2, 2, layout)
    kept, places = tiles._recorded.values()
    assert kept is tables
    assert places is tiles._places(2, 2, 2, 2, layout, cpu)


def test_tables_without_values_are_not_kept():
    """torch.export made later results of the same shape fake."""
    key = 3, tiles.Layout(4, 4, 2), torch.device("cpu")
    with FakeTensorMode():
        assert isinstance(tiles.all_visible(*key).index, FakeTensor)
    assert type(tiles.all_visible(*key).index) is torch.Tensor
    with FakeTensorMode():
        assert isinstance(tiles.all_visible(*key).index, FakeTensor)
