"""A SLURM for the session, and what the tests ask of a job."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import TINY_PRETRAIN
from tests.pace import limit
from tests.results import weights_sha256
from tests.slurm.lab import NODES, Lab, install

REPOSITORY = Path(__file__).parents[2]
RUN = (*TINY_PRETRAIN, "schedule.epochs=60", "trainer.eval_every_epochs=60", "trainer.checkpoint_every_epochs=10")
RUN += ("trainer.device=cpu", "loader.workers=1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/slurm" in str(item.path):
            item.add_marker("slurm")


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    install()
    cluster = Lab(tmp_path_factory.mktemp("lab"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.close()
        print(f"\nCPU seconds on the nodes of SLURM: {cluster.cpu_seconds:.0f}")


@pytest.fixture(autouse=True)
def _nothing_left(lab: Lab) -> Iterator[None]:
    """After every test: no job, and on the nodes no process and no shared memory."""
    yield
    lab.run("scancel", "--user=root")
    wait_until(lambda: not lab.run("squeue", "--noheader"))
    for node in NODES:
        wait_until(lambda node=node: not lab.processes(node))
        assert not lab.shared_memory(node)


@pytest.fixture(scope="session")
def undisturbed_job(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> "Job":
    """A job of two ranks that nothing disturbed."""
    job = Job(lab, tmp_path_factory.mktemp("undisturbed"), *RUN)
    result = job.finish()
    assert job.restarts == 0
    print(f"\nundisturbed, srun: {result[:16]}")
    return job


class Job:
    """A batch job that runs ``fcmae ARGS`` in ``folder`` by one of the scripts in launch/slurm.

    Args:
        paced: so many starts of the job take a while for every step, on fast machines too: time to disturb them.
        pace: how long, in seconds.
        tasks: whether to ask for one task per node; SLURM takes the fewest nodes of a range then.
        options: more options for sbatch.
        variables: more of the job's environment.
    """

    def __init__(
        self,
        lab: Lab,
        folder: Path,
        *args: str,
        script: str = "srun",
        paced: int = 0,
        pace: float = 0.1,
        tasks: bool = True,
        options: tuple[str, ...] = (),
        **variables: str,
    ) -> None:
        self.lab = lab
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.run_dir = folder / "run"
        self.output = folder / "job.txt"
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        environment = {"PYTHON": sys.executable, "RUN_DIR": str(self.run_dir), "TMPDIR": str(self.temporary)}
        environment["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
        environment |= {"PACED_STARTS": str(paced), "PACE": str(pace)}
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
        if script == "srun":
            environment["FCMAE"] = f"{sys.executable} -m {'tests.paced' if paced else 'fcmae.cli'}"
        environment |= variables
        submit = [
            *("sbatch", "--parsable", f"--chdir={REPOSITORY}", f"--output={self.output}"),
            *("--nodes=2", *["--ntasks-per-node=1"] * tasks, "--cpus-per-task=1", "--gpus-per-node=1"),
            "--export=" + ",".join(["ALL", *(f"{name}={value}" for name, value in environment.items())]),
            *options,
            *(str(REPOSITORY / "launch" / "slurm" / f"{script}.sbatch"), *args),
        ]
        self.id = lab.run(*submit).strip()

    def show(self) -> dict[str, str]:
        """What SLURM says of the job."""
        words = self.lab.run("scontrol", "show", "job", self.id).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    @property
    def restarts(self) -> int:
        return int(self.show()["Restarts"])

    @property
    def step(self) -> int:
        return last_step(self.run_dir)

    def wait_for(self, condition: Callable[["Job"], bool]) -> None:
        """Waits until ``condition`` holds; a job that fails or takes too long fails the test with its output."""
        try:
            wait_until(lambda: condition(self) or self._has_ended(condition))
        except TimeoutError as error:
            said = self.output.read_text() if self.output.is_file() else ""
            raise AssertionError(f"{error}: {self.show()}\n{said}") from error

    def finish(self) -> str:
        """Waits for the job's success and returns the SHA-256 of the weights."""
        self.wait_for(lambda job: job.show()["JobState"] == "COMPLETED")
        return weights_sha256(self.run_dir)

    def _has_ended(self, condition: Callable[["Job"], bool]) -> bool:
        """Whether the job has ended as ``condition`` demands. Raises TimeoutError if it has ended in another way."""
        if self.show()["JobState"] not in ("FAILED", "TIMEOUT", "CANCELLED"):
            return False
        if not condition(self):  # asked again: the job may have ended since it was asked
            raise TimeoutError("the job ended")
        return True


def wait_until(condition: Callable[[], bool], seconds: float = 300) -> None:
    """Waits for an event; ``seconds``, more on a slow machine, are only how long before it is given up."""
    begin = time.monotonic()
    while not condition():
        if time.monotonic() - begin > seconds and time.monotonic() - begin > limit(seconds):
            raise TimeoutError(f"waited {limit(seconds)} s in vain")
        time.sleep(0.1)


def last_step(run_dir: Path) -> int:
    """The last step that metrics.jsonl knows."""
    file = run_dir / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    return json.loads(lines[-1])["step"] if lines else 0
