"""Mistakes of the first hour: one line that says what to do, before any work."""

import argparse
import os
import subprocess
import sys

import pytest

from fcmae import hydra_run
from fcmae.cli import main
from fcmae.training import setup
from tests.conftest import TINY_FINETUNE, TINY_PRETRAIN
from tests.in_process import unchanged

KEYS = "docs/config.md lists all keys, and --cfg job prints those of a command"
TYPED = {
    "option": ("pretrain --data photos", "--data: unknown option; settings are written KEY=VALUE, such as data.path="),
    "short option": ("pretrain -o runs/photos", "-o: unknown option; settings are written KEY=VALUE"),
    "spaces": ("pretrain data.path = photos", "=: not an override; write KEY=VALUE without spaces around ="),
    "no =": ("pretrain data=synthetic seed", "seed: not an override; write KEY=VALUE"),
    "path alone": ("pretrain data=synthetic a.jpg", "a.jpg: not an override; write data.path=a.jpg"),
    "run alone": ("pretrain data=synthetic run", "run: not an override; write checkpoint=run"),
    "missing run alone": (
        "evaluate runs/nope",
        "runs/nope: not an override; write KEY=VALUE, such as checkpoint=RUN or data.path=FOLDER",
    ),
    "run alone, evaluated": ("evaluate run", "run: not an override; write checkpoint=run"),
    "folder alone": ("pretrain run/checkpoints", "run/checkpoints: not an override; write data.path=run/checkpoints"),
    "letters for a number": ("pretrain data=synthetic seed=a", "seed must be an integer; got 'a'"),
    "relative path": ("pretrain data.path=nope", "data.path: nope is not a folder; relative paths start in /"),
    "image for a folder": (
        "pretrain data.path=a.jpg",
        "data.path: a.jpg is not a folder; it is a file: give its folder",
    ),
    "array for a folder": ("pretrain data.path=a.npy", "data.path: a.npy is not a folder; such files need data=array"),
    "Zarr for a folder": (
        "pretrain data.path=a.zarr",
        "data.path: a.zarr is a Zarr array or group; it needs data=array",
    ),
    "name of another library": (
        "pretrain data=synthetic optim.learning_rate=1",
        f"optim.learning_rate: unknown key; did you mean optim.lr? {KEYS}",
    ),
    "key of another command": (
        "finetune data=synthetic model.mask_ratio=0.5",
        f"model.mask_ratio: unknown key; it is a key of fcmae pretrain; {KEYS}",
    ),
    "experiment of another command": (
        "pretrain data=synthetic experiment=in1k/finetune_base",
        "experiment/in1k/finetune: this command has no key model.head_init_scale; it is for fcmae finetune",
    ),
    "experiment": (
        "pretrain data=synthetic experiment=own/smal",
        "Could not find 'experiment/own/smal'; the nearest are own/small, own/large, own/medium, ",
    ),
    "network": (
        "pretrain data=synthetic model=convnextv2_ato",
        "model is 'convnextv2_ato'; did you mean convnextv2_atto? It must be one of convnext_atto, convnext_base, ",
    ),
    "engine": (
        "pretrain data=synthetic engine=minkowsky",
        "engine is 'minkowsky'; did you mean minkowski? It must be one of dense, masked, minkowski, packed, timm",
    ),
    "objective without classes": (
        "finetune data=synthetic objective=segment trainer.eval_every_epochs=null",
        "objective.classes must be a list of two or more names, or their number; got None",
    ),
    "table": ("pretrain data.path=t.csv", "data.path: t.csv is not a folder; such files need data=table"),
    "tar": ("pretrain data.path=a.tar", "data.path: a.tar is not a folder; such files need data=webdataset"),
    "study": ("study data.path=. init_from=a.jpg", "data.val_path is not set; give the folder of validation images"),
    "argument of an objective": (
        "finetune data=synthetic objective.clases=[a] trainer.eval_every_epochs=null optim.global_batch_size=1",
        "objective: fcmae.tasks.objectives.Classify does not take these arguments: ",
    ),
    "picture for a checkpoint": (
        "knn checkpoint=a.jpg data.path=.",
        "a.jpg cannot be read: it is not a file of torch.save",
    ),
}


def told(tmp_path, monkeypatch, capfd, *args):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.zarr").mkdir()
    for name in ("t.csv", "a.tar", "a.jpg", "a.npy", "a.zarr/zarr.json"):
        (tmp_path / name).write_bytes(b"\xff\xd8 not what it says")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with unchanged():
        assert main(list(args)) == 2
    return [line for line in capfd.readouterr().err.splitlines() if line.startswith(f"fcmae {args[0]}: ")]


@pytest.mark.parametrize("case", TYPED)
def test_the_answer_is_one_line(case, tmp_path, monkeypatch, capfd):
    typed, answer = TYPED[case]
    lines = told(tmp_path, monkeypatch, capfd, *typed.split())
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"fcmae {typed.split()[0]}: {answer}")
    assert len(lines[0]) < 420


def test_a_disk_without_room_for_a_checkpoint_is_named_before_the_first_step(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(setup.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 2**10}))
    (line,) = told(tmp_path, monkeypatch, capfd, *TINY_PRETRAIN, "hydra.run.dir=run")
    assert "run has 0.0 MiB free, and a checkpoint needs " in line
    assert "choose a folder on another disk" in line
    assert not list((tmp_path / "run").glob("checkpoints/*"))


@pytest.mark.parametrize(
    ("command", "way_out"),
    [
        (TINY_PRETRAIN, "experiment=own/small takes one that fits"),
        (TINY_FINETUNE, "give optim.global_batch_size=16 or, with few labels, recipe=auto"),
    ],
)
def test_a_batch_of_more_images_than_there_are_has_a_way_out(command, way_out, fcmae_here):
    refused = fcmae_here(*command, "optim.global_batch_size=4096", check=2).stderr.splitlines()[-1]
    mistake = "optim.global_batch_size must be at most 24, the number of training images; got 4096"
    assert refused == f"fcmae {command[0]}: {mistake}; {way_out}"


def test_options_are_parsed_where_help_texts_are_checked(tmp_path, monkeypatch, capfd):
    """As from Python 3.14 on: every command ended with "badly formed help string"."""

    def check_help(self, action):
        if action.help and "%" not in action.help:
            return

    monkeypatch.setattr(argparse._ActionsContainer, "_check_help", check_help, raising=False)
    add = argparse._ActionsContainer.add_argument

    def add_argument(self, *args, **kwargs):
        action = add(self, *args, **kwargs)
        self._check_help(action)
        return action

    monkeypatch.setattr(argparse._ActionsContainer, "add_argument", add_argument)
    with pytest.raises(TypeError):
        hydra_run.hydra_utils.get_args_parser()
    (line,) = told(tmp_path, monkeypatch, capfd, "pretrain")
    assert "data.path is not set" in line
    assert argparse._ActionsContainer._check_help is check_help


def test_options_of_hydra_are_known(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    with unchanged(), pytest.raises(SystemExit):
        main(["pretrain", "--version"])
    assert "unknown option" not in capfd.readouterr().err


@pytest.mark.parametrize("argv", [["--help"], ["pretrain", "--help"]])
def test_output_that_nobody_reads_is_no_error(argv):
    """As in ``fcmae --help | head -1``."""
    reads, writes = os.pipe()
    os.close(reads)
    command = [sys.executable, "-m", "fcmae.cli", *argv]
    ended = subprocess.run(command, stdout=writes, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writes)
    assert (ended.returncode, ended.stderr) == (1, "")
