"""FCMAE: masked autoencoding pretraining of ConvNets (ConvNeXt V2, arXiv 2301.00808) over visible patches only."""

from typing import TYPE_CHECKING, Any

from fcmae.version import __version__ as __version__

__all__ = ["FCMAE", "embed", "load", "predict", "save"]

if TYPE_CHECKING:
    from fcmae.evaluation.embed import embed, predict
    from fcmae.interchange.save import save
    from fcmae.models import FCMAE
    from fcmae.models.build import load

_HOMES = {"FCMAE": "fcmae.models", "load": "fcmae.models.build", "save": "fcmae.interchange.save"}
_HOMES |= dict.fromkeys(("embed", "predict"), "fcmae.evaluation.embed")


def __getattr__(name: str) -> Any:
    """Imports torch and timm when they are needed, so that the command line starts at once."""
    if name not in _HOMES:
        raise AttributeError(f"module 'fcmae' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
