"""The network: a timm backbone, a decoder, and FCMAE which joins them."""

from fcmae.models.backbone import create_backbone
from fcmae.models.fcmae import FCMAE, FCMAEOutput

__all__ = ["FCMAE", "FCMAEOutput", "create_backbone"]
