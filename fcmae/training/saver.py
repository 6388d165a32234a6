"""Saving in the background: the state is copied to the host, and a thread writes it to the disk."""

import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fcmae.checkpoints import encoder
from fcmae.checkpoints.checkpoint import CheckpointDir, State
from fcmae.errors import SaveError, reason_of
from fcmae.messages import say


class HostCopy:
    """Copies states to the host, into the same memory every time (pinned, if they come from a GPU)."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._from_gpu = False

    def __call__(self, state: State) -> State:
        """A copy of nested dicts, lists and tensors that shares nothing with ``state``; overwritten by the next."""
        copy = self._copy(state, "")
        if self._from_gpu:  # asking torch.cuda would open a GPU that a run on the CPU does not use
            torch.cuda.synchronize()
        return copy

    def _copy(self, value: Any, key: str) -> Any:
        if isinstance(value, dict):
            return {name: self._copy(item, f"{key}/{name}") for name, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self._copy(item, f"{key}/{i}") for i, item in enumerate(value))
        if not isinstance(value, Tensor):
            return value
        value = value.detach()
        self._from_gpu |= value.is_cuda
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
            # The layout is the original's, so that a resumed run computes in the same order.
            buffer = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
            self._buffers[key] = buffer
        return buffer.copy_(value, non_blocking=True)


class Saver:
    """Writes checkpoints in the background, one at a time, on one rank; for milestones of pretraining also the encoder.

    ``failed`` is true once a write has failed and the run is to stop for it; the reason was printed.
    """

    def __init__(self, checkpoints: CheckpointDir, on_error: str, enabled: bool) -> None:
        self.checkpoints = checkpoints
        self.on_error = on_error
        self.enabled = enabled
        self.failed = False
        self._copy = HostCopy()
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._stall: float | None = None

    def save(self, state: Callable[[], State]) -> None:
        """Starts to write what ``state`` returns; waits for the previous write and for the copy to the host."""
        if not self.enabled:
            return
        start = time.perf_counter()
        self.close()
        self._thread = threading.Thread(target=self._write, args=(self._copy(state()),), name="fcmae-saver")
        self._thread.start()
        self._stall = (self._stall or 0.0) + time.perf_counter() - start

    def take_stall(self) -> dict[str, float]:
        """The metric ``checkpoint_stall_seconds``: seconds that training waited since the last call, if any."""
        stall, self._stall = self._stall, None
        return {} if stall is None else {"checkpoint_stall_seconds": stall}

    def finish(self) -> None:
        """Waits until the last checkpoint is on the disk. Raises SaveError if it is not."""
        self.close()
        if self._error is not None:
            raise SaveError(f"the last checkpoint was not saved: {reason_of(self._error)}")

    def close(self) -> None:
        """Waits for the current write."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, state: State) -> None:
        best = state["best"]
        if best is not None and best["step"] != state["step"] and not self.checkpoints.path(best["step"]).is_file():
            best = self.checkpoints.best()  # the new best was not saved, so the one before stays
        state = {**state, "best": best}
        try:
            self.checkpoints.save(state, keep_steps=() if best is None else (best["step"],))
            if state["task"] == "pretrain" and self.checkpoints.is_milestone(state["step"]):
                encoder.write(self.checkpoints.folder / f"encoder_{state['step']:08d}.safetensors", state)
            self._error = None
        except Exception as error:  # a thread's error would be lost
            self._error = error
            self.failed = self.on_error == "stop"
            path = self.checkpoints.path(state["step"])
            what_now = "the run stops" if self.failed else "training continues"
            what_now += f" (trainer.on_save_error={self.on_error})"
            say(f"checkpoint {path} was not saved: {reason_of(error)}; {what_now}")
