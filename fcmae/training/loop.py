"""The training loop of both tasks, from top to bottom: set up, resume, steps, save."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fcmae import memory
from fcmae.checkpoints.encoder import ENCODER_FILE
from fcmae.checkpoints.resume import newest_state
from fcmae.config import to_dict
from fcmae.data.loading import TrainBatches, deaths_told_later
from fcmae.data.plan import BatchPlan, Padding
from fcmae.data.sheet import keep_sheet
from fcmae.data.sources.base import listing_digest
from fcmae.data.to_device import to_device
from fcmae.data.unreadable import count_bad_samples
from fcmae.distributed import World
from fcmae.errors import EvaluationStopped, Interrupted, SaveError
from fcmae.kernels.caches import use_private_cache
from fcmae.loggers.logger import RunLogger, Sink, create_sinks
from fcmae.loggers.meter import Meter
from fcmae.loggers.progress import create_progress
from fcmae.messages import say
from fcmae.optim.adamw import set_lr
from fcmae.plugins import brings_code
from fcmae.randomness import preserved
from fcmae.tasks.monitors import Monitor
from fcmae.tasks.task import Losses, Task
from fcmae.training import fit_micro_batch as micro_batch
from fcmae.training import setup
from fcmae.training.agree_to_stop import StopAgreement, Verdict
from fcmae.training.cuda_graphs import use_cuda_graph
from fcmae.training.exchange import create_exchange
from fcmae.training.finite import FiniteGuard, act_on_non_finite
from fcmae.training.profile import StepProfile
from fcmae.training.run_dir import check_folder, set_results_aside, write_config, write_event
from fcmae.training.saver import Saver
from fcmae.training.state import TrainState
from fcmae.training.step import TrainingStep
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
    """A run: set up and resumed by the constructor; :meth:`run` is the loop."""

    def __init__(self, task: Task, run_dir: Path, world: World, watchdog: Watchdog, stop: StopAgreement) -> None:
        cfg, asked = task.cfg, task.cfg.trainer.micro_batch_size
        self.task, self.cfg, self.run_dir = task, cfg, run_dir
        self.world, self.watchdog, self.stop = world, watchdog, stop
        fixed = None if asked == micro_batch.AUTO else asked
        self.plan = world.together(lambda: setup.create_plan(task, world, fixed))
        self.schedule = setup.create_schedule(cfg, self.plan)
        self.checkpoints = setup.checkpoint_dir(run_dir, cfg, self.plan, watchdog)
        world.on_main(lambda: check_folder(cfg, run_dir))
        stop.before_training(run_dir)
        self.state = self._resume()
        if asked == micro_batch.AUTO:
            self._fit()
        self.config = to_dict(cfg)
        self.listing = listing_digest(task.source) if world.is_main else None
        if brings_code(self.config):
            world.together(lambda: micro_batch.rehearse(task, self.plan, self.state, world))
        total_steps = self.schedule.total_steps
        self.stop_step = min(total_steps, cfg.trainer.max_steps or total_steps)
        world.on_main(self._begin_folder)
        stop.before_training(run_dir)
        watchdog.beat()
        self.verdict, self.has_stepped = Verdict.GO_ON, False
        if cfg.trainer.compiles(world.device.type):
            use_private_cache()
            task.compile()
        self.batches = self._read()
        self.logger = self._logger()
        self.padding = Padding(self.plan, world.rank, world.device)
        self.meter = Meter(world, self.plan.global_batch_size, self.plan.share(world.rank))
        self.guard = FiniteGuard(world.device, skip=cfg.trainer.on_nonfinite == "skip")
        self.saver = Saver(self.checkpoints, cfg.trainer.on_save_error, enabled=world.is_main)
        self.step = self._training_step()
        self.profile = StepProfile(cfg.trainer.profile_steps if world.is_main else None, world.device, run_dir)

    def _resume(self) -> TrainState:
        """The state to continue from: of the newest checkpoint, if its recipe is this one, else the initial one."""
        task, cfg, world = self.task, self.cfg, self.world
        resumed = newest_state(self.checkpoints, world) if cfg.trainer.resume else None
        self.stop.before_training(self.run_dir)
        if resumed is None:
            world.on_main(task.initialise)
        setup.settle_precision(cfg, world, resumed, task.model)
        self.graphed = use_cuda_graph(cfg, world.device)
        state = TrainState.create(task.model, cfg, world)
        if resumed is not None:
            fits = (resumed, task, to_dict(cfg), self.run_dir, self.plan, self.schedule.total_steps)
            world.on_main(lambda: setup.check_fits(*fits))
            state.load_state_dict(resumed, self.checkpoints.folder)
        return state

    def _fit(self) -> None:
        """Settles the size of micro-batches, which the config then holds."""
        task, world = self.task, self.world
        self.plan = micro_batch.find(task, lambda size: setup.create_plan(task, world, size), self.state, world)
        self.cfg.trainer.micro_batch_size = self.plan.micro_batch_size
        self.watchdog.beat()
        world.say(f"trainer.micro_batch_size=auto takes {self.plan.micro_batch_size}")

    def _begin_folder(self) -> None:
        """Renames files that the run does not use, writes the config, and prints what begins."""
        if self.state.step == 0 and self.cfg.trainer.on_save_error == "stop":
            setup.check_space(self.run_dir, self.state)
        self.checkpoints.sweep()
        self.checkpoints.set_aside(self.state.step, say)
        if not self.cfg.trainer.resume:
            set_results_aside(self.run_dir)
        write_config(self.run_dir, self.config)
        write_event(self.run_dir, setup.event(self.task, self.plan, self.state, self.world))
        begins = setup.summary(self.task, self.plan, self.state, self.schedule.total_steps, self.world)
        self.world.say(*self.task.notes, begins)
        with preserved(self.world.device):
            keep_sheet(self.task.source, self.run_dir, self.cfg.loader.max_pixels)

    def _read(self) -> TrainBatches:
        """The micro-batches of the steps that are left."""
        return setup.load_batches(self.task, self.plan, self.world, range(self.state.step, self.stop_step))

    def _logger(self) -> RunLogger:
        """Passes metrics on; on ranks other than the first to nothing."""
        cfg, step = self.cfg, self.state.step
        sinks: list[Sink] = []
        self.world.on_main(lambda: sinks.extend(create_sinks(cfg.logger, cfg.name, self.config, self.run_dir, step)))
        shown = self.world.is_main and cfg.logger.progress
        return RunLogger(sinks, create_progress(cfg.name, step, self.stop_step, shown, self.run_dir))

    def _training_step(self) -> TrainingStep:
        task, plan, world = self.task, self.plan, self.world

        def loss(batch: Sequence[Tensor]) -> Losses:
            parts, weight = (batch[:-1], batch[-1]) if plan.padding else (batch, None)
            return task.loss(task.model, parts, weight)

        return TrainingStep(
            task.model,
            loss,
            world.device,
            self.cfg.precision,
            accum_steps=plan.accum_steps,
            graphed=self.graphed,
            exchange=create_exchange(self.cfg.trainer.exchange, task.model, world.size),
            scaler=self.state.scaler,
        )

    def run(self) -> Path:
        """The steps that are left."""
        state, stop_step = self.state, self.stop_step
        self.task.model.train()
        parts = (self.logger, self.saver, self.step, self.profile)
        with contextlib.ExitStack() as stack:
            for part in parts:
                stack.callback(part.close)
            if state.evaluation_due:
                self._look()
                self._save()
            while state.step < stop_step and self.verdict == Verdict.GO_ON and not self._is_over():
                lr = self._advance()
                self.verdict = self.stop.after_step(self.saver.failed)
                at_end = state.step == stop_step
                if at_end or self.verdict != Verdict.GO_ON or state.step % self.cfg.trainer.log_every == 0:
                    self._log(lr)
                state.evaluation_due = bool(_due_monitors(self.task, state.step, stop_step, self.plan))
                due = self._look() or _due(state.step, self.cfg.trainer.checkpoint_every_epochs, self.plan)
                if self.verdict != Verdict.FAIL and (at_end or due or self.verdict == Verdict.STOP or self._is_over()):
                    self._save()
            self.stop.close()
            self.world.on_main(self.saver.finish)
            over = self._is_over()
            stopped = (state.step < self.schedule.total_steps and not over) or state.evaluation_due
            if self.world.is_main and self.verdict != Verdict.FAIL and not stopped:
                self.task.finish(self.run_dir, state.average, state.step)
                self.logger.artifact(self.run_dir / ENCODER_FILE)
        if self.verdict == Verdict.FAIL:
            raise SaveError(
                f"stopped at step {state.step}: a checkpoint could not be saved (trainer.on_save_error=stop)"
            )
        if over:
            self.world.say(_why_over(state, self.schedule.total_steps))
        if stopped:
            raise Interrupted(_why_stopped(state.step, stop_step, self.schedule.total_steps, self.stop, self.run_dir))
        return self.checkpoints.path(state.step)

    def _advance(self) -> float:
        """One optimizer step. Returns its learning rate."""
        state = self.state
        lr = self.schedule(state.step)
        set_lr(state.optimizer, lr)
        try:
            if self.graphed and not self.has_stepped:
                self._record()
            losses = self.step(self._micro_batches())
        except RuntimeError:
            if not self.has_stepped:  # Ctrl-C also ends the assembler of a kernel that torch.compile waits for
                self.stop.at_a_failed_first_step(self.run_dir)
            raise
        self.has_stepped = True
        loss = losses.pop("loss")
        grad_norm = state.update(loss, self.guard, self.cfg.optim.clip_grad, self.world)
        self.meter.add(loss, grad_norm, losses)
        self.profile.advance(state.step)
        self.logger.progress.advance()
        self.watchdog.beat()
        return lr

    def _record(self) -> None:
        """Records the CUDA graph while workers read the first batch: both take seconds."""
        with deaths_told_later():
            with preserved(self.world.device):
                made_up = self.batches.made_up()
            if made_up is not None:
                self.step.record(self._on_device(0, made_up))

    def _micro_batches(self) -> Iterator[list[Tensor]]:
        """This rank's part of the next step, on the device."""
        for micro in range(self.plan.accum_steps):
            with self.meter.waiting_for_data():
                batch = next(self.batches)
            yield self._on_device(micro, batch)

    def _on_device(self, micro: int, batch: Sequence[Any]) -> list[Tensor]:
        """What a pass gets of a micro-batch."""
        positions = self.plan.read(micro, self.world.rank)
        parts = [*batch, *self.task.draw(self.state.step, positions)]
        return self.padding(micro, [to_device(part, self.world.device) for part in parts])

    def _log(self, lr: float) -> None:
        """A line of metrics: means since the last one."""
        step, plan = self.state.step, self.plan
        metrics = self.meter.read() | self.task.extra_metrics() | self.saver.take_stall()
        metrics |= self._act_on_non_finite()
        of_epoch = plan.steps_per_epoch * plan.global_batch_size
        metrics |= count_bad_samples(self.batches.bad_samples(step), of_epoch, self.cfg.loader, self.world)
        self.batches.tell_first_epoch(step, self.world)
        left = (self.stop_step - step) * plan.global_batch_size / metrics["images_per_second"]
        epoch = step / plan.steps_per_epoch
        metrics |= {"lr": lr, "epoch": epoch, "seconds_left": left}
        self.logger.log(step, metrics)
        if self.world.is_main and (line := self.task.warning(step, metrics)) is not None:
            self.logger.warn(step, line)

    def _act_on_non_finite(self) -> dict[str, float]:
        return act_on_non_finite(self.guard, self.task, self.plan, self.run_dir, self.world, self.logger)

    def _look(self) -> bool:
        """Runs the monitors that are due. Returns whether one of them found this state the best so far.

        A stop does not wait for them: the next process begins with them.
        """
        state = self.state
        if not state.evaluation_due or self.verdict != Verdict.GO_ON:
            return False
        scores = []
        try:
            for monitor in _due_monitors(self.task, state.step, self.stop_step, self.plan):
                score = monitor.look(state.average, state.step, self.logger, self.world, self._wish)
                due = _due(state.step, monitor.every_epochs, self.plan)
                if due or state.step == self.schedule.total_steps:  # where a run is only stopped, it does not count
                    scores.append((score, due))
                self.meter.restart()
                self.watchdog.beat()
        except EvaluationStopped:  # the next process looks again, and a score counts once
            self.verdict = Verdict.STOP
            return False
        state.evaluation_due = False
        improved = [state.improves(*score) for score in scores]
        return any(improved)

    def _is_over(self) -> bool:
        """Whether a monitor's patience is at its end, on all ranks."""
        return any(m.patience is not None and self.state.since_best >= m.patience for m in self.task.monitors)

    def _wish(self) -> bool:
        """Whether this rank wants to stop. Monitors ask before every batch, which also feeds the watchdog."""
        self.watchdog.beat()
        return self.stop.wished()

    def _save(self) -> None:
        self._act_on_non_finite()
        sizes = {"num_samples": self.plan.num_samples, "micro_batch_size": self.plan.micro_batch_size}
        run = {"task": self.task.name, "config": self.config, "listing": self.listing, **sizes}
        self.saver.save(lambda: {**run, **self.task.extra_state(), **self.state.state_dict()})
        self.watchdog.beat()


def _due_monitors(task: Task, step: int, stop_step: int, plan: BatchPlan) -> list[Monitor]:
    """The monitors that run after a step: all of them at the end."""
    return [m for m in task.monitors if step == stop_step or _due(step, m.every_epochs, plan)]


def _due(step: int, every_epochs: float, plan: BatchPlan) -> bool:
    """Whether another ``every_epochs`` epochs ended with this step."""
    interval = max(1, round(every_epochs * plan.steps_per_epoch))
    return step % interval == 0


def _why_over(state: TrainState, total_steps: int) -> str:
    best = "" if state.best is None else f" than at step {state.best['step']}"
    return (
        f"ended at step {state.step} of {total_steps}: {state.since_best} evaluation(s) in a row not better{best} "
        "(monitor.patience); monitor.patience=null continues"
    )


def _why_stopped(step: int, stop_step: int, total_steps: int, stop: StopAgreement, run_dir: Path) -> str:
    again = f"the same command with hydra.run.dir={run_dir}"
    if step == stop_step < total_steps:
        return f"stopped at trainer.max_steps={stop_step} of {total_steps}; {again} and more steps continues"
    return f"stopped after step {step} of {total_steps} ({stop.reason()}); {again} continues"
