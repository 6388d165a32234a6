"""``fcmae`` as it runs under tests/chaos: paced, and each rank in a network namespace of its own where there are some.

``NETWORKS`` are the namespaces' files, one per rank, and ``NETWORK_HOME`` is the address of the ranks' launcher.
"""

import ctypes
import os
import sys

from fcmae import cli
from tests import paced

CLONE_NEWNET = 0x40000000


def enter(namespace: str) -> None:
    """Moves this process, which must have one thread, into a network namespace. Raises OSError."""
    with open(namespace, "rb") as file:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(file.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), namespace)


if __name__ == "__main__":
    if "NETWORKS" in os.environ and "RANK" in os.environ:
        enter(os.environ["NETWORKS"].split(",")[int(os.environ["RANK"])])
        os.environ.update(MASTER_ADDR=os.environ["NETWORK_HOME"], GLOO_SOCKET_IFNAME="eth0")
    paced.install()
    sys.exit(cli.main())
