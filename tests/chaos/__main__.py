"""Random faults in all commands at once, with a fixed seed: ``python -m tests.chaos minutes=20 seed=0``.

Every job runs once undisturbed. Then jobs run side by side, each in a folder of its own, and events from
tests/chaos/events.py happen to them at random moments; a job that was ended is started again until it has had its share
of events and finishes. What it leaves in the end must equal what the undisturbed one left, bit for bit: weights and all
logged losses, or the files written. After every end no process of it is left; after every job no temporary file and no
shared memory. Every end that was not a SIGKILL is told in a line, without a traceback.

``events=N`` ends after so many events, ``only=NAME,...`` and ``ranks=N`` choose jobs, ``jobs=N`` run side by side,
``keep=FOLDER`` keeps all files. Linux, a compiler; as root in a network namespace of its own, where a rank's network is
cut. Exit code 1: something did not hold.
"""

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

INSIDE = "FCMAE_CHAOS"
ROOT = Path(__file__).parents[2]
CLONE_NEWNS, CLONE_NEWNET = 0x20000, 0x40000000


def main(arguments: list[str]) -> int:
    if INSIDE not in os.environ:
        _enter()
    given = {"minutes": "20", "seed": "0", "events": "", "only": "", "ranks": "", "keep": "", "jobs": "3"}
    given |= dict(argument.split("=", 1) for argument in arguments)
    with tempfile.TemporaryDirectory(prefix="fcmae_chaos_") as temporary:
        folder = Path(given["keep"] or temporary).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        library = folder / "disturb.so"
        source = Path(__file__).with_name("disturb.c")
        subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
        os.environ.update(LD_PRELOAD=str(library), PYTHONPATH=str(ROOT), XDG_CACHE_HOME=str(folder / "cache"))
        from tests.chaos.play import Play  # the server of processes has this environment

        return Play(folder, given).run()


def _enter() -> None:
    """Gives this process a network and a /dev/shm of its own, where that is possible."""
    os.environ[INSIDE] = "alone"
    if os.geteuid() == 0 and shutil.which("ip"):
        os.environ[INSIDE] = "namespaces"
        if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNS | CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "cannot unshare network and mounts")
        for command in ("mount --make-rprivate /", "ip link set lo up", "mount -t tmpfs none /dev/shm"):
            subprocess.run(command.split(), check=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
