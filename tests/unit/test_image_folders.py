"""Image folders, and the listings of them that are kept in files."""

import mmap
import os
import pickle

import numpy as np
import pytest
from PIL import Image

from fcmae.config import DataConfig
from fcmae.data.pixels.formats import EXTENSIONS
from fcmae.data.sources import (
    ImageFolder,
    listing,
    train_source,
)
from fcmae.data.sources import kept as arrays
from fcmae.errors import ImageError, UsageError
from fcmae.messages import print_once
from tests.bad_files import encoded


def png(value=0):
    return encoded(Image.new("RGB", (8, 8), (value,) * 3), "PNG")


def touch(folder, *names):
    """Empty files, in folders that last changed long ago."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    age(folder)


def age(folder):
    for path, _, _ in os.walk(folder):
        os.utime(path, (1, 1))


def names(source, root):
    return [os.path.relpath(source.describe(i), root) for i in range(len(source))]


@pytest.fixture(autouse=True)
def kept_from_the_first(tmp_path, monkeypatch):
    """Every listing is kept, and nothing outside the test's folder."""
    print_once.cache_clear()
    monkeypatch.setattr(listing, "KEEP_FROM", 1)
    monkeypatch.setattr(arrays, "HOME", tmp_path / "home")


@pytest.fixture
def scans(monkeypatch):
    """The folders that are read."""
    seen = []
    scandir = os.scandir

    def noted(path):
        if isinstance(path, bytes):  # the listing's; os.walk asks for text
            seen.append(path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", noted)
    return seen


def test_a_folders_own_images_come_first_then_those_of_each_folder_in_it(tmp_path):
    root = tmp_path / "images"
    touch(root, "b/2.jpg", "b/1.JPEG", "b/a/3.png", "a/1.png", "z.jpg", "notes.txt", ".hidden.jpg", ".git/1.jpg")
    source = ImageFolder(root)
    assert names(source, root) == ["z.jpg", "a/1.png", "b/1.JPEG", "b/2.jpg", "b/a/3.png"]
    assert source.classes is None  # z.jpg has none
    (root / "z.jpg").unlink()
    source = ImageFolder(root)
    assert source.classes == ["a", "b"]
    assert [source.label(i) for i in range(4)] == [0, 1, 1, 1]
    with pytest.raises(IndexError):
        source.describe(4)


def test_several_folders_share_classes_of_the_same_name(tmp_path):
    touch(tmp_path / "one", "cat/1.jpg", "dog/1.jpg")
    touch(tmp_path / "two", "ant/1.jpg", "dog/2.jpg")
    source = train_source(DataConfig(path=[str(tmp_path / "one"), str(tmp_path / "two")]))
    assert names(source, tmp_path) == ["one/cat/1.jpg", "one/dog/1.jpg", "two/ant/1.jpg", "two/dog/2.jpg"]
    assert source.classes == ["ant", "cat", "dog"]
    assert [source.label(i) for i in range(4)] == [1, 2, 0, 2]
    copy = pickle.loads(pickle.dumps(source))
    assert [copy.label(i) for i in range(4)] == [1, 2, 0, 2]


def test_what_is_named_like_an_image_but_is_none(tmp_path):
    """A folder is a folder; a broken link is an image that cannot be read; a pipe, which would never end, is left out.

    A link to a folder that it is in is not followed.
    """
    root = tmp_path / "images"
    touch(root, "a.jpg", "folder.jpg/b.jpg")
    (root / "broken.jpg").symlink_to(root / "nowhere.jpg")
    (root / "link.jpg").symlink_to(root / "a.jpg")
    (root / "loop").symlink_to(root)
    os.mkfifo(root / "pipe.jpg")
    source = ImageFolder(root)
    assert names(source, root) == ["a.jpg", "broken.jpg", "link.jpg", "folder.jpg/b.jpg"]
    with pytest.raises(ImageError, match=r"cannot read the image .*broken.jpg: No such file"):
        source[1]


def test_a_listing_is_kept_beside_the_folder_and_found_again(tmp_path, scans):
    root = tmp_path / "images"
    touch(root, "a/1.jpg", "b/2.jpg", "b/3.jpg")
    first = ImageFolder(root)
    assert (tmp_path / ".images.fcmae-listing").is_file()
    assert len(scans) == 3
    again = ImageFolder(root)
    assert len(scans) == 3
    assert names(again, root) == names(first, root)
    assert again.classes == first.classes
    assert ImageFolder(root, relist=True).classes == first.classes
    assert len(scans) == 6


@pytest.mark.parametrize(
    "change",
    [
        lambda root: (root / "b" / "4.jpg").touch(),
        lambda root: (root / "b" / "3.jpg").unlink(),
        lambda root: (root / "b" / "3.jpg").rename(root / "b" / "0.jpg"),
        lambda root: (root / "c").mkdir(),
        lambda root: (root / "b").rename(root / "z"),
    ],
    ids=["added", "removed", "renamed", "new folder", "renamed folder"],
)
def test_a_change_of_a_folder_is_noticed(tmp_path, change):
    root = tmp_path / "images"
    touch(root, "a/1.jpg", "b/2.jpg", "b/3.jpg")
    ImageFolder(root)
    change(root)
    listed = ImageFolder(root)
    age(root)
    assert names(listed, root) == names(ImageFolder(root, relist=True), root)


def test_a_folder_that_changed_just_now_is_not_relied_on(tmp_path):
    """Within the resolution of its clock it could change again without its modification time telling."""
    root = tmp_path / "images"
    touch(root, "a/1.jpg")
    os.utime(root / "a")
    ImageFolder(root)
    changed = (root / "a").stat().st_mtime_ns
    (root / "a" / "2.jpg").touch()
    os.utime(root / "a", ns=(changed, changed))
    assert len(ImageFolder(root)) == 2


def test_a_listing_that_cannot_be_beside_the_folder_is_kept_in_the_cache(tmp_path, scans):
    root = tmp_path / "images"
    touch(root, "a/1.jpg")
    (tmp_path / ".images.fcmae-listing").mkdir()  # nobody can write a file of that name
    ImageFolder(root)
    assert [p.name.split("-")[0] for p in (tmp_path / "home").iterdir()] == ["images"]
    count = len(scans)
    ImageFolder(root)
    assert len(scans) == count


def test_without_any_place_a_listing_stays_in_memory(tmp_path, monkeypatch):
    root = tmp_path / "images"
    touch(root, "a/1.jpg")
    (tmp_path / ".images.fcmae-listing").mkdir()
    (tmp_path / "home").touch()
    source = ImageFolder(root)
    assert names(pickle.loads(pickle.dumps(source)), root) == ["a/1.jpg"]


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_a_damaged_listing_is_made_again(tmp_path, size):
    root = tmp_path / "images"
    touch(root, *(f"a/{i}.jpg" for i in range(9)))
    ImageFolder(root)
    kept = tmp_path / ".images.fcmae-listing"
    kept.write_bytes(kept.read_bytes()[:size])
    assert len(ImageFolder(root)) == 9


def test_a_listing_costs_a_worker_nothing(tmp_path):
    root = tmp_path / "images"
    touch(root, *(f"a/{i:05d}.jpg" for i in range(1000)))
    assert len(pickle.dumps(ImageFolder(root))) < 1000
    memory = ImageFolder(root).listings[0].names.data
    while isinstance(memory, np.ndarray):
        memory = memory.base
    assert isinstance(memory, mmap.mmap)


def test_files_that_are_not_read_are_counted_and_named(tmp_path, capsys, scans):
    """At every start, the listing kept or not; once in a process."""
    root = tmp_path / "images"
    touch(root, "a/1.jpg", "b/2.jpg", "b/3.psd", "b/4.PSD", "b/README", "b/.DS_Store", "c/x\n.svg")
    line = f"{root}: 2 images ({' '.join(EXTENSIONS)}); not read: 2 .psd, "
    line += "1 without an ending, 1 .svg, such as b/"
    for _ in range(2):
        print_once.cache_clear()
        ImageFolder(root)
        told = capsys.readouterr().err.splitlines()
        assert [text.startswith(line) for text in told if not text.startswith("listed")] == [True]
    assert len(scans) == 4  # the second time nothing is listed
    ImageFolder(root)
    assert not capsys.readouterr().err
    for i in range(200):
        (root / f"x.{i}").touch()
    (root / "b" / "2.jpg").unlink()
    (root / "a" / "1.jpg").unlink()
    with pytest.raises(
        UsageError, match=r"has no images; looked for .*; not read: 104 of other kinds, .*, 96 others, such as x"
    ):
        ImageFolder(root)


def test_only_the_first_rank_tells_of_them(tmp_path, capsys, monkeypatch):
    touch(tmp_path / "images", "a/1.jpg", "a/2.psd")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    ImageFolder(tmp_path / "images")
    assert "not read" not in capsys.readouterr().err
