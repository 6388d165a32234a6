"""What ``make release`` refuses; the definitions of containers."""

import re
from pathlib import Path

import yaml

from benchmarks.release import IN_WHEEL, lacking, problems
from fcmae.version import __version__

try:
    import tomllib
except ImportError:  # before Python 3.11
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
READY = {"version": "1.0.0", "changelog": "## [1.0.0] - 2027-01-02\n", "status": "", "tags": [], "today": "2027-01-02"}


def test_a_commit_that_is_not_ready_is_not_released():
    assert problems(**READY) == []
    for change, expected in (
        ({"status": "?? new.py"}, "commit or remove these files first:\n?? new.py"),
        ({"tags": ["v1.0.0"]}, "v1.0.0 is tagged; set another __version__"),
        ({"changelog": "## [0.9.0] - 2026-01-02\n"}, "CHANGELOG.md must have the heading ## [1.0.0] - 2027-01-02"),
        ({"changelog": "## [1.0.0] - unreleased\n"}, "the date of 1.0.0 must be 2027-01-02; got unreleased"),
    ):
        (problem,) = problems(**{**READY, **change})
        assert expected in problem
    assert lacking(["fcmae-1.0/fcmae/cli.py", "fcmae/conf/pretrain.yaml"], IN_WHEEL) == [
        "fcmae/launchers/slurm/srun.sbatch"
    ]


def test_versions_and_files_agree():
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    versions = [line.rsplit(" ", 1)[1] for line in project["classifiers"] if re.search(r":: 3\.\d+$", line)]
    assert versions == ["3.10", "3.11", "3.12", "3.13", "3.14"]
    assert project["requires-python"] == f">={versions[0]}"
    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text()
    extras = set(re.findall(r"fcmae\[([\w,]+)\]", (ROOT / "README.md").read_text()))
    assert {name for extra in extras for name in extra.split(",")} <= project["optional-dependencies"].keys()
    service = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]["fcmae"]
    assert service["deploy"]["resources"]["reservations"]["devices"][0]["driver"] == "nvidia"
    assert "%runscript" in (ROOT / "apptainer.def").read_text()
