"""Schedule, parameter groups, the guard against non-finite gradients, what is logged, and the recipe."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import timm
import torch
from timm.utils import ModelEmaV3
from torch import nn

from fcmae.config import FinetuneConfig, OptimConfig, PretrainConfig, to_dict
from fcmae.config.recipe import HOW_IT_RUNS, PLACES, check_recipe, is_recipe
from fcmae.distributed import World
from fcmae.errors import UsageError
from fcmae.loggers import meter as meters
from fcmae.loggers.logger import MetricsFile, RunLogger
from fcmae.loggers.meter import Meter
from fcmae.loggers.progress import create_progress
from fcmae.models import FCMAE, create_backbone
from fcmae.optim.adamw import create_optimizer, layer_scale, load_moments, param_groups, set_lr
from fcmae.optim.schedule import Schedule
from fcmae.training.finite import FiniteGuard, infectious
from fcmae.training.state import TrainState
from tests.conftest import run_python

CPU = World(0, 1, 0, 1, torch.device("cpu"))


def test_schedule_warms_up_linearly_and_ends_at_min_lr():
    schedule = Schedule(peak=1.0, min_lr=0.1, warmup_steps=10, total_steps=110)
    assert schedule(0) == 0
    assert schedule(5) == 0.5
    assert schedule(10) == 1.0
    assert schedule(60) == pytest.approx(0.1 + 0.9 * 0.5)
    assert schedule(35) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert schedule(110) == pytest.approx(0.1)
    line = replace(schedule, decay="linear")
    assert [line(step) for step in (5, 10, 35, 110)] == pytest.approx([0.5, 1.0, 0.1 + 0.9 * 0.75, 0.1])


def test_lr_follows_the_global_batch():
    assert OptimConfig(blr=1.5e-4, global_batch_size=4096).peak_lr == pytest.approx(2.4e-3)
    assert OptimConfig(blr=1.5e-4, lr=1e-3).peak_lr == 1e-3


def test_vectors_and_the_mask_token_are_not_decayed():
    groups = param_groups(FCMAE("convnextv2_atto"), OptimConfig(weight_decay=0.05))
    decay = {name: group["weight_decay"] for group in groups for name in group["names"]}
    for name, value in decay.items():
        vector = name.endswith(("bias", "mask_token")) or ".norm" in name or ".grn." in name or "stem.1" in name
        assert value == (0.0 if vector or ".downsample.0." in name else 0.05), name
    assert "decoder.mask_token" in decay
    assert not any(name.startswith("backbone.head") for name in decay)


def test_set_lr_scales_each_group():
    model = create_backbone("convnextv2_atto", num_classes=10, depths=(1, 1, 1, 1), dims=(8, 8, 8, 8))
    optimizer = create_optimizer(model, OptimConfig(layer_decay=0.5))
    set_lr(optimizer, 2.0)
    lrs = {name: group["lr"] for group in optimizer.param_groups for name in group["names"]}
    assert lrs["head.fc.weight"] == 2.0
    assert lrs["stages.3.blocks.0.mlp.fc1.weight"] == 1.0
    assert lrs["stem.0.weight"] == lrs["stages.0.blocks.0.norm.bias"] == 2.0 * 0.5**4


def test_layer_decay_is_for_backbones():
    with pytest.raises(ValueError, match="optim.layer_decay must be null in pretraining; got 0.9"):
        param_groups(FCMAE("convnextv2_atto"), OptimConfig(layer_decay=0.9))
    with pytest.raises(ValueError, match="'decoder.pred.bias' is not a parameter of a ConvNeXt"):
        layer_scale("decoder.pred.bias", (1, 1, 1, 1), 0.9, "single")


def test_the_guard_stops_the_optimizer_at_the_first_bad_step_and_keeps_it_stopped():
    layer = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    guard = FiniteGuard(torch.device("cpu"))
    assert guard.first_bad_step(CPU) is None
    weights = []
    for step, gradient in enumerate((1.0, 1.0, float("nan"), 1.0)):
        for param in layer.parameters():
            param.grad = torch.full_like(param, gradient)
        norm = torch.nn.utils.get_total_norm([p.grad for p in layer.parameters()])
        optimizer.found_inf = guard.check(torch.isfinite(norm), step)
        optimizer.step()
        weights.append(layer.weight.detach().clone())
    assert guard.first_bad_step(CPU) == 2
    assert not torch.equal(weights[0], weights[1])
    assert torch.equal(weights[1], weights[2])
    assert torch.equal(weights[1], weights[3])


def test_a_loss_that_is_not_finite_spoils_its_gradient_and_a_finite_one_does_not():
    weight = torch.tensor([1e19, 2e19], requires_grad=True)
    (weight * 2).square().sum().backward()
    assert weight.grad is not None
    assert weight.grad.isfinite().all()  # although the loss is infinite
    weight.grad = None
    infectious((weight * 2).square().sum()).backward()
    assert weight.grad.isnan().all()
    small = torch.randn(1000, requires_grad=True)
    losses = small.sin().sum(), infectious(small.sin().sum())
    plain, same = (torch.autograd.grad(loss, small)[0] for loss in losses)
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(plain, same)


@pytest.mark.parametrize(("scale", "noticed"), [(2.0**16, False), (0.5, True)])
def test_only_a_scale_excuses_a_gradient_of_float16_that_is_not_finite(scale, noticed):
    layer = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    scaler.scale(layer(torch.full((1, 2), math.inf)).sum()).backward()
    before = layer.weight.detach().clone()
    guard = FiniteGuard(torch.device("cpu"))
    TrainState(7, layer, optimizer, scaler, None).update(torch.tensor(1.0), guard, None, CPU)
    assert torch.equal(layer.weight, before)
    assert guard.first_bad_step(CPU) == (7 if noticed else None)


@pytest.mark.parametrize(("skip", "moved"), [(False, [0, 1]), (True, [0, 1, 4])])
def test_in_float16_nothing_changes_after_a_loss_that_is_not_finite(skip, moved):
    """Nor at a step that the scaler leaves out, neither the weights nor their average."""
    layer = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    state = TrainState(0, layer, optimizer, scaler, ModelEmaV3(layer, decay=0.5))
    guard = FiniteGuard(torch.device("cpu"), skip=skip)
    changed, averaged = [], []
    for step, gradient in enumerate((1.0, 1.0, math.nan, math.inf, 1.0)):
        weight, average = layer.weight.detach().clone(), state.ema.module.weight.clone()
        for param in layer.parameters():
            param.grad = scaler.scale(torch.full_like(param, gradient))
        state.update(torch.tensor(math.nan if step == 2 else 1.0), guard, None, CPU)
        changed += [step] * (not torch.equal(layer.weight, weight))
        averaged += [step] * (not torch.equal(state.ema.module.weight, average))
    assert changed == averaged == moved
    assert guard.first_bad_step(CPU) == 2
    assert guard.count(CPU) == 1


def test_a_resumed_optimizer_has_the_moments_of_before_and_the_settings_of_now():
    """Also where other settings make other groups."""
    model = timm.create_model("convnextv2_atto", num_classes=3)
    first = create_optimizer(model, OptimConfig(weight_decay=0.0))
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    first.step()
    now = OptimConfig(weight_decay=0.3, betas=[0.8, 0.9], layer_decay=0.5)
    second = create_optimizer(model, now)
    load_moments(second, first.state_dict())
    assert len(second.param_groups) > len(first.param_groups)
    for param in model.parameters():
        assert first.state[param].keys() == second.state[param].keys()
        assert all(torch.equal(first.state[param][key], second.state[param][key]) for key in first.state[param])
    fresh = create_optimizer(model, now)
    for loaded, made in zip(second.param_groups, fresh.param_groups, strict=True):
        assert {k: v for k, v in loaded.items() if k != "params"} == {k: v for k, v in made.items() if k != "params"}


def test_skipping_leaves_out_the_bad_step_alone():
    layer = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    guard = FiniteGuard(torch.device("cpu"), skip=True)
    weights = []
    for step, gradient in enumerate((1.0, float("inf"), 1.0)):
        for param in layer.parameters():
            param.grad = torch.full_like(param, gradient)
        optimizer.found_inf = guard.check(torch.tensor(math.isfinite(gradient)), step)
        optimizer.step()
        weights.append(layer.weight.detach().clone())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])
    assert guard.first_bad_step(CPU) == 1
    assert guard.first_bad_step(CPU) is None
    assert guard.count(CPU) == 1


DETERMINISTIC = """
import os, torch
from fcmae.training.determinism import only_deterministic_algorithms
only_deterministic_algorithms()
from torch._inductor import config
assert torch.are_deterministic_algorithms_enabled()
assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
assert config.deterministic
assert not torch.cuda.is_initialized()
print(os.environ["CUBLAS_WORKSPACE_CONFIG"])
"""


def test_determinism_is_set_up_before_cuda_and_keeps_what_the_user_chose(tmp_path, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    for given, used in ((None, ":4096:8"), (":16:8", ":16:8")):
        variables = {} if given is None else {"CUBLAS_WORKSPACE_CONFIG": given}
        done = run_python(tmp_path, "-c", DETERMINISTIC, variables=variables)
        assert done.stdout.strip() == used


def test_the_meter_leaves_out_what_is_not_finite():
    meter = Meter(CPU, images_per_step=8)
    for loss in (1.0, math.nan, 3.0):
        meter.add(torch.tensor(loss), torch.tensor(5.0))
    assert meter.read()["loss"] == 2.0


def test_a_loss_counts_for_the_share_of_its_rank():
    """Also where another rank's is not finite: the sums over ranks are stood in for."""
    losses, shares = (0.5, math.nan, 1.0), (1.25, 1.25, 0.5)  # a rank's loss is the mean over all that it processes
    meters = [Meter(CPU, 8, share) for share in shares]
    for meter, loss in zip(meters, losses, strict=True):
        meter.add(torch.tensor(loss), torch.tensor(5.0))
    total = Meter(CPU, 8)
    total.loss, total.finite = (sum(getattr(meter, name) for meter in meters) for name in ("loss", "finite"))
    assert total.read()["loss"] == pytest.approx(1.5 / 1.75)


class BrokenSink:
    """Fails like a process of wandb that died."""

    def __init__(self):
        self.calls = 0

    def log(self, *_):
        self.calls += 1
        raise ConnectionResetError("Connection lost\nlong story")

    picture = close = log


def test_what_cannot_be_logged_is_told_once_and_stops_nothing(tmp_path, capsys):
    broken, written = BrokenSink(), MetricsFile(tmp_path, 0)
    logger = RunLogger([broken, written], create_progress("run", 0, 3, enabled=False))
    for step in (1, 2):
        logger.log(step, {"loss": 1.0})
    logger.close()
    assert broken.calls == 3
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    assert capsys.readouterr().err == "BrokenSink could not write: Connection lost\n"


def test_resuming_cuts_the_metrics_after_its_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    MetricsFile(tmp_path, 2).close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert list(tmp_path.iterdir()) == [path]


def test_the_meter_averages_since_the_last_reading():
    meter = Meter(CPU, images_per_step=8)
    for loss in (1.0, 3.0):
        meter.add(torch.tensor(loss), torch.tensor(5.0))
    metrics = meter.read()
    assert (metrics["loss"], metrics["grad_norm"]) == (2.0, 5.0)
    assert 0.05 < metrics["memory_gib"] < 100
    meter.add(torch.tensor(7.0), torch.tensor(1.0))
    assert meter.read()["loss"] == 7.0


def test_the_share_of_waiting_for_data_is_that_of_the_time_since_the_last_reading(monkeypatch):
    """Of the rank that waited longest, by a clock that this test turns."""
    now = [100.0]
    monkeypatch.setattr(meters, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    meter = Meter(CPU, images_per_step=8)

    def step(waiting: float, working: float) -> None:
        with meter.waiting_for_data():
            now[0] += waiting
        meter.add(torch.tensor(1.0), torch.tensor(1.0))
        now[0] += working

    step(1.0, 3.0)
    step(0.0, 4.0)
    metrics = meter.read()
    assert (metrics["data_wait"], metrics["images_per_second"]) == (0.125, 2.0)
    step(3.0, 1.0)
    assert meter.read()["data_wait"] == 0.75
    step(5.0, 0.0)
    meter.restart()  # after an evaluation
    step(1.0, 1.0)
    assert meter.read()["data_wait"] == 0.5


def test_a_changed_recipe_is_refused_key_by_key():
    old, new = to_dict(PretrainConfig()), to_dict(PretrainConfig(seed=1, optim=OptimConfig(betas=[0.9, 0.99])))
    new["trainer"]["micro_batch_size"] = 8
    new["logger"]["project"] = "other"
    del old["data"]["hflip"]
    with pytest.raises(UsageError) as caught:
        check_recipe(old, new)
    assert str(caught.value).split("\n")[1:] == ["  seed: 0 -> 1", "  optim.betas: (0.9, 0.95) -> (0.9, 0.99)"]
    check_recipe(old, {**new, "seed": 0, "optim": old["optim"]})


def test_what_may_change_on_resuming_is_a_rule_by_group():
    known = {}
    for config in (to_dict(PretrainConfig()), to_dict(FinetuneConfig())):
        for group, value in config.items():
            known |= {f"{group}.{key}": group for key in value} if isinstance(value, dict) else {group: ""}
    assert known.keys() >= PLACES
    assert set(known.values()) >= set(HOW_IT_RUNS)
    for key, group in known.items():
        assert is_recipe(key) == (group not in HOW_IT_RUNS and key not in PLACES), key
    for key in ("seed", "precision", "optim.global_batch_size", "optim.ema_decay", "model.grn_scope", "data.hflip"):
        assert is_recipe(key), key
    assert not any(map(is_recipe, ("name", "data.path", "trainer.micro_batch_size", "engine.name", "loader.workers")))
