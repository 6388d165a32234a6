"""Data sets of the library `datasets`."""

import pickle
import sys

import pytest

from fcmae.config import DataConfig
from fcmae.data.sources import (
    require_labels,
    train_source,
    val_source,
)
from fcmae.data.sources.base import listing_digest
from fcmae.errors import ConfigError, UsageError
from tests.unit.test_image_folders import png


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
    with pytest.raises(ConfigError, match=r"data.image_column must be one of picture, kind; got 'image'"):
        train_source(cfg)


def test_problems_are_counted_at_the_start(tmp_path, hf_rows, capsys):
    datasets = pytest.importorskip("datasets")
    kinds = datasets.ClassLabel(names=["cat", "cow", "dog"])
    pictures = [{"bytes": content, "path": None} for content in (b"", b"no image", png())]
    pictures.append(None)
    features = datasets.Features({"picture": datasets.Image(), "kind": kinds})
    rows = datasets.Dataset.from_dict({"picture": pictures, "kind": [0, 2, 0, 0]}, features=features)
    rows.save_to_disk(tmp_path / "one")
    train_source(DataConfig(name="hf", path=str(tmp_path / "one")))
    told, name = capsys.readouterr().err, f"{tmp_path / 'one'}:train"
    assert (
        f"4 images; 1 image without content, such as {name}[0]; 1 image of no format that is read, such as "
        f"{name}[1]; 1 image that cannot be opened, such as {name}[3] (it has neither bytes nor a path)"
    ) in told
    assert told.rstrip().endswith("; 1 of 3 classes have no image, such as cow")


def test_a_saved_data_set(tmp_path, hf_rows):
    hf_rows.save_to_disk(tmp_path / "one")
    cfg = DataConfig(name="hf", path=str(tmp_path / "one"))
    assert train_source(cfg)[3].label == 1
    with pytest.raises(UsageError, match=r"split validation: it has train"):
        val_source(cfg)
    hf_rows.with_format("numpy", columns=["kind"]).save_to_disk(tmp_path / "shown")  # which keeps this
    cfg = DataConfig(name="hf", path=str(tmp_path / "shown"))
    assert train_source(cfg)[3].image.data == png(3)
    rows = hf_rows.remove_columns("kind").add_column("class", [0, 1] * 3)
    rows.save_to_disk(tmp_path / "numbers")
    cfg = DataConfig(name="hf", path=str(tmp_path / "numbers"))
    source = train_source(cfg)
    assert source.classes is None
    with pytest.raises(UsageError, match="data.path has no labels: no column is a ClassLabel; data.label_column may"):
        require_labels(source, "data.path")
    (tmp_path / "one.parquet").touch()
    with pytest.raises(UsageError, match="one.parquet must be a folder with Parquet or Arrow files, or"):
        train_source(DataConfig(name="hf", path=str(tmp_path / "one.parquet")))
    cfg.label_column = "class"
    assert train_source(cfg).classes == ["0", "1"]
    cfg.label_column = "picture"
    with pytest.raises(
        ConfigError, match="data.label_column is 'picture', .*it must be a column of integers or strings"
    ):
        train_source(cfg)


def digest(path, **how):
    return listing_digest(train_source(DataConfig(name="hf", path=str(path), **how)))


def test_a_run_does_not_resume_with_other_rows(tmp_path, hf_rows, monkeypatch):
    """Wherever the files lie, and however the library chooses the rows; pixels are not read."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    assert len({len(png(i)) for i in (0, 1, 2)}) > 1  # so that their order shows without labels
    without = hf_rows.select_columns(["picture"])
    for name, rows in (("one", without), ("moved", without), ("turned", without.select(range(5, -1, -1)))):
        rows.save_to_disk(tmp_path / name)
    first = digest(tmp_path / "one")
    assert first is not None
    assert first == digest(tmp_path / "moved")
    assert first != digest(tmp_path / "turned")
    for name, rows in (("files", hf_rows), ("files2", hf_rows), ("labelled", hf_rows.select([0, 2, 1, 3, 4, 5]))):
        rows.to_parquet(tmp_path / name / "train-00000.parquet")
    first = digest(tmp_path / "files")
    assert first == digest(tmp_path / "files2")
    assert first != digest(tmp_path / "labelled")
    assert digest(tmp_path / "files", split="train[:3]") != digest(tmp_path / "files", split="train[3:]")


def test_names_of_rows_count_below_the_folder_that_they_share(tmp_path, hf_rows):
    datasets = pytest.importorskip("datasets")
    digests = []
    for place, names in (("here", "ab"), ("there", "ab"), ("there", "ba")):
        pictures = [{"bytes": png(), "path": f"/{place}/{name}/1.png"} for name in names]
        datasets.Dataset.from_list([{"p": each} for each in pictures]).save_to_disk(tmp_path / f"{place}_{names}")
        digests.append(digest(tmp_path / f"{place}_{names}", image_column="p"))
    assert digests[0] == digests[1] != digests[2]


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
