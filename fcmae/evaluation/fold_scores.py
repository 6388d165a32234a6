"""Compares the folds' scores of a probe and of fine-tuning. A larger score is better."""

import math
import statistics

NONE = -101.0
"""The score where a metric is not defined: less than any."""


def shown_score(score: float) -> str:
    return "not defined" if score == NONE else f"{score:.1f}"


def clearly_better(probe: list[float], finetuned: list[float]) -> bool:
    """Whether the probe's mean over the folds is higher by more than the standard error of the folds' differences.

    Fine-tuning has the doubt: it gains more than the probe from the images that a fold holds out.
    """
    differences = [a - b for a, b in zip(probe, finetuned, strict=True) if not math.isnan(a - b)]
    if not differences:
        return mean_of(probe) > mean_of(finetuned)
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else 0.0
    return statistics.mean(differences) > error


def mean_of(values: list[float]) -> float:
    """Of those that are defined; less than any score if none is."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else NONE
