"""Keys of ``fcmae study``: which arms are compared, with how many labels, and how often."""

from dataclasses import dataclass, field
from typing import Any

from fcmae.config.checks import LAYERS, as_list, check, check_one_of, check_positive, check_seed

ALL = "all"
ARMS = ("random_probe", "pretrained_probe", "scratch", "finetuned", "auto", "auto_scratch")
"""Ways to a classifier; the last one is not among the defaults."""


@dataclass
class StudyKeys:
    """Keys of ``fcmae study`` beside the keys of ``fcmae finetune``, which apply to every network that it trains."""

    labels: Any = field(default_factory=lambda: [5, 10, 25, 100, ALL])
    """Numbers of labelled images: per class, or in all where images have no classes; ``all`` = every training image.
    A larger number includes the images of a smaller one."""
    seeds: Any = 3
    """How often everything is repeated, each time with other images, weights, orders and crops; or a list of seeds."""
    arms: list[str] | None = None
    """What is compared (docs/learning.md). None = random_probe, pretrained_probe, scratch, finetuned and auto."""
    others: dict[str, str] = field(default_factory=dict)
    """Further initial weights to compare with, by a name of your own, as ``init_from`` names them:
    ``{imagenet: timm:convnextv2_atto.fcmae}``."""
    metric: str | None = None
    """What is compared, after ``-`` where less is better. None = ``objective.best``; of classes of unequal sizes
    auroc, with more than two classes balanced_accuracy."""
    steps: int | None = None
    """Optimizer steps of every training. None = 100 epochs of its images, at least 200 and at most 2,000 steps."""
    layer: str = "stages"
    """Features that the probes of a classifier read, as ``layer`` of ``fcmae probe``."""
    processes: int = 1
    """Trainings at a time per GPU. On a CPU they run one after another."""

    def check_study(self) -> None:
        """Notes mistakes in these keys, and makes ``labels`` and ``seeds`` lists."""
        given = as_list(self.labels)
        numbers = [label for label in given if label != ALL]
        ok = all(type(number) is int and number > 0 for number in numbers) and len(set(given)) == len(given) > 0
        if check("labels", self.labels, ok, "different positive integers, or all"):
            self.labels = [*sorted(numbers), *([ALL] if ALL in given else [])]
        seeds = list(range(self.seeds)) if type(self.seeds) is int else self.seeds
        ok = isinstance(seeds, (list, tuple)) and 0 < len(set(seeds)) == len(seeds)
        if check("seeds", self.seeds, ok, "a positive integer, or a list of different seeds"):
            self.seeds = list(seeds)
            for seed in self.seeds:
                check_seed(seed)
        ok = self.arms is None or (bool(self.arms) and set(self.arms) <= set(ARMS))
        check("arms", self.arms, ok, f"null or some of {', '.join(ARMS)}")
        for name in self.others:
            ok = str(name).isidentifier() and name not in ("random", "pretrained")
            check(f"others.{name}", name, ok, "a name of letters, digits and _, other than random and pretrained")
        check_positive("steps", self.steps)
        check_one_of("layer", self.layer, LAYERS)
        check_positive("processes", self.processes)
