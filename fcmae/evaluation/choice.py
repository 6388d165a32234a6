"""Which of probe and fine-tuning ``recipe=auto`` keeps, by their scores on the same folds."""

import math
import statistics
from typing import Any

NONE = -101.0
"""The score where a metric is not defined: less than any."""


def summary(found: dict[str, Any]) -> str:
    """The line that says what was kept, and why."""
    best = max(found["finetuned"], key=lambda each: each["score"])
    metric, folds = found["metric"], len(found["probe"]["folds"])
    fine = f"fine-tuning (lr={best['lr']:g}, layer_decay={best['layer_decay']:g}) {_shown(best['score'])}"
    probe = f"the probe (layer={found['layer']}, l2={found['l2']:g}) {_shown(found['probe']['score'])}"
    first, second = (fine, probe) if found["kept"] == "finetuned" else (probe, fine)
    close = found["kept"] == "finetuned" and found["probe"]["score"] > best["score"]
    doubt = ", not better by more than a standard error" if close else ""
    return f"recipe=auto keeps {first}; {second}{doubt}: {metric} of held-out training images, mean of {folds} folds"


def _shown(score: float) -> str:
    return "not defined" if score == NONE else f"{score:.1f}"


def clearly_better(probe: list[float], finetuned: list[float]) -> bool:
    """Whether the probe's mean over the folds is higher by more than the standard error of the folds' differences.

    Fine-tuning has the doubt: it gains more than the probe from the images that a fold holds out.
    """
    differences = [a - b for a, b in zip(probe, finetuned, strict=True) if not math.isnan(a - b)]
    if not differences:
        return mean(probe) > mean(finetuned)
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else 0.0
    return statistics.mean(differences) > error


def mean(values: list[float]) -> float:
    """Of those that are defined; less than any score if none is."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else NONE
