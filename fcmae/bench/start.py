"""``fcmae bench start``: how long a command takes to its first and tenth step, from empty and from filled caches."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fcmae.bench.measure import check_positive, check_some_of, machine, parse, title, write_report
from fcmae.bench.workloads import TASKS
from fcmae.distributed import pick_device
from fcmae.errors import EXIT_RESUMABLE, UsageError
from fcmae.kernels.caches import VARIABLE

STEPS = 10


@dataclass
class StartConfig:
    """What ``fcmae bench start`` measures: whole commands, each in a process of its own, on random images."""

    model: str = "convnextv2_base"
    tasks: list[str] = field(default_factory=lambda: list(TASKS))
    batch_size: int = 256
    image_size: int = 224
    overrides: list[str] = field(default_factory=list)
    """Further overrides of the commands."""
    repeats: int = 2
    """Starts from filled caches, after the one from empty ones."""

    def __post_init__(self) -> None:
        check_some_of("tasks", self.tasks, TASKS)
        check_positive(self, "batch_size", "image_size", "repeats")


@dataclass
class StartResult:
    """One row: seconds since the process was started."""

    task: str
    caches: str
    """``empty`` or ``filled``."""
    first_step: float
    tenth_step: float
    end: float
    """With the checkpoint."""


def run(overrides: Sequence[str], json_file: Path | None = None) -> list[StartResult]:
    """Measures, prints a table, and writes JSON if asked. Raises UsageError where a command fails."""
    cfg = parse(StartConfig, overrides)
    where = machine(pick_device("auto"))
    print(f"{title(where)}, {cfg.model}, batch {cfg.batch_size}; seconds")
    print(f"{'command':9} {'caches':7} {'step 1':>7} {f'step {STEPS}':>7} {'end':>7}")
    results: list[StartResult] = []
    for task in cfg.tasks:
        for result in _starts(cfg, task):
            results.append(result)
            write_report(json_file, machine=where, config=cfg, results=results)
            print(f"{task:9} {result.caches:7} {result.first_step:7.1f} {result.tenth_step:7.1f} {result.end:7.1f}",
                  flush=True)  # fmt: skip
    return results


def _starts(cfg: StartConfig, task: str) -> Iterator[StartResult]:
    with tempfile.TemporaryDirectory() as folder:
        for number in range(1 + cfg.repeats):
            yield StartResult(task, "filled" if number else "empty", *_seconds(cfg, task, Path(folder), number))


def _seconds(cfg: StartConfig, task: str, folder: Path, number: int) -> tuple[float, float, float]:
    """Of one command, which stops after its tenth step."""
    run_dir = folder / str(number)
    command = [
        *(sys.executable, "-m", "fcmae.cli", task, f"model={cfg.model}", "data=synthetic"),
        *(f"data.length={2 * STEPS * cfg.batch_size}", f"data.image_size={cfg.image_size}"),
        *(f"optim.global_batch_size={cfg.batch_size}", "trainer.log_every=1", f"trainer.max_steps={STEPS}"),
        *("trainer.eval_every_epochs=null", "logger=quiet", "logger.progress=false", f"hydra.run.dir={run_dir}"),
        *cfg.overrides,
    ]
    # Triton's cache is a folder in torch's.
    environment = {**os.environ, VARIABLE: str(folder / "caches")}
    environment.pop("TRITON_CACHE_DIR", None)
    first = tenth = 0.0
    with (folder / f"{number}.txt").open("w+") as said:
        began = time.perf_counter()
        process = subprocess.Popen(command, env=environment, stdout=said, stderr=said)
        try:
            while process.poll() is None:
                time.sleep(0.02)
                steps = _steps(run_dir / "metrics.jsonl") if not tenth else STEPS
                now = time.perf_counter() - began
                first, tenth = first or now * (steps > 0), tenth or now * (steps >= STEPS)
        finally:
            process.kill()
            process.wait()
        end = time.perf_counter() - began
        if _steps(run_dir / "metrics.jsonl") >= STEPS:
            first, tenth = first or end, tenth or end
        said.seek(0)
        if process.returncode != EXIT_RESUMABLE or not tenth:
            last = said.read().strip().splitlines()[-1:]
            raise UsageError(f"fcmae {task} ended with {process.returncode}: {''.join(last)}")
    return first, tenth, end


def _steps(metrics: Path) -> int:
    """The last step that a run has written."""
    if not metrics.exists():
        return 0
    lines = metrics.read_text().splitlines(keepends=True)
    return max([0, *(json.loads(line)["step"] for line in lines if line.endswith("\n"))])
