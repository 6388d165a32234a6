"""``fcmae`` whose steps take at least ``PACE`` seconds: a run lasts about as long on any machine."""

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
    interrupt.received = _slowly
    sys.exit(cli.main())
