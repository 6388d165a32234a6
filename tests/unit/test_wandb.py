"""How a run uses wandb: by the config, by wandb's own settings, and with an API key or without one."""

import json
import math
import struct
import sys
from types import SimpleNamespace

import pytest
from PIL import Image

from fcmae.cli import main
from fcmae.config import LoggerConfig
from fcmae.errors import UsageError
from fcmae.evaluation import summary
from fcmae.loggers.wandb import ID_FILE, WandbLogger, check_report, log_report, wandb_mode
from fcmae.messages import print_once
from fcmae.models.objective import Report
from fcmae.training.run_dir import set_results_aside
from tests.conftest import TINY_PRETRAIN

VARIABLES = (
    "MODE",
    "API_KEY",
    "IDENTITY_TOKEN_FILE",
    "PROJECT",
    "NAME",
    "RUN_ID",
    "RESUME",
    "DIR",
    "SILENT",
    "BASE_URL",
)


class CommError(Exception):
    pass


class Fake:
    """wandb, as far as it is used: settings from the environment, and what its runs were started with."""

    Image = staticmethod(lambda image, caption: image)
    Table = staticmethod(lambda columns, data: (columns, data))
    Artifact = staticmethod(lambda name, type: SimpleNamespace(name=name, files=[]))
    errors = SimpleNamespace(Error=Exception, CommError=CommError)

    def __init__(self):
        self.mode = "online"
        """Of wandb/settings, which `wandb offline` writes."""
        self.started: list[dict] = []
        self.logged: list[int] = []
        self.starting_step = 0
        self.reachable = True

    def setup(self):
        import os

        mode = os.environ.get("WANDB_MODE", self.mode)
        if mode not in ("online", "offline", "shared", "disabled", "dryrun", "run"):
            raise ValueError("1 validation error for Settings\nmode\n  Input should be 'online'\n    For further")
        given = {n: os.environ.get(f"WANDB_{v}") for n, v in (("project", "PROJECT"), ("run_name", "NAME"))}
        given |= {n: os.environ.get(f"WANDB_{v}") for n, v in (("run_id", "RUN_ID"), ("resume", "RESUME"))}
        return SimpleNamespace(settings=SimpleNamespace(mode=mode, base_url="https://api.wandb.ai", **given))

    def init(self, **arguments):
        self.started.append(arguments)
        if arguments["mode"] == "online" and not self.reachable:
            raise CommError("timed out")
        folder = f"{arguments.get('dir')}/wandb/offline-run-1"
        return SimpleNamespace(
            log=lambda _, step: self.logged.append(step),
            starting_step=self.starting_step,
            finish=lambda: None,
            settings=SimpleNamespace(sync_dir=folder),
        )

    @staticmethod
    def Settings(**settings):
        return settings


@pytest.fixture
def wandb(monkeypatch, tmp_path):
    for name in VARIABLES:
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    fake = Fake()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def give_key(tmp_path):
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")


@pytest.mark.parametrize(
    ("config", "variable", "settings", "key", "expected"),
    [
        ("auto", None, "online", False, "offline"),
        ("auto", None, "online", True, "online"),
        ("auto", "disabled", "online", True, "disabled"),
        ("auto", "offline", "online", True, "offline"),
        ("auto", "dryrun", "online", True, "offline"),
        ("auto", "online", "online", True, "online"),
        ("auto", None, "offline", True, "offline"),
        ("auto", None, "disabled", True, "disabled"),
        ("online", "disabled", "online", True, "online"),
        ("offline", "online", "online", True, "offline"),
        ("disabled", "online", "online", True, "disabled"),
    ],
)
def test_the_mode(monkeypatch, tmp_path, wandb, config, variable, settings, key, expected):
    wandb.mode = settings
    if variable:
        monkeypatch.setenv("WANDB_MODE", variable)
    if key:
        give_key(tmp_path)
    assert wandb_mode(LoggerConfig(wandb=config)) == expected


@pytest.mark.parametrize(("config", "variable"), [("online", None), ("auto", "online")])
def test_online_without_a_key_is_refused_before_anything_else(monkeypatch, tmp_path, capfd, wandb, config, variable):
    if variable:
        monkeypatch.setenv("WANDB_MODE", variable)
    monkeypatch.setattr("fcmae.training.run._pretraining", lambda *_: pytest.fail("was reached"))
    args = [*TINY_PRETRAIN, f"logger.wandb={config}", f"hydra.run.dir={tmp_path}/run"]
    assert main(args) == 2
    asked = "WANDB_MODE" if variable else "logger.wandb=online"
    error = capfd.readouterr().err
    assert error.startswith(f"fcmae pretrain: {asked} needs an API key of https://api.wandb.ai: run `wandb login`")
    assert error.count("\n") == 1


def test_settings_that_wandb_refuses_are_one_line(monkeypatch, wandb):
    monkeypatch.setenv("WANDB_MODE", "foo")
    with pytest.raises(UsageError, match="wandb does not accept its settings .* mode   Input should be 'online'$"):
        wandb_mode(LoggerConfig())


def test_without_the_package_auto_says_so_once_and_others_refuse(monkeypatch, capsys, wandb):
    monkeypatch.setitem(sys.modules, "wandb", None)
    print_once.cache_clear()
    assert [wandb_mode(LoggerConfig()) for _ in range(2)] == ["disabled"] * 2
    assert capsys.readouterr().err.startswith("wandb is not installed, so it logs nothing")
    for mode in ("online", "offline"):
        with pytest.raises(UsageError, match=f"logger.wandb is {mode}, but wandb is not installed: pip install wandb"):
            wandb_mode(LoggerConfig(wandb=mode))


def test_what_the_user_set_for_wandb_comes_first(monkeypatch, tmp_path, capsys, wandb):
    WandbLogger("offline", LoggerConfig(), "mine", tmp_path, {"a": 1})
    first = wandb.started.pop()
    assert first == {
        "mode": "offline",
        "project": "fcmae",
        "name": "mine",
        "id": (tmp_path / ID_FILE).read_text(),
        "resume": "allow",
        "dir": tmp_path,
        "config": {"a": 1},
        "settings": {"silent": True},
    }
    assert capsys.readouterr().err == (
        f"wandb logs offline; to upload all processes of this run: wandb sync {tmp_path}/wandb\n"
    )
    for name in ("PROJECT", "NAME", "RUN_ID", "RESUME", "DIR", "SILENT"):
        monkeypatch.setenv(f"WANDB_{name}", "theirs")
    WandbLogger("online", LoggerConfig(), "mine", tmp_path, {})
    assert wandb.started.pop() == {"mode": "online", "config": {}}
    WandbLogger("online", LoggerConfig(project="asked"), "mine", tmp_path, {})
    assert wandb.started.pop()["project"] == "asked"


def test_runs_are_described_as_the_config_says(tmp_path, wandb):
    """Keys that are not set leave it to the variables of wandb."""
    said = {"entity": "team", "group": "g", "tags": ["a", "b"], "notes": "n", "job_type": "j"}
    WandbLogger("online", LoggerConfig(**said), "mine", tmp_path, {})
    assert said.items() <= wandb.started.pop().items()
    WandbLogger("online", LoggerConfig(), "mine", tmp_path, {})
    assert not said.keys() & wandb.started.pop().keys()


def test_a_server_that_is_not_reached_is_no_reason_to_stop(tmp_path, capsys, wandb):
    wandb.reachable = False
    WandbLogger("online", LoggerConfig(), "mine", tmp_path, {})
    assert [start["mode"] for start in wandb.started] == ["online", "offline"]
    assert wandb.started[0]["id"] == wandb.started[1]["id"]
    assert capsys.readouterr().err.startswith("wandb cannot be reached, so this process logs offline: timed out\n")


def test_nothing_is_logged_for_steps_that_wandb_would_drop(tmp_path, wandb):
    wandb.starting_step = 7
    logger = WandbLogger("online", LoggerConfig(), "mine", tmp_path, {})
    for step in (6, 7, 8):
        logger.log(step, {"top1": 1.0})
    assert wandb.logged == [7, 7, 8]


def test_a_run_that_is_begun_again_is_another_one(tmp_path, wandb):
    ids = []
    for _ in range(2):
        WandbLogger("offline", LoggerConfig(), "mine", tmp_path, {})
        WandbLogger("offline", LoggerConfig(), "mine", tmp_path, {})
        ids.append({start["id"] for start in wandb.started})
        wandb.started.clear()
        set_results_aside(tmp_path)  # trainer.resume=false
    assert [len(same) for same in ids] == [1, 1]
    assert ids[0] != ids[1]
    assert (tmp_path / f"{ID_FILE}.unused").read_text() in ids[0]


def test_an_evaluation_is_added_to_the_run(monkeypatch, tmp_path, wandb):
    """Only where there is a wandb run, before anything is measured; in its project, at its last step."""
    with pytest.raises(UsageError, match="wandb must be false with report=null"):
        check_report(tmp_path, None)
    with pytest.raises(UsageError, match=f"wandb must be false: {tmp_path} was not logged to wandb"):
        check_report(tmp_path, "run")
    (tmp_path / ID_FILE).write_text("abc")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with pytest.raises(UsageError, match="not installed or disabled"):
        check_report(tmp_path, "run")
    monkeypatch.delenv("WANDB_MODE")
    check_report(tmp_path, "run")
    (tmp_path / "config.yaml").write_text("name: cells\nlogger: {project: tissue, tags: [a]}\n")
    (tmp_path / "metrics.jsonl").write_text('{"step": 40, "loss": 1.0}\n')
    summary.write(tmp_path / "evaluation", {"top1": 62.5}, Report())
    log_report(tmp_path, tmp_path / "evaluation")
    (start,) = wandb.started
    assert (start["id"], start["project"], start["name"], start["resume"]) == ("abc", "tissue", "cells", "allow")
    assert wandb.logged == [40]


def records(file):
    """The records of a .wandb file: LevelDB's log format, after a header of 7 bytes."""
    pb2 = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    data, position, content = file.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if 2**15 - position % 2**15 < 7:
            position += 2**15 - position % 2**15
            continue
        _, size, kind = struct.unpack("<IHB", data[position : position + 7])
        content += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):
            record = pb2.Record()
            record.ParseFromString(content)
            yield record
            content = b""


def number_folder(run_dir, number):
    """Puts a number behind the newest offline folder's name, which has seconds only."""
    for folder in (run_dir / "wandb").glob("offline-run-*"):
        if folder.name.count("-") == 3:
            folder.rename(folder.with_name(f"{folder.name}-{number}"))


def test_processes_of_an_offline_run_sync_as_one(monkeypatch, tmp_path):
    """`wandb sync` goes through the files of one id by start time, and appends those that are recorded as resumed."""
    real = pytest.importorskip("wandb")
    for name in VARIABLES:
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    monkeypatch.setenv("WANDB_CONSOLE", "off")
    for first in (1, 4):
        logger = WandbLogger("offline", LoggerConfig(), "mine", tmp_path, {"seed": first})
        for step in range(first, first + 3):
            logger.log(step, {"loss": float(step)})
        logger.close()
        number_folder(tmp_path, first)
    logger = WandbLogger("offline", LoggerConfig(), "mine", tmp_path, {})
    per_class = {"cat": {"recall": 50.0, "auroc": math.nan}}
    summary.write(tmp_path / "evaluation", {"top1": 62.5}, Report(per_class))
    Image.new("RGB", (8, 8)).save(tmp_path / "evaluation" / "worst.png")
    logger.report(9, tmp_path / "evaluation")
    logger.close()
    number_folder(tmp_path, 9)
    real.teardown()
    found = [list(records(file)) for file in sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))]
    runs = [next(r.run for r in process if r.WhichOneof("record_type") == "run") for process in found]
    steps = [[r.history.step.num for r in process if r.WhichOneof("record_type") == "history"] for process in found]
    assert [run.run_id for run in runs] == [(tmp_path / ID_FILE).read_text()] * 3
    assert [run.resume for run in runs] == [True] * 3
    assert runs[0].start_time.ToNanoseconds() < runs[1].start_time.ToNanoseconds()
    assert steps == [[1, 2, 3], [4, 5, 6], [9]]
    (last,) = [r.history for r in found[-1] if r.WhichOneof("record_type") == "history"]
    logged = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in last.item}
    assert logged["evaluation/top1"] == 62.5
    assert (logged["evaluation/per_class/nrows"], logged["evaluation/per_class/ncols"]) == (1, 3)
    assert logged["evaluation/worst/caption"] == "worst, step 9"
