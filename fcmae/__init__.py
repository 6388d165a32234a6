"""FCMAE: masked autoencoding pretraining of ConvNets (ConvNeXt V2, arXiv 2301.00808) over visible patches only."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["FCMAE", "load"]

if TYPE_CHECKING:
    from fcmae.models import FCMAE
    from fcmae.training.build import load


def __getattr__(name: str) -> Any:
    """Imports torch and timm when they are needed, so that the command line starts at once."""
    if name == "FCMAE":
        from fcmae.models import FCMAE

        return FCMAE
    if name == "load":
        from fcmae.training.build import load

        return load
    raise AttributeError(f"module 'fcmae' has no attribute {name!r}")
