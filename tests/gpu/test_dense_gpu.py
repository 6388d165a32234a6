"""The dense engine on the GPU's kernels against timm's forward."""

import pytest
import timm
import torch

from fcmae.engines.dense import dense
from tests.conftest import relative_error

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
