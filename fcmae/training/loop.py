"""The training loop, for both tasks. It reads from top to bottom: set up, resume, steps, save."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor

from fcmae.config import PretrainConfig, TrainerConfig, to_dict
from fcmae.data.cores import default_workers
from fcmae.data.loader import BatchPlan, TrainBatches
from fcmae.engines import HOST_BOUND
from fcmae.errors import ConfigError, Interrupted, SaveError
from fcmae.evaluation.features import EvaluationStopped, autocast
from fcmae.randomness import seed_step
from fcmae.training.backward import EagerBackward, GraphedBackward
from fcmae.training.bad import count_bad_samples
from fcmae.training.checkpoint import CheckpointDir, replacing
from fcmae.training.distributed import World
from fcmae.training.exchange import GradientExchange
from fcmae.training.finite import FiniteGuard, act_on_non_finite, infectious
from fcmae.training.logging import RunLogger
from fcmae.training.meter import Meter
from fcmae.training.monitors import Monitor
from fcmae.training.optim import create_optimizer, set_lr
from fcmae.training.recipe import check_recipe
from fcmae.training.resume import newest_state, say
from fcmae.training.saver import Saver
from fcmae.training.schedule import CosineSchedule
from fcmae.training.state import TrainState
from fcmae.training.stop import StopAgreement, Verdict
from fcmae.training.tasks import Task
from fcmae.training.watchdog import Watchdog


def train(task: Task, run_dir: Path, world: World, watchdog: Watchdog) -> Path:
    """Trains a task to the end of its schedule, continuing what ``run_dir`` holds.

    Returns:
        The last checkpoint.

    Raises NonFiniteLossError, with the weights and checkpoints of before; SaveError if a checkpoint cannot be written;
    Interrupted at ``trainer.max_steps``, after ``trainer.max_hours`` and at a signal (see :mod:`fcmae.interrupt`).
    """
    cfg = task.cfg
    plan = BatchPlan.create(
        len(task.source),
        cfg.trainer.global_batch_size,
        cfg.trainer.micro_batch_size,
        world.size,
        cfg.seed,
        cfg.data.crops_per_image,
    )
    task.prepare(plan)
    schedule = CosineSchedule(
        cfg.optim.peak_lr(plan.global_batch_size),
        cfg.schedule.min_lr,
        round(cfg.schedule.warmup_epochs * plan.steps_per_epoch),
        max(1, round(cfg.schedule.epochs * plan.steps_per_epoch)),
    )
    checkpoints = _checkpoint_dir(run_dir, cfg.trainer, plan)
    state = _create_state(task, world)
    resumed = newest_state(checkpoints, world) if cfg.trainer.resume else None
    config = to_dict(cfg)
    if resumed is not None:
        if not cfg.trainer.allow_changed_recipe:
            world.on_main(lambda: check_recipe(resumed["config"], config))
        state.load_state_dict(resumed, checkpoints.folder)
    stop_step = min(schedule.total_steps, cfg.trainer.max_steps or schedule.total_steps)
    if world.is_main:
        checkpoints.sweep()
        checkpoints.set_aside(state.step, say)
        _write_config(run_dir, config)
        for line in (*task.notes, _summary(task, plan, state, schedule.total_steps, world)):
            say(line)
    stop = StopAgreement(world, cfg.trainer.max_hours)
    verdict = stop.at_once()
    model = task.model
    if cfg.trainer.compile if cfg.trainer.compile is not None else world.device.type == "cuda":
        model.compile()
    workers = default_workers(world.device, world.local_size) if cfg.data.workers is None else cfg.data.workers
    batches = TrainBatches(
        task.dataset(),
        plan,
        rank=world.rank,
        start_step=state.step,
        stop_step=stop_step,
        workers=workers,
        pin_memory=world.device.type == "cuda",
        prefetch=cfg.data.prefetch,
        timeout=cfg.trainer.hang_timeout,
        skip=cfg.data.on_error == "skip",
    )
    logger = RunLogger.create(cfg.logger, cfg.name, config, run_dir, (state.step, stop_step), world.is_main)
    meter = Meter(world, plan.global_batch_size)
    guard = FiniteGuard(world.device, skip=cfg.trainer.on_nonfinite == "skip")
    saver = Saver(checkpoints, cfg.trainer.on_save_error, enabled=world.is_main)

    exchange = GradientExchange(model, world.size)

    def run(batch: Sequence[Tensor], last: bool) -> Tensor:
        with autocast(world.device, cfg.trainer.precision):
            loss = task.loss(model, batch) / plan.accum_steps
        with exchange(last):
            state.scaler.scale(infectious(loss) / world.size).backward()
        return loss.detach()

    backward: EagerBackward | GraphedBackward = EagerBackward(run, model)
    if _use_cuda_graph(task, world):
        backward = GraphedBackward(run, model, plan.accum_steps > 1, exchange)

    def look(verdict: Verdict) -> tuple[bool, Verdict]:
        """Whether a monitor that is due found this state the best so far; and the verdict, which may become to stop.

        A stop does not wait for them: the next process begins with them.
        """
        if not state.evaluation_due or verdict != Verdict.GO_ON:
            return False, verdict
        best = False
        try:
            for monitor in _due_monitors(task, state.step, stop_step, plan):
                best |= state.improves(monitor.look(state.average, state.step, logger, world, stop.wished))
                meter.restart()
                watchdog.beat()
        except EvaluationStopped:
            return best, Verdict.STOP
        state.evaluation_due = False
        return best, verdict

    def save() -> None:
        act_on_non_finite(guard, task, plan, run_dir, world)
        saver.save(lambda: {"task": task.name, "config": config, **task.extra_state(), **state.state_dict()})
        watchdog.beat()

    model.train()
    with contextlib.closing(logger), contextlib.closing(saver), contextlib.closing(backward):
        if state.evaluation_due:
            _, verdict = look(verdict)
            save()
        while state.step < stop_step and verdict == Verdict.GO_ON:
            step = state.step
            lr = schedule(step)
            set_lr(state.optimizer, lr)
            backward.start_step()
            loss = torch.zeros((), device=world.device)
            for micro in range(plan.accum_steps):
                batch = [part.to(world.device, non_blocking=True) for part in next(batches)]
                seed_step(cfg.seed, step, micro, world.rank, world.device)
                loss += backward(batch, last=micro == plan.accum_steps - 1)
            grad_norm = _optimizer_step(state, guard, cfg.optim.clip_grad, step, loss)
            state.step += 1
            meter.add(loss, grad_norm)
            logger.progress.advance()
            watchdog.beat()

            verdict = stop.after_step(saver.failed)
            at_end = state.step == stop_step
            if at_end or verdict != Verdict.GO_ON or state.step % cfg.trainer.log_every == 0:
                metrics = meter.read() | saver.take_stall()
                metrics |= act_on_non_finite(guard, task, plan, run_dir, world)
                metrics |= count_bad_samples(batches, state.step, cfg.data, world)
                left = (stop_step - state.step) * plan.global_batch_size / metrics["images_per_second"]
                epoch = state.step / plan.steps_per_epoch
                logger.log(state.step, {**metrics, "lr": lr, "epoch": epoch, "seconds_left": left})
            state.evaluation_due = bool(_due_monitors(task, state.step, stop_step, plan))
            best, verdict = look(verdict)
            due = best or _due(state.step, cfg.trainer.checkpoint_every_epochs, plan)
            if verdict != Verdict.FAIL and (at_end or due or verdict == Verdict.STOP):
                save()
        stop.close()
        world.on_main(saver.finish)
    if verdict == Verdict.FAIL:
        raise SaveError(f"stopped at step {state.step}: a checkpoint could not be saved (trainer.on_save_error=stop)")
    if state.step < schedule.total_steps or state.evaluation_due:
        raise Interrupted(_why_stopped(state.step, stop_step, schedule.total_steps, stop, run_dir))
    if world.is_main:
        task.finish(run_dir, state.average)
    return checkpoints.path(state.step)


def _checkpoint_dir(run_dir: Path, cfg: TrainerConfig, plan: BatchPlan) -> CheckpointDir:
    keep_every: int | None = None
    if cfg.keep_every_epochs is not None:
        keep_every = max(1, round(cfg.keep_every_epochs * plan.steps_per_epoch))
    return CheckpointDir(run_dir, cfg.keep_checkpoints, keep_every)


def _create_state(task: Task, world: World) -> TrainState:
    cfg = task.cfg
    task.model.to(world.device)
    ema = None
    if cfg.trainer.ema_decay is not None:
        ema = ModelEmaV3(task.model, decay=cfg.trainer.ema_decay)
    optimizer = create_optimizer(task.model, cfg.optim)
    scaler = torch.amp.GradScaler(world.device.type, enabled=cfg.trainer.precision == "fp16")
    return TrainState(0, task.model, optimizer, scaler, ema)


def _use_cuda_graph(task: Task, world: World) -> bool:
    """Whether steps are replayed from a CUDA graph. Raises ConfigError where that was asked for and cannot be."""
    trainer = task.cfg.trainer
    engine = task.cfg.engine.name if isinstance(task.cfg, PretrainConfig) else None
    obstacles = {
        "a CPU": world.device.type != "cuda",
        "trainer.precision=fp16": trainer.precision == "fp16",  # the scale of the loss would be recorded
        f"engine={engine}": engine in HOST_BOUND,
        "fine-tuning (drop path and mixup draw random numbers)": task.name != "pretrain",
    }
    found = [name for name, present in obstacles.items() if present]
    if trainer.cuda_graph and found:
        raise ConfigError(f"trainer.cuda_graph is True; allowed with {' and '.join(found)} is false or null")
    return not found if trainer.cuda_graph is None else trainer.cuda_graph


def _optimizer_step(state: TrainState, guard: FiniteGuard, clip_grad: float | None, step: int, loss: Tensor) -> Tensor:
    """One optimizer step, which changes nothing if the gradient isn't finite. Returns the gradient's norm."""
    state.scaler.unscale_(state.optimizer)
    params = [p for group in state.optimizer.param_groups for p in group["params"] if p.grad is not None]
    grads = [p.grad for p in params]
    norm = torch.nn.utils.get_total_norm(grads, foreach=True)
    if clip_grad is not None:
        torch.nn.utils.clip_grads_with_norm_(params, clip_grad, norm, foreach=True)
    if state.scaler.is_enabled():
        # An overflow in float16 is ordinary: the scaler skips the step and scales less. A loss is never scaled, and a
        # gradient that is not finite although it was scaled down is no overflow of the scale's.
        excused = state.scaler.get_scale() >= 1
        guard.check(torch.isfinite(loss) & (torch.isfinite(norm) | excused), step)
        state.scaler.step(state.optimizer)
        state.scaler.update()
    else:
        # Fused AdamW leaves everything as it is where found_inf is 1, without the host having to know.
        found_inf = guard.check(torch.isfinite(norm), step)
        state.optimizer.found_inf = found_inf  # type: ignore[attr-defined]
        state.optimizer.step()
        if guard.skip and state.ema is not None and bool(found_inf):  # waits for the device, with this policy only
            return norm
    if state.ema is not None:
        state.ema.update(state.model)
    return norm


def _due_monitors(task: Task, step: int, stop_step: int, plan: BatchPlan) -> list[Monitor]:
    """The monitors that look after a step: all of them at the end."""
    return [m for m in task.monitors if step == stop_step or _due(step, m.every_epochs, plan)]


def _due(step: int, every_epochs: float, plan: BatchPlan) -> bool:
    """Whether another ``every_epochs`` epochs ended with this step."""
    interval = max(1, round(every_epochs * plan.steps_per_epoch))
    return step % interval == 0


def _why_stopped(step: int, stop_step: int, total_steps: int, stop: StopAgreement, run_dir: Path) -> str:
    again = f"the same command with hydra.run.dir={run_dir}"
    if step == stop_step < total_steps:
        return f"stopped at trainer.max_steps={stop_step} of {total_steps}; {again} and more steps goes on"
    return f"stopped after step {step} of {total_steps} ({stop.reason()}); {again} goes on"


def _write_config(run_dir: Path, config: dict[str, Any]) -> None:
    from omegaconf import OmegaConf

    run_dir.mkdir(parents=True, exist_ok=True)
    with replacing(run_dir / "config.yaml") as file:
        file.write(OmegaConf.to_yaml(OmegaConf.create(config)).encode())


def _summary(task: Task, plan: BatchPlan, state: TrainState, total_steps: int, world: World) -> str:
    params = sum(p.numel() for p in task.model.parameters() if p.requires_grad) / 1e6
    start = f"resumed at step {state.step}" if state.step else "from the start"
    batch = f"{plan.global_batch_size} = {world.size} x {plan.micro_batch_size} x {plan.accum_steps}"
    return (
        f"{task.name}: {params:.1f} M parameters, {len(task.source)} images, {total_steps} steps, batch {batch} "
        f"(ranks x micro-batch x accumulation), {world.device.type}, {task.cfg.trainer.precision}, {start}"
    )
