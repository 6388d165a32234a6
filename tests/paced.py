"""``fcmae`` whose steps take at least ``PACE`` seconds, so that there is time to disturb a run on any machine.

Only the first ``PACED_STARTS`` starts of a SLURM job are paced, those that are to be disturbed.
"""

import os
import sys
import time

from fcmae import cli, interrupt

PACE = float(os.environ.get("PACE", "0.05"))

_received = interrupt.received


def _slowly() -> str | None:
    """Asked once after every step."""
    time.sleep(PACE)
    return _received()


def install() -> None:
    """From now on steps take their time, if this start is to be paced."""
    if int(os.environ.get("SLURM_RESTART_COUNT", "0")) < int(os.environ.get("PACED_STARTS", "1")):
        interrupt.received = _slowly


if __name__ == "__main__":
    install()
    sys.exit(cli.main())
