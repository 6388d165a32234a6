"""Tar files in WebDataset's format, read at random through an index of their own."""

import io
import json
import os
import pickle
import tarfile

import pytest
import webdataset
from webdataset import tariterators

from fcmae.data.sources import WebDataset, require_labels
from fcmae.data.sources.webdataset import OpenFiles, expand_braces
from fcmae.errors import ImageError, UsageError
from tests.unit.test_sources import png


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
                member = tarfile.TarInfo(name)
                member.size = len(png())
                tar.addfile(member, io.BytesIO(png()))
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
        patch.setattr(tarfile, "open", None)  # the headers are not read again
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
            member = tarfile.TarInfo(f"{i}.png")
            member.size = len(png(i))
            assert 0 < member.size <= 512  # one block for the header, one for the image
            tar.addfile(member, io.BytesIO(png(i)))
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
    with pytest.raises(UsageError, match=r"nowhere.tar is neither a tar file nor"):
        WebDataset(tmp_path / "nowhere.tar")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"empty has no files that end in .tar"):
        WebDataset(tmp_path / "empty")
    write_tar(tmp_path / "a.tar", {"1": {"txt": b"x"}})
    with pytest.raises(UsageError, match=r"have no images"):
        WebDataset(tmp_path)


def test_only_so_many_files_stay_open(tmp_path):
    paths = [tmp_path / str(i) for i in range(5)]
    for path in paths:
        path.write_text(path.name)
    files = OpenFiles(limit=2)
    for path in [*paths, *paths[::-1]]:
        assert os.pread(files[path], 9, 0).decode() == path.name
        assert len(files.descriptors) <= 2


def test_braces():
    assert expand_braces("a-{08..11}/{x,y}.tar")[:3] == ["a-08/x.tar", "a-08/y.tar", "a-09/x.tar"]
    assert len(expand_braces("a-{08..11}/{x,y}.tar")) == 8
    assert expand_braces("a{b}.tar") == ["a{b}.tar"]
