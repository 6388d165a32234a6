"""What the decoder predicts at every patch. A target is a small class; several can be predicted at once."""

from fcmae.targets.base import Target, create_target, part
from fcmae.targets.pixels import Pixels

__all__ = ["Pixels", "Target", "create_target", "part"]
