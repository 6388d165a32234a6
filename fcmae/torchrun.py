"""torchrun that passes signals on to its ranks and returns their exit code: ``python -m fcmae.torchrun``.

torchrun itself ends its ranks some time after a signal and always exits with 1, so a job script could not tell a
stopped, resumable run (75) from a failed one.
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

    with tempfile.TemporaryDirectory(prefix="fcmae_torchrun_") as logs:  # torchrun leaves its own behind
        try:
            # It must handle some signal, and ignores those that are not named.
            run.main(["--signals-to-handle=SIGQUIT", f"--log-dir={logs}", *arguments])
        except ChildFailedError as error:
            _, failure = error.get_first_failure()
            return failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode
    return 0


def _pass_on(number: int, _: FrameType | None) -> None:
    """Sends the signal to every rank. Before there are ranks, nothing is lost."""
    ranks = _children()
    if not ranks:
        raise SystemExit(EXIT_RESUMABLE)
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(rank, number)


def _children() -> list[int]:
    """The children of this process; known on Linux only."""
    return [int(pid) for file in Path("/proc/self/task").glob("*/children") for pid in file.read_text().split()]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
