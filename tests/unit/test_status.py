"""`fcmae status` and `fcmae ls` say what a run's folder says, whoever wrote it."""

import errno
import json
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from fcmae.cli import main
from fcmae.errors import UsageError
from fcmae.status import describe, find_runs, read_any, read_status, table
from fcmae.training.run_dir import RunLock
from tests.unit.holder import held


def write(folder, lines, steps=(), config="name: pretrain\noptim: {global_batch_size: 64}\nschedule: {epochs: 20}\n"):
    (folder / "checkpoints").mkdir(parents=True)
    for step in steps:
        (folder / "checkpoints" / f"step_{step:08d}.pt").touch()
    (folder / "config.yaml").write_text(config)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def training(step, left, loss=0.5):
    speed = {"images_per_second": 128.0, "seconds_left": left, "memory_gib": 0.0, "grad_norm": 1.0}
    return {"step": step, "loss": loss, "lr": 1e-3, "epoch": step / 10, **speed}


def test_a_run_in_a_few_lines(tmp_path):
    lines = [training(10, 95, 1.0), training(100, 50, 0.25), {"step": 100, "knn10": 71.25}]
    run = read_status(write(tmp_path / "a", lines, steps=(50, 100)))
    assert (run.state, run.step, run.total, run.scores, run.checkpoints) == (
        "stopped",
        100,
        200,
        {"knn10": 71.25},
        [50, 100],
    )
    assert describe(run, now=run.written + 7200).splitlines() == [
        f"{tmp_path}/a: pretrain, stopped",
        "  step 100/200, epoch 10",
        "  loss 0.25 (1 at step 10), 128 images/s",
        "  at step 100: knn10 71.25",
        "  checkpoints of steps 50, 100; metrics written 2 h ago",
    ]
    done = read_status(write(tmp_path / "b", [training(200, 0)], steps=(200,)))
    assert done.state == "done"
    shown = table([run, done], tmp_path, now=time.time()).splitlines()
    assert [line.split()[:4] for line in shown[1:]] == [
        ["a", "pretrain", "stopped", "100/200"],
        ["b", "pretrain", "done", "200/200"],
    ]


def test_a_run_that_ended_early_is_done_and_all_monitors_of_its_last_step_are_shown(tmp_path):
    signs = {"step": 100, "effective_rank": 3.0, "feature_cosine": 0.5, "dead_channels": 0.0}
    looks = [{"step": 50, "knn10": 60.0}, signs, {"step": 100, "knn10": 70.0}, {"step": 100, "val_loss": 0.5}]
    run = write(tmp_path / "a", [training(100, 50), *looks], steps=(100,))
    assert read_status(run).state == "stopped"
    assert read_status(run).total == 200
    (run / "encoder.safetensors").touch()
    status = read_status(run)
    assert status.state == "done"
    assert list(status.scores.items()) == [
        *[("val_loss", 0.5), ("knn10", 70.0)],
        *[("effective_rank", 3.0), ("feature_cosine", 0.5), ("dead_channels", 0.0)],
    ]
    assert "val_loss 0.5 knn10 70 ..." in table([status], tmp_path)
    os.utime(run / "encoder.safetensors", (0, 0))  # of a shorter schedule, before the run went on
    assert read_status(run).state == "stopped"


def test_a_search_says_what_its_trainings_have_left(tmp_path):
    write(tmp_path / "auto" / "fold2_lr0.001_decay0.7", [training(100, 50), training(200, 0)])
    said = {"training": "fold2_lr0.001_decay0.7", "done": 3, "total": 11, "samples_after": 128 * 4200}
    (tmp_path / "auto" / "progress.json").write_text(json.dumps(said))
    with held(tmp_path):
        run = read_status(tmp_path)
    lines = describe(run, now=run.written).splitlines()
    assert lines[0].startswith(f"{tmp_path}: pretrain, running (")
    assert lines[1:] == [
        "  recipe=auto: 3 of 11 trainings done, about 1 h 10 min left",
        "  step 200/200 of fold2_lr0.001_decay0.7, epoch 20",
        "  loss 0.5 (0.5 at step 100), 128 images/s",
        "  checkpoints of steps none; metrics written 0 s ago",
    ]
    assert table([run], tmp_path).splitlines()[1].split()[3:5] == ["3/11", "trainings"]
    (tmp_path / "run.lock").unlink()
    assert read_status(tmp_path).state == "stopped"  # not done, though that training is
    (tmp_path / "auto" / "chosen.json").touch()
    assert read_status(tmp_path).search is None


@pytest.mark.parametrize(
    "said",
    [
        {"training": "../../other", "done": 3, "total": 11, "samples_after": 1},
        {"training": None, "done": 3, "total": 11, "samples_after": 1},
        {"training": "fold1", "done": 12, "total": 11, "samples_after": 1},
        {"training": "fold1", "done": "3", "total": 11, "samples_after": 1},
        {"training": "fold1", "done": 3, "total": 11, "samples_after": "many"},
    ],
)
def test_what_anybody_wrote_of_a_search(tmp_path, said):
    write(tmp_path / "run" / "auto" / "fold1", [training(100, 50)])
    write(tmp_path / "other", [training(100, 50)])
    (tmp_path / "run" / "auto" / "progress.json").write_text(json.dumps(said))
    assert read_status(tmp_path / "run").step is None


def test_a_run_that_chooses_a_recipe_is_a_run(tmp_path):
    (tmp_path / "auto").mkdir()
    assert read_status(tmp_path).state == "stopped"
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step_00000000.pt").touch()
    (tmp_path / "auto" / "chosen.json").touch()
    assert read_status(tmp_path).state == "done"  # the probe was kept, so nothing was trained


def test_a_lock_that_is_held_is_a_run_that_goes_on_and_one_that_is_left_was_killed(tmp_path):
    run = write(tmp_path / "a", [training(1, 7260.0)])
    with held(run) as process:
        status = read_status(run)
        assert (status.state, str(process.pid) in status.holder) == ("running", True)
        assert "2 h 01 min left" in describe(status)
    assert read_status(run).state == "killed"
    lock = RunLock(run)  # the next run takes it over
    lock.acquire()
    lock.close()
    assert read_status(run).state == "stopped"


def test_a_run_that_reads_its_own_status_keeps_its_lock(tmp_path):
    """As with ``logger.report``: a POSIX lock ends when its process closes any descriptor of the file."""
    run = write(tmp_path / "a", [training(1, 10)])
    lock = RunLock(run)
    lock.acquire()
    status = read_status(run)
    assert (status.state, status.holder.endswith(f"process {os.getpid()}")) == ("running", True)
    other = multiprocessing.get_context("fork").Process(target=RunLock(run).acquire)
    other.start()
    other.join()
    assert other.exitcode == 1  # refused
    lock.close()
    assert read_status(run).state == "stopped"


def test_a_lock_that_names_nobody_does_not_say_that_a_run_was_killed(tmp_path):
    run = write(tmp_path / "a", [training(1, 10)])
    with held(run):
        (run / "run.lock").write_bytes(b"")
        assert describe(read_status(run)).splitlines()[0].endswith("running (run.lock is damaged)")
    assert describe(read_status(run)).splitlines()[0].endswith("unknown (run.lock is damaged)")
    (run / "run.lock").unlink()
    (run / "run.lock").symlink_to("elsewhere")
    status = read_status(run)
    assert describe(status).splitlines()[0].endswith("unknown (run.lock cannot be read: it is a link)")
    assert "unknown" in table([status], tmp_path)


def test_a_run_that_only_starts_is_a_run(tmp_path):
    """trainer.budget first measures the speed in a folder of the run, which is no run of its own."""
    (tmp_path / "a" / "speed").mkdir(parents=True)
    (tmp_path / "a" / "speed" / "metrics.jsonl").touch()
    with held(tmp_path / "a"):
        assert find_runs(tmp_path) == [tmp_path / "a"]
        text = describe(read_status(tmp_path / "a")).splitlines()
    assert text[0].startswith(f"{tmp_path}/a: ?, running (host ")
    assert text[1:] == ["  the first logged step will tell the time left"]


def test_before_its_first_logged_step_a_training_says_when_its_time_is_known(tmp_path):
    """It may be one of a search, too."""
    write(tmp_path / "a", [])
    write(tmp_path / "b" / "auto" / "fold0_lr0.001", [])
    said = {"training": "fold0_lr0.001", "done": 3, "total": 11, "samples_after": 100}
    (tmp_path / "b" / "auto" / "progress.json").write_text(json.dumps(said))
    for name, more in (("a", []), ("b", ["  recipe=auto: 3 of 11 trainings done"])):
        with held(tmp_path / name):
            run = read_status(tmp_path / name)
        assert describe(run, now=run.written).splitlines()[1:] == [
            *more,
            "  the first logged step will tell the time left",
            "  checkpoints of steps none; metrics written 0 s ago",
        ]


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.yaml", "run.lock"])
@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe", b"[" * 100_000, b'{"step": "x"}\n{"step": 1e999}\n{"step"', b"a: *b"]
)
def test_files_that_are_damaged_say_nothing_and_do_no_harm(tmp_path, name, content):
    run = write(tmp_path / "a", [training(10, 10)], steps=(1,))
    (run / name).write_bytes(content)
    assert describe(read_status(run))
    assert table([read_status(run)], tmp_path)


def test_numbers_that_no_float_holds_are_left_out(tmp_path):
    """JSON has integers of any size."""
    huge = 10**400
    lines = [training(10, 95), {**training(20, 50), "images_per_second": huge}, {"step": huge, "loss": 1.0}]
    run = read_status(
        write(tmp_path / "a", [*lines, {"step": 20, "top1": huge}], config=f"schedule: {{epochs: {huge}}}")
    )
    assert (run.step, run.total, run.images_per_second, run.scores) == (20, None, None, {})
    assert "step 20" in describe(run)


def test_names_in_files_are_only_text(tmp_path):
    lines = [training(1, 1), {"step": 1, "\x1b[2Jtop1": 3.0}]
    run = read_status(write(tmp_path / "a\n\x1b", lines, config='name: "\\e[2J"\n'))
    for text in (describe(run), table([run], tmp_path)):
        assert "\x1b" not in text


def test_a_long_run_is_read_from_its_end(tmp_path):
    run = write(tmp_path / "a", [training(1, 5)])
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(training(step, 5)) + "\n" for step in range(2, 20_000))
    status = read_status(run)
    assert status.step == 19_999
    assert 0 < 19_999 - status.earlier[0] < 3000


def test_runs_are_found_and_links_are_not_followed(tmp_path, capsys):
    write(tmp_path / "x" / "b", [])
    write(tmp_path / "x" / "a", [training(3, 1)])
    os.symlink(tmp_path, tmp_path / "x" / "loop")
    assert [run.name for run in find_runs(tmp_path)] == ["a", "b"]
    assert main(["ls", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("x/a  pretrain  stopped  3/200")
    assert main(["status", str(tmp_path / "x" / "b")]) == 0
    for wrong in (tmp_path / "none", tmp_path / "x" / "a" / "checkpoints"):
        with pytest.raises(UsageError):
            find_runs(wrong)
        assert main(["status", str(wrong)]) == 2


def study(folder, planned, measured, **result):
    (folder / "cells").mkdir(parents=True)
    (folder / "recipe.json").write_text(json.dumps({"config": {}, **({"cells": planned} if planned else {})}))
    for name in measured:
        (folder / "cells" / f"{name}.json").write_text("{}")
    if result:
        (folder / "study.json").write_text(json.dumps(result))
    write(folder / "runs" / "scratch_2_0", [training(3, 1)])
    return folder


def test_a_folder_that_this_user_may_not_read(tmp_path, capsys, monkeypatch):
    for name in "abc":
        write(tmp_path / name, [])
    is_file = Path.is_file

    def denied(path):
        if path.parent.name == "b":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", denied)
    assert [path.name for path in find_runs(tmp_path)] == ["a", "c"]
    assert main(["status", str(tmp_path / "b")]) == 2
    assert capsys.readouterr().err == f"fcmae status: {tmp_path}/b cannot be read: Permission denied\n"


def test_studies_among_runs(tmp_path, capsys):
    """How much of what is planned is measured, whatever was measured before; then the result."""
    planned = [f"scratch_{label}_0" for label in (2, 4)]
    begun = study(tmp_path / "begun", planned, [planned[0], "scratch_99_0"])
    ended = study(tmp_path / "ended", planned, planned, sentence="worth\x1b[31m " + "4 times " * 20)
    more = study(tmp_path / "more", [*planned, "scratch_8_0"], planned, sentence="worth 4 times")
    older = study(tmp_path / "older", None, planned)
    write(tmp_path / "run", [training(3, 1)])
    assert main(["ls", str(tmp_path)]) == 0
    rows = [line.split()[:4] for line in capsys.readouterr().out.splitlines()[1:]]
    assert rows == [
        ["begun", "study", "stopped", "1/2"],
        ["ended", "study", "done", "2/2"],
        ["more", "study", "stopped", "2/3"],
        ["older", "study", "stopped", "2"],
        ["run", "pretrain", "stopped", "3/200"],
    ]
    assert [path.name for path in find_runs(begun / "runs")] == ["scratch_2_0"]
    status = read_any(ended)
    assert max(map(len, describe(status).splitlines()[1:])) <= 80
    assert "\x1b" not in describe(status)
    assert describe(read_any(more), now=read_any(more).written + 61).splitlines() == [
        f"{more}: study, stopped",
        "  2/3 measured, the last 1 min ago",
        "  before that: worth 4 times",
    ]
    assert describe(read_any(older)).startswith(f"{older}: study, stopped\n  2 measured, the last ")
    with held(begun):
        assert read_any(begun).state == "running"
    assert main(["report", str(begun), "--out", str(tmp_path / "page.html")]) == 2
    assert f"{begun} is a study without a result yet: 1/2 measured" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"[]", b'{"cells": 3, "sentence": [1]}', b"\xff", b"[" * 10**5])
def test_a_damaged_study_does_no_harm(tmp_path, content):
    study(tmp_path / "a", ["x"], ["x"])
    for name in ("recipe.json", "study.json"):
        (tmp_path / "a" / name).write_bytes(content)
    assert describe(read_any(tmp_path / "a"))
    assert table([read_any(tmp_path / "a")], tmp_path)
