"""The dense engine on the GPU's kernels against timm's forward."""

import pytest
import timm
import torch

from fcmae.engines.dense import dense
from tests.conftest import relative_error
from tests.results import assert_same, newest

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("size", [(224, 224), (160, 96), (100, 230)])
@pytest.mark.parametrize("name", ["convnextv2_atto", "convnext_atto"])
def test_equals_timm_in_float32(name, size, compiled):
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    model = timm.create_model(name, num_classes=3).cuda()
    for param in model.parameters():
        torch.nn.init.normal_(param, std=0.1)
    imgs = torch.randn(4, 3, *size, device="cuda")

    def gradients(features: torch.Tensor) -> list[torch.Tensor]:
        model.zero_grad()
        model.forward_head(features).square().sum().backward()
        return [param.grad.clone() for param in model.parameters()]

    expected = model.forward_features(imgs)
    wanted = gradients(expected)
    actual = dense(model, imgs, compiled=compiled)[-1]
    assert relative_error(actual, expected) < 1e-5
    found = gradients(actual)
    assert max(map(relative_error, found, wanted)) < 1e-5
    again = gradients(dense(model, imgs, compiled=compiled)[-1])
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


RUN = ("finetune", "model=convnextv2_atto", "model.drop_path_rate=0.2", "data=synthetic", "data.length=256")
RUN += ("optim.lr=1e-3", "optim.global_batch_size=64", "schedule.epochs=5", "schedule.warmup_epochs=1")
RUN += ("trainer.eval_every_epochs=null", "optim.ema_decay=0.9", "trainer.log_every=1", "logger=quiet")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("micro_batch_size", [64, 24])
def test_a_cuda_graph_changes_no_bit_of_fine_tuning(fcmae, tmp_path, micro_batch_size):
    """With drop path, mixup and CutMix; with micro-batches of 24 also accumulation and padding."""
    args = (*RUN, "precision=bf16", f"trainer.micro_batch_size={micro_batch_size}")
    for name, graph in (("graph", "true"), ("eager", "false")):
        fcmae(*args, f"trainer.cuda_graph={graph}", f"hydra.run.dir={name}", threads=4, timeout=280)
    with_graph, without = (newest(tmp_path / name) for name in ("graph", "eager"))
    assert_same(with_graph["model"], without["model"])
    assert_same(with_graph["ema"], without["ema"])


@pytest.mark.timeout(600)
def test_fine_tuning_follows_timms_curve(fcmae, tmp_path):
    for engine in ("dense", "timm"):
        fcmae(*RUN, "precision=float32", f"engine={engine}", f"hydra.run.dir={engine}", threads=4, timeout=280)
    dense_run, timm_run = (newest(tmp_path / name)["model"] for name in ("dense", "timm"))
    norms = [torch.cat([w.flatten().double() for w in run.values()]) for run in (dense_run, timm_run)]
    assert relative_error(*norms) < 1e-3  # 20 steps of AdamW, whose first ones amplify rounding
