"""Measures the cells of a study, each once: its result is a file that is written whole."""

import contextlib
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fcmae.checkpoints import checkpoint
from fcmae.config import to_dict
from fcmae.config.recipe import changes
from fcmae.data.sources.base import LISTING
from fcmae.errors import FCMAEError, UsageError
from fcmae.evaluation import run as evaluation
from fcmae.files import as_read, defined, read_result, write_result
from fcmae.opening import own_folder
from fcmae.studies.arms import Cell, Plan, evaluating, probing, training
from fcmae.study_status import CELLS, RECIPE
from fcmae.training.few_labels import CHOSEN
from fcmae.training.run import finetune

RUNS, LOGS = "runs", "logs"
SHOWN = {"listing": LISTING, "val_listing": LISTING.replace("training", "validation")}
"""Names of digests in messages."""
MAY_CHANGE = ("labels", "seeds", "arms", "others", "processes")
"""Keys that say how much is measured."""
Result = dict[str, Any]


def begin(plan: Plan, folder: Path) -> None:
    """Makes the folders of a study, or compares the recipe with that of the study in them.

    Raises UsageError naming the keys that changed.
    """
    cfg = as_read(to_dict(plan.cfg))
    others = {name: checkpoint.identity(path) for name, path in plan.cfg.others.items()}
    weights = {"pretrained": checkpoint.identity(_resolved(plan.cfg.init_from)), **others}
    config = {key: value for key, value in cfg.items() if key not in MAY_CHANGE}
    numbers = {"images": plan.images, "metric": plan.metric, "listing": plan.listing}
    numbers |= {"validation images": plan.val_images, "val_listing": plan.val_listing}
    now = {"config": config, "weights": weights, **numbers}
    old = read_result(folder / RECIPE, config=dict, weights=dict)
    if old is not None:
        changed = changes(old["config"], config)
        known = old["weights"]
        changed += [
            f"  weights of {name}: others" for name in weights if known.get(name, weights[name]) != weights[name]
        ]
        for name, value in numbers.items():
            before = old.get(name, value)  # of an earlier version
            changed += [] if before == value else [f"  {SHOWN.get(name, name)}: {before} -> {value}"]
        if changed:
            raise UsageError(
                "the recipe differs from that of the study so far; give its values again, or another hydra.run.dir:\n"
                + "\n".join(changed)
            )
        now["weights"] = {**known, **weights}
    for name in (CELLS, RUNS, LOGS):
        own_folder(folder / name)
    write_result(folder / RECIPE, {**now, "cells": [cell.name for cell in plan.cells()]})


def _resolved(path: str | None) -> str | None:
    from fcmae.interchange.foreign import is_foreign

    return path if path is None or is_foreign(path) else str(checkpoint.resolve(path))


def result_of(folder: Path, cell: Cell) -> Result | None:
    """What a cell's file says, NaN for metrics that are not defined; None if it is not measured yet."""
    result = read_result(folder / CELLS / f"{cell.name}.json", metrics=dict)
    return None if result is None else {**result, "metrics": defined(result["metrics"])}


def measure(plan: Plan, cell: Cell, folder: Path) -> Result:
    """Measures a cell, keeps the result and returns :func:`result_of` it. What it prints goes into a log.

    Raises what training raises.

    Interrupted: the same call continues.
    """
    began = time.perf_counter()
    log = folder / LOGS / f"{cell.name}.log"
    try:
        with _printing_to(log):
            metrics, more = _measured(plan, cell, folder)
    except FCMAEError as error:
        error.args = (f"{cell.name}: {error}", *error.args[1:])
        raise
    name = plan.metric.removeprefix("-")
    if name not in metrics:
        known = ", ".join(key for key in metrics if key != "images")
        raise UsageError(f"metric must be one of {known}, perhaps after -; got {plan.metric}")
    result = {
        "arm": cell.arm.name,
        "labels": cell.budget.label,
        "images": cell.budget.images,
        "seed": cell.seed,
        "seconds": round(time.perf_counter() - began, 1),
        "metrics": metrics,
        **more,
    }
    write_result(folder / CELLS / f"{cell.name}.json", result)
    shutil.rmtree(folder / RUNS / cell.name / "checkpoints", ignore_errors=True)
    kept = result_of(folder, cell)
    assert kept is not None
    return kept


@contextlib.contextmanager
def _printing_to(log: Path) -> Iterator[None]:
    with log.open("a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        yield


def _measured(plan: Plan, cell: Cell, folder: Path) -> tuple[dict[str, float], Result]:
    """The metrics on validation images, and what was chosen on the training images."""
    if cell.arm.method == "probe" and plan.classifies:
        found = evaluation.probe(probing(plan, cell, str(folder / "features")))
        assert found is not None
        return _numbers(found), {"l2": found["l2"]}
    run_dir = folder / RUNS / cell.name
    finetune(training(plan, cell), run_dir)
    metrics = evaluation.evaluate(evaluating(plan, run_dir))
    assert metrics is not None
    averaged = {name.removeprefix("ema_"): value for name, value in metrics.items() if name.startswith("ema_")}
    chosen = read_result(run_dir / "auto" / "chosen.json", **CHOSEN)
    return _numbers(metrics | averaged), {} if chosen is None else {name: chosen[name] for name in CHOSEN}


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if isinstance(value, (int, float)) and name != "l2"}
