import functools

import pytest
import timm
import torch
from timm.layers import DropPath
from torch._dynamo.testing import CompileCounterWithBackend

from fcmae.config import FCMAEConfig, from_dict
from fcmae.engines import compiled as regions
from fcmae.errors import ConfigError
from fcmae.masks.patches import random_mask
from fcmae.models import FCMAE, create_backbone
from fcmae.models.fcmae import init_official
from tests.conftest import ENGINE_NAMES

SIZES = ("atto", "femto", "pico", "nano", "tiny", "base", "large", "huge")


@pytest.mark.parametrize("name", ["convnextv2_atto", "convnext_atto"])
def test_a_gradient_for_every_trained_parameter(name):
    model = FCMAE(name, decoder_embed_dim=16, decoder_depth=2)
    out = model(torch.randn(2, 3, 64, 64))
    out.loss.backward()
    assert out.pred.shape == (2, 4, 3072)
    assert out.mask.shape == (2, 4)
    for param_name, param in model.named_parameters():
        if param_name.startswith("backbone.head"):
            assert param.grad is None
        else:
            assert param.grad is not None, param_name


@pytest.mark.parametrize(("init", "low", "high"), [("timm", 0.95, 1.1), ("official", 15, 18)])
def test_first_loss(init, low, high):
    """Std 0.02 starts at the variance of the target; the official code's std 1 at 16.5."""
    model = FCMAE("convnextv2_atto")
    if init == "official":
        init_official(model)
    assert low < model(torch.randn(2, 3, 224, 224)).loss.item() < high


@pytest.mark.parametrize("size", SIZES)
def test_all_sizes_by_their_timm_names(size):
    with torch.device("meta"):
        model = FCMAE(f"convnextv2_{size}")
    assert model.patch_size == 32
    names = {n.removeprefix("backbone.") for n in model.state_dict() if n.startswith("backbone.")}
    with torch.device("meta"):
        assert names == set(timm.create_model(f"convnextv2_{size}", num_classes=0).state_dict())


def test_a_backbone_object_is_used_as_it_is():
    backbone = create_backbone("convnextv2_atto", depths=(1, 1, 1, 1))
    model = FCMAE(backbone)
    assert model.backbone is backbone


def test_a_given_mask_is_used():
    model = FCMAE("convnextv2_atto", decoder_embed_dim=16)
    imgs, mask = torch.randn(2, 3, 64, 64), random_mask(torch.rand(2, 4), 2)
    out = model(imgs, mask)
    assert torch.equal(out.mask, mask)
    assert torch.equal(out.loss, model(imgs, mask, 2).loss)


def test_mask_patch_of_two_strides():
    model = FCMAE("convnextv2_atto", mask_patch_size=64, mask_ratio=0.5, decoder_embed_dim=16)
    out = model(torch.randn(2, 3, 128, 128))
    assert out.mask.shape == (2, 4)
    assert out.pred.shape == (2, 16, 3072)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.zeros(2, 4), "got torch.float32"),
        (torch.zeros(2, 5, dtype=torch.bool), r"mask must be torch.bool \[2, 4\]; got torch.bool \[2, 5\]"),
        (torch.tensor([[True] * 4] * 2), "at least 1"),
        (torch.tensor([[True, True, True, False], [True, False, True, False]]), r"got \[1, 2\]"),
    ],
)
def test_a_wrong_mask_is_refused(mask, message):
    with pytest.raises(ValueError, match=message):
        FCMAE("convnextv2_atto", decoder_embed_dim=16)(torch.randn(2, 3, 64, 64), mask)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"mask_ratio": 1.0}, r"mask_ratio must be in \[0, 1\); got 1.0"),
        ({"mask_patch_size": 48}, "mask_patch_size must be a multiple .* 32; got 48"),
        ({"grn_scope": "gpu"}, "grn_scope must be one of image, batch; got 'gpu'"),
        ({"engine": "sparse"}, "engine must be one of packed, .*; got 'sparse'"),
        ({"backbone": "convnextv2_ato"}, "did you mean convnextv2_atto"),
        ({"backbone": "resnet50"}, "not a ConvNeXt known to timm"),
        ({"drop_path_rate": 0.1}, r"drop path 0.0\d+, .*; create it with drop_path_rate=0"),
    ],
)
def test_a_wrong_argument_is_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        FCMAE(**kwargs)


def test_a_wrong_attribute_is_named():
    with pytest.raises(ValueError, match=r"recompute_stages must be stages, 1 to 4; got \[0\]"):
        FCMAE("convnextv2_atto").recompute_stages = [0]
    with pytest.raises(ConfigError, match="model.init must be one of timm, official; got 'zero'"):
        from_dict(FCMAEConfig, {"init": "zero"}, prefix="model")


def test_an_image_that_does_not_fit_names_what_does():
    with pytest.raises(ValueError, match="224 and 256"):
        FCMAE("convnextv2_atto")(torch.zeros(1, 3, 230, 224))


@pytest.mark.parametrize("engine", ENGINE_NAMES)
def test_engines_do_not_ignore_drop_path(engine):
    """Also where it was set after the model was made; in evaluation it does nothing anyway."""
    model = FCMAE("convnextv2_atto", engine=engine, decoder_embed_dim=16)
    imgs = torch.randn(1, 3, 64, 64)
    model.backbone.stages[2].blocks[1].drop_path = DropPath(0.25)
    with pytest.raises(ValueError, match="drop path 0.25"):
        model(imgs)
    model.eval()(imgs)


def test_grad_checkpointing_of_the_backbone_recomputes_its_stages():
    def kept(enable):
        sizes = []
        model = FCMAE("convnextv2_atto", decoder_embed_dim=16)
        model.backbone.set_grad_checkpointing(enable)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            model(torch.randn(2, 3, 64, 64))
        return sum(sizes)

    assert kept(True) < 0.5 * kept(False)


@pytest.mark.parametrize("engine", ["packed", "masked"])
def test_recomputing_stages_changes_no_bit(engine):
    imgs, mask = torch.randn(2, 3, 64, 64), random_mask(torch.rand(2, 4), 2)
    results = []
    for stages, timms in (((), False), ((1, 3), False), ((), True)):
        torch.manual_seed(0)
        model = FCMAE("convnextv2_atto", engine=engine, decoder_embed_dim=16)
        model.recompute_stages = stages
        model.backbone.set_grad_checkpointing(timms)
        model(imgs, mask).loss.backward()
        results.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for name, grad in results[0].items():
        assert all(torch.equal(grad, result[name]) for result in results[1:]), name


def test_recomputing_keeps_fewer_tensors():
    def kept(stages):
        sizes = []
        model = FCMAE("convnextv2_atto", decoder_embed_dim=16)
        model.recompute_stages = stages
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            model(torch.randn(2, 3, 64, 64))
        return sum(sizes)

    assert kept((1, 2, 3, 4)) < 0.5 * kept(())


@pytest.fixture
def graphs(monkeypatch, backend):
    """Counts the graphs that are compiled, by a backend that costs little time.

    A function may have three shapes, and torch's limit of eight is as low: four stages exceed it.
    """
    counter = CompileCounterWithBackend(backend)
    compiled = functools.cache(lambda f: torch.compile(f, backend=counter, dynamic=False, fullgraph=True))
    monkeypatch.setattr(regions, "_compiled", compiled)
    torch.compiler.reset()
    regions._prepare.cache_clear()
    with torch._dynamo.config.patch(recompile_limit=3):
        yield counter
    regions._prepare.cache_clear()


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo looks at it
@pytest.mark.parametrize(
    ("engine", "decoder", "backend"),
    [
        ("packed", "light", "eager"),
        pytest.param("packed", "unet", "aot_eager", marks=pytest.mark.slow),
        pytest.param("masked", "light", "aot_eager", marks=pytest.mark.slow),
    ],
)
def test_regions_are_compiled_once_for_all_blocks_and_steps(engine, decoder, backend, graphs):
    """A graph break is an error (fullgraph); a stage's blocks share one graph, and no step compiles again.

    Two slow cases also trace the gradients, which takes as long again.

    A process may compile more networks than torch expects of one.
    """
    model = FCMAE("convnextv2_atto", engine=engine, decoder=decoder, decoder_embed_dim=16, depths=(2, 2, 2, 2))
    model.compile()
    batches = [(torch.randn(2, 3, 64, 64), random_mask(torch.rand(2, 4), 2)) for _ in range(3)]
    losses = [model(imgs, mask, 2).loss for imgs, mask in batches[:1]]
    compiled = graphs.frame_count
    losses += [model(imgs, mask, 2).loss for imgs, mask in batches[1:]]
    assert graphs.frame_count == compiled
    # stem, three downsamplings, four blocks, decoder, loss; the masked engine's first downsampling is an identity
    assert compiled == (10 if engine == "packed" else 11)
    model.eval()
    for (imgs, mask), loss in zip(batches, losses, strict=True):
        torch.testing.assert_close(model(imgs, mask, 2).loss, loss)
    assert graphs.frame_count == compiled  # evaluation runs as it is


@pytest.mark.slow
def test_the_whole_model_compiles_into_one_graph():
    model = FCMAE("convnextv2_atto", decoder_embed_dim=16, depths=(1, 1, 1, 1))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    imgs, mask = torch.randn(2, 3, 64, 64), random_mask(torch.rand(2, 4), 2)
    torch.testing.assert_close(compiled(imgs, mask, 2).loss, model(imgs, mask, 2).loss)
    assert counter.frame_count == 1


def test_an_unknown_argument_is_named_with_the_known_ones():
    with pytest.raises(TypeError, match="FCMAE got an unexpected keyword argument 'mask_rato'; its own are back"):
        FCMAE("convnextv2_atto", mask_rato=0.5)
