"""A network namespace for each rank, joined by a bridge, whose cables can be pulled out. Needs root and iproute2."""

import os
import shutil
import subprocess

RANKS = 4


def is_possible() -> bool:
    return os.geteuid() == 0 and shutil.which("ip") is not None and shutil.which("unshare") is not None


class Network:
    """The namespaces of one job at a time; ``slot`` tells apart those of jobs that run side by side.

    To be made in a network namespace of the caller's own, with which everything vanishes.
    """

    def __init__(self, slot: int) -> None:
        self.slot = slot
        self.home = f"10.77.{slot}.254"
        self._holders: list[subprocess.Popen] = []
        ip("link", "add", "name", f"br{slot}", "type", "bridge")
        ip("addr", "add", f"{self.home}/24", "dev", f"br{slot}")
        ip("link", "set", f"br{slot}", "up")
        for rank in range(RANKS):
            self._add(rank)

    def _add(self, rank: int) -> None:
        holder = subprocess.Popen(["unshare", "--net", "sh", "-c", "echo; exec sleep infinity"], stdout=subprocess.PIPE)
        self._holders.append(holder)
        assert holder.stdout is not None
        holder.stdout.readline()
        cable = self._cable(rank)
        ip("link", "add", "name", cable, "type", "veth", "peer", "name", "eth0", "netns", str(holder.pid))
        ip("link", "set", cable, "master", f"br{self.slot}", "up")
        inside = ("nsenter", f"--net={self._file(rank)}", "ip")
        run(*inside, "link", "set", "lo", "up")
        run(*inside, "addr", "add", f"10.77.{self.slot}.{rank + 1}/24", "dev", "eth0")
        run(*inside, "link", "set", "eth0", "up")

    def variables(self) -> dict[str, str]:
        """Environment of the ranks, for :mod:`tests.chaos.rank`."""
        return {"NETWORKS": ",".join(map(self._file, range(RANKS))), "NETWORK_HOME": self.home}

    def cut(self, rank: int) -> None:
        ip("link", "set", self._cable(rank), "down")

    def restore(self, rank: int) -> None:
        ip("link", "set", self._cable(rank), "up")

    def close(self) -> None:
        for holder in self._holders:
            holder.kill()
            holder.wait()

    def _cable(self, rank: int) -> str:
        return f"v{self.slot}r{rank}"

    def _file(self, rank: int) -> str:
        return f"/proc/{self._holders[rank].pid}/ns/net"


def ip(*args: str) -> None:
    run("ip", *args)


def run(*command: str) -> None:
    subprocess.run(command, check=True)
