"""The arithmetic of a study: means, paired differences with intervals, and how many labels pretraining is worth."""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fcmae.models.objective import sign_and_name

T95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
"""Student's t of a two-sided 95 % interval for 1 to 30 degrees of freedom."""
Scores = Mapping[int, float]
"""A score by seed."""
Table = Mapping[str, Mapping[str, Scores]]
"""Scores by label of a budget and arm."""


class Difference(NamedTuple):
    """The mean over seeds of a paired difference, and half its 95 % interval (None with one seed)."""

    mean: float
    half: float | None
    seeds: int

    @property
    def sure(self) -> int:
        """1 or -1 where the whole interval is above or below 0, or there is none; else 0."""
        return 0 if self.half is not None and abs(self.mean) <= self.half else (self.mean > 0) - (self.mean < 0)

    def __str__(self) -> str:
        mean = f"{self.mean:+.1f}" if abs(self.mean) >= 1 else f"{self.mean:+.2g}"
        return mean + (f" ± {_number(self.half)}" if self.half is not None else "")


def paired(ours: Scores, theirs: Scores) -> Difference | None:
    """The difference of two arms over the seeds that both have, by the paired t interval; None without such a seed."""
    seeds = [seed for seed in ours if seed in theirs and not math.isnan(ours[seed] - theirs[seed])]
    if not seeds:
        return None
    differences = [ours[seed] - theirs[seed] for seed in seeds]
    mean = statistics.fmean(differences)
    if len(seeds) == 1:
        return Difference(mean, None, 1)
    t = T95[len(seeds) - 2] if len(seeds) - 2 < len(T95) else 1.96 + 2.4 / (len(seeds) - 1)
    return Difference(mean, t * statistics.stdev(differences) / math.sqrt(len(seeds)), len(seeds))


def spread(scores: Scores) -> tuple[float, float]:
    """Mean and standard deviation over seeds; 0 for one seed, NaN for none."""
    known = [score for score in scores.values() if not math.isnan(score)]
    if not known:
        return math.nan, math.nan
    return statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else 0.0


def best_of(arms: Sequence[str], of_budget: Mapping[str, Scores]) -> str | None:
    """The arm with the best mean, of those that are measured."""
    measured = [arm for arm in arms if not math.isnan(spread(of_budget.get(arm, {}))[0])]
    return max(measured, key=lambda arm: spread(of_budget[arm])[0]) if measured else None


class Worth(NamedTuple):
    """How many times the labels the others need for the same score; ``bound`` is ``at least``, ``at most`` or empty."""

    factor: float
    bound: str = ""

    def __str__(self) -> str:
        return f"{self.bound} {self.factor:.1f}".strip()


def worth(curve: Sequence[tuple[float, float]], images: float, score: float) -> Worth:
    """How many times as many images a curve needs to reach a score.

    The curve is made to rise (each score is the best so far) and is linear between its points over the logarithm of the
    images.

    Args:
        curve: numbers of images, ascending, and scores where more is better.
    """
    rising: list[tuple[float, float]] = []
    for number, value in curve:
        rising.append((number, max(value, rising[-1][1]) if rising else value))
    if score <= rising[0][1]:
        exact = score == rising[0][1] or rising[0][0] == images
        return Worth(rising[0][0] / images, "" if exact else "at most")
    for (few, low), (many, high) in itertools.pairwise(rising):
        if low < score <= high:
            share = (score - low) / (high - low)
            return Worth(few * (many / few) ** share / images)
    return Worth(rising[-1][0] / images, "at least")


def mean_worth(values: Sequence[Worth]) -> Worth:
    """The geometric mean; a bound of any of them, both together being none that can be said."""
    factor = math.exp(statistics.fmean(math.log(value.factor) for value in values))
    bounds = {value.bound for value in values} - {""}
    return Worth(factor, bounds.pop() if len(bounds) == 1 else "about" if bounds else "")


class Budget(NamedTuple):
    """A number of labels: as given (``all`` too), in words, and the images that it is."""

    label: int | str
    text: str
    images: int


class Verdict(NamedTuple):
    """The result of a study in a sentence, with what it stands on, by the label of the budget."""

    sentence: str
    worth: Worth | None
    gains: dict[str, Difference]
    rivals: dict[str, str]


def verdict(table: Table, budgets: Sequence[Budget], ours: str, rivals: Sequence[str], metric: str) -> Verdict:
    """What ``ours``, an arm with pretraining, brings against the best at each budget of arms without.

    Args:
        table: scores where more is better, by label of a budget and arm.
    """
    gains: dict[str, Difference] = {}
    best: dict[str, str] = {}
    curve: list[tuple[float, float]] = []
    for budget in budgets:
        of_budget = table.get(str(budget.label), {})
        rival = best_of(rivals, of_budget)
        if rival is None:
            continue
        curve.append((budget.images, spread(of_budget[rival])[0]))
        difference = paired(of_budget.get(ours, {}), of_budget[rival])
        if difference is not None:
            gains[str(budget.label)], best[str(budget.label)] = difference, rival
    measured = [budget for budget in budgets if str(budget.label) in gains]
    if not measured:
        if not rivals or not ours:
            lacks = f"no arm has {'random' if ours else 'pretrained'} weights"
        elif any(of_budget.get(ours) for of_budget in table.values()):
            lacks = f"{sign_and_name(metric)[1]} is not defined for {ours} and an arm without pretraining"
        else:
            lacks = f"{ours} is not measured"
        return Verdict(f"nothing to compare: {lacks}", None, gains, best)
    sure = [budget for budget in measured if gains[str(budget.label)].sure > 0]
    below = [budget for budget in sure if budget.images < curve[-1][0]]
    times = None
    if below:
        means = [spread(table[str(budget.label)][ours])[0] for budget in below]
        times = mean_worth([worth(curve, b.images, mean) for b, mean in zip(below, means, strict=True)])
    return Verdict(_sentence(measured, sure, gains, times, (ours, metric, rivals)), times, gains, best)


def _sentence(
    measured: Sequence[Budget],
    sure: Sequence[Budget],
    gains: Mapping[str, Difference],
    times: Worth | None,
    names: tuple[str, str, Sequence[str]],
) -> str:
    ours, metric, rivals = names
    worse = [budget for budget in measured if gains[str(budget.label)].sure < 0]
    unclear = [budget for budget in measured if budget not in sure and budget not in worse]
    parts = []
    if times is not None:
        parts.append(f"pretraining is worth {times} times the labels: {_listed(sure, gains)}")
    elif sure:
        parts.append(f"pretraining brings {_listed(sure, gains)}")
    if worse:
        parts.append(f"pretraining loses: {_listed(worse, gains)}")
    if unclear:
        parts.append(f"no gain at {', '.join(f'{budget.text} ({gains[str(budget.label)]})' for budget in unclear)}")
    if 1 in {gain.seeds for gain in gains.values()}:
        parts.append("differences of one seed have no interval")
    return f"{'; '.join(parts)} ({ours} against the best of {' and '.join(rivals)}, {metric.removeprefix('-')})"


def _listed(budgets: Sequence[Budget], gains: Mapping[str, Difference]) -> str:
    return ", ".join(f"{gains[str(budget.label)]} at {budget.text}" for budget in budgets)


def markdown(table: Table, budgets: Sequence[Budget], arms: Sequence[str], metric: str) -> list[str]:
    """The table of means and standard deviations, in the metric's own sign."""
    sign, name = sign_and_name(metric)
    lines = [f"| {name} | " + " | ".join(budget.text for budget in budgets) + " |", "|---" * (len(budgets) + 1) + "|"]
    for arm in arms:
        cells = []
        for budget in budgets:
            scores = table.get(str(budget.label), {}).get(arm, {})
            mean, deviation = spread(scores)
            text = _number(sign * mean) + f" ± {_number(deviation)}" * (len(scores) > 1)
            cells.append("" if math.isnan(mean) else text)
        if any(cells):
            lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return lines


def _number(value: float) -> str:
    return f"{value:.1f}" if abs(value) >= 1 or value == 0 else f"{value:.2g}"


def plain(verdict: Verdict) -> dict[str, Any]:
    """A verdict for JSON."""
    gains = {
        label: {"mean": gain.mean, "half": gain.half, "seeds": gain.seeds, "against": verdict.rivals[label]}
        for label, gain in verdict.gains.items()
    }
    times = None if verdict.worth is None else {"factor": verdict.worth.factor, "bound": verdict.worth.bound}
    return {"sentence": verdict.sentence, "worth": times, "gains": gains}
