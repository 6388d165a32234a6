"""What training changes, and a resume needs."""

from dataclasses import dataclass
from pathlib import Path

import torch
from timm.utils import ModelEmaV3
from torch import nn

from fcmae.checkpoints.checkpoint import State
from fcmae.models.build import load_state
from fcmae.optim.adamw import load_moments


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
    evaluation_due: bool = False
    """The step is one to evaluate after, and that was not done."""

    def state_dict(self) -> State:
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema is not None else None,
            "best": self.best,
            "evaluation_due": self.evaluation_due,
        }

    def load_state_dict(self, state: State, path: Path) -> None:
        self.step = state["step"]
        self.best = state["best"]
        self.evaluation_due = state.get("evaluation_due", False)
        load_state(self.model, state["model"], path)
        load_moments(self.optimizer, state["optimizer"])
        if state["scaler"]:  # empty unless in fp16
            self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            load_state(self.ema.module, state["ema"] or state["model"], path)

    @property
    def average(self) -> nn.Module | None:
        """The model with averaged weights, if the run keeps one."""
        return self.ema.module if self.ema is not None else None

    def improves(self, score: float | None) -> bool:
        """Whether ``score`` is the highest so far; then the step is remembered."""
        if score is None or (self.best is not None and score <= self.best["score"]):
            return False
        self.best = {"step": self.step, "score": score}
        return True
