"""How files are opened: regular files only, and no links where something is created, changed or trusted."""

import os
import socket
import stat
import tempfile

import pytest
import torch

from fcmae import opening
from fcmae.data.sources.kept import Arrays
from fcmae.errors import DiskError, UsageError
from fcmae.evaluation.cache import CachedExtractor, Features
from fcmae.files import STRAY, check_output, delete_strays, output, replacing, temporary_path, write_result
from fcmae.processes import Process

NOT_REGULAR = ("folder", "pipe", "socket", "device")


@pytest.fixture
def not_regular(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a socket's name must be short
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("socket")
        (tmp_path / "device").symlink_to("/dev/zero")
        yield tmp_path


@pytest.mark.parametrize("kind", NOT_REGULAR)
def test_only_regular_files_are_opened(kind, not_regular):
    """And nothing waits: a pipe that nobody writes to would hang its reader for ever."""
    for action in (opening.open_regular, lambda path: opening.read_regular(path, 10), opening.open_trusted):
        with pytest.raises(OSError, match="not a regular file|Is a directory|it is a link"):
            action(not_regular / kind)
    with pytest.raises(OSError, match="not a regular file|Is a directory|it is a link"):
        opening.open_to_change(not_regular / kind)
    with pytest.raises(FileExistsError):
        opening.create(not_regular / kind)


def test_a_link_to_read_is_followed_and_one_to_write_is_not(tmp_path):
    target, link, dangling = (tmp_path / name for name in ("target", "link", "dangling"))
    target.write_bytes(b"precious")
    link.symlink_to(target)
    dangling.symlink_to(tmp_path / "nothing")
    with opening.open_regular(link) as file:
        assert file.read() == b"precious"
    for path in (link, dangling):
        for action in (opening.open_to_change, opening.open_trusted):
            with pytest.raises(OSError, match="it is a link"):
                action(path)
        with pytest.raises(OSError, match="it is a link"):
            opening.open_regular(path, links=False)
        with pytest.raises(FileExistsError):
            opening.create(path)
        with replacing(path) as file:
            file.write(b"new")
        assert not path.is_symlink()
    assert target.read_bytes() == b"precious"
    assert not (tmp_path / "nothing").exists()


def test_a_hard_link_is_not_changed_in_place(tmp_path):
    (tmp_path / "precious").write_text("text")
    os.link(tmp_path / "precious", tmp_path / "run.lock")
    with pytest.raises(OSError, match="several names"):
        opening.open_to_change(tmp_path / "run.lock")


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    with (tmp_path / "large").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(OSError, match="it has more than 100 bytes"):
        opening.read_regular(tmp_path / "large", 100)


@pytest.mark.parametrize(("mode", "trusted"), [(0o600, True), (0o644, True), (0o664, False), (0o646, False)])
def test_what_others_may_write_is_not_trusted(mode, trusted, tmp_path):
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.write_bytes(b"content")
    file.chmod(mode)
    folder.mkdir()
    folder.chmod(mode | 0o111)
    assert (opening.private_folder(folder, tmp_path / "next") == folder) is trusted
    if trusted:
        with opening.open_trusted(file) as opened:
            assert opened.read() == b"content"
    else:
        with pytest.raises(PermissionError, match="others may write it"):
            opening.open_trusted(file)


def test_what_another_user_made_is_not_trusted(tmp_path, other_user):
    (tmp_path / "file").touch(0o600)
    (tmp_path / "folder").mkdir(0o700)
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "leading").symlink_to("link")
    with pytest.raises(PermissionError, match=r"it belongs to another user \(\d+\)"):
        opening.open_trusted(tmp_path / "file")
    with opening.open_trusted(tmp_path / "file", owners=[os.geteuid()]) as file:
        assert file.read() == b""
    for name in ("link", "leading"):
        with pytest.raises(UsageError, match=f"out .*{name} cannot be written: .* is a link of another user"):
            check_output("out", tmp_path / name)
        with pytest.raises(DiskError, match="is a link of another user"), output("out", tmp_path / name):
            pass


def test_a_private_folder_is_nobody_elses(tmp_path, monkeypatch, other_user):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "taken").mkdir(0o777)
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path)
    found = opening.private_folder(tmp_path / "taken", tmp_path / "file", tmp_path / "link", tmp_path / "file" / "in")
    assert found.parent == tmp_path
    assert found.name.startswith("fcmae-")
    assert stat.S_IMODE(found.stat().st_mode) == 0o700


def test_a_new_private_folder_has_the_name_that_was_asked_for(tmp_path):
    found = opening.private_folder(tmp_path / "new" / "folder")
    assert found == tmp_path / "new" / "folder"
    assert stat.S_IMODE(found.stat().st_mode) == 0o700


def test_temporary_files_have_names_that_nobody_can_guess(tmp_path):
    names = {temporary_path(tmp_path / "step.pt").name for _ in range(100)}
    assert len(names) == 100
    assert all(STRAY.search(name) for name in names)


def test_files_of_a_process_elsewhere_with_the_same_number_stay(tmp_path):
    """Containers and machines that share a disk give out the same numbers."""
    here = Process.this()
    mine = temporary_path(tmp_path / "step.pt")
    mine.touch()
    delete_strays(tmp_path, [Process(here.pid, here.born, "another container")])
    assert mine.exists()
    delete_strays(tmp_path, [here])
    assert not mine.exists()


@pytest.mark.parametrize(
    ("write", "of_all"),
    [
        (lambda file: write_result(file, {}), False),
        (lambda file: Arrays({}, {}).save(file), True),
        (
            lambda file: CachedExtractor(None, file.parent, {})._write("", Features(torch.zeros(1, 1), torch.zeros(1))),
            True,
        ),
    ],
)
def test_what_a_killed_process_left_of_a_file_is_deleted_when_the_file_is_written(write, of_all, tmp_path):
    """Results of a study; listings and features, whose names change with the images. Those of living processes stay."""
    file = CachedExtractor(None, tmp_path, {})._path("")
    mine, other = temporary_path(file), temporary_path(tmp_path / "other")
    left, left_of_other = (
        path.with_name(path.name.replace(f".{os.getpid()}-", f".{2**22 + 1}-"))  # no process has this number
        for path in (mine, other)
    )
    for path in (mine, left, left_of_other):
        path.touch()
    write(file)
    assert sorted(tmp_path.iterdir()) == sorted([file, mine] if of_all else [file, mine, left_of_other])
