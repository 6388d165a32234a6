"""Sources by the name of a class, labels across sources, and mistakes in what a config says of its data."""

import pickle
from typing import ClassVar

import pytest
import torch

from fcmae.config import DataConfig, LoaderConfig, PretrainConfig, compose, from_dict, to_dict
from fcmae.config.recipe import check_recipe
from fcmae.data.sources import (
    Sample,
    Synthetic,
    train_source,
    val_source,
    with_classes,
)
from fcmae.errors import ConfigError, ImageError, UsageError


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
    def config(loader=None, **data):
        return to_dict(PretrainConfig(data=DataConfig(**data), loader=loader or LoaderConfig()))

    own = {"_target_": f"{__name__}.Squares", "count": 5}
    loader = LoaderConfig(relist=True, on_error="skip", max_bad=0.5)
    check_recipe(config(source=own), config(loader, source=dict(own), val_source=own, val_split="test"))
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
    with pytest.raises(ConfigError, match=r"data.source must be null, or _target_.*; got \{'count': 5\}"):
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
        (GREY, r"the source must give Sample\(image, label\); got a Tensor"),
        (Sample(GREY.numpy(), 0), r"its image must be a tensor or Encoded.*; got a ndarray"),
        (Sample(GREY.repeat(3, 1, 1), 0), r"its shape must be \[C, H, W\] \(data.in_chans is 1\); got \[3, 8, 8\]"),
        (Sample(GREY[0], 0), r"its shape must be .*; got \[8, 8\]"),
        (Sample(GREY[:, :0], 0), r"its shape must be .*; got \[1, 0, 8\]"),
        (Sample(GREY.to(torch.uint16), 0), r"torch.uint8 \(data.bit_depth=8\), or .*; got torch.uint16"),
        (Sample(GREY.double(), 0), r"its pixels must be .*; got torch.float64"),
        (Sample(GREY, 2), r"its label must be 0 to 1; got 2"),
        (Sample(GREY, None), r"its label must be 0 to 1; got None"),
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
    with pytest.raises(ImageError, match="square 0: it has (NaN in channel 0|infinite values); replace"):
        source[0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"path": []}, r"data.path must be a path, or a list of paths.*; got \[\]"),
        ({"val_path": [True]}, r"data.val_path must be a path.*; got \[True\]"),
        ({"name": "tar"}, r"data.name must be one of imagefolder, webdataset, hf.*; got 'tar'"),
    ],
)
def test_a_mistake_names_its_key(given, message):
    with pytest.raises(ConfigError, match=message):
        DataConfig(**given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"on_error": "ignore"}, r"loader.on_error must be one of raise, skip.*; got 'ignore'"),
        ({"max_bad": 2}, r"loader.max_bad must be a number from 0 to 1.*; got 2"),
    ],
)
def test_a_mistake_in_the_loader_names_its_key(given, message):
    with pytest.raises(ConfigError, match=message):
        LoaderConfig(**given)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (["a", "x"], "1 of the 2 classes of data.val_path is not among the 3 of data.path: x"),
        (
            [str(i) for i in range(12)],
            "12 of the 12 .* are not among the 3 of data.path: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more",
        ),
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
    with pytest.raises(UsageError, match=r"data.path must be one path with data.name=fashion_mnist; got"):
        train_source(DataConfig(name="fashion_mnist", path=["a", "b"]))
    assert DataConfig(path=2024).path == "2024"
    assert isinstance(train_source(DataConfig(name="synthetic")), Synthetic)
