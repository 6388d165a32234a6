"""Which files are images, and what the summary at the start says of the others (``data.extensions``, ``data.keys``)."""

import tarfile

import pytest

from fcmae.config import DataConfig, LoaderConfig, PrepareConfig
from fcmae.config.prepare import PreparedDataConfig
from fcmae.data.prepare.command import prepare
from fcmae.data.sources import train_source
from fcmae.errors import ConfigError, UsageError
from fcmae.messages import print_once
from tests.bad_files import add_file, encoded, picture


@pytest.fixture(autouse=True)
def _told_again():
    print_once.cache_clear()


def folder(root, *names):
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encoded(picture(8, 8, seed=i), "PNG" if i % 2 else "GIF"))
    return root


def names(source):
    return [source.describe(i).rpartition("/")[2] for i in range(len(source))]


def test_other_endings_are_images_where_the_user_says_so(tmp_path, capsys):
    root = folder(tmp_path / "scans", "a.scan", "b", "c.SCAN", "d.png", "1.2.840.77")
    given = {"path": str(root)}
    assert names(train_source(DataConfig(**given, extensions=[".scan"]))) == ["a.scan", "c.SCAN"]
    assert "(.scan); not read: 1 without an ending, 1 .png, 1 .77, such as" in capsys.readouterr().err
    assert names(train_source(DataConfig(**given, extensions=["", ".png"]))) == ["b", "d.png"]
    everything = names(train_source(DataConfig(**given, extensions=["*"])))
    assert everything == ["1.2.840.77", "a.scan", "b", "c.SCAN", "d.png"]
    with pytest.raises(UsageError, match=r"has no images; looked for .jpg \(data.extensions\); not read: 2 .scan, "):
        train_source(DataConfig(**given, extensions=[".jpg"]))
    data = PreparedDataConfig(**given, extensions=["*"])
    prepare(PrepareConfig(data=data, out=str(tmp_path / "out"), loader=LoaderConfig(workers=0), shuffle=False))
    made = train_source(DataConfig(name="webdataset", path=str(tmp_path / "out")))
    assert [name.partition(".")[2] for name in names(made)] == ["gif", "gif", "png", "gif", "png"]
    for wrong in ([], ["scan"], ".scan", [3]):
        with pytest.raises(ConfigError, match="data.extensions must be a list of endings such as"):
            DataConfig(extensions=wrong)


def test_the_summary_names_empty_classes_and_broken_links(tmp_path, capsys):
    root = folder(tmp_path / "images", "cat/1.png", "dog/2.png", "dog/x.psd")
    (root / "owl" / "none").mkdir(parents=True)
    (root / "newt").mkdir()
    (root / "dog" / "3.png").symlink_to("nowhere.png")
    source = train_source(DataConfig(path=str(root)))
    assert source.classes == ["cat", "dog"]
    said = capsys.readouterr().err
    assert (
        "not read: 1 .psd, such as dog/x.psd; 1 links lead to no file, such as dog/3.png; 2 folders have no image "
        in said
    )
    assert "and are no class, such as newt" in said


def test_images_that_are_read_twice_are_counted(tmp_path, capsys):
    root = folder(tmp_path / "images", "cat/1.png", "dog/2.png")
    train_source(DataConfig(path=[str(root), str(root / "cat")]))
    assert f"{root}/cat lies in {root}: its images are read twice" in capsys.readouterr().err
    (root / "list.csv").write_text("image\ncat/1.png\ndog/2.png\ncat/1.png\n")
    train_source(DataConfig(name="table", path=str(root / "list.csv")))
    assert "1 rows name the file of an earlier row, such as" in capsys.readouterr().err


def tar(path, *members):
    with tarfile.open(path, "w") as file:
        for i, name in enumerate(members):
            data = b"1" if name.endswith("cls") else encoded(picture(8, 8, seed=i), "PNG")
            add_file(file, name, data)
    return str(path)


def test_keys_of_tar_files_can_be_chosen(tmp_path):
    path = tar(tmp_path / "a.tar", "1.left.png", "1.right.png", "2.left.png", "2.right.png")
    found = {keys: len(train_source(DataConfig(name="webdataset", path=path, keys=keys)))
             for keys in ("auto", "first_dot", "last_dot")}  # fmt: skip
    assert found == {"auto": 2, "first_dot": 2, "last_dot": 4}
    path = tar(tmp_path / "b.tar", "1.scan", "1.cls", "2.scan", "2.cls")
    source = train_source(DataConfig(name="webdataset", path=path, extensions=[".scan"]))
    assert (len(source), source.label(0)) == (2, 1)
    assert len(train_source(DataConfig(name="webdataset", path=path, extensions=["*"]))) == 2


def test_the_same_key_twice_is_an_error_that_names_both_files(tmp_path):
    path = tar(tmp_path / "a.tar", "x/1.png", "x/2.png", "x/1.jpg")
    with pytest.raises(
        UsageError, match=r"x/1.png and x/1.jpg are apart, but have the same name x/1; rename or remove"
    ):
        train_source(DataConfig(name="webdataset", path=path))
    with pytest.raises(ConfigError, match="data.keys must be one of auto, first_dot, last_dot"):
        DataConfig(keys="longest")
