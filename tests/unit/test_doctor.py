"""What fcmae doctor says of good and of bad machines, and what it exits with."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

import fcmae.doctor
from fcmae.doctor import checks, machine, run
from fcmae.doctor.checks import GIB, Finding
from fcmae.ranks import port_of

HEADER = Path("/usr/include/python3.11/Python.h")
ARCHS = ["sm_75", "sm_80", "sm_86", "sm_90a", "sm_100", "compute_120"]
GOOD = {
    "compilers": checks.compilers("/usr/bin/gcc", "/usr/bin/g++", HEADER),
    "gpu": checks.gpu_precision("H100", (9, 0)),
    "gpu without float8": checks.gpu_precision("A100", (8, 0)),
    "architecture": checks.architecture("T4", (7, 5), ARCHS),
    "a later minor version": checks.architecture("RTX 4090", (8, 9), ARCHS),
    "an exact architecture": checks.architecture("H100", (9, 0), ARCHS),
    "compiled on the machine": checks.architecture("a GPU of tomorrow", (13, 0), ARCHS),
    "driver": checks.driver("13.0", 13010, True),
    "older driver of the same major version": checks.driver("12.8", 12040, True),
    "no GPU": checks.driver("13.0", None, False),
    "no GPU, CPU build": checks.driver(None, None, False),
    "cpu": checks.cpu({"avx512f", "amx_bf16"}, "AVX512", 0.8),
    "cpu without AVX-512": checks.cpu({"avx2"}, "AVX2", 19.6),
    "cpu of an unknown system": checks.cpu(set(), "AVX2", 2.0),
    "shared memory": checks.shared_memory(16 * GIB, 16 * GIB, 15, 2, 2),
    "port": next(iter(checks.rendezvous({29400: None}))),
    "versions": checks.versions(["timm>=1.0.20", "onnx>=1; extra == 'onnx'"], {"timm": "1.0.31"}.get)[0],
    "a build of torch": checks.versions(["torch>=2.11"], {"torch": "2.14.1+cu130"}.get)[0],
    "wandb": checks.wandb("offline"),
    "disk": checks.disk(Path("/data"), 500 * GIB),
}
BAD = {
    "no compiler": (checks.compilers(None, "/usr/bin/g++", HEADER), "no C:", "install gcc"),
    "no headers": (checks.compilers("/usr/bin/gcc", "/usr/bin/g++", None), "no Python.h:", "python3-dev"),
    "old GPU": (checks.gpu_precision("T4", (7, 5)), "no bf16, no float8", "precision=auto takes fp16"),
    "too old a GPU": (checks.architecture("V100", (7, 0), ARCHS), "not sm_70", "pytorch.org"),
    "too new a GPU": (checks.architecture("B200", (10, 0), ["sm_80", "sm_90"]), "sm_80, sm_90, not sm_100", "pytorch"),
    "only another exact one": (checks.architecture("B300", (10, 3), ["sm_100a"]), "not sm_103", "pytorch.org"),
    "old driver": (checks.driver("13.0", 12040, True), "supports CUDA 12.4, torch was built for 13.0", "for CUDA 12"),
    "no driver": (checks.driver("13.0", None, True), "no NVIDIA driver, but", "--gpus all"),
    "torch without CUDA": (checks.driver(None, 13000, True), "built without CUDA, but", "a torch with CUDA"),
    "no vector instructions": (checks.cpu(set(), "DEFAULT", 2.0), "torch uses DEFAULT", "AVX2"),
    "Docker's shared memory": (checks.shared_memory(2**26, 2**26, 15, 1, 2), "0.06 of 0.06 GiB", "--shm-size"),
    "full shared memory": (checks.shared_memory(16 * GIB, GIB // 2, 15, 1, 2), "0.50 of 16.00", "loader.workers"),
    "busy port": (next(iter(checks.rendezvous({29400: "Address in use"}))), "29400 cannot be opened", "MASTER_PORT"),
    "old timm": (checks.versions(["timm>=1.0.20"], {"timm": "0.9.16"}.get)[0], "timm 0.9.16", "'timm>=1.0.20'"),
    "no timm": (checks.versions(["timm>=1.0.20"], lambda _: None)[0], "timm is not installed", "'timm>=1.0.20'"),
    "wandb without a key": (checks.wandb(None, "WANDB_MODE needs an API key"), "needs an API key", "logger.wandb=off"),
    "full disk": (checks.disk(Path("/data"), GIB), "1.0 GiB free in /data", "hydra.run.dir"),
}


@pytest.mark.parametrize("finding", GOOD.values(), ids=GOOD)
def test_good(finding):
    assert str(finding).startswith("ok   ")
    assert "\n" not in str(finding)


@pytest.mark.parametrize(("finding", "what", "to_do"), BAD.values(), ids=BAD)
def test_bad_says_what_to_do(finding, what, to_do):
    line = str(finding)
    assert line.startswith("warn ")
    assert line.index(what) < line.index(to_do)
    assert "\n" not in line


@pytest.mark.parametrize(
    ("environment", "ports"),
    [
        ({}, [checks.TORCHRUN_PORT]),
        ({"SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "1"}, [port_of(4711, 1)]),
        ({"SLURM_JOB_ID": "4711"}, [port_of(4711, 0)]),
        ({"SLURM_JOB_ID": "4711", "MASTER_PORT": "1234"}, [1234]),
    ],
)
def test_the_ports_of_a_launch(environment, ports):
    assert checks.ports(environment) == ports


def test_a_port_is_tried():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        assert machine.why_not_open(port) is not None
    assert machine.why_not_open(port) is None
    assert machine.why_not_open(70_000) is not None


def test_every_check_has_its_line_on_this_machine():
    """And none of them fails, whatever it finds."""
    topics = [finding.what.partition(":")[0] for finding in machine.findings()]
    assert {"CPU", "rendezvous", "versions", "wandb", "disk"} <= set(topics)
    assert any(topic.startswith("compilers") for topic in topics)


@pytest.mark.parametrize("failed", [0, 2])
def test_only_engines_that_disagree_fail(failed, monkeypatch, capsys):
    def bad() -> Iterator[Finding]:
        yield Finding("disk: full", "delete something")

    monkeypatch.setattr(fcmae.doctor, "findings", bad)
    monkeypatch.setattr(fcmae.doctor, "agree", lambda golden: failed)
    assert run([]) == (1 if failed else 0)
    assert "\nwarn disk: full: delete something\n" in capsys.readouterr().out
