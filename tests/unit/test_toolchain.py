"""Compilers: which one is found, and what is said without one, before any data is read."""

from types import SimpleNamespace

import pytest
import torch

from fcmae import toolchain
from fcmae.cli import main
from fcmae.kernels import depthwise
from tests.conftest import TINY_FINETUNE, TINY_PRETRAIN


def which(*there):
    return lambda name: f"/usr/bin/{name}" if name in there else None


@pytest.mark.parametrize(
    ("environment", "there", "c", "cxx"),
    [
        ({}, ["gcc", "g++", "clang"], "gcc", "g++"),
        ({}, ["clang", "clang++"], "clang", None),
        ({}, [], None, None),
        ({"CC": "gcc-12", "CXX": "ccache g++-12"}, ["gcc-12", "ccache"], "gcc-12", "ccache"),
        ({"CC": "gcc-12", "CXX": "g++-12"}, ["gcc", "g++"], None, None),
    ],
)
def test_compilers_are_looked_for_as_triton_and_torch_do(environment, there, c, cxx, monkeypatch):
    monkeypatch.setattr(toolchain.sys, "platform", "linux")
    found = toolchain.c_compiler(environment, which(*there)), toolchain.cxx_compiler(environment, which(*there))
    assert found == tuple(name and f"/usr/bin/{name}" for name in (c, cxx))


def test_what_is_missing(tmp_path):
    (tmp_path / "Python.h").touch()
    header, gone = tmp_path / "Python.h", tmp_path / "gone" / "Python.h"
    assert toolchain.missing("cuda", {}, which("gcc"), header) is None
    assert "install gcc" in toolchain.missing("cuda", {}, which("g++"), header)
    assert toolchain.missing("cpu", {}, which("g++"), header) is None
    assert "install g++" in toolchain.missing("cpu", {}, which("gcc"), header)
    assert f"{gone} is missing; install Python's headers" in toolchain.missing("cuda", {}, which("gcc"), gone)


@pytest.mark.parametrize("command", [TINY_PRETRAIN, TINY_FINETUNE], ids=["pretrain", "finetune"])
def test_a_run_without_a_compiler_is_refused_before_data_is_read(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    images = tmp_path / "images"
    images.mkdir()
    args = ["data=imagefolder", f"data.path={images}", "trainer.compile=true", f"hydra.run.dir={tmp_path}/run"]
    command = [arg for arg in command if arg not in ("data=synthetic", "data.length=24")]
    assert main([*command, *args]) == 2
    line = capsys.readouterr().err
    assert "trainer.compile: torch.compile cannot run: no C++ compiler" in line
    assert line.endswith("install g++, or set trainer.compile=false\n")
    assert main([*command, *args[:2], args[3]]) == 2
    assert f"{images} has no images" in capsys.readouterr().err


@pytest.mark.parametrize("has_compiler", [True, False])
def test_kernels_that_cannot_be_compiled_are_left_to_torch(has_compiler, monkeypatch):
    if depthwise.depthwise_launch is None:
        pytest.skip("needs Triton")
    monkeypatch.setattr(depthwise, "HAS_C_COMPILER", has_compiler)
    x = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, shape=(2, 3, 4, 4, 8))
    assert depthwise.use_triton(x, torch.zeros(8, 1, 7, 7)) == has_compiler
