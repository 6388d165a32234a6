"""The training loop, for both tasks. It reads from top to bottom: set up, resume, steps, save."""

import contextlib
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from timm.utils import ModelEmaV3
from torch import Tensor

from fcmae import memory, precision
from fcmae.checkpoints.checkpoint import CheckpointDir, State
from fcmae.checkpoints.resume import newest_state, say
from fcmae.config import RunConfig, TrainerConfig, to_dict
from fcmae.config.recipe import MICRO_BATCH, check_recipe
from fcmae.data.cores import default_workers
from fcmae.data.loading import TrainBatches, Workers
from fcmae.data.plan import BatchPlan, Padding
from fcmae.distributed import World
from fcmae.errors import CheckpointError, EvaluationStopped, Interrupted, SaveError, UsageError
from fcmae.kernels.caches import use_private_cache
from fcmae.loggers.logger import Progress, RunLogger, Sink, create_sinks
from fcmae.loggers.meter import Meter
from fcmae.optim.adamw import create_optimizer, set_lr
from fcmae.optim.schedule import CosineSchedule
from fcmae.tasks.monitors import Monitor
from fcmae.tasks.task import Task
from fcmae.training import micro_batch
from fcmae.training.backward import EagerBackward, GraphedBackward, use_cuda_graph
from fcmae.training.bad import count_bad_samples
from fcmae.training.exchange import GradientExchange, broadcast
from fcmae.training.finite import FiniteGuard, act_on_non_finite, infectious
from fcmae.training.run_folder import check_folder, set_results_aside, write_config
from fcmae.training.saver import Saver
from fcmae.training.state import TrainState
from fcmae.training.stop import StopAgreement, Verdict
from fcmae.training.watchdog import Watchdog


def train(task: Task, run_dir: Path, world: World, watchdog: Watchdog, stop: StopAgreement) -> Path:
    """Trains a task to the end of its schedule, continuing what ``run_dir`` holds.

    Returns:
        The last checkpoint.

    Raises NonFiniteLossError, with the weights and checkpoints of before; SaveError if a checkpoint cannot be written;
    Interrupted at ``trainer.max_steps``, after ``trainer.max_hours`` and at a signal (see :mod:`fcmae.interrupt`);
    OutOfMemory.
    """
    asked = task.cfg.trainer.micro_batch_size
    with memory.explained(world.device, lambda: micro_batch.how_to_shrink(task.cfg, world, asked)):
        return _Training(task, run_dir, world, watchdog, stop).run()


class _Training:
    """What :func:`train` is made of, set up and resumed; :meth:`run` is the loop."""

    def __init__(self, task: Task, run_dir: Path, world: World, watchdog: Watchdog, stop: StopAgreement) -> None:
        cfg = task.cfg
        self.task, self.cfg, self.run_dir = task, cfg, run_dir
        self.world, self.watchdog, self.stop = world, watchdog, stop
        asked = cfg.trainer.micro_batch_size
        self.plan = world.together(lambda: _plan(task, world, None if asked == micro_batch.AUTO else asked))
        self.schedule = CosineSchedule(
            cfg.optim.peak_lr,
            cfg.schedule.min_lr,
            round(cfg.schedule.warmup_epochs * self.plan.steps_per_epoch),
            max(1, round(cfg.schedule.epochs * self.plan.steps_per_epoch)),
        )
        self.checkpoints = _checkpoint_dir(run_dir, cfg.trainer, self.plan, watchdog)
        world.on_main(lambda: check_folder(task.cfg, run_dir))
        stop.before_training(run_dir)
        resumed = newest_state(self.checkpoints, world) if cfg.trainer.resume else None
        stop.before_training(run_dir)
        if resumed is None:
            world.on_main(task.initialise)
        _settle_precision(cfg, world, resumed)
        self.graphed = use_cuda_graph(cfg, world.device)
        self.config = to_dict(cfg)
        self.state = _create_state(task, world)
        if resumed is not None:
            self._resume(resumed)
            del resumed  # its tensors
        if cfg.trainer.micro_batch_size == micro_batch.AUTO:
            self._fit()
        total_steps = self.schedule.total_steps
        self.stop_step = min(total_steps, cfg.trainer.max_steps or total_steps)
        if world.is_main:
            self.checkpoints.sweep()
            self.checkpoints.set_aside(self.state.step, say)
            if not cfg.trainer.resume:
                set_results_aside(run_dir)
            write_config(run_dir, self.config)
            for line in (*task.notes, _summary(task, self.plan, self.state, total_steps, world)):
                say(line)
        stop.before_training(run_dir)
        watchdog.beat()
        self.verdict = Verdict.GO_ON
        if cfg.trainer.compiles(world.device.type):
            use_private_cache()
            task.compile()
        self.batches = self._read()
        self.logger = self._logger()
        self.padding = Padding(self.plan, world.rank, world.device)
        self.meter = Meter(world, self.plan.global_batch_size, self.plan.share(world.rank))
        self.guard = FiniteGuard(world.device, skip=cfg.trainer.on_nonfinite == "skip")
        self.saver = Saver(self.checkpoints, cfg.trainer.on_save_error, enabled=world.is_main)
        self.backward = self._backward()

    def _fit(self) -> None:
        """Settles the size of micro-batches, which the config then holds."""
        self.plan = micro_batch.find(self.task, lambda size: _plan(self.task, self.world, size), self.state, self.world)
        self.cfg.trainer.micro_batch_size = self.plan.micro_batch_size
        self.config = to_dict(self.cfg)
        self.watchdog.beat()
        if self.world.is_main:
            say(f"trainer.micro_batch_size=auto takes {self.plan.micro_batch_size}")

    def run(self) -> Path:
        """The steps that are left."""
        state, stop_step = self.state, self.stop_step
        self.task.model.train()
        with contextlib.closing(self.logger), contextlib.closing(self.saver), contextlib.closing(self.backward):
            if state.evaluation_due:
                self._look()
                self._save()
            while state.step < stop_step and self.verdict == Verdict.GO_ON:
                lr = self._step()
                self.verdict = self.stop.after_step(self.saver.failed)
                at_end = state.step == stop_step
                if at_end or self.verdict != Verdict.GO_ON or state.step % self.cfg.trainer.log_every == 0:
                    self._log(lr)
                state.evaluation_due = bool(_due_monitors(self.task, state.step, stop_step, self.plan))
                due = self._look() or _due(state.step, self.cfg.trainer.checkpoint_every_epochs, self.plan)
                if self.verdict != Verdict.FAIL and (at_end or due or self.verdict == Verdict.STOP):
                    self._save()
            self.stop.close()
            self.world.on_main(self.saver.finish)
        if self.verdict == Verdict.FAIL:
            raise SaveError(
                f"stopped at step {state.step}: a checkpoint could not be saved (trainer.on_save_error=stop)"
            )
        if state.step < self.schedule.total_steps or state.evaluation_due:
            raise Interrupted(_why_stopped(state.step, stop_step, self.schedule.total_steps, self.stop, self.run_dir))
        if self.world.is_main:
            self.task.finish(self.run_dir, state.average, state.step)
        return self.checkpoints.path(state.step)

    def _step(self) -> float:
        """One optimizer step. Returns its learning rate."""
        step, world, plan = self.state.step, self.world, self.plan
        lr = self.schedule(step)
        set_lr(self.state.optimizer, lr)
        self.backward.start_step()
        losses: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=world.device))
        for micro in range(plan.accum_steps):
            parts = [*next(self.batches), *self.task.draw(step, plan.read(micro, world.rank))]
            batch = self.padding(micro, [part.to(world.device, non_blocking=True) for part in parts])
            for name, value in self.backward(batch, last=micro == plan.accum_steps - 1).items():
                losses[name] += value
        loss = losses.pop("loss")
        grad_norm = _optimizer_step(self.state, self.guard, self.cfg.optim.clip_grad, step, loss, world)
        self.state.step += 1
        self.meter.add(loss, grad_norm, losses)
        self.logger.progress.advance()
        self.watchdog.beat()
        return lr

    def _log(self, lr: float) -> None:
        """A line of metrics: means since the last one."""
        step, plan = self.state.step, self.plan
        metrics = self.meter.read() | self.saver.take_stall()
        metrics |= act_on_non_finite(self.guard, self.task, plan, self.run_dir, self.world)
        metrics |= count_bad_samples(self.batches, step, self.cfg.loader, self.world)
        left = (self.stop_step - step) * plan.global_batch_size / metrics["images_per_second"]
        epoch = step / plan.steps_per_epoch
        self.logger.log(step, {**metrics, "lr": lr, "epoch": epoch, "seconds_left": left})

    def _look(self) -> bool:
        """Whether a monitor that is due found this state the best so far.

        A stop does not wait for them, and changes the verdict: the next process begins with them.
        """
        state = self.state
        if not state.evaluation_due or self.verdict != Verdict.GO_ON:
            return False
        best = False
        try:
            for monitor in _due_monitors(self.task, state.step, self.stop_step, self.plan):
                score = monitor.look(state.average, state.step, self.logger, self.world, self._wish)
                best |= state.improves(score)
                self.meter.restart()
                self.watchdog.beat()
        except EvaluationStopped:
            self.verdict = Verdict.STOP
            return best
        state.evaluation_due = False
        return best

    def _wish(self) -> bool:
        """Whether this rank wishes to stop. Monitors ask before every batch, so they do not stand still."""
        self.watchdog.beat()
        return self.stop.wished()

    def _save(self) -> None:
        act_on_non_finite(self.guard, self.task, self.plan, self.run_dir, self.world)
        task, state = self.task, self.state
        self.saver.save(lambda: {**self._identity(), **task.extra_state(), **state.state_dict()})
        self.watchdog.beat()

    def _identity(self) -> State:
        sizes = {"num_samples": self.plan.num_samples, "micro_batch_size": self.plan.micro_batch_size}
        return {"task": self.task.name, "config": self.config, **sizes}

    def _resume(self, resumed: State) -> None:
        """Takes a checkpoint's state, if its recipe is this one."""
        self.world.on_main(lambda: self._check_fits(resumed))
        self.state.load_state_dict(resumed, self.checkpoints.folder)

    def _check_fits(self, resumed: State) -> None:
        if "optimizer" not in resumed:
            held = f"the newest checkpoint in {self.checkpoints.folder} holds weights without an optimizer's state"
            raise CheckpointError(f"{held}, so no run resumes from it; move it elsewhere, e.g. for init_from")
        if resumed["task"] != self.task.name:
            held = f"{self.run_dir} holds a run of fcmae {resumed['task']}"
            raise CheckpointError(f"{held}; give fcmae {self.task.name} another hydra.run.dir")
        if not self.cfg.trainer.allow_changed_recipe:
            numbers = {"training images": (resumed.get("num_samples"), self.plan.num_samples)}
            if self.task.mixes_micro_batch:
                numbers[MICRO_BATCH] = resumed.get("micro_batch_size"), self.plan.micro_batch_size
            check_recipe(resumed["config"], self.config, numbers)
        if resumed["step"] > self.schedule.total_steps:
            at = f"the run in {self.run_dir} is at step {resumed['step']}"
            raise UsageError(
                f"schedule.epochs={self.cfg.schedule.epochs:g} ends at step {self.schedule.total_steps}; {at}"
            )

    def _read(self) -> TrainBatches:
        """The micro-batches of the steps that are left."""
        cfg, world = self.cfg, self.world
        workers = default_workers(world.device, world.local_size) if cfg.loader.workers is None else cfg.loader.workers
        return TrainBatches(
            self.task.dataset(),
            self.plan,
            world.rank,
            range(self.state.step, self.stop_step),
            Workers(
                workers,
                pin_memory=world.device.type == "cuda",
                prefetch=cfg.loader.prefetch,
                timeout=cfg.trainer.hang_timeout + Watchdog.GRACE / 2,  # the watchdog, which leaves stacks, comes first
            ),
            skip=cfg.loader.on_error == "skip",
        )

    def _logger(self) -> RunLogger:
        """What passes metrics on; on ranks other than the first to nothing."""
        cfg, step = self.cfg, self.state.step
        sinks: list[Sink] = []
        self.world.on_main(lambda: sinks.extend(create_sinks(cfg.logger, cfg.name, self.config, self.run_dir, step)))
        shown = self.world.is_main and cfg.logger.progress
        return RunLogger(sinks, Progress(cfg.name, step, self.stop_step, enabled=shown))

    def _backward(self) -> EagerBackward[dict[str, Tensor]] | GraphedBackward[dict[str, Tensor]]:
        """The forward and backward pass of a micro-batch, with the exchange of gradients after the last of a step."""
        # Not self: whoever holds the result would hold the loader's workers with it.
        task, model, world, accum_steps = self.task, self.task.model, self.world, self.plan.accum_steps
        padded = self.plan.padding > 0
        scaler, kind = self.state.scaler, self.cfg.precision
        exchange = GradientExchange(model, world.size)

        def run(batch: Sequence[Tensor], last: bool) -> dict[str, Tensor]:
            with precision.autocast(world.device, kind):
                parts, weight = (batch[:-1], batch[-1]) if padded else (batch, None)
                loss, terms = task.loss(model, parts, weight)
                loss = loss / accum_steps
            shown = {f"loss_{name}": term.detach() / accum_steps for name, term in terms.items() if len(terms) > 1}
            with exchange(last):
                scaler.scale(infectious(loss) / world.size).backward()
            return {"loss": loss.detach(), **shown}

        if self.graphed:
            return GraphedBackward(run, model, accum_steps > 1, exchange)
        return EagerBackward(run, model)


def _plan(task: Task, world: World, micro_batch_size: int | None) -> BatchPlan:
    """The batches of a task. Raises UsageError where sizes do not fit."""
    cfg = task.cfg
    plan = BatchPlan.create(
        len(task.source),
        cfg.optim.global_batch_size,
        micro_batch_size,
        world.size,
        cfg.seed,
        cfg.data.crops_per_image,
        task.pairs,
    )
    task.prepare(plan)
    return plan


def _checkpoint_dir(run_dir: Path, cfg: TrainerConfig, plan: BatchPlan, watchdog: Watchdog) -> CheckpointDir:
    keep_every: int | None = None
    if cfg.keep_every_epochs is not None:
        keep_every = max(1, round(cfg.keep_every_epochs * plan.steps_per_epoch))
    return CheckpointDir(run_dir, cfg.keep_checkpoints, keep_every, watchdog.beat)


def _settle_precision(cfg: RunConfig, world: World, resumed: State | None) -> None:
    """``cfg.precision`` becomes what the run computes in, and what its config and checkpoints record."""
    recorded = None if resumed is None else resumed["config"].get("precision")
    cfg.precision = precision.settle(
        "precision",
        cfg.precision,
        world.device,
        recorded=recorded,
        smallest=world.smallest,
        main=world.is_main,
    )


def _create_state(task: Task, world: World) -> TrainState:
    cfg = task.cfg
    task.model.to(world.device)
    if world.size > 1:
        broadcast(task.model)  # the first rank alone has read init_from; the average begins with it
    ema = None
    if cfg.optim.ema_decay is not None:
        ema = ModelEmaV3(task.model, decay=cfg.optim.ema_decay)
    optimizer = create_optimizer(task.model, cfg.optim)
    scaler = torch.amp.GradScaler(world.device.type, enabled=cfg.precision == "fp16")
    return TrainState(0, task.model, optimizer, scaler, ema)


def _optimizer_step(
    state: TrainState, guard: FiniteGuard, clip_grad: float | None, step: int, loss: Tensor, world: World
) -> Tensor:
    """One optimizer step, which changes nothing if the gradient isn't finite. Returns the gradient's norm."""
    state.scaler.unscale_(state.optimizer)
    params = [p for group in state.optimizer.param_groups for p in group["params"] if p.grad is not None]
    grads = [p.grad for p in params]
    norm = torch.nn.utils.get_total_norm(grads, foreach=True)
    if clip_grad is not None:
        torch.nn.utils.clip_grads_with_norm_(params, clip_grad, norm, foreach=True)
    if state.scaler.is_enabled():
        # An overflow in float16 is ordinary: the scaler skips the step and scales less. A loss is never scaled, and a
        # gradient that is not finite although it was scaled down is no overflow of the scale's. Of a rank's loss the
        # others know from the gradient only, which does not tell it from an overflow. All of this waits for the device.
        scale = state.scaler.get_scale()
        finite = world.max((~torch.isfinite(loss)).float()) == 0
        held = bool(guard.check(finite & (torch.isfinite(norm) | (scale >= 1)), step))
        if not held:
            state.scaler.step(state.optimizer)
        state.scaler.update()
        if held or state.scaler.get_scale() < scale:  # then the scaler left everything as it was
            return norm
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


def _summary(task: Task, plan: BatchPlan, state: TrainState, total_steps: int, world: World) -> str:
    params = sum(p.numel() for p in task.model.parameters() if p.requires_grad) / 1e6
    start = f"resumed at step {state.step}" if state.step else "from the start"
    return (
        f"{task.name}: {params:.1f} M parameters, {len(task.source)} images, {total_steps} steps, batch {plan} "
        f"(ranks x micro-batch x accumulation), {world.device.type}, {task.cfg.precision}, {start}"
    )
