"""Run directories, locks, caches and what other machines say, prepared by somebody who means harm."""

import contextlib
import dataclasses
import fcntl
import html
import json
import os
import re
import threading
from typing import ClassVar

import pytest
import torch
from torch import nn

from fcmae import distributed, opening
from fcmae.checkpoints import checkpoint
from fcmae.checkpoints.checkpoint import CheckpointDir
from fcmae.config import DataConfig, EvaluateConfig, PretrainConfig, check_plain, from_dict, without_arguments
from fcmae.data.sources import Sample, Synthetic, train_source
from fcmae.errors import ConfigError, DiskError, UsageError
from fcmae.evaluation.cache import CachedExtractor
from fcmae.evaluation.features import Extractor, Features
from fcmae.evaluation.run import evaluate
from fcmae.files import one_at_a_time
from fcmae.interchange import model_card
from fcmae.interchange.convert import export, import_weights
from fcmae.loggers.logger import MetricsFile
from fcmae.processes import Process
from fcmae.training import run
from fcmae.training.run_dir import RunLock
from fcmae.training.watchdog import Watchdog
from tests.interchange import CLASSES, classifier


@pytest.fixture
def precious(tmp_path):
    """A file of the user's that nothing may change."""
    file = tmp_path / "precious"
    file.write_text("precious\n")
    yield file
    assert file.read_text() == "precious\n"


@pytest.fixture
def run_dir(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


IN_PLACE = {
    "run.lock": lambda folder: RunLock(folder).acquire(),
    "stacks_rank0.txt": lambda folder: Watchdog(60.0, folder, 0).close(),
    "metrics.jsonl": lambda folder: MetricsFile(folder, 0).close(),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_what_a_run_writes_in_place_is_no_link(name, run_dir, precious):
    (run_dir / name).symlink_to(precious.with_name("new"))
    refused = pytest.raises((DiskError, UsageError), match=rf"{name} cannot be written: it is a link$")
    with refused, run._disk_explained(run_dir):
        IN_PLACE[name](run_dir)
    assert not precious.with_name("new").exists()
    (run_dir / name).unlink()
    (run_dir / name).symlink_to(precious)
    with contextlib.suppress(DiskError, UsageError), run._disk_explained(run_dir):  # earlier stacks are renamed
        IN_PLACE[name](run_dir)


def test_what_a_run_writes_in_place_is_no_hard_link(run_dir, precious):
    for name in IN_PLACE:
        os.link(precious, run_dir / name)
        with contextlib.suppress(DiskError, UsageError), run._disk_explained(run_dir):
            IN_PLACE[name](run_dir)


def test_a_backup_of_hard_links_keeps_its_metrics(run_dir):
    (run_dir / "metrics.jsonl").write_text('{"step": 1}\n')
    os.link(run_dir / "metrics.jsonl", run_dir / "backup")
    with contextlib.closing(MetricsFile(run_dir, 1)) as metrics:
        metrics.log(2, {})
    assert (run_dir / "backup").read_text() == '{"step": 1}\n'
    assert (run_dir / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize("name", IN_PLACE)
def test_what_a_run_writes_in_place_is_no_pipe(name, run_dir):
    """Opening one would wait for ever for somebody who reads it."""
    os.mkfifo(run_dir / name)
    with pytest.raises((OSError, UsageError), match="not a regular file"):
        IN_PLACE[name](run_dir)


def test_folders_of_a_run_are_no_links_of_others(run_dir, tmp_path, other_user):
    (tmp_path / "elsewhere").mkdir()
    for name in ("checkpoints", "reconstructions"):
        (run_dir / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PermissionError, match="checkpoints is a link of another user"):
        CheckpointDir(run_dir).save({"step": 1})
    with contextlib.closing(MetricsFile(run_dir, 0)) as metrics, pytest.raises(PermissionError, match="is a link of"):
        metrics.picture(1, "picture", None)
    assert not os.listdir(tmp_path / "elsewhere")


def test_checkpoints_may_lie_elsewhere_if_the_user_says_so(run_dir, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (run_dir / "checkpoints").symlink_to(tmp_path / "elsewhere")
    CheckpointDir(run_dir).save({"step": 1})
    assert os.listdir(tmp_path / "elsewhere") == ["step_00000001.pt"]


@pytest.mark.parametrize(
    "told",
    [
        {"pid": "../../../tmp", "born": "1", "place": "", "host": "h", "started": "s"},
        {"pid": 1, "born": [], "place": "", "host": "h", "started": "s"},
        {"pid": 1, "born": "1", "place": "", "host": "\x1b[2J", "started": "s"},
        {"pid": 1, "born": "1", "place": "", "host": {}, "started": "s"},
        [],
        "deep",
    ],
)
def test_a_lock_file_of_anything_is_taken_over(told, run_dir):
    content = "[" * 100_000 if told == "deep" else json.dumps(told)
    (run_dir / "run.lock").write_text(content)
    with contextlib.closing(RunLock(run_dir)) as lock:
        lock.acquire()
        assert json.loads((run_dir / "run.lock").read_text())["pid"] == os.getpid()


@pytest.mark.parametrize(
    "values", [{}, [], {"pid": "1", "born": "", "place": ""}, {"pid": -1, "born": "", "place": ""}]
)
def test_a_process_that_is_none_gets_no_signal(values):
    with pytest.raises(ValueError, match="it names no process"):
        Process.parse(values)


def test_a_start_time_from_the_network_names_no_folder(monkeypatch):
    assert distributed._checked_time(b"2026-01-31_23-59-59") == "2026-01-31_23-59-59"
    for told in (b"../../home/me", b"/tmp/x", b"2026-01-31_23-59-59/..", b"\xff", b"", b"2026-1-31_23-59-59"):
        with pytest.raises(UsageError, match="is not a time such as .*; another program uses this port"):
            distributed._checked_time(told)


class Extract:
    """An extractor that counts how often it is asked."""

    def __init__(self, world):
        self.world = world
        self.width = 3
        self.count = 0

    def __call__(self, source):
        self.count += 1
        return Features(torch.ones(2, 3), torch.tensor([0, 1]))


def cached(folder, monkeypatch):
    extract = Extract(distributed.World(0, 1, 0, 1, torch.device("cpu")))
    found = CachedExtractor(extract, folder, {})
    monkeypatch.setattr(CachedExtractor, "_describe", lambda self, source: "wanted")
    return extract, found


def test_features_that_others_may_write_are_not_used(run_dir, precious, monkeypatch, capsys):
    extract, features = cached(run_dir, monkeypatch)
    features(None)
    assert features(None).values.tolist() == [[1.0] * 3] * 2
    assert extract.count == 1
    (file,) = run_dir.iterdir()
    file.chmod(0o666)
    features(None)
    assert extract.count == 2
    assert "are not used: others may write it; they are extracted again" in capsys.readouterr().err
    assert not file.stat().st_mode & opening.WRITTEN_BY_OTHERS
    file.unlink()
    file.symlink_to(precious)
    features(None)
    assert extract.count == 3
    assert not file.is_symlink()


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    opening.cache_folder.cache_clear()
    yield tmp_path / "home"
    opening.cache_folder.cache_clear()


def test_a_reader_of_the_data_cannot_block_a_start(tmp_path, home):
    """Whoever may read a folder can lock it."""
    data = tmp_path / "data"
    data.mkdir()
    descriptor = os.open(data, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    entered = threading.Event()

    def start():
        with one_at_a_time(data):
            entered.set()

    thread = threading.Thread(target=start, daemon=True)
    thread.start()
    assert entered.wait(60)
    thread.join()
    os.close(descriptor)
    assert not list((home / ".cache/fcmae/locks").iterdir())


def test_who_waits_for_another_says_so(tmp_path, home, monkeypatch, capfd):
    monkeypatch.setattr("fcmae.files.PATIENCE", 0.01)
    order = []

    def second():
        with one_at_a_time(tmp_path):
            order.append("second")

    with one_at_a_time(tmp_path):
        thread = threading.Thread(target=second, daemon=True)
        thread.start()
        while "waiting for another process that reads" not in capfd.readouterr().err:
            thread.join(0.01)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_a_class_that_the_user_allows_is_called(tmp_path, monkeypatch):
    """By the name that the checkpoint gives it, and no other."""
    path = classifier(
        tmp_path, lambda state: state["config"]["data"].update(val_source={"_target_": PLUGIN, "count": 3})
    )
    monkeypatch.setattr(Squares, "made", 0)

    def run(*allow):
        return evaluate(EvaluateConfig(checkpoint=str(path), device="cpu", allow=list(allow)))

    for allow in ((), (f"{PLUGIN}2",)):
        with pytest.raises(ConfigError, match=rf"names the class {PLUGIN} as its data.val_source.*allow=\[{PLUGIN}\]$"):
            run(*allow)
    assert Squares.made == 0
    assert run(PLUGIN)["images"] == 3
    assert Squares.made == 1


@pytest.mark.parametrize("target", ["os.system", "subprocess.check_output", "builtins.exec", "builtins.dict"])
def test_what_is_no_source_is_not_called_even_if_the_user_names_it(target, tmp_path):
    """A mistake, or a class that a checkpoint named and the user allowed."""
    given = {"_target_": target, "command": f"touch {tmp_path}/touched"}
    with pytest.raises(
        ConfigError, match=rf"data.source._target_ is '{target}', which must be a class with the methods"
    ):
        train_source(DataConfig(source=given))
    assert not os.listdir(tmp_path)


class Squares:
    """A source of someone's own, which counts how often one was made."""

    made = 0
    classes: ClassVar[list] = CLASSES

    def __init__(self, count):
        type(self).made += 1
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return Sample(torch.zeros(3, 64, 64, dtype=torch.uint8), index)

    def label(self, index):
        return index

    def describe(self, index):
        return f"square {index}"


PLUGIN = f"{__name__}.Squares"


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ({"data": {"path": "${oc.env:HOME}"}}, "data.path: must not be an interpolation"),
        ({"name": "a ${now:%Y}"}, "name: must not be an interpolation"),
        ({"data": {"source": {"${oc.env:HOME}": 1}}}, "data.source: a key must be a text"),
        ({"seed": 2**64}, "seed: must be an integer of at most 64 bits"),
        ({"name": "x" * 100_000}, "name: must have at most 65536 characters"),
        ({"optim": {"betas": torch.ones(2)}}, "optim.betas: must be a plain value; got a Tensor"),
        ({1: 2}, "the config: a key must be a text"),
        ([{}] * 30_000, "the config has more than 20000 values"),
    ],
)
def test_a_config_from_a_file_is_plain(value, problem):
    with pytest.raises(ConfigError, match=problem):
        from_dict(PretrainConfig, value)


def test_a_config_that_holds_itself_is_refused():
    circle = {}
    circle["data"] = circle
    with pytest.raises(ConfigError, match="nested more than 16 levels deep"):
        check_plain(circle)


SECRET = {"_target_": PLUGIN, "password": "the password"}


def test_what_leaves_the_machine_has_no_arguments_and_no_paths(tmp_path):
    def change(state):
        state["config"]["data"].update(source=SECRET, path="/home/me/images", val_source=SECRET)
        state["config"].update(name="the secret project", init_from="/home/me/runs/1")

    path = classifier(tmp_path, change)
    config = checkpoint.read(path)["config"]
    assert "password" not in str(without_arguments(config))
    for library in ("timm", "transformers", "official"):
        export(path, library, tmp_path / library, check=False)
        found = b"".join(file.read_bytes() for file in (tmp_path / library).iterdir())
        for private in (b"password", b"/home/me", b"secret", b"Squares"):
            assert private not in found
    import_weights(next((tmp_path / "official").glob("*.pt")), "official", tmp_path / "back.pt")
    assert checkpoint.read(tmp_path / "back.pt")["config"]["data"]["mean"] == config["data"]["mean"]


def test_features_that_are_kept_have_no_arguments(run_dir):
    data = DataConfig(source=SECRET, val_source=SECRET)
    extract = Extractor(nn.Identity(), data, distributed.World(0, 1, 0, 1, torch.device("cpu")))
    source = Synthetic(2, 3, (8, 8))
    wanted = CachedExtractor(extract, run_dir, {})._describe(source)
    assert "password" not in wanted
    other = dataclasses.replace(extract, data=DataConfig(source={**SECRET, "password": "x"}, val_source=SECRET))
    assert CachedExtractor(other, run_dir, {})._describe(source) != wanted


def test_names_are_only_text_in_a_model_card(tmp_path):
    bad = [
        "a|b",
        "<script>alert(1)</script>",
        "![x](http://evil.com/?)",
        "c\n\n# heading",
        "`d` *e* _f_",
        "@g www.h.com",
    ]

    def change(state):
        state.update(classes=bad[:3], versions={"fcmae": "1\n# <b>", "![x](y)": "0"})

    export(classifier(tmp_path, change), "timm", tmp_path / "out", check=False)
    card = (tmp_path / "out" / "README.md").read_text()
    for markup in ("<script", "<b>", "![", "](", "a|b", "http://evil"):
        assert markup not in card
    shown = [html.unescape(model_card._text(name)) for name in bad]
    assert shown == [name.replace("\n\n", " ") for name in bad]
    for name in bad[3:]:
        assert not re.search(r"\n|(?<!&)#(?!\d)|[`*@]|\b_|www\.", model_card._text(name))


def test_metrics_of_others_are_numbers(tmp_path):
    path = classifier(tmp_path)
    lines = [
        '{"step": 1, "top1": "<b>"}',
        "[" * 100_000,
        '{"step": "<b>", "top1": 1}',
        "[]",
        '{"step": 7, "top1": 50.0}',
    ]
    (tmp_path / "run" / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    export(path, "timm", tmp_path / "out", check=False)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| top1 | 50 (step 7) |" in card
    assert "<b>" not in card
