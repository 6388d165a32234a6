"""The folder of compiled code. Code is loaded from it and run, so no other user may write there."""

import contextlib
import os
import tempfile
from pathlib import Path

from fcmae.opening import private_folder

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


def use_private_cache() -> None:
    """Sets torch.compile's folder for this process and those that it starts, unless the user chose one.

    Another user can create torch's own choice, ``/tmp/torchinductor_USER``, first. It is used if it belongs to this
    user and nobody else can write it. Triton's folder is inside.
    """
    usual: Path | None = None
    with contextlib.suppress(ImportError):  # private to torch
        from torch._inductor.runtime.cache_dir_utils import default_cache_dir

        usual = Path(default_cache_dir())
    if os.environ.get(VARIABLE) in (None, str(usual)):
        ours = Path(tempfile.gettempdir()) / f"fcmae-{os.getuid()}-inductor"
        os.environ[VARIABLE] = str(private_folder(*([usual] if usual else []), ours))
