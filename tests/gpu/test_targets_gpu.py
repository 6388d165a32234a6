"""All kinds of targets on a GPU: compiled, and replayed from a CUDA graph to the same bits."""

from functools import partial

import pytest
import timm
import torch

from fcmae.config import DataConfig, OptimConfig
from fcmae.masks.patches import random_mask
from fcmae.models import FCMAE
from fcmae.optim.adamw import create_optimizer, set_lr
from fcmae.targets import Channels, Hog, Labels, Laplacian, Pixels, Teacher
from fcmae.tasks.teachers import Features
from fcmae.training.cuda_graphs import EagerBackward, GraphedBackward

pytestmark = pytest.mark.gpu

MEAN = [0.5, 0.5, 0.5]


def teacher(name):
    """A random network of timm, the same at every call."""
    torch.manual_seed(3)
    options = {"dynamic_img_size": True} if "vit" in name else {}
    network = timm.create_model(name, num_classes=0, **options)
    made = Teacher(32, 3, dim=network.num_features)
    made.network = Features(network, MEAN, MEAN, DataConfig(), None)
    return made


def train(name, graphed, compiled=True, steps=6, holes=False):
    """Weights after some steps, and their losses by target.

    Args:
        holes: some pixels have no value, and channels that the encoder does not see are predicted.
    """
    torch.compiler.reset()
    targets = {
        "pixels": Pixels,
        "laplacian": Laplacian,
        "hog": Hog,
        "labels": partial(Labels, dim=10),
        "teacher": lambda **_: teacher(name),
    }
    if holes:
        targets["depth"] = partial(Channels, channels=[1, 0], norm="channel")
        targets["map"] = partial(Channels, channels=2, loss="ce", classes=5, cell=8)
    torch.manual_seed(0)
    model = FCMAE("convnextv2_atto", decoder_embed_dim=64, targets=targets)
    model.target_weights = {**dict.fromkeys(targets, 1.0), "hog": "learned", "labels": "learned"}
    model.cuda()
    if compiled:
        model.compile()
    optimizer = create_optimizer(model, OptimConfig())
    set_lr(optimizer, 1e-3)
    torch.manual_seed(1)
    imgs = torch.randn(32, 3, 224, 224, device="cuda")
    masks = [random_mask(torch.rand(32, 49, device="cuda"), 19) for _ in range(steps)]
    labels = torch.arange(32, device="cuda") % 11 - 1
    seen = {"label": labels}
    if holes:
        seen["valid"], seen["channels_valid"] = (torch.rand(32, 3, 224, 224, device="cuda") > 0.2 for _ in range(2))
        seen["valid"][:, :, :64, :96] = False
        seen["channels"] = torch.randint(0, 6, (32, 3, 224, 224), device="cuda").float()

    def run(batch, _):
        with torch.autocast("cuda", torch.bfloat16):
            out = model(batch[0], batch[1], 19, **dict(zip(seen, batch[2:], strict=True)))
        out.loss.backward()
        return {name: value.detach() for name, value in out.parts.items()}

    backward = GraphedBackward(run, model) if graphed else EagerBackward(run, model)
    losses = []
    for mask in masks:
        backward.start_step()
        losses.append({name: value.clone() for name, value in backward([imgs, mask, *seen.values()]).items()})
        optimizer.step()
    backward.close()
    return model.state_dict(), losses


@pytest.mark.parametrize(("name", "holes"), [("convnext_atto", False), ("test_vit", False), ("convnext_atto", True)])
def test_a_cuda_graph_with_a_teacher_changes_no_bit(name, holes):
    (eager, losses), (graphed, again) = train(name, False, holes=holes), train(name, True, holes=holes)
    for key, value in eager.items():
        assert torch.equal(value, graphed[key]), key
    assert all(
        torch.equal(value, other[key]) for one, other in zip(losses, again, strict=True) for key, value in one.items()
    )
    assert {"log_var_hog", "log_var_labels"} <= eager.keys()
    assert eager["log_var_hog"] != 0


@pytest.mark.parametrize("holes", [False, True])
def test_compiled_targets_are_those_that_run_as_they_are(holes):
    first = [train("convnext_atto", False, compiled, steps=1, holes=holes)[1][0] for compiled in (False, True)]
    for name, value in first[0].items():
        assert first[1][name].item() == pytest.approx(value.item(), rel=1e-2), name
