"""``fcmae prepare`` killed in the middle."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.bad_files import encoded, picture
from tests.faults.runs import side_by_side

pytestmark = pytest.mark.faults

COMMAND = (sys.executable, "-m", "fcmae.cli", "prepare", "data.path=images", "samples_per_shard=2")


def contents(out: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in out.iterdir() if "fcmae-index" not in p.name}


def test_killed_and_started_again_is_as_if_never_killed(tmp_path):
    """And the processes of a killed one end with it: else two would write the same files."""
    (tmp_path / "images").mkdir()
    for i in range(60):
        content = encoded(picture(30 + i, 90 - i, seed=i), "JPEG")
        (tmp_path / "images" / f"{i:02d}.jpg").write_bytes(content[: 0 if i == 7 else None])
    subprocess.run([*COMMAND, "out=whole", "workers=1"], cwd=tmp_path, check=True, capture_output=True)

    def kill_after(out, lines):
        command = [*COMMAND, f"out={out}", "workers=2"]
        process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE)
        progress = out / "progress.jsonl"
        while not progress.is_file() or progress.read_text().count("sha256") < int(lines):
            assert process.poll() is None
            time.sleep(0.001)
        process.kill()
        process.communicate()  # ends when nobody holds the other end of its messages
        assert not (out / "manifest.json").exists()
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
        assert contents(out) == contents(tmp_path / "whole")

    side_by_side(kill_after, [("1",), ("10",)], tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_stopped_while_it_starts_it_says_so_in_a_line(tmp_path, number):
    """A terminal signals the whole group, in which processes are that only just start."""
    (tmp_path / "images").mkdir()
    for i in range(200):
        (tmp_path / "images" / f"{i:03d}.png").write_bytes(encoded(picture(200, 200, seed=i), "PNG"))
    for delay in (0.0, 1.0):
        command = [*COMMAND, f"out=out_{delay}", "workers=2"]
        process = subprocess.Popen(
            command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True
        )
        assert process.stderr is not None
        estimate = process.stderr.readline()
        assert "200 images in 100 tar files" in estimate
        time.sleep(delay)
        os.killpg(process.pid, number)
        said = process.communicate(timeout=60)[1]
        assert process.returncode == 1, said
        assert said.rstrip().splitlines()[-1] == "fcmae prepare: interrupted"
        assert "Traceback" not in said
        assert "leaked" not in said
