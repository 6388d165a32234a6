"""The objectives of fine-tuning that a config's ``objective`` names (see :mod:`fcmae.models.objective`)."""

from fcmae.tasks.objectives.detect import Detect
from fcmae.tasks.objectives.per_image import Classify, Multilabel, Regress
from fcmae.tasks.objectives.segment import Segment
from fcmae.tasks.objectives.translate import Translate

__all__ = ["Classify", "Detect", "Multilabel", "Regress", "Segment", "Translate"]
