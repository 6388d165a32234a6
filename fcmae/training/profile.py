"""A trace of some training steps by torch.profiler, in a file that Perfetto and chrome://tracing show."""

import shutil
import tempfile
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from fcmae.errors import counted
from fcmae.files import replacing
from fcmae.messages import say
from fcmae.opening import own_folder

FOLDER = "profiles"
WARM_UP = 10
"""Steps of the process before the trace: they compile, record CUDA graphs and fill the loader's queues."""


class StepProfile:
    """Writes ``profiles/step_STEP.json.gz`` in the run's folder, of the steps from STEP on, and says so.

    Args:
        steps: how many to record; None = none, and everything here does nothing.
    """

    def __init__(self, steps: int | None, device: torch.device, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.steps, self.seen, self.written = steps or 0, 0, False
        self._profiler: profile | None = None
        if self.steps:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
            # The step before the trace is recorded and thrown away: the first one costs more.
            plan = schedule(wait=WARM_UP - 1, warmup=1, active=self.steps, repeat=1)
            self._profiler = profile(activities=activities, schedule=plan, on_trace_ready=self._write, acc_events=True)
            self._profiler.start()

    def advance(self, step: int) -> None:
        """Another step of the process is done, by which the run has ``step``."""
        if self._profiler is None:
            return
        self.seen, self.step = self.seen + 1, step
        self._profiler.step()
        if self.written:
            self.close()

    def close(self) -> None:
        """Writes what there is, of a run that ends earlier, and stops."""
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        if self.seen > WARM_UP or self.written:
            profiler.stop()
            return
        profiler.on_trace_ready = None
        profiler.stop()
        say(f"trainer.profile_steps: no trace, because the process ended before its step {WARM_UP + 1}")

    def _write(self, profiler: profile) -> None:
        if self.written:
            return
        self.written = True
        recorded = min(self.steps, self.seen - WARM_UP)
        path = self.run_dir / FOLDER / f"step_{self.step - recorded:08d}.json.gz"
        try:
            own_folder(path.parent)
            with tempfile.TemporaryDirectory() as folder, replacing(path) as file:
                trace = Path(folder) / path.name
                profiler.export_chrome_trace(str(trace))
                with open(trace, "rb") as whole:
                    shutil.copyfileobj(whole, file)
        except (OSError, RuntimeError) as error:  # such as a full disk; training continues
            say(f"trainer.profile_steps: the trace was not written: {error}")
            return
        say(
            f"trainer.profile_steps: a trace of {counted(recorded, 'step')} is in {path}; open it at https://ui.perfetto.dev"
        )
