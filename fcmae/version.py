"""The version of the package, and the versions that a checkpoint records."""

import sys

__version__ = "0.1.0"


def versions() -> dict[str, str]:
    """Versions of fcmae, torch, timm and Python, as recorded in checkpoints."""
    import timm
    import torch

    return {
        "fcmae": __version__,
        "torch": str(torch.__version__),
        "timm": timm.__version__,
        "python": sys.version.split()[0],
    }
