"""A real SLURM of two nodes on this machine, for tests, and a third that is off: Debian's packages, no systemd, root.

The controller and every node are a PID, mount and host-name namespace of their own, with their own /dev/shm. A node
that loses power is its namespace killed, all of its processes at once; and whatever happens to a test, the kernel ends
every process of the lab with the three of them. Nothing outside the lab's folder is changed.

By hand: ``python -m tests.slurm.lab FOLDER`` starts one and waits for Ctrl-C.
"""

import ctypes
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
NODES = ("n1", "n2")
SPARE = "n3"
"""In partition ``spare``, with the others; off until it is needed."""
PR_SET_PDEATHSIG = 1

CONFIG = """
ClusterName=lab
SlurmctldHost=ctl(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
# A requeued job waits until its credential has expired, two minutes by default.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
GresTypes=gpu
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
KillWait=30
SlurmdTimeout=15
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=2
PreemptMode=REQUEUE
PreemptType=preempt/partition_prio
SlurmctldParameters=preempt_send_user_signal
NodeName=n1 NodeHostname=n1 NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 Gres=gpu:2
NodeName=n2 NodeHostname=n2 NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 Gres=gpu:2
NodeName=n3 NodeHostname=n3 NodeAddr=127.0.0.1 Port={ports[3]} CPUs=2 Gres=gpu:2
PartitionName=main Nodes=n1,n2 Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=high Nodes=n1,n2 PriorityTier=10 PreemptMode=OFF
PartitionName=spare Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
"""

# The shell is the first process of its namespace: it reaps orphans, and its end is the end of all.
MACHINE = """
mount --bind {folder}/hosts /etc/hosts
mount -t tmpfs none /dev/shm
hostname {name}
{daemons}
wait
"""
CONTROLLER = """
munged --foreground --force --key-file={folder}/munge.key --socket={folder}/munge.socket \\
    --pid-file={folder}/munged.pid --log-file={folder}/munged.log --seed-file={folder}/munged.seed &
until [ -S {folder}/munge.socket ]; do sleep 0.05; done
slurmctld -D -f {folder}/slurm.conf &
"""


def install() -> None:
    """Debian's packages, if they are not there."""
    if all(shutil.which(program) for program in ("slurmctld", "slurmd", "sbatch", "munged")):
        return
    apt = ["apt-get", "-qq", "-o", "DPkg::Lock::Timeout=120"]
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "--yes", "--no-install-recommends", *PACKAGES]):
        subprocess.run([*apt, *command], env=environment, stdout=subprocess.DEVNULL, check=True)


class Lab:
    """A cluster whose state is in ``folder``, which must be empty. Partition ``high`` pre-empts ``main``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cpu_seconds = 0.0
        """User and system time of the machines that were switched off; their processes are nobody's children then."""
        self._machines: dict[str, subprocess.Popen] = {}

    def start(self) -> None:
        """Starts the controller and the nodes, and waits until the nodes are idle."""
        (self.folder / "slurm.conf").write_text(CONFIG.format(folder=self.folder, ports=_free_ports(4)))
        for gpu in ("gpu0", "gpu1"):  # the scheduler counts them, nobody opens them
            (self.folder / gpu).touch()
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-1]\n")
        (self.folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
        (self.folder / "hosts").write_text(
            "".join(f"127.0.0.1 {name}\n" for name in ("localhost", "ctl", *NODES, SPARE))
        )
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(1024))
        (self.folder / "state").mkdir()
        self._boot("ctl", CONTROLLER.format(folder=self.folder))
        for node in NODES:
            self.power_on(node)
        self.wait_for_nodes()

    def wait_for_nodes(self, seconds: float = 600, partition: str = "main") -> None:
        """Waits until all nodes of a partition are up; one that doesn't answer has a star behind its state."""
        count = len(NODES) + (partition == "spare")
        command = ("sinfo", "--noheader", "--Node", f"--partition={partition}", "--format=%t")
        limit = time.monotonic() + seconds
        while True:
            states = self.run(*command, check=False).split()
            if len(states) == count and set(states) <= {"idle", "mix", "alloc"}:
                return
            if time.monotonic() > limit:
                logs = "\n".join(f"{log}:\n{log.read_text()[-2000:]}" for log in self.folder.glob("*.log"))
                raise TimeoutError(f"the nodes are {states} after {seconds} s\n{logs}")
            time.sleep(0.2)

    def power_on(self, node: str) -> None:
        (self.folder / f"spool-{node}").mkdir(exist_ok=True)
        self._boot(node, f"slurmd -D -f {self.folder}/slurm.conf -N {node} &")

    def power_off(self, node: str) -> None:
        """SIGKILL for every process of the node."""
        first = self._first_process(node)
        below = Path(f"/proc/{first}/task/{first}/children").read_text().split()
        stats = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in (first, *below)]
        self.cpu_seconds += sum(int(ticks) for stat in stats for ticks in stat[11:15]) / os.sysconf("SC_CLK_TCK")
        machine = self._machines.pop(node)
        machine.kill()
        machine.wait()

    def close(self) -> None:
        for name in list(self._machines):
            self.power_off(name)

    def run(self, *command: str, check: bool = True, **kwargs) -> str:
        """Runs a command of SLURM outside of the nodes, as on a login node, and returns what it prints."""
        done = subprocess.run(command, env=self.environment(), capture_output=True, text=True, timeout=60, **kwargs)
        assert not check or done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def environment(self) -> dict[str, str]:
        return {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def shared_memory(self, node: str) -> list[str]:
        """The files in the node's /dev/shm."""
        return os.listdir(f"/proc/{self._first_process(node)}/root/dev/shm")

    def processes(self, node: str) -> list[str]:
        """Command lines of the node's processes, without the node's own shell and slurmd."""
        namespace = os.readlink(f"/proc/{self._first_process(node)}/ns/pid")
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if os.readlink(entry / "ns/pid") == namespace:
                    found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except OSError:
                continue
        return [line for line in found if line and not line.startswith(("bash -c", "slurmd "))]

    def _first_process(self, node: str) -> int:
        pid = self._machines[node].pid
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])

    def _boot(self, name: str, daemons: str) -> None:
        script = MACHINE.format(folder=self.folder, name=name, daemons=daemons)
        namespaces = ["unshare", "--pid", "--mount-proc", "--uts", "--fork", "--kill-child=KILL"]
        with (self.folder / f"{name}.log").open("ab") as log:
            self._machines[name] = subprocess.Popen(
                [*namespaces, "bash", "-c", script],
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


if __name__ == "__main__":
    install()
    lab = Lab(Path(sys.argv[1]).resolve())
    lab.folder.mkdir(parents=True)
    lab.start()
    print(f"export SLURM_CONF={lab.folder}/slurm.conf")
    try:
        signal.pause()
    finally:
        lab.close()
