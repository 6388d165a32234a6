"""Signs of feature collapse, in constructed networks and in a healthy one; the probe during pretraining."""

import math
from types import SimpleNamespace

import pytest
import torch
from timm.layers.grn import GlobalResponseNorm
from timm.models.convnext import ConvNeXtBlock

from fcmae.config import compose
from fcmae.data.sources import val_source
from fcmae.distributed import World
from fcmae.evaluation.collapse import DEAD, Channels, effective_rank, mean_cosine
from fcmae.loggers.logger import RunLogger
from fcmae.loggers.progress import create_progress
from fcmae.models import create_backbone
from fcmae.models.build import build_fcmae
from fcmae.tasks.monitors import Collapse, OnlineProbe
from tests.conftest import TINY_PRETRAIN
from tests.results import metrics_of

CPU = World(0, 1, 0, 1, torch.device("cpu"))


def test_the_effective_rank_counts_directions():
    assert effective_rank(torch.eye(7)) == pytest.approx(7)
    assert effective_rank(torch.ones(50, 8)) == pytest.approx(1)
    assert effective_rank(torch.zeros(5, 3)) == 1
    shares = torch.tensor([0.5, 0.25, 0.25])
    entropy = -(shares * shares.log()).sum()
    assert effective_rank(8 * shares.diag()) == pytest.approx(entropy.exp().item())


def test_the_mean_cosine_is_that_of_all_pairs():
    features = torch.randn(9, 4)
    units = features.double() / features.double().norm(dim=1, keepdim=True)
    pairs = [units[i] @ units[j] for i in range(9) for j in range(i)]
    assert mean_cosine(features) == pytest.approx(torch.stack(pairs).mean().item())
    assert mean_cosine(torch.ones(4, 3)) == pytest.approx(1)


def bias(block: ConvNeXtBlock, value: float, share: float) -> None:
    """``value`` as the bias of the first channels of the widened layer."""
    with torch.no_grad():
        layer = block.mlp.fc1.bias
        layer[: math.ceil(share * len(layer))] = value


@pytest.mark.parametrize("conv_mlp", [False, True])
def test_a_channel_is_dead_if_it_answers_to_no_image(conv_mlp):
    backbone = create_backbone("convnextv2_atto", depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), conv_mlp=conv_mlp).eval()
    blocks = [module for module in backbone.modules() if isinstance(module, ConvNeXtBlock)]
    bias(blocks[1], -100, 0.5)
    bias(blocks[3], -100, 0.25)
    channels = Channels(backbone, CPU.device)
    imgs = torch.randn(3, 3, 64, 64)
    with channels.watched(), torch.no_grad():
        backbone(imgs[:2])
        backbone(imgs[2:])
    assert not any(module._forward_pre_hooks for module in backbone.modules())
    assert channels.dead(CPU) == pytest.approx((0.5 + 0.25) / 4)
    layer = next(module for module in backbone.modules() if isinstance(module, GlobalResponseNorm))
    seen: list[torch.Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        backbone(imgs)
    hook.remove()
    norms = seen[0].flatten(2).norm(dim=2) if conv_mlp else seen[0].flatten(1, 2).norm(dim=1)
    relative = norms / norms.mean(dim=1, keepdim=True)
    assert torch.allclose(channels.largest[0].flatten(), relative.amax(0), rtol=1e-4)
    assert DEAD < 0.1 < relative.min()


def test_v1_has_no_channels_of_grn():
    assert Channels(create_backbone("convnext_atto"), CPU.device).dead(CPU) is None


@pytest.mark.parametrize(
    ("what", "signs"),
    [
        ("healthy", []),
        ("dead", ["dead_channels is 0.75 (above 0.5)"]),
        ("constant", ["effective_rank is 1 (below 2)", "feature_cosine is 1 (above 0.999)"]),
    ],
)
def test_a_collapse_is_said_once(capsys, what, signs):
    cfg = compose("pretrain", TINY_PRETRAIN[1:])
    backbone = build_fcmae(cfg).backbone
    for block in (module for module in backbone.modules() if isinstance(module, ConvNeXtBlock)):
        if what == "dead":
            bias(block, -100, 0.75)
    if what == "constant":
        torch.nn.init.zeros_(backbone.stem[0].weight)
        torch.nn.init.normal_(backbone.stem[1].bias)
    logged, kept = [], []
    sink = SimpleNamespace(log=lambda step, metrics: logged.append(metrics), warn=lambda *given: kept.append(given))
    logger = RunLogger([sink], create_progress("a", 0, 1, enabled=False))
    look = Collapse(backbone, cfg, val_source(cfg.data))
    for step in (1, 2):
        look(None, step, logger, CPU, lambda: False)
    assert [set(metrics) for metrics in logged] == 2 * [{"effective_rank", "feature_cosine", "dead_channels"}]
    assert backbone.training
    lines = capsys.readouterr().err.splitlines()
    said = [f"warning: the features collapse at step 1: {', '.join(signs)}; see docs/monitoring.md"]
    assert lines == (said if signs else [])
    assert kept == [(1, line) for line in lines]


def test_the_probe_is_the_same_at_every_look_and_leaves_the_generators_alone():
    cfg = compose("pretrain", [*TINY_PRETRAIN[1:], "monitor=probe", "data.length=60", "monitor.knn_queries=20"])
    look = OnlineProbe(build_fcmae(cfg).backbone, cfg)
    logged = []
    logger = type("Logger", (), {"log": lambda self, step, metrics: logged.append(metrics)})()
    before = torch.get_rng_state()
    for step in (1, 2):
        look(None, step, logger, CPU, lambda: False)
    assert torch.equal(torch.get_rng_state(), before)
    assert logged[0] == logged[1]
    assert set(logged[0]) == {"probe_top1", "probe_top5"}
    assert logged[0]["probe_top1"] > 50  # the images are those that it learned


def test_all_looks_together_change_no_bit(fcmae_here, tmp_path):
    looks = ("monitor=probe", "monitor.probe_every_epochs=1", "monitor.knn_every_epochs=1", "monitor.val_loss=true")
    run = (*TINY_PRETRAIN, "schedule.epochs=2", "trainer.eval_every_epochs=1")
    for name, given in (("alone", ()), ("watched", looks)):
        fcmae_here(*run, *given, f"hydra.run.dir={name}")
    files = [(tmp_path / name / "encoder.safetensors").read_bytes()[-4096:] for name in ("alone", "watched")]
    assert files[0] == files[1]
    lines = metrics_of(tmp_path / "watched")
    for name in ("val_loss", "effective_rank", "feature_cosine", "dead_channels", "knn10", "probe_top1"):
        assert [line["step"] for line in lines if name in line] == [3, 6]
