"""The command ``study`` as a function: measures what is not measured yet, then compares."""

import contextlib
import sys
import time
from pathlib import Path
from typing import Any

from fcmae import ranks
from fcmae.config import StudyConfig
from fcmae.errors import DiskError, Interrupted, UsageError, counted
from fcmae.files import is_full, json_text, write_output
from fcmae.models.objective import score
from fcmae.studies import compare
from fcmae.studies.arms import Cell, Plan, make_plan, rivals, steps_of
from fcmae.studies.cells import Result, begin, result_of
from fcmae.studies.plot import draw
from fcmae.studies.processes import measure_all
from fcmae.study_status import SPREAD, STUDY_FILE
from fcmae.training.run_dir import RunLock

PLOT_FILE = "study.png"


def study(cfg: StudyConfig, folder: Path) -> Path:
    """Runs a study in ``folder``, continuing what it holds, and prints its table and its result.

    Returns:
        ``study.json`` in the folder (docs/learning.md says what it holds).

    Raises UsageError; Interrupted after a signal, DiskError for a full disk: the same call continues.
    """
    if ranks.detect().size > 1:
        raise UsageError("fcmae study starts a process per GPU itself; run it without torchrun or srun")
    plan = make_plan(cfg)
    try:
        with contextlib.closing(RunLock(folder)) as lock:
            lock.acquire()
            begin(plan, folder)
            return _Study(plan, folder).run()
    except OSError as error:  # of any file, also of the log into which measurements print
        if not is_full(folder, error):
            raise
        raise DiskError(f"{folder} cannot be written: {error.strerror}; the same command continues") from error


class _Study:
    def __init__(self, plan: Plan, folder: Path) -> None:
        self.plan, self.folder = plan, folder
        self.cells = plan.cells()
        self.results = {cell: result_of(folder, cell) for cell in self.cells}
        self.began, self.measured = time.perf_counter(), 0
        self.err = sys.stderr  # what a measurement prints goes elsewhere

    def run(self) -> Path:
        for line in (*self.plan.notes, *self._introduction()):
            self._say(line)
        left = [cell for cell in self.cells if self.results[cell] is None]
        try:
            measure_all(self.plan, left, self.folder, self._done)
        except Interrupted as error:
            done = sum(result is not None for result in self.results.values())
            again = f"the same command with hydra.run.dir={self.folder} continues"
            raise Interrupted(f"{done} of {len(self.cells)} measured; {error}; {again}") from error
        summary = self.summary()
        write_output("study.json", self.folder / STUDY_FILE, json_text(summary, indent=1) + "\n")
        missing = draw(summary, self.folder / PLOT_FILE)
        legend = ["", SPREAD] if any("±" in row for row in summary["table"]) else []
        print("\n".join([*summary["table"], *legend, "", summary["sentence"]]), flush=True)
        if missing is not None:
            self._say(missing)
        return self.folder / STUDY_FILE

    def _introduction(self) -> list[str]:
        plan, cfg = self.plan, self.plan.cfg
        steps = [counted(steps_of(cfg, budget.images), "step") for budget in plan.budgets]
        budgets = ", ".join(f"{budget.text} ({length})" for budget, length in zip(plan.budgets, steps, strict=True))
        return [
            f"study: {', '.join(arm.name for arm in plan.arms)}; {budgets}; {counted(len(cfg.seeds), 'seed')}: "
            f"{len(self.cells)} measurements, {sum(map(bool, self.results.values()))} of them done",
            f"metric: {plan.metric} on data.val_path ({plan.rule})",
        ]

    def _say(self, line: str) -> None:
        print(line, file=self.err, flush=True)

    def _done(self, cell: Cell, result: Result) -> None:
        self.results[cell] = result
        self.measured += 1
        left = sum(each is None for each in self.results.values())
        minutes = (time.perf_counter() - self.began) / self.measured * left / 60
        name = self.plan.metric.removeprefix("-")
        self._say(
            f"{len(self.cells) - left} of {len(self.cells)}: {cell.arm.name}, {cell.budget.text}, seed {cell.seed}: "
            f"{name} {result['metrics'][name]:.4g} ({result['seconds']:.0f} s), about {minutes:.0f} min left"
        )
        if left and all(self.results[other] is not None for other in self.cells if other.seed == cell.seed):
            self._say("\n".join(self._table()))

    def _scores(self) -> dict[str, dict[str, dict[int, float]]]:
        """By budget, arm and seed; more is better."""
        scores: dict[str, dict[str, dict[int, float]]] = {}
        for cell, result in self.results.items():
            if result is not None:
                of_budget = scores.setdefault(str(cell.budget.label), {})
                of_budget.setdefault(cell.arm.name, {})[cell.seed] = score(self.plan.metric, result["metrics"])
        return scores

    def _table(self) -> list[str]:
        plan = self.plan
        return compare.markdown(self._scores(), plan.budgets, [arm.name for arm in plan.arms], plan.metric)

    def summary(self) -> dict[str, Any]:
        """What study.json holds."""
        plan, scores = self.plan, self._scores()
        ours, others = rivals(plan.arms)
        found = compare.verdict(scores, plan.budgets, ours, others, plan.metric)
        return {
            **compare.plain(found),
            "ours": ours,
            "without": others,
            "metric": plan.metric,
            "metric_rule": plan.rule,
            "budgets": [
                {"label": b.label, "text": b.text, "images": b.images, "steps": steps_of(plan.cfg, b.images)}
                for b in plan.budgets
            ],
            "seeds": plan.cfg.seeds,
            "arms": [arm.name for arm in plan.arms],
            "init_from": plan.cfg.init_from,
            "others": plan.cfg.others,
            "results": [self.results[cell] for cell in self.cells if self.results[cell] is not None],
            "table": self._table() + self._differences(scores),
        }

    def _differences(self, scores: compare.Table) -> list[str]:
        """Rows of the table: every arm with other than random weights against the best arm with random weights."""
        _, others = rivals(self.plan.arms)
        lines = []
        for arm in self.plan.arms:
            if arm.name in others:
                continue
            cells = []
            for budget in self.plan.budgets:
                of_budget = scores.get(str(budget.label), {})
                rival = compare.best_of(others, of_budget)
                gain = rival and compare.paired(of_budget.get(arm.name, {}), of_budget[rival])
                cells.append(str(gain) if gain else "")
            if any(cells):
                lines.append(f"| {arm.name} minus the best of random weights | " + " | ".join(cells) + " |")
        return lines
