"""What a run shows on a terminal of 80 columns, in plain lines, and beside messages."""

import contextlib
import fcntl
import io
import os
import pty
import re
import struct
import sys
import termios

import pytest

from fcmae.loggers.progress import Numbers, create_progress
from fcmae.messages import say

TRAINING = {"grad_norm": 1.0, "images_per_second": 12345.6, "memory_gib": 118.25, "lr": 1e-3, "seconds_left": 7654.0}


def screen(output):
    """The lines of a terminal that was given this text, and the widest of all times."""
    lines, row, column, widest = [[]], 0, 0, 0
    for part in re.findall(r"\x1b\[A|.|\n", output, re.DOTALL):
        if part == "\x1b[A":
            row -= 1
        elif part in "\r\n":
            row, column = row + (part == "\n"), 0
        else:
            lines[row] += [" "] * (column + 1 - len(lines[row]))
            lines[row][column] = part
            column += 1
            widest = max(widest, column)
        lines += [[] for _ in range(row + 1 - len(lines))]
    return ["".join(line).rstrip() for line in lines], widest


@pytest.fixture
def terminal():
    """A terminal of 80 columns: a file to write to, and what gives what was written."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    file = open(theirs, "w", buffering=1)  # noqa: SIM115
    os.set_blocking(ours, False)

    def written():
        parts = []
        with contextlib.suppress(BlockingIOError):
            while True:
                parts.append(os.read(ours, 2**16))
        return b"".join(parts).decode()

    yield file, written
    file.close()
    os.close(ours)


def test_two_lines_on_a_terminal(terminal, tmp_path, monkeypatch):
    file, written = terminal
    monkeypatch.setattr(sys, "stderr", file)
    progress = create_progress("pretrain", 124_000, 500_000, True, tmp_path)
    progress.bar.mininterval = 0
    for step in range(124_001, 124_031):
        progress.advance()
        if step % 10 == 0:
            progress.log(step, {"loss": 0.75 - (step - 124_000) / 1000, "epoch": step / 4000, **TRAINING})
    progress.log(124_030, {"val_loss": 0.5712, "val_loss_hog": 1.0})
    progress.log(124_030, {"effective_rank": 3.0})
    progress.log(124_030, {"knn10": 71.25, "knn20": 70.0})
    say("a warning")
    lines, widest = screen(written())
    assert widest <= 80
    assert lines[:2] == [f"files of the run: {tmp_path}", "a warning"]
    bar, numbers = lines[2:4]
    assert re.fullmatch(r"pretrain  25%\|.{4,}\| step 124030/500000, epoch 31.0, [\d:]+ left", bar)
    assert numbers == "loss 0.72 (-0.02), 12,346 images/s, 118.2 GiB, knn10 71.25, val_loss 0.5712"
    progress.close()


def test_a_long_line_loses_what_is_oldest():
    numbers = Numbers()
    assert numbers.text(80) == ""
    numbers.take({"loss": 1.0, "images_per_second": 5.0, "memory_gib": 0.0})
    for name in ("val_loss", "knn10", "a_metric_whose_name_is_very_long"):
        numbers.take({name: 0.5, f"ema_{name}": 0.25} if name == "knn10" else {name: 0.5})
    assert numbers.text(200) == "loss 1, 5 images/s, a_metric_whose_name_is_very_long 0.5, ema_knn10 0.25, val_loss 0.5"
    assert numbers.text(60) == "loss 1, 5 images/s, a_metric_whose_name_is_very_long 0.5"
    assert numbers.text(50) == "loss 1, 5 images/s, ema_knn10 0.25, val_loss 0.5"
    assert len(numbers.text(10)) < 10


def test_plain_lines_elsewhere(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    progress = create_progress("a", 0, 9, True, tmp_path)
    progress.advance()
    progress.log(1, {"loss": 0.5, "epoch": 1.0, **TRAINING})
    progress.log(1, {"val_loss": 0.25})
    progress.close()
    assert sys.stderr.getvalue().splitlines() == [
        f"files of the run: {tmp_path}",
        "a step 1/9 loss 0.5 images_per_second 1.235e+04, 7654 s left",
        "a step 1/9 val_loss 0.25",
    ]
