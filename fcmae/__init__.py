"""FCMAE: masked autoencoding pretraining of ConvNets (ConvNeXt V2, arXiv 2301.00808) over visible patches only."""

from typing import TYPE_CHECKING, Any

from fcmae.version import __version__ as __version__

if TYPE_CHECKING:
    from fcmae.api import Run, evaluate, finetune, knn, pretrain, probe, study
    from fcmae.errors import FCMAEError, Interrupted
    from fcmae.evaluation.embed import embed, predict
    from fcmae.interchange.convert import export
    from fcmae.interchange.save import save
    from fcmae.models import FCMAE
    from fcmae.models.build import load

__all__ = [
    "FCMAE",
    "FCMAEError",
    "Interrupted",
    "Run",
    "embed",
    "evaluate",
    "export",
    "finetune",
    "knn",
    "load",
    "predict",
    "pretrain",
    "probe",
    "save",
    "study",
]
_HOMES = {
    "fcmae.api": ("Run", "evaluate", "finetune", "knn", "pretrain", "probe", "study"),
    "fcmae.errors": ("FCMAEError", "Interrupted"),
    "fcmae.evaluation.embed": ("embed", "predict"),
    "fcmae.interchange.convert": ("export",),
    "fcmae.interchange.save": ("save",),
    "fcmae.models": ("FCMAE",),
    "fcmae.models.build": ("load",),
}


def __getattr__(name: str) -> Any:
    """Imports torch and timm when they are needed, so that the command line starts at once."""
    home = next((module for module, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module 'fcmae' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
