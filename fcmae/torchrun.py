"""torchrun that asks its ranks to stop instead of ending them, and that exits as they do: ``python -m fcmae.torchrun``.

torchrun itself gives its ranks a grace period after a signal and then exits with 1, whatever they return; a job script
could not tell a run that stopped and can be resumed (75) from one that failed.
"""

import contextlib
import os
import signal
import sys
import tempfile
from pathlib import Path
from types import FrameType

from fcmae import interrupt
from fcmae.errors import EXIT_RESUMABLE
from fcmae.imports import quick_imports


def main(arguments: list[str]) -> int:
    """Runs torchrun with its own arguments. Returns the exit code of the first rank that failed, or 0."""
    interrupt.watch(lambda line: print(f"torchrun: {line}", file=sys.stderr, flush=True))
    for number in interrupt.SIGNALS:
        signal.signal(number, _pass_on)
    with quick_imports():
        from torch.distributed import run
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    with tempfile.TemporaryDirectory(prefix="fcmae_torchrun_") as logs:  # torchrun would leave its own behind
        try:
            # It must handle some signal, and leaves those alone that it is not told to handle.
            run.main(["--signals-to-handle=SIGQUIT", f"--log-dir={logs}", *arguments])
        except ChildFailedError as error:
            _, failure = error.get_first_failure()
            return failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode
    return 0


def _pass_on(number: int, _: FrameType | None) -> None:
    """Every rank gets the signal. Without any so far there is nothing to save, and nothing lost."""
    ranks = _children()
    if not ranks:
        raise SystemExit(EXIT_RESUMABLE)
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(rank, number)


def _children() -> list[int]:
    """The processes that this one started; known on Linux only."""
    return [int(pid) for file in Path("/proc/self/task").glob("*/children") for pid in file.read_text().split()]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
