"""What training changes, and a resume needs."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from fcmae.checkpoints.checkpoint import State
from fcmae.config import RunConfig
from fcmae.distributed import World
from fcmae.models.build import load_state, with_loss_weights
from fcmae.optim.adamw import clip_gradients, create_optimizer, load_moments
from fcmae.training.exchange import broadcast
from fcmae.training.finite import FiniteGuard


@dataclass
class TrainState:
    """Everything that a resume needs: the number of optimizer steps done, and what they changed."""

    step: int
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: ModelEmaV3 | None
    best: dict[str, float] | None = None
    """The step and score of the best evaluation."""
    since_best: int = 0
    """Evaluations since then."""
    evaluation_due: bool = False
    """The step is one to evaluate after, and that was not done."""

    @classmethod
    def create(cls, model: nn.Module, cfg: RunConfig, world: World) -> "TrainState":
        """The state before the first step, on the device, with the weights of the first rank."""
        model.to(world.device)
        if world.size > 1:
            broadcast(model)  # the first rank alone has read init_from; the average begins with it
        ema = None if cfg.optim.ema_decay is None else ModelEmaV3(model, decay=cfg.optim.ema_decay)
        scaler = torch.amp.GradScaler(world.device.type, enabled=cfg.precision == "fp16")
        return cls(0, model, create_optimizer(model, cfg.optim), scaler, ema)

    def update(self, loss: Tensor, guard: FiniteGuard, clip_grad: float | None, world: World) -> Tensor:
        """One optimizer step with the gradients that are there; returns their norm.

        If they are not finite, the weights, the optimizer and the average stay as they are.

        Args:
            loss: this rank's loss in the step.
        """
        self.scaler.unscale_(self.optimizer)
        norm = clip_gradients(self.optimizer, clip_grad)
        moved = self._scaled_update(loss, norm, guard, world) if self.scaler.is_enabled() else self._update(norm, guard)
        if moved and self.ema is not None:
            self.ema.update(self.model)
        self.step += 1
        return norm

    def _update(self, norm: Tensor, guard: FiniteGuard) -> bool:
        """Returns whether the average is to follow: not after a step that was skipped."""
        # Fused AdamW leaves everything as it is where found_inf is 1, without the host having to know.
        found_inf = guard.check(torch.isfinite(norm), self.step)
        self.optimizer.found_inf = found_inf  # type: ignore[attr-defined]
        self.optimizer.step()
        # Waits for the device, with this policy only.
        return not (guard.skip and self.ema is not None and bool(found_inf))

    def _scaled_update(self, loss: Tensor, norm: Tensor, guard: FiniteGuard, world: World) -> bool:
        """In float16, where this waits for the device. Returns whether the optimizer stepped.

        An overflow is ordinary: the scaler skips the step and scales less. A loss is never scaled, and a gradient that
        is not finite although it was scaled down is no overflow. Other ranks know of a rank's loss from the gradient
        only, which does not tell it from an overflow.
        """
        scale = self.scaler.get_scale()
        finite = world.max((~torch.isfinite(loss)).float()) == 0
        held = bool(guard.check(finite & (torch.isfinite(norm) | (scale >= 1)), self.step))
        if not held:
            self.scaler.step(self.optimizer)
        self.scaler.update()
        return not held and self.scaler.get_scale() >= scale  # otherwise the scaler left everything as it was

    def state_dict(self) -> State:
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema is not None else None,
            "best": self.best,
            "since_best": self.since_best,
            "evaluation_due": self.evaluation_due,
        }

    def load_state_dict(self, state: State, path: Path) -> None:
        self.step = state["step"]
        self.best, self.since_best = state["best"], state.get("since_best", 0)
        self.evaluation_due = state.get("evaluation_due", False)
        load_state(self.model, with_loss_weights(state["model"], self.model), path)
        load_moments(self.optimizer, state["optimizer"])
        if state["scaler"]:  # empty unless in fp16
            self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            average = state["ema"] or state["model"]
            load_state(self.ema.module, with_loss_weights(average, self.model), path)

    @property
    def average(self) -> nn.Module | None:
        """The model with averaged weights, if the run keeps one."""
        return self.ema.module if self.ema is not None else None

    def improves(self, score: float | None, counts: bool = True) -> bool:
        """Whether ``score`` is the highest so far; then the step is remembered. NaN never is.

        Args:
            counts: as an evaluation since the best.
        """
        if score is None:
            return False
        highest = -math.inf if self.best is None or math.isnan(self.best["score"]) else self.best["score"]
        if not score > highest:
            self.since_best += counts
            return False
        self.best, self.since_best = {"step": self.step, "score": score}, 0
        return True
