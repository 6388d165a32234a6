"""``fcmae`` whose steps take at least ``PACE`` seconds: a run lasts about as long on any machine.

Only the first PACED_STARTS starts of a job are paced, those that are to be disturbed.
"""

import os
import sys
import time

from fcmae import cli, interrupt

PACE = 0.05

_received = interrupt.received


def _slowly() -> str | None:
    """Asked once after every step."""
    time.sleep(PACE)
    return _received()


if __name__ == "__main__":
    if int(os.environ.get("SLURM_RESTART_COUNT", "0")) < int(os.environ["PACED_STARTS"]):
        interrupt.received = _slowly
    sys.exit(cli.main())
