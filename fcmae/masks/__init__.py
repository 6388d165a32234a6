"""Which patches are hidden. A strategy is a small class that scores the patches of one image.

The patches with the lowest scores stay visible, the same number in every image, so every strategy keeps the static
shapes that the packed engine needs.
"""

from fcmae.masks.base import Mask, create_mask, draw_scores
from fcmae.masks.block import BlockMask
from fcmae.masks.grid import GridMask
from fcmae.masks.random import RandomMask
from fcmae.masks.weighted import WeightedMask

__all__ = ["BlockMask", "GridMask", "Mask", "RandomMask", "WeightedMask", "create_mask", "draw_scores"]
