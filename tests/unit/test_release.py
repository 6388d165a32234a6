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


def test_make_knows_what_it_names():
    """A target without a rule is "Nothing to be done" and exit code 0."""
    makefile = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split()
    assert [name for name in phony if not re.search(rf"^{name}:", makefile, re.MULTILINE)] == []
    assert re.search(r"^release:.*\n\t.*benchmarks\.release$", makefile, re.MULTILINE)
    documents = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    named = {name for file in documents for name in re.findall(r"^make ([a-z-]+)|`make ([a-z-]+)", file.read_text())}
    assert {name for pair in named for name in pair if name} <= set(phony)


def test_versions_and_files_agree():
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    versions = [line.rsplit(" ", 1)[1] for line in project["classifiers"] if re.search(r":: 3\.\d+$", line)]
    assert versions == ["3.10", "3.11", "3.12", "3.13", "3.14"]
    assert project["requires-python"] == f">={versions[0]}"
    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text()
    extras = set(re.findall(r"fcmae\[([\w,]+)\]", (ROOT / "README.md").read_text()))
    assert {name for extra in extras for name in extra.split(",")} <= project["optional-dependencies"].keys()


def test_containers_are_built_from_files_that_are_there():
    """`make image` builds the image where a builder is installed; this needs none."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        pyproject = tomllib.load(file)
    project, hatch = pyproject["project"], pyproject["tool"]["hatch"]["build"]["targets"]["wheel"]
    docker, apptainer = (ROOT / "Dockerfile").read_text(), (ROOT / "apptainer.def").read_text()
    copied = {name for line in re.findall(r"^COPY (.*) \S+$", docker, re.MULTILINE) for name in line.split()}
    assert [name for name in copied if not (ROOT / name).exists()] == []
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert kept == copied
    assert set(re.findall(r"^    (\S+) /opt/fcmae/\1$", apptainer, re.MULTILINE)) == copied
    needed = {project["readme"], *project["license-files"], *hatch["packages"], *hatch["force-include"]}
    assert needed <= copied
    extras = [set(re.search(r"\[([\w,]+)\]'", text)[1].split(",")) for text in (docker, apptainer)]
    assert extras[0] == extras[1] <= project["optional-dependencies"].keys()
    for entry in (r'ENTRYPOINT \["(\w+)"\]', r"exec (\w+) "):
        (command,) = re.findall(entry, docker + apptainer)
        assert command in project["scripts"]
    assert re.search(r"^USER (?!root)", docker, re.MULTILINE)
    service = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]["fcmae"]
    assert service["deploy"]["resources"]["reservations"]["devices"][0]["driver"] == "nvidia"
    data, runs = service["volumes"]
    assert data["read_only"]
    assert runs["target"] == service["environment"]["HOME"]


def test_the_files_for_a_repository_are_there_and_valid():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["license"] == "MIT"
    for file in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        form = yaml.safe_load(file.read_text())
        assert {"name", "description", "body"} <= form.keys()
        ids = [part["id"] for part in form["body"]]
        assert len(ids) == len(set(ids))
        assert all(part["attributes"]["label"] for part in form["body"])
    assert "docs/plugins.md" in (ROOT / "SECURITY.md").read_text()
