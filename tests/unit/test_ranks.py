"""An optimizer step is the same on any number of ranks and for any micro-batch, to 1e-6 in float32."""

import pytest
import torch
from torch import Tensor

from fcmae.config import compose
from fcmae.data.loading import TrainBatches, Workers
from fcmae.data.plan import BatchPlan, Padding
from fcmae.errors import ConfigError, Interrupted, UsageError
from fcmae.tasks.finetuning import Finetuning
from fcmae.tasks.pretraining import Pretraining
from fcmae.tasks.task import Task
from fcmae.training.run import pretrain
from tests.conftest import TINY_FINETUNE, TINY_PRETRAIN, relative_error
from tests.results import metrics_of

CPU = torch.device("cpu")
STEP = 3
BATCH = ("data.length=100", "optim.global_batch_size=32", "schedule.epochs=1")
MIXING = ("augment.mixup=0.8", "augment.cutmix=1.0", "augment.label_smoothing=0.1", "model.drop_path_rate=0.5")
AUGMENT = ("augment.on=gpu", "augment.auto_augment=rand-m9-mstd0.5-inc1", "augment.random_erasing=0.25")
OVERRIDES = {
    "pretrain": [*TINY_PRETRAIN[1:], *BATCH, "schedule.warmup_epochs=0", "data.crops_per_image=2"],
    "finetune": [*TINY_FINETUNE[1:], *BATCH, *MIXING, *AUGMENT],
}
TASKS = {"pretrain": Pretraining, "finetune": Finetuning}


def gradient(task: Task, ranks: int, micro: int | None) -> tuple[Tensor, Tensor]:
    """Loss and gradient of a step: the mean over ranks, which the exchange takes, of what each computes."""
    cfg = task.cfg
    plan = BatchPlan.create(100, 32, micro, ranks, cfg.seed, cfg.data.crops_per_image, task.pairs)
    task.model.train().zero_grad()
    total = torch.zeros(())
    for rank in range(ranks):
        batches = TrainBatches(task.dataset(), plan, rank, range(STEP, STEP + 1), Workers())
        padding = Padding(plan, rank, CPU)
        for number in range(plan.accum_steps):
            drawn = task.draw(STEP, plan.read(number, rank))
            batch = padding(number, [*(part.to(CPU) for part in next(batches)), *drawn])
            parts, weight = (batch[:-1], batch[-1]) if plan.padding else (batch, None)
            if task.name == "finetune":
                parts[0] = parts[0].to(next(task.model.parameters()).dtype)
            assert {len(part) for part in parts} == {plan.micro_batch_size}
            loss = task.loss(task.model, parts, weight)[0] / plan.accum_steps / ranks
            loss.backward()
            total += loss.detach()
    grads = [param.grad.flatten() for param in task.model.parameters() if param.grad is not None]
    return total, torch.cat(grads)


@pytest.fixture(
    scope="module", params=[("pretrain", torch.float32), ("finetune", torch.float32), ("finetune", torch.float64)]
)
def alone(request):
    """A task, and the loss and gradient of one rank."""
    name, dtype = request.param
    torch.manual_seed(0)
    task = TASKS[name](compose(name, OVERRIDES[name]))
    for param in task.model.to(dtype).parameters():
        torch.nn.init.normal_(param, std=0.1)  # some start at 0
    return task, *gradient(task, 1, None)


MORE = [pytest.param(*case, marks=pytest.mark.slow) for case in ((2, None), (3, None), (7, 6))]


@pytest.mark.parametrize(("ranks", "micro"), [(1, 10), (3, 8), (20, None), *MORE])
def test_any_number_of_ranks_takes_the_same_step(alone, ranks, micro):
    task, loss, grads = alone
    ours = gradient(task, ranks, micro)
    assert ours[0].item() == pytest.approx(loss.item(), rel=1e-6)
    assert relative_error(ours[1], grads) < (1e-6 if grads.dtype == torch.float32 else 1e-14)


@pytest.mark.parametrize(
    ("ranks", "micro", "message"),
    [
        (3, None, "optim.global_batch_size=32 must be a multiple of the 3 ranks"),
        (2, 7, "trainer.micro_batch_size must divide the 16 samples of a rank"),
    ],
)
def test_statistics_of_a_batch_hold_no_padding(ranks, micro, message):
    task = Pretraining(compose("pretrain", [*TINY_PRETRAIN[1:], *BATCH, "model.grn_scope=batch"]))
    task.prepare(BatchPlan.create(100, 32, 8, 2, 0))
    with pytest.raises(ConfigError, match=message):
        task.prepare(BatchPlan.create(100, 32, micro, ranks, 0))


def test_another_micro_batch_is_refused_on_resuming_where_it_changes_the_result(tmp_path):
    def run(folder, scope, micro, steps, *overrides):
        sizes = (f"trainer.micro_batch_size={micro}", f"trainer.max_steps={steps}", f"model.grn_scope={scope}")
        with pytest.raises(Interrupted):
            pretrain(compose("pretrain", [*TINY_PRETRAIN[1:], *sizes, *overrides]), tmp_path / folder)

    run("image", "image", 4, 1)
    run("image", "image", 3, 2)
    run("batch", "batch", 4, 1)
    with pytest.raises(UsageError, match=r"micro-batch, whose statistics model.grn_scope=batch takes: 4 -> 2$"):
        run("batch", "batch", 2, 2)
    run("batch", "batch", 2, 2, "trainer.allow_changed_recipe=true")


@pytest.mark.parametrize("name", TASKS)
def test_three_processes_train_as_one(fcmae, fcmae_here, tmp_path, name):
    args = (name, *OVERRIDES[name], "trainer.eval_every_epochs=null")
    fcmae(*args, "hydra.run.dir=three", ranks=3)
    fcmae_here(*args, "hydra.run.dir=one")
    three, one = (metrics_of(tmp_path / run) for run in ("three", "one"))
    assert len(one) == 3
    for ours, expected in zip(three, one, strict=True):
        assert ours["loss"] == pytest.approx(expected["loss"], rel=1e-6 if ours["step"] == 1 else 1e-5)
        assert ours["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)


@pytest.mark.parametrize("shares", [{"pixels": 1.0}, {"pixels": 0.25, "gradients": 0.75}])
def test_parts_of_a_loss_are_logged_as_the_loss_is(fcmae_here, tmp_path, monkeypatch, shares):
    """With accumulation and padding. A single part is the loss itself."""
    whole = Pretraining.loss

    def in_parts(*args):
        loss, _ = whole(*args)
        return loss, {name: share * loss for name, share in shares.items()}

    monkeypatch.setattr(Pretraining, "loss", in_parts)
    fcmae_here(*TINY_PRETRAIN, "trainer.micro_batch_size=3", "schedule.epochs=1", "hydra.run.dir=run")
    for line in metrics_of(tmp_path / "run"):
        parts = {name: value for name, value in line.items() if name.startswith("loss_")}
        expected = {f"loss_{name}": share * line["loss"] for name, share in shares.items() if len(shares) > 1}
        assert parts == pytest.approx(expected, rel=1e-6)
