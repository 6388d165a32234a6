"""``fcmae init``: a folder whose commands run, with settings that suit the images; what to type first."""

import json
import re
import shlex
import sys

import numpy as np
import pytest
import yaml
from PIL import Image

from fcmae.cli import main
from fcmae.config import DataConfig, compose, from_dotlist
from tests.in_process import unchanged


@pytest.fixture
def cells(tmp_path, monkeypatch):
    """Dark images of 12 bits in two channels."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cells").mkdir()
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 2000, (2, 64, 80), np.uint16)
        np.save(tmp_path / "cells" / f"{number}.npy", pixels)


def test_the_folder_has_settings_for_the_images(cells, tmp_path, capsys, monkeypatch):
    assert main(["init", "my project", "data.path=cells", "data.name=imagefolder", "data.vflip=0.5"]) == 0
    said = capsys.readouterr().out
    assert "12 images: experiment=own/small, data.in_chans=2, data.bit_depth=11" in said
    assert "cd 'my project'; fcmae pretrain" in said
    monkeypatch.chdir(tmp_path / "my project")
    readme = (tmp_path / "my project" / "README.md").read_text()
    first = shlex.split(said.splitlines()[-1].partition("fcmae pretrain")[2], comments=True)
    assert f"fcmae pretrain {' '.join(first)} " in readme
    config = tmp_path / "my project" / "conf" / "experiment" / "project.yaml"
    expected = [f"path: {tmp_path}/cells", "in_chans: 2", "bit_depth: 11", "vflip: 0.5", "image_size: 64"]
    for more in (["name: my_project", "budget: 5min"], ["rot90: true", "fit: pad", "backbone: convnextv2_tiny"]):
        with unchanged():
            assert main(["pretrain", *first, "--cfg", "job", "--resolve"]) == 0
        composed = capsys.readouterr().out
        assert [line for line in [*expected, *more] if line not in composed] == []
        top, _, keys = config.read_text().partition("name:")  # the next time with the keys that are offered
        config.write_text(top + "name:" + re.sub(r"^( *)# (?!vflip)", r"\1", keys, flags=re.MULTILINE))
    script = (tmp_path / "my project" / "job.sbatch").read_text()
    assert "srun" in script
    assert "launch/" not in script  # which an installed package does not have
    assert main(["init", ".", "data.path=../cells"]) == 2
    assert "exists; name a folder that is new or empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("dtype", "chosen"),
    [
        ("uint16", "data.in_chans=2, data.bit_depth=10, data.mean=[0.4"),
        ("float32", "data.in_chans=2, data.dtype=float32"),
    ],
)
def test_an_array_has_the_suggested_type_and_scale(dtype, chosen, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("a.npy", np.random.default_rng(0).integers(0, 1000, (6, 2, 64, 64)).astype(dtype))
    assert main(["init", "own", "data.path=a.npy"]) == 0
    assert f"6 images: experiment=own/small, {chosen}" in capsys.readouterr().out
    data = yaml.safe_load((tmp_path / "own" / "conf" / "experiment" / "project.yaml").read_text())["data"]
    keys = [f"{key}={json.dumps(value)}" for key, value in data.items()]
    cfg = from_dotlist(DataConfig, [f"data.{key}" for key in keys], "data")
    assert cfg.mean == pytest.approx([500 / 1023 if dtype == "uint16" else 500] * 2, rel=0.02)


def test_photographs_need_no_settings(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for number in range(4):
        pixels = np.random.default_rng(number).normal(0.45 * 255, 0.25 * 255, (64, 64, 3)).clip(0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "photos" / f"{number}.png")
    assert main(["init", "new", "data.path=photos"]) == 0
    assert "4 images: experiment=own/small\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["new"], "data.path is not set; give data.path=FOLDER"),
        (["new", "data.path=cells", "data.name=imagefolder", "data.colour=1"], "data.colour: unknown key"),
        (["new", "data.path=missing"], "data.path: missing is not a folder"),
        ([], "--help shows all flags"),
    ],
)
def test_mistakes(cells, tmp_path, capsys, args, message):
    assert main(["init", *args]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_written_is_one_line(cells, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["init", "file/new", "data.path=cells", "data.name=imagefolder"]) == 1
    line = "file/new cannot be written: Not a directory; name a folder elsewhere"
    assert capsys.readouterr().err.splitlines()[-1].endswith(line)


def test_a_command_alone_says_what_to_type_next(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with unchanged():
        assert main(["pretrain"]) == 2
        assert "fcmae init" not in capsys.readouterr().err
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        assert main(["pretrain"]) == 2
    said = capsys.readouterr().err
    assert "data.path is not set" in said
    commands = [shlex.split(line.split("   ")[0]) for line in said.splitlines() if "fcmae pretrain experiment" in line]
    assert commands == [["fcmae", "pretrain", "experiment=own/small", "data.path=FOLDER"]]
    assert compose("pretrain", ["data=synthetic", "data.length=64", "debug=default"])
