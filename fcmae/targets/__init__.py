"""What the decoder predicts at every patch. A target is a small class; several can be predicted at once."""

from fcmae.targets.base import NEEDS, Seen, Target, create_target, has_own_errors, part
from fcmae.targets.channels import Channels
from fcmae.targets.hog import Hog
from fcmae.targets.labels import Labels
from fcmae.targets.laplacian import Laplacian
from fcmae.targets.pixels import Pixels
from fcmae.targets.teacher import Teacher

__all__ = [
    "NEEDS",
    "Channels",
    "Hog",
    "Labels",
    "Laplacian",
    "Pixels",
    "Seen",
    "Target",
    "Teacher",
    "create_target",
    "has_own_errors",
    "part",
]
