"""Files that the user names: refused before the work if they cannot be written, whole or not at all after it."""

import contextlib
import json
import math
import os

import pytest

from fcmae import files, sweep
from fcmae.api import Run
from fcmae.errors import DiskError, UsageError
from fcmae.files import check_output, is_full, output, write_output
from fcmae.loggers.logger import MetricsFile
from fcmae.processes import Process
from fcmae.status import read_status


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "out.json"
    check_output("out", path)
    write_output("out", path, "old")
    with contextlib.suppress(KeyError), output("out", path) as file:
        file.write(b"new")
        raise KeyError
    assert path.read_text() == "old"
    write_output("out", path, "new")
    assert path.read_text() == "new"
    assert os.listdir(path.parent) == ["out.json"]


def test_what_a_killed_command_left_is_deleted_by_the_next_one(tmp_path):
    """Only of dead processes of this machine, and only of the same file."""
    ours = files._tag(Process.this())
    place, token = ours.partition("-")[2], "0123456789abcdef"
    dead = next(pid for pid in range(2, 1 << 22) if not os.path.exists(f"/proc/{pid}"))
    kept = {
        f"out.{ours}-{token}.tmp",
        f"out.{dead}-00000000-{token}.tmp",
        f"out2.{dead}-{place}-{token}.tmp",
        "out.tmp",
    }
    for name in (*kept, f"out.{dead}-{place}-{token}.tmp"):
        (tmp_path / name).touch()
    (tmp_path / f"out.{dead}-{place}-{token[::-1]}.tmp").mkdir()
    write_output("out", tmp_path / "out", "text")
    assert set(os.listdir(tmp_path)) == kept | {"out"}


def test_a_link_stays_one(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    check_output("out", tmp_path / "link")
    write_output("out", tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "text"


def test_a_device_is_written_to(tmp_path):
    check_output("out", "/dev/null")
    write_output("out", "/dev/null", "text")
    assert not os.path.isfile("/dev/null")


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    (tmp_path / "out").write_text("old")
    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(DiskError, match=r"^--out .*out cannot be written: No space left on device$"):
        write_output("--out", tmp_path / "out", "new")
    assert (tmp_path / "out").read_text() == "old"
    assert os.listdir(tmp_path) == ["out"]
    assert is_full(tmp_path, OSError(28, "No space left on device"))
    assert not is_full(tmp_path, FileNotFoundError(2, "No such file"))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "out must be a file; '' is a folder"),
        (".", "out must be a file; '.' is a folder"),
        ("file/below", "out file/below cannot be written: Not a directory"),
        ("/proc/nope", "out /proc/nope cannot be written: "),
    ],
)
def test_what_cannot_be_written_is_refused_before(path, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=message):
        check_output("out", path)


def test_what_is_read_is_not_overwritten(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "labels.csv").touch()
    with pytest.raises(UsageError, match="out must be another file; './labels.csv' is used otherwise"):
        check_output("out", "./labels.csv", [tmp_path / "labels.csv"])
    check_output("out", "./labels.csv")


def test_a_result_does_not_replace_what_is_no_result(tmp_path):
    for content, allowed in ((b"", True), (b' {"top1": 1}', True), (b"PK\3\4", False), (b"\xff\xd8\xff", False)):
        (tmp_path / "out").write_bytes(content)
        with contextlib.nullcontext() if allowed else pytest.raises(UsageError, match="must be a new file or JSON"):
            check_output("out", tmp_path / "out", json=True)


def test_json_of_numbers_that_are_not_finite_is_read_by_all(tmp_path):
    """A result, and a run's metrics with those who read them."""
    files.write_result(tmp_path / "a.json", {"top1": math.nan, "mae": [math.inf, 1.5], "name": "NaN"})
    assert json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail) == {
        "top1": None, "mae": [None, 1.5], "name": "NaN"}  # fmt: skip
    assert files.as_read({"a": (1, -math.inf)}) == {"a": [1, None]}
    (tmp_path / "earlier.json").write_text('{"top1": Infinity, "mae": [NaN, -Infinity]}')
    assert files.read_result(tmp_path / "earlier.json") == {"top1": None, "mae": [None, None]}
    written = MetricsFile(tmp_path, 0)
    written.log(2, {"loss": 0.5, "lr": 0.1})
    written.log(2, {"val_loss": math.nan, "knn10": 3.0})
    written.log(4, {"loss": math.nan})
    written.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line, parse_constant=pytest.fail) for line in lines][1:] == [
        {"step": 2, "val_loss": None, "knn10": 3.0}, {"step": 4, "loss": None}]  # fmt: skip
    assert math.isnan(Run(tmp_path, tmp_path).history[1]["val_loss"])
    assert math.isnan(sweep.score(tmp_path, {}))
    assert read_status(tmp_path).scores == {"knn10": 3.0}


@pytest.mark.parametrize(
    "line",
    [b'{"step": 2, "l\xffss": 1}', b'{"step": "2"}', b'{"step": []}', b"[2]", b'{"loss": 1}', b'{"st', b"[" * 10**5],
)
def test_a_damaged_line_of_metrics_is_left_out(line, tmp_path):
    """It may have been cut off when the run was killed."""
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "loss": 0.5}\n' + line + b'\n{"step": 3}\n{"step": 4}')
    assert Run(tmp_path, tmp_path).history[0] == {"step": 1, "loss": 0.5}
    MetricsFile(tmp_path, 4).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"step": 1, "loss": 0.5}\n{"step": 3}\n{"step": 4}\n'
    MetricsFile(tmp_path, 2).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"step": 1, "loss": 0.5}\n'


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b"[" * 10**5])
def test_a_damaged_result_is_named(content, tmp_path):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UsageError, match=r"^.*a\.json is damaged \([^\n]+\); delete it, and the same command"):
        files.read_result(tmp_path / "a.json")
