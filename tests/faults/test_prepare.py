"""``fcmae prepare`` killed in the middle."""

import hashlib
import os
import signal
from pathlib import Path

import pytest

from tests.bad_files import encoded, picture
from tests.faults.runs import finish, processes, side_by_side, start, wait_until
from tests.pace import limit

pytestmark = pytest.mark.faults

COMMAND = ("prepare", "out=out", "samples_per_shard=2")


def contents(out: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in out.iterdir() if "fcmae-index" not in p.name}


def finished_shards(out: Path) -> int:
    progress = out / "progress.jsonl"
    return progress.read_text().count("sha256") if progress.is_file() else 0


def test_killed_and_started_again_is_as_if_never_killed(tmp_path):
    """And the processes of a killed one end with it: else two would write the same files."""
    (tmp_path / "images").mkdir()
    for i in range(60):
        content = encoded(picture(30 + i, 90 - i, seed=i), "JPEG")
        (tmp_path / "images" / f"{i:02d}.jpg").write_bytes(content[: 0 if i == 7 else None])
    command = (*COMMAND, "data.path=../images")
    (tmp_path / "whole").mkdir()
    finish(tmp_path / "whole", *command, "loader.workers=1")

    def kill_after(folder, shards):
        process = start(folder, *command, "loader.workers=2")
        wait_until(lambda: finished_shards(folder / "out") >= int(shards) or process.poll() is not None)
        assert process.poll() is None
        process.kill()
        process.wait()
        wait_until(lambda: not list(processes(folder)))
        assert not (folder / "out" / "manifest.json").exists()
        finish(folder, *command, "loader.workers=2")
        assert contents(folder / "out") == contents(tmp_path / "whole" / "out")

    side_by_side(kill_after, [("1",), ("10",)], tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_stopped_while_it_starts_it_says_so_in_a_line(tmp_path, number):
    """A terminal signals the whole group, in which processes are that only just start.

    There are so many images that the command does not end before the signal on a busy machine.
    """
    (tmp_path / "images").mkdir()
    pictures = [encoded(picture(200, 200, seed=i), "PNG") for i in range(50)]
    for i in range(900):
        (tmp_path / "images" / f"{i:03d}.png").write_bytes(pictures[i % 50])

    def stop_after(folder, shards):
        process = start(folder, *COMMAND, "data.path=../images", "loader.workers=2")
        said = folder / "stderr.txt"
        wait_until(lambda: "900 images in 450 tar files" in said.read_text())
        wait_until(lambda: finished_shards(folder / "out") >= int(shards))
        os.killpg(process.pid, number)
        assert process.wait(limit(60)) == 1, said.read_text()
        assert said.read_text().rstrip().splitlines()[-1] == "fcmae prepare: interrupted"
        assert "Traceback" not in said.read_text()
        assert "leaked" not in said.read_text()

    side_by_side(stop_after, [("0",), ("1",)], tmp_path)
