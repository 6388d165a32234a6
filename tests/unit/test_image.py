"""``.ci/image``: what it reads in a Dockerfile, and its lines; docker, apt-cache and pip are imitated."""

import importlib.machinery
import importlib.util
import os
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / ".ci" / "image"
LOADER = importlib.machinery.SourceFileLoader("image", str(SCRIPT))
WRONG = """
# a comment
FROM base
RUN apt-get update \\
    # another
    && apt-get install -y gcc nonsense
WORKDIR /src
COPY there absent ./
RUN pip install -c constraints.txt '.[nothing]'
ENTRYPOINT ["missing"]
CMD ["--help"]
"""


@pytest.fixture(scope="module")
def script():
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("image", LOADER))
    # dataclasses look their module up.
    sys.modules["image"] = module
    sys.dont_write_bytecode, before = True, sys.dont_write_bytecode
    LOADER.exec_module(module)
    sys.dont_write_bytecode = before
    yield module
    del sys.modules["image"]


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """Write a shell script that stands for a program."""
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    (tmp_path / "bin").mkdir()

    def write(name, text):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o700)

    return write


def test_the_dockerfile_is_read(script):
    text = (ROOT / "Dockerfile").read_text()
    steps = script.read(text, {})
    image = steps[-1]
    assert image.base.startswith("docker.io/"), "podman and buildah take no short names on Debian"
    assert (image.user, image.folder, image.entry, image.command) == ("fcmae", "/workspace", ("fcmae",), ("--help",))
    assert image.env["PATH"].startswith("/opt/fcmae/bin:/")
    (packages,) = [words for step in steps for words in step.installs("apt-get")]
    assert packages[2:] == ["gcc", "g++", "libc6-dev", "python3", "python3-venv", "python3-dev"]
    torch, ours = [words for step in steps for words in step.installs("pip")]
    assert torch == ["-c", "constraints.txt", "torch", "torchvision"]
    assert ours == ["-c", "constraints.txt", ".[demo,tensorboard,tiff]"]
    assert script.missing_files(steps, ROOT) == []
    steps = script.read(text, {"TORCH_INDEX_URL": "https://a b", "BASE_IMAGE": "other"})
    assert steps[-1].base == "other"
    assert next(words for step in steps for words in step.installs("pip"))[2:4] == ["--index-url", "https://a b"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("ENTRYPOINT fcmae", "ENTRYPOINT fcmae"),
        ("HEALTHCHECK NONE", "HEALTHCHECK NONE"),
        ("WORKDIR ${HERE%/}/a", "${HERE%/}/a"),
    ],
)
def test_what_cannot_be_read_is_refused(script, line, said):
    with pytest.raises(SystemExit) as refused:
        script.read(f"FROM base\n\n{line}", {})
    assert refused.value.code == f"Dockerfile:3: .ci/image cannot read {said}"


def test_each_failure_is_a_line(script, tool, tmp_path, monkeypatch):
    (tmp_path / "there").touch()
    steps = script.read(WRONG, {})
    assert script.missing_files(steps, tmp_path) == ["Dockerfile:8: COPY: absent does not exist"]

    tool("apt-get", "")
    tool("apt-cache", "printf 'gcc:\\n  Installed: 1\\n  Candidate: 2\\n  Version table:\\n     2 500\\n'")
    (said,) = script.check_apt(steps, steps[-1])
    assert said.startswith("Dockerfile:4: apt package nonsense has no candidate in ")

    (tmp_path / "absent").touch()
    for out, expected in (
        ("WARNING: a 1 does not provide the extra 'nothing'", "WARNING: a 1 does not provide the extra 'nothing'"),
        ("ERROR: no matching distribution\nERROR: for help see", "ERROR: no matching distribution"),
    ):
        done = subprocess.CompletedProcess([], int("ERROR" in out), out)
        with monkeypatch.context() as patch:
            patch.setattr(script, "call", lambda *_, done=done, **__: done)
            (said,) = script.check_pip(steps, tmp_path, tmp_path / "temporary")
        assert said == f"Dockerfile:9: pip install -c constraints.txt '.[nothing]': {expected}"
    assert (tmp_path / "temporary/image/src/there").is_file()
    done = subprocess.CompletedProcess([], 1, "error: externally-managed-environment\n\nhint: See PEP 668")
    with monkeypatch.context() as patch:
        patch.setattr(script, "call", lambda *_, **__: done)
        (said,) = script.check_pip(steps, tmp_path, tmp_path / "temporary")
    assert said.startswith(f"pip's commands cannot be checked: {sys.executable} is externally managed ")
    assert said.endswith("(PEP 668), so pip refuses; use `make test-image`, or a virtual environment")

    failures = script.try_entry(steps[-1], lambda *words: script.call(["missing", *words], 60))
    said = "ended with 127, not {}: [Errno 2] No such file or directory: 'missing'"
    assert failures == [
        f"Dockerfile: `missing --help` {said.format(0)}",
        f"Dockerfile: `missing {shlex.join(script.PRETRAIN)}` {said.format(75)}",
    ]


DOCKER = """
echo "$@" >> "$0.log"
case $1 in
    inspect) exit 1;;
    pull) echo "{pull}"; test -z "{pull}";;
    build) echo building >&2; exit {build};;
    run) echo "cannot run"; test "$8" = true && exit {true}; test "$8" = --help && exit 0; exit {run};;
esac
"""
WORKS = {"pull": "", "true": 0, "build": 0, "run": 75}
FALLS_BACK = "checked without building: docker: "


@pytest.mark.parametrize(
    ("change", "failure", "printed"),
    [
        ({}, None, "docker built the image"),
        ({"pull": "lookup docker.io: no such host"}, None, f"{FALLS_BACK}lookup docker.io: no such host"),
        ({"true": 1}, None, f"{FALLS_BACK}cannot run"),
        ({"pull": "a: manifest unknown"}, "Dockerfile: FROM base:1: docker: a: manifest unknown", ""),
        ({"build": 3}, "Dockerfile: docker could not build it, exit code 2: see above", ""),
        ({"run": 1}, "Dockerfile: `fcmae pretrain", ""),
    ],
)
def test_a_builder_builds_and_runs_or_its_failure_is_said(
    script, tool, tmp_path, monkeypatch, capfd, change, failure, printed
):
    tool("docker", DOCKER.format(**{**WORKS, **change}))
    monkeypatch.setenv("BUILD_ARGS", "--build-arg BASE_IMAGE=base:1")
    for name in ("check_apt", "check_pip", "check_chroot"):
        monkeypatch.setattr(script, name, lambda *_: [])
    failures = script.check(script.read((ROOT / "Dockerfile").read_text(), {"BASE_IMAGE": "base:1"}))
    assert [line.startswith(failure) for line in failures] == [True] * (failure is not None)
    assert printed in capfd.readouterr().out
    log = (tmp_path / "bin" / "docker.log").read_text().splitlines()
    built = "build --build-arg BASE_IMAGE=base:1 -t fcmae-ci ." in log
    assert built == (FALLS_BACK not in printed and "FROM" not in (failure or ""))
    if not change:
        started = [line for line in log if line.startswith("run ") and " fcmae-ci " in line]
        assert [line.split()[7] for line in started] == ["--help", "pretrain"]
        assert log[-1].startswith("rm -f fcmae-ci-")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_build_is_ended(tool, tmp_path, number):
    builds = "trap 'echo ended > \"$0.log\"; exit 1' TERM; echo building; while :; do sleep 0.02; done"
    tool("docker", f"case $1 in build) {builds};; esac")
    with subprocess.Popen([sys.executable, SCRIPT], stdout=subprocess.PIPE, text=True, env=os.environ) as process:
        assert any("building" in line for line in process.stdout)
        process.send_signal(number)
        assert process.wait() == 128 + number
    assert (tmp_path / "bin" / "docker.log").read_text() == "ended\n"


def test_a_signal_while_a_process_starts_ends_it(script, monkeypatch):
    started = []

    class Popen(subprocess.Popen):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            started.append(self)
            # Not to the process: one of the tests' other threads could take it at once.
            signal.pthread_kill(threading.get_ident(), signal.SIGTERM)

    monkeypatch.setattr(subprocess, "Popen", Popen)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with pytest.raises(SystemExit):
            script.call(["sleep", "60"], 60)
    finally:
        signal.signal(signal.SIGTERM, before)
        started[0].kill()
    assert started[0].wait() == -signal.SIGTERM
