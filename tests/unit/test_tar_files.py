"""Tar files in WebDataset's format, read at random through an index of their own."""

import json
import os
import pickle
import tarfile

import numpy as np
import pytest
import webdataset
from webdataset import tariterators

from fcmae.config import DataConfig
from fcmae.data.sources import WebDataset, require_labels, train_source
from fcmae.data.sources.kept import Arrays
from fcmae.data.sources.webdataset import OpenFiles
from fcmae.errors import ImageError, UsageError
from fcmae.messages import print_once
from fcmae.urls import expand_braces
from tests.bad_files import add_file
from tests.unit.test_image_folders import png


@pytest.fixture(autouse=True)
def nothing_told():
    print_once.cache_clear()


def write_tar(path, samples):
    """By the library whose format it is."""
    with webdataset.TarWriter(str(path), encoder=False) as writer:
        for key, files in samples.items():
            writer.write({"__key__": key, **files})


SAMPLES = {
    "deep/0001": {"png": png(1), "cls": b"3"},
    "deep/0002": {"json": json.dumps({"label": 1, "caption": "x"}).encode(), "png": png(2)},
    "0003": {"seg.png": png(3), "cls": b"0"},
    "0004": {"txt": b"no image here", "cls": b"2"},
}


def test_tar_files_of_webdataset(tmp_path):
    write_tar(tmp_path / "a-000.tar", SAMPLES)
    write_tar(tmp_path / "a-001.tar", {f"{i}": {"PNG": png(i), "cls": b"1"} for i in range(5)})
    for path in (tmp_path, tmp_path / "a-{000..001}.tar", [tmp_path / "a-000.tar", tmp_path / "a-001.tar"]):
        source = WebDataset(path)
        assert len(source) == 8
        assert [source.label(i) for i in range(8)] == [3, 1, 0, 1, 1, 1, 1, 1]
        assert source.classes == ["0", "1", "2", "3"]
    assert source[1].image == (png(2), f"{tmp_path}/a-000.tar/deep/0002.png")
    assert source[7].image.data == png(4)
    read = []
    for shard in source.shards:
        with shard.open("rb") as file:
            for sample in tariterators.group_by_keys(
                {**f, "__url__": ""} for f in tariterators.tar_file_iterator(file)
            ):
                read += [content for ending, content in sample.items() if ending.endswith("png")]
    assert [sample.image.data for sample in source] == read


def test_classes_are_named_in_a_file(tmp_path):
    write_tar(tmp_path / "a.tar", SAMPLES)
    (tmp_path / "classes.txt").write_text("cat\ndog\nant\nbee\nfly\n")
    assert WebDataset(tmp_path).classes == ["cat", "dog", "ant", "bee", "fly"]
    (tmp_path / "classes.txt").write_text("cat\n")
    with pytest.raises(UsageError, match=r"classes.txt names 1 classes; the tar files have labels up to 3"):
        WebDataset(tmp_path)


def test_tar_files_without_labels(tmp_path):
    write_tar(tmp_path / "a.tar", {**SAMPLES, "5": {"jpg": b""}, "6": {"jpg": b"", "json": b"{}"}})
    source = WebDataset(tmp_path)
    assert source.classes is None
    assert source[0].label is None
    with pytest.raises(UsageError, match=r"data.path has no labels: .* has no number from 0 on in a .cls, or as lab"):
        require_labels(source, "data.path")


def test_long_names_and_other_kinds_of_members(tmp_path):
    """GNU's and POSIX's long names, folders, links, and what macOS puts beside a file."""
    for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(tmp_path / "a.tar", "w", format=kind) as tar:
            folder = tarfile.TarInfo("./" + "x" * 200)
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
            for name in (f"{folder.name}/._1.png", f"{folder.name}/1.png"):
                add_file(tar, name, png())
            link = tarfile.TarInfo("2.png")
            link.type, link.linkname = tarfile.SYMTYPE, "1.png"
            tar.addfile(link)
        source = WebDataset(tmp_path / "a.tar", reindex=True)
        assert [source.describe(i) for i in range(len(source))] == [f"{tmp_path}/a.tar/./{'x' * 200}/1.png"]
        assert source[0].image.data == png()


def test_an_index_is_kept_until_the_tar_file_changes(tmp_path, monkeypatch):
    write_tar(tmp_path / "a.tar", SAMPLES)
    assert len(WebDataset(tmp_path)) == 3
    assert (tmp_path / ".a.tar.fcmae-index").is_file()
    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarInfo, "frombuf", None)  # the headers are not read again
        assert len(pickle.loads(pickle.dumps(WebDataset(tmp_path)))) == 3
    write_tar(tmp_path / "a.tar", {"1": SAMPLES["0003"]})
    assert len(WebDataset(tmp_path)) == 1


@pytest.mark.parametrize(
    ("size", "images", "reason"),
    [
        (1024 + 512 + 40, 2, "unexpected end of data"),  # in the second image
        (1024 + 512, 2, "unexpected end of data"),  # before it
        (1024 + 100, 1, "no header at byte 1024"),
        (1024, 1, "no mark of the archive's end"),
    ],
)
def test_a_tar_file_cut_off(tmp_path, size, images, reason):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for i in range(3):
            assert 0 < len(png(i)) <= 512  # one block for the header, one for the image
            add_file(tar, f"{i}.png", png(i))
    content = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(content[:size])
    with pytest.raises(UsageError, match=rf"a.tar is cut off or damaged after {images} images \({reason}\).*on_error"):
        WebDataset(tmp_path)
    source = WebDataset(tmp_path, allow_cut=True)
    assert len(source) == images
    assert source[0].image.data == png(0)
    if images == 2:
        with pytest.raises(ImageError, match=r"cannot read the image .*a.tar/1.png: the tar file ends after"):
            source[1]


def test_what_is_no_tar_file_is_named(tmp_path):
    (tmp_path / "a.tar").write_text("no tar file")
    with pytest.raises(UsageError, match=r"cannot read the tar file .*a.tar"):
        WebDataset(tmp_path)
    with tarfile.open(tmp_path / "a.tar", "w:gz") as tar:
        tar.add(__file__, "a.jpg")
    with pytest.raises(UsageError, match=r"compressed tar files have no random access"):
        WebDataset(tmp_path)
    with pytest.raises(UsageError, match=r"nowhere.tar must be a tar file, a folder"):
        WebDataset(tmp_path / "nowhere.tar")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"empty has no files that end in .tar"):
        WebDataset(tmp_path / "empty")
    write_tar(tmp_path / "a.tar", {"1": {"txt": b"x"}})
    with pytest.raises(UsageError, match=r"\.tar: no images; looked for \.jpg"):
        WebDataset(tmp_path)


def test_only_so_many_files_stay_open(tmp_path):
    paths = [tmp_path / str(i) for i in range(5)]
    for path in paths:
        path.write_text(path.name)
    files = OpenFiles(limit=2)
    for path in [*paths, *paths[::-1]]:
        assert os.pread(files.descriptor(path), 9, 0).decode() == path.name
        assert len(files.descriptors) <= 2


def test_braces():
    assert expand_braces("a-{08..11}/{x,y}.tar")[:3] == ["a-08/x.tar", "a-08/y.tar", "a-09/x.tar"]
    assert len(expand_braces("a-{08..11}/{x,y}.tar")) == 8
    assert expand_braces("a{b}.tar") == ["a{b}.tar"]


LABELLED = {
    "fractions": [f"img_0.{i}_x.{kind}" for i in range(5) for kind in ("png", "cls")],
    "UIDs": [f"1.2.840.{i}.{kind}" for i in range(5) for kind in ("png", "cls")],
    "one of each": [f"img_{i}.5.{kind}" for i in range(5) for kind in ("PNG", "cls")],
    "Kaggle's": [f"{pet}.{i}.{kind}" for pet in ("cat", "dog") for i in range(3) for kind in ("png", "json")],
}


def tar_of(path, names):
    """A tar file of these names: images by their number, labels by that of the image before or after."""
    images = [name for name in names if name.lower().endswith("png")]
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name in names:
            content = png(images.index(name)) if name in images else b'{"label": 1}' if "json" in name else b"1"
            add_file(tar, name, content)
    return images


@pytest.mark.parametrize("kind", LABELLED)
def test_dots_in_names_do_not_make_one_sample_of_many(tmp_path, kind, capsys):
    images = tar_of(tmp_path / "a.tar", LABELLED[kind])
    source = WebDataset(tmp_path)
    assert [source.describe(i) for i in range(len(source))] == [f"{tmp_path}/a.tar/{name}" for name in images]
    assert [source.label(i) for i in range(len(source))] == [1] * len(images)
    assert [source[i].image.data for i in range(len(source))] == [png(i) for i in range(len(source))]
    assert "names end at the last dot" in capsys.readouterr().err
    tar_of(tmp_path / "a.tar", images)  # without labels, too
    assert len(WebDataset(tmp_path)) == len(images)


@pytest.mark.parametrize(
    ("names", "read"),
    [
        (["0.png", "0.seg.png", "1.png", "1.seg.png"], ["0.png", "1.png"]),
        (["0.left.png", "0.right.png", "1.left.png", "1.right.png"], ["0.left.png", "1.left.png"]),
        (["0.0.png", "0.1.png", "0.cls", "1.0.png", "1.1.png", "1.cls"], ["0.0.png", "1.0.png"]),
        (["a.b.png", "a.cls", "img_0.png"], ["a.b.png", "img_0.png"]),
    ],
)
def test_webdatasets_own_names_are_read_by_its_rule(tmp_path, names, read, capsys):
    tar_of(tmp_path / "a.tar", names)
    source = WebDataset(tmp_path)
    assert [source.describe(i) for i in range(len(source))] == [f"{tmp_path}/a.tar/{name}" for name in read]
    further = sum("png" in name for name in names) - len(read)
    told = capsys.readouterr().err
    assert (f"{further} further images of samples are left out, such as {names[1]} beside {names[0]}" in told) == (
        further > 0
    )


def test_names_that_follow_two_rules_are_refused(tmp_path):
    tar_of(tmp_path / "a.tar", ["0.left.png", "0.cls", "scan_1.5.png", "scan_1.6.png", "scan_1.7.png"])
    with pytest.raises(UsageError, match=r"a.tar: 2 images .*such as scan_1.5.png and scan_1.6.png, but other files"):
        WebDataset(tmp_path)
    tar_of(tmp_path / "a.tar", ["scan_1.png", "scan_1.5.png"])
    with pytest.raises(UsageError, match=r"a.tar: 1 images .*such as scan_1.png and scan_1.5.png"):
        WebDataset(tmp_path)
    tar_of(tmp_path / "a.tar", ["0.png", "1.png", "1.png", "1.cls"])
    with pytest.raises(UsageError, match=r"a.tar: 1.png is there twice"):
        WebDataset(tmp_path)


def test_samples_without_an_image_are_counted(tmp_path, capsys):
    for i in range(2):
        tar_of(tmp_path / f"{i}.tar", [f"{i}.png", f"{i}.cls", "2.psd", "2.cls", "3.txt"])
    assert len(WebDataset(tmp_path)) == 2
    assert (
        "1.tar: 2 images; 4 samples without an image are left out, such as 2.psd; 1 of 2 classes have no"
        in capsys.readouterr().err
    )


def test_a_class_that_cannot_be(tmp_path):
    tar_of(tmp_path / "a.tar", ["0.png", "0.cls"])
    write_tar(tmp_path / "b.tar", {"1": {"png": png(), "cls": b"65537"}})
    source = WebDataset(tmp_path)
    assert (len(source), source.classes) == (2, None)
    with pytest.raises(
        UsageError, match=r"b.tar/1.png has the class 65537, but there are 2 images; if that is right, na"
    ):
        require_labels(source, "data.path")
    write_tar(tmp_path / "b.tar", {"1": {"png": png(), "cls": b"65536"}})
    assert len(WebDataset(tmp_path).classes) == 65537


@pytest.mark.parametrize("url", ["ftp://x.org/{000..100}.tar", "file:///a.tar", "simplecache::https://x.org/a.tar"])
def test_other_urls_are_refused(url):
    with pytest.raises(UsageError, match=r"data.path: .* must be a path, pipe:COMMAND or a URL of s3, gs"):
        train_source(DataConfig(name="webdataset", path=url))


@pytest.mark.parametrize("name", ["offsets", "sizes", "labels", "names_offsets"])
def test_an_index_that_cannot_be_is_made_again(tmp_path, name, capsys):
    write_tar(tmp_path / "a.tar", SAMPLES)
    WebDataset(tmp_path)
    file = tmp_path / ".a.tar.fcmae-index"
    made = Arrays.open(file)
    for bad in (np.full(3, 2**30), np.full(3, -9), np.zeros(2)):
        arrays = {key: np.array(value) for key, value in made.arrays.items()}
        arrays[name] = bad.astype(arrays[name].dtype)
        Arrays(arrays, made.meta).save(file)
        if name in ("sizes", "labels") and bad[0] == 2**30:
            continue  # may be, as far as an index goes
        source = WebDataset(tmp_path)
        assert [source.label(i) for i in range(3)] == [3, 1, 0]
        assert source[2].image.data == png(3)
        assert f"{file} is not used: it" in capsys.readouterr().err
        print_once.cache_clear()


def test_an_index_of_another_user_is_not_believed(tmp_path, capsys, monkeypatch):
    write_tar(tmp_path / "a.tar", SAMPLES)
    WebDataset(tmp_path)
    file = tmp_path / ".a.tar.fcmae-index"
    file.chmod(0o666)
    WebDataset(tmp_path)
    assert f"{file} is not used: others may write it; {tmp_path}/a.tar is read again\n" in capsys.readouterr().err
    assert file.stat().st_mode & 0o022 == 0
    if os.geteuid() == 0:
        os.chown(file, 12345, -1)
        monkeypatch.setattr("fcmae.data.sources.kept.HOME", tmp_path / "home")
        assert len(WebDataset(tmp_path)) == 3
        assert f"{file} is not used: it belongs to another user" in capsys.readouterr().err
        assert file.stat().st_uid == 12345  # and is left alone
        assert len(WebDataset(tmp_path)) == 3
        assert not capsys.readouterr().err  # the one in the cache is found
        os.chown(tmp_path / "a.tar", 12345, -1)  # its owner may change the images as well
        monkeypatch.setattr(tarfile.TarInfo, "frombuf", None)
        assert len(WebDataset(tmp_path)) == 3
