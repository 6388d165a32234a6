"""Where samples come from: folders and their kept listings, `datasets`, one's own."""

import io
import mmap
import os
import pickle
import sys
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from fcmae.config import DataConfig, PretrainConfig, compose, from_dict, to_dict
from fcmae.config.recipe import check_recipe
from fcmae.data import mapped_arrays as arrays
from fcmae.data.sources import (
    ImageFolder,
    Sample,
    Synthetic,
    listing,
    require_labels,
    train_source,
    val_source,
    with_classes,
)
from fcmae.errors import ConfigError, ImageError, UsageError
from fcmae.messages import print_once


def png(value=0):
    content = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(content, "PNG")
    return content.getvalue()


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
    touch(root, "a/1.jpg", "b/2.jpg", "b/3.heic", "b/4.HEIC", "b/README", "b/.DS_Store", "c/x\n.jfif")
    line = f"{root}: 2 images (.jpg .jpeg .png .ppm .pgm .bmp .gif .tif .tiff .webp .npy); not read: 2 .heic, "
    line += "1 without an ending, 1 .jfif, such as b/"
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
    touch(tmp_path / "images", "a/1.jpg", "a/2.heic")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    ImageFolder(tmp_path / "images")
    assert "not read" not in capsys.readouterr().err


@pytest.fixture
def hf_rows():
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    features = datasets.Features({"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["cat", "dog"])})
    pictures = [{"bytes": png(i), "path": None} for i in range(6)]
    return datasets.Dataset.from_dict({"picture": pictures, "kind": [0, 1] * 3}, features=features)


def test_parquet_files(tmp_path, hf_rows, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    hf_rows.to_parquet(tmp_path / "data" / "train-00000.parquet")
    hf_rows.select([0, 1]).to_parquet(tmp_path / "data" / "test-00000.parquet")
    cfg = DataConfig(name="hf", path=str(tmp_path / "data"), val_split="test")
    source = train_source(cfg)
    assert (len(source), len(val_source(cfg))) == (6, 2)
    assert source.classes == val_source(cfg).classes == ["cat", "dog"]
    assert [source.label(i) for i in range(6)] == [0, 1] * 3
    assert pickle.loads(pickle.dumps(source))[4].image == (png(4), f"{tmp_path / 'data'}:train[4]")
    cfg.val_split = "dev"
    with pytest.raises(UsageError, match=r"cannot load the data set .*, split dev: .*train"):
        val_source(cfg)
    cfg.image_column = "image"
    with pytest.raises(ConfigError, match=r"data.image_column is 'image'; allowed is one of picture, kind"):
        train_source(cfg)


def test_a_saved_data_set(tmp_path, hf_rows):
    hf_rows.save_to_disk(tmp_path / "one")
    cfg = DataConfig(name="hf", path=str(tmp_path / "one"))
    assert train_source(cfg)[3].label == 1
    with pytest.raises(UsageError, match=r"split validation: it has train"):
        val_source(cfg)
    rows = hf_rows.remove_columns("kind").add_column("class", [0, 1] * 3)
    rows.save_to_disk(tmp_path / "numbers")
    cfg = DataConfig(name="hf", path=str(tmp_path / "numbers"))
    source = train_source(cfg)
    assert source.classes is None
    with pytest.raises(UsageError, match="data.path has no labels: no column is a ClassLabel; data.label_column may"):
        require_labels(source, "data.path")
    (tmp_path / "one.parquet").touch()
    with pytest.raises(UsageError, match="one.parquet is a file; allowed is a folder with Parquet or Arrow files, or"):
        train_source(DataConfig(name="hf", path=str(tmp_path / "one.parquet")))
    cfg.label_column = "class"
    assert train_source(cfg).classes == ["0", "1"]
    cfg.label_column = "picture"
    with pytest.raises(
        ConfigError, match="data.label_column is 'picture', .*it must be a column of integers or strings"
    ):
        train_source(cfg)


@pytest.mark.parametrize(
    ("values", "classes", "labels"),
    [
        (["dog", "cat", "dog"], ["cat", "dog"], [1, 0, 1]),
        ([2, 0, 1], ["0", "1", "2"], [2, 0, 1]),
        ([2, None, 1], None, "the column kind is empty at row 1"),
        (["dog", None, "cat"], None, "the column kind is empty at row 1"),
        ([0, 3_000_000_000, 1], None, "the column kind has 3000000000, at row 1, but there are 3 rows"),
        ([0, 1, -1], None, "the column kind has -1, at row 2"),
    ],
)
def test_labels_of_a_column(tmp_path, hf_rows, values, classes, labels):
    rows = hf_rows.remove_columns("kind").select(range(3)).add_column("kind", values)
    rows.save_to_disk(tmp_path / "rows")
    source = train_source(DataConfig(name="hf", path=str(tmp_path / "rows"), label_column="kind"))
    assert source.classes == classes
    if classes is None:
        assert labels in source.unlabelled
        assert source[0].label is None
    else:
        assert [source[i].label for i in range(3)] == [source.label(i) for i in range(3)] == labels


def test_a_configuration_and_a_revision_are_asked_for(tmp_path, hf_rows, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    configs = "".join(f"- config_name: {name}\n  data_files: {name}.parquet\n" for name in ("one", "two"))
    for count, name in enumerate(("one", "two"), 1):
        hf_rows.select(range(count)).to_parquet(tmp_path / "data" / f"{name}.parquet")
    (tmp_path / "data" / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    cfg = DataConfig(name="hf", path=str(tmp_path / "data"), config_name="two", revision="v1", val_split="train")
    assert (len(train_source(cfg)), len(val_source(cfg))) == (2, 2)
    with pytest.raises(UsageError, match=r"cannot load the data set .*one.*two"):
        train_source(DataConfig(name="hf", path=str(tmp_path / "data")))
    (tmp_path / "data" / "README.md").write_text("---\nconfigs:\n- config_name: x\n  data_files: ../a.parquet\n---\n")
    hf_rows.to_parquet(tmp_path / "a.parquet")
    with pytest.raises(UsageError, match=r"data.path: .*data names the file .*a.parquet, which is outside of it"):
        train_source(DataConfig(name="hf", path=str(tmp_path / "data")))


def test_the_package_datasets_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match=r"pip install 'fcmae\[hf\]'"):
        train_source(DataConfig(name="hf", path="x"))


class Squares:
    """A source of someone's own."""

    def __init__(self, count):
        self.count = count
        self.classes = None

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return Sample(torch.full((3, 32, 32), index, dtype=torch.uint8), None)

    def label(self, index):
        return None

    def describe(self, index):
        return f"square {index}"


def test_a_source_of_ones_own_on_the_command_line():
    given = f"data.source={{_target_: {__name__}.Squares, count: 5}}"
    cfg = compose("pretrain", [given])
    assert len(train_source(cfg.data)) == 5
    assert from_dict(PretrainConfig, to_dict(cfg)) == cfg
    merged = compose("knn", ["checkpoint=x", given.replace("5", "7")]).merge_data(cfg.data)
    assert len(train_source(merged)) == 7


def test_given_images_take_the_place_of_a_checkpoints_own_source():
    own = DataConfig(
        source={"_target_": f"{__name__}.Squares", "count": 5},
        val_source={"_target_": f"{__name__}.Squares", "count": 6},
    )

    def merged(*given, own=own):
        data = compose("knn", ["checkpoint=x", *given]).merge_data(own)
        return (data.name, data.path, data.val_path, data.source, data.val_source)

    assert merged() == ("imagefolder", None, None, own.source, own.val_source)
    assert merged("data.path=A", "data.val_path=B") == ("imagefolder", "A", "B", None, None)
    assert merged("data.val_path=B") == ("imagefolder", None, "B", own.source, None)
    assert merged("data.name=webdataset", "data.val_path=B") == ("webdataset", None, "B", None, None)
    folders = DataConfig(path="A", val_path="B")
    target = {"_target_": f"{__name__}.Squares", "count": 7}
    given = f"data.source={{_target_: {__name__}.Squares, count: 7}}"
    assert merged(given, own=folders) == ("imagefolder", None, "B", target, None)
    # A checkpoint of an older version may have both; its source was used.
    assert merged(own=DataConfig(path="A", source=target)) == ("imagefolder", None, None, target, None)
    for both in ({"path": "A", "source": target}, {"val_path": "A", "val_source": target}):
        with pytest.raises(ConfigError, match="source and data.(val_)?path=A are both set; give one of them"):
            (train_source if "path" in both else val_source)(DataConfig(**both))


def test_another_source_is_another_recipe():
    def config(**data):
        return to_dict(PretrainConfig(data=DataConfig(**data)))

    own = {"_target_": f"{__name__}.Squares", "count": 5}
    harmless = {"relist": True, "on_error": "skip", "max_bad": 0.5, "val_source": own, "val_split": "test"}
    check_recipe(config(source=own), config(source=dict(own), **harmless))
    for before, now in ((None, own), (own, {**own, "count": 6})):
        with pytest.raises(UsageError, match="  data.source: .*Squares"):
            check_recipe(config(source=before), config(source=now))


def test_a_source_of_ones_own():
    own = {"_target_": f"{__name__}.Squares", "count": 5}
    source = train_source(DataConfig(source=own))
    assert len(source) == 5
    assert torch.equal(source[3].image, torch.full((3, 32, 32), 3, dtype=torch.uint8))
    assert source.describe(3) == "square 3"
    assert source.classes is None
    with pytest.raises(ConfigError, match=r"data.val_source is not set"):
        val_source(DataConfig(source=own))
    for given, message in (
        ({**own, "side": 3}, r"data.source: .*Squares does not take these arguments: .*side"),
        ({"_target_": "nowhere.Cls"}, r"data.source._target_ is 'nowhere.Cls'; expected a class .*nowhere"),
        (
            {"_target_": "builtins.open", "file": "/nowhere"},
            r"must be a class with the methods .*; it is a builtin",
        ),
        ({"_target_": "builtins.list"}, r"it is a class without label, describe$"),
        ({"_target_": f"{__name__}.Nameless"}, r"Nameless must have the attribute classes"),
    ):
        with pytest.raises(ConfigError, match=message):
            train_source(DataConfig(source=given))
    with pytest.raises(ConfigError, match=r"data.source is \{'count': 5\}; allowed is null, or _target_"):
        DataConfig(source={"count": 5})


class Nameless(Squares):
    """Without the names of classes."""

    def __init__(self):
        super().__init__(1)
        del self.classes


class Anything(Squares):
    """What a test puts into it."""

    samples: ClassVar[list] = []

    def __init__(self, classes=None):
        super().__init__(1)
        self.classes = classes

    def __getitem__(self, index):
        return self.samples[0]


GREY = torch.zeros(1, 8, 8, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (GREY, r"the source gives a Tensor; allowed is Sample\(image, label\)"),
        (Sample(GREY.numpy(), 0), r"its image is a ndarray; allowed is a tensor or Encoded"),
        (Sample(GREY.repeat(3, 1, 1), 0), r"its shape is \[3, 8, 8\]; allowed is \[C, H, W\] with 1 channels"),
        (Sample(GREY[0], 0), r"its shape is \[8, 8\]"),
        (Sample(GREY[:, :0], 0), r"its shape is \[1, 0, 8\]"),
        (Sample(GREY.to(torch.uint16), 0), r"torch.uint16; allowed with data.bit_depth=8 is torch.uint8, or"),
        (Sample(GREY.double(), 0), r"its pixels are torch.float64"),
        (Sample(GREY, 2), r"its label is 2; allowed is 0 to 1"),
        (Sample(GREY, None), r"its label is None; allowed is 0 to 1"),
    ],
)
def test_samples_of_ones_own_source_are_checked(sample, message, monkeypatch):
    monkeypatch.setattr(Anything, "samples", [sample])
    own = {"_target_": f"{__name__}.Anything", "classes": ["cat", "dog"]}
    source = train_source(DataConfig(source=own, in_chans=1, mean=[0.5], std=[0.5]))
    with pytest.raises(ImageError, match=f"square 0: .*{message}"):
        source[0]
    monkeypatch.setattr(Anything, "samples", [Sample(GREY.float(), 1)])
    assert source[0].label == 1


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_values_that_are_no_numbers_are_told_of_the_input(monkeypatch, value):
    image = GREY.float()
    image[0, 3, 4] = value
    monkeypatch.setattr(Anything, "samples", [Sample(image, 1)])
    own = {"_target_": f"{__name__}.Anything", "classes": ["cat", "dog"]}
    source = train_source(DataConfig(source=own, in_chans=1, mean=[0.5], std=[0.5]))
    with pytest.raises(ImageError, match=r"square 0: it has values that are infinite or not a number \(NaN\); replace"):
        source[0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"path": []}, r"data.path is \[\]; allowed is a path, or a list of paths"),
        ({"val_path": [True]}, r"data.val_path is \[True\]; allowed is a path"),
        ({"on_error": "ignore"}, r"data.on_error is 'ignore'; allowed is one of raise, skip"),
        ({"max_bad": 2}, r"data.max_bad is 2; allowed is a number from 0 to 1"),
        ({"name": "tar"}, r"data.name is 'tar'; allowed is one of imagefolder, webdataset, hf"),
    ],
)
def test_a_mistake_names_its_key(given, message):
    with pytest.raises(ConfigError, match=message):
        DataConfig(**given)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (["a", "x"], "the 2 classes of data.val_path are not among the 3 of data.path: x"),
        ([str(i) for i in range(12)], "the 12 classes .* of data.path: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more"),
        (None, "data.val_path has no labels: its source gives none"),
    ],
)
def test_unknown_classes_are_refused(classes, message):
    with pytest.raises(UsageError, match=message):
        with_classes(Anything(classes), "data.val_path", ["a", "b", "c"], "data.path")


@pytest.mark.parametrize(
    ("classes", "notes"),
    [
        (["a", "b", "c"], []),
        (["c", "a"], ["data.val_path lacks 1 of the 3 classes of data.path: b"]),
        (["c"], ["data.val_path lacks 2 of the 3 classes of data.path: a, b"]),
        (["c", "b", "a"], []),
    ],
)
def test_labels_are_matched_by_the_names_of_classes(monkeypatch, classes, notes):
    expected = ["a", "b", "c"]
    monkeypatch.setattr(Anything, "samples", [Sample(GREY, classes.index("c"))])
    monkeypatch.setattr(Anything, "label", lambda self, index: self[index].label)
    source, said = with_classes(Anything(classes), "data.val_path", expected, "data.path")
    assert said == notes
    assert source.classes == expected
    assert source.label(0) == source[0].label == 2
    assert (len(source), source.describe(0)) == (len(Anything(classes)), "square 0")
    assert pickle.loads(pickle.dumps(source))[0].label == 2


def test_one_path_where_one_is_meant(tmp_path):
    with pytest.raises(UsageError, match=r"data.path is .*; allowed with data.name=fashion_mnist is one path"):
        train_source(DataConfig(name="fashion_mnist", path=["a", "b"]))
    assert DataConfig(path=2024).path == "2024"
    assert isinstance(train_source(DataConfig(name="synthetic")), Synthetic)
