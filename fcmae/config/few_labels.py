"""Group ``auto``: the search of ``recipe=auto``."""

from dataclasses import dataclass, field
from typing import Any

from fcmae.config.checks import L2, LAYERS, check, check_positive, check_positives

RECIPES = ("auto",)


@dataclass
class AutoConfig:
    """Group ``auto``: what ``recipe=auto`` tries (docs/few_labels.md)."""

    folds: int = 5
    """Parts of the training images; each is held out once."""
    layers: list[str] = field(default_factory=lambda: ["pooled", "stages"])
    """Features that the probe may read (``layer`` of ``fcmae probe``); [pooled] keeps the network one of timm's."""
    l2: Any = field(default_factory=lambda: list(L2))
    """Strengths of the probe's penalty."""
    lrs: Any = field(default_factory=lambda: [3e-4, 1e-3])
    """Learning rates of fine-tuning (``optim.lr``)."""
    layer_decays: Any = field(default_factory=lambda: [0.7])
    """Values of ``optim.layer_decay``, each with every learning rate."""
    held_out: int = 200
    """Fine-tuning is measured on the first folds that hold so many images together, at most on all of them."""

    def __post_init__(self) -> None:
        check("auto.folds", self.folds, self.folds > 1, "2 or more")
        ok = bool(self.layers) and set(self.layers) <= set(LAYERS)
        check("auto.layers", self.layers, ok, f"a list of {', '.join(LAYERS)}")
        for name in ("l2", "lrs", "layer_decays"):
            setattr(self, name, check_positives(f"auto.{name}", getattr(self, name)))
        ok = not isinstance(self.layer_decays, list) or max(self.layer_decays) <= 1
        check("auto.layer_decays", self.layer_decays, ok, "numbers in (0, 1]")
        check_positive("auto.held_out", self.held_out)
