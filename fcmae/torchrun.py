"""torchrun that passes signals on to its ranks and returns their exit code: ``python -m fcmae.torchrun``.

torchrun itself ends its ranks some time after a signal and always exits with 1, so a job script could not tell a
stopped, resumable run (75) from a failed one. With ``--max-restarts`` it would start again what it was asked to stop.
"""

import contextlib
import os
import signal
import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import Any

from fcmae import interrupt
from fcmae.errors import EXIT_ERROR, EXIT_RESUMABLE
from fcmae.imports import quick_imports

_signals: list[signal.Signals] = []
"""That this process received."""


def main(arguments: list[str]) -> int:
    """Runs torchrun with its own arguments. Returns the exit code of the first rank that failed, or 0."""
    interrupt.watch(lambda line: print(f"torchrun: {line}", file=sys.stderr, flush=True))
    for number in interrupt.SIGNALS:
        signal.signal(number, _pass_on)
    with quick_imports():
        from torch.distributed import run
        from torch.distributed.elastic.multiprocessing.api import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.elastic.rendezvous import RendezvousConnectionError
    _stay_stopped(SignalException)

    if any(argument.startswith("--nnodes=") and ":" in argument for argument in arguments):
        # The ranks of each start then meet in a store of their own. In the agents' store they meet under the number of
        # restarts, which the agents count differently once a node was lost.
        os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    with tempfile.TemporaryDirectory(prefix="fcmae_torchrun_") as logs:  # torchrun leaves its own behind
        try:
            # It must handle some signal, and ignores those that are not named.
            run.main(["--signals-to-handle=SIGQUIT", f"--log-dir={logs}", *arguments])
        except ChildFailedError as error:
            _, failure = error.get_first_failure()
            return failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode
        except SignalException:
            return EXIT_RESUMABLE
        except RendezvousConnectionError as error:
            print(f"torchrun: the place where the nodes meet is lost: {error}", file=sys.stderr, flush=True)
            return EXIT_ERROR
    return 0


def _stay_stopped(stopped: type[Exception]) -> None:
    """After a signal, this node's ranks are not started again; those of other nodes are, without them.

    To torchrun, a rank that has saved and stopped has failed. Its ``SignalException`` leaves the rendezvous open.
    """
    from torch.distributed.elastic.agent.server.api import SimpleElasticAgent

    restart = SimpleElasticAgent._restart_workers

    def unless_stopped(agent: SimpleElasticAgent, group: Any) -> None:
        if _signals:
            raise stopped("this node was asked to stop", _signals[0])
        restart(agent, group)

    SimpleElasticAgent._restart_workers = unless_stopped  # type: ignore[method-assign]


def _pass_on(number: int, _: FrameType | None) -> None:
    """Sends the signal to every rank. Before there are ranks, nothing is lost."""
    _signals.append(signal.Signals(number))
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
