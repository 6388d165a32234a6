"""The wheel, built from the sdist and installed into an environment of its own, runs from any folder."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.conftest import TINY_PRETRAIN

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Path:
    """A virtual environment with the wheel. The dependencies, gigabytes of them, come from the running one by path."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
    wheel = next(folder.glob("*.whl"))
    python = folder / "venv" / "bin" / "python"
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", site, str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    # appended after site-packages: without its .pth files, so that the checkout itself is not importable
    (Path(site) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def test_the_wheel_runs_from_any_folder(environment, tmp_path):
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    where = subprocess.run(
        [environment, "-c", "import fcmae; print(fcmae.__file__)"],
        cwd=tmp_path, env=clean, check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert str(environment.parents[1]) in where.stdout
    done = subprocess.run(
        [environment, "-m", "fcmae.cli", *TINY_PRETRAIN, "trainer.max_steps=2", "hydra.run.dir=run"],
        cwd=tmp_path, env=clean, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 75, done.stderr
    assert (tmp_path / "run" / "checkpoints" / "step_00000002.pt").is_file()


def test_the_wheel_carries_conf_and_the_launch_scripts(environment):
    package = next((environment.parents[1] / "lib").glob("python*/site-packages/fcmae"))
    checkout = {p.relative_to(ROOT) for p in (ROOT / "conf").rglob("*.yaml")}
    assert {p.relative_to(package) for p in (package / "conf").rglob("*.yaml")} == checkout
    for script in ("torchrun.sh", "install_minkowski.sh", "slurm/srun.sbatch", "slurm/torchrun.sbatch"):
        assert (package / "launchers" / script).is_file()
    modules = {p.with_suffix("") for p in package.rglob("*.py")}
    assert not [p for p in modules if p.is_dir()]  # a module and a folder of one name
