"""Target maps: files of every kind, cut as their images are, and checked before training."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from fcmae.config import AugmentConfig, DataConfig, LoaderConfig, check_places, compose, to_dict
from fcmae.data.pixels.crops import Box, cut, cut_nearest
from fcmae.data.pixels.decode import Encoded
from fcmae.data.pixels.extra import Extra
from fcmae.data.pixels.maps import IGNORED, class_map, stored_size, value_map
from fcmae.data.pixels.pairs import PairTransform
from fcmae.data.samples import PairedImages
from fcmae.data.sources.map_files import mapped_source
from fcmae.errors import CheckpointError, ConfigError, ImageError, UsageError
from fcmae.models.build import model_of
from fcmae.plugins import named_by
from fcmae.tasks.finetuning import Finetuning
from fcmae.tasks.objectives import Segment
from tests.bad_files import bomb, encoded, npy
from tests.conftest import TINY_FINETUNE
from tests.dense_files import write_squares

CLASSES = np.arange(12, dtype=np.uint8).reshape(3, 4) % 5


def palette():
    image = Image.fromarray(CLASSES, "P")
    image.putpalette([0, 0, 0, 9, 9, 9, 200, 0, 0, 0, 200, 0, 0, 0, 200])
    return image


@pytest.mark.parametrize(
    "data",
    [
        encoded(Image.fromarray(CLASSES), "PNG"),
        encoded(palette(), "PNG"),
        encoded(palette(), "GIF"),
        encoded(Image.fromarray(CLASSES.astype(np.uint16)), "PNG"),
        encoded(Image.fromarray(CLASSES), "TIFF"),
        encoded(Image.fromarray(CLASSES.astype(np.int32)), "TIFF"),
        npy(CLASSES),
        npy(CLASSES.astype(np.int64)[None]),
        npy(CLASSES.astype(np.uint16)[..., None]),
    ],
    ids=["PNG", "palette", "GIF", "PNG 16", "TIFF", "TIFF 32", "npy", "npy 1HW", "npy HW1"],
)
def test_classes_are_read_as_they_are_stored(data):
    assert class_map(Encoded(data, "a"), "a").equal(torch.from_numpy(CLASSES.astype(np.int64)))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (encoded(Image.fromarray(CLASSES).convert("RGB"), "PNG"), "it has 3 channels; a map of classes must have 1"),
        (encoded(Image.fromarray(CLASSES).convert("LA"), "PNG"), "it has 2 channels; a map of classes must have 1"),
        (npy(np.zeros((3, 4, 5), np.uint8)), "it has 3 channels; a map of classes must have 1"),
        (encoded(Image.fromarray(CLASSES), "JPEG"), "it is a JPEG, whose compression changes classes"),
        (npy(CLASSES.astype(np.float32)), "its values are float32; classes must be integers"),
        (npy(np.array([{}])), "cannot read the image"),
        (encoded(Image.fromarray(CLASSES), "PNG")[:50], "cannot read the image"),
        (bomb(), "loader.max_pixels"),
        (b"no map", "its bytes are of no image format"),
    ],
)
def test_a_file_that_is_no_map_of_classes_is_refused(data, message):
    with pytest.raises(ImageError, match=message):
        class_map(Encoded(data, "a"), "a", max_pixels=10**6)


def test_numbers_are_read_as_they_are_stored():
    tifffile = pytest.importorskip("tifffile")
    import io

    values = np.linspace(-3, 9, 24, dtype=np.float32).reshape(2, 3, 4)
    values[0, 0, 0] = np.nan
    expected = torch.from_numpy(values)
    file = io.BytesIO()
    tifffile.imwrite(file, values, planarconfig="separate", photometric="minisblack", compression="zlib")
    one = encoded(Image.fromarray(values[1]), "TIFF")
    for data, found in ((file.getvalue(), expected), (npy(values.astype(np.float64)), expected), (one, expected[1:])):
        torch.testing.assert_close(value_map(Encoded(data, "a"), "a", len(found)), found, equal_nan=True)
    grey = encoded(Image.fromarray(CLASSES), "PNG")
    assert value_map(Encoded(grey, "a"), "a", 1).equal(torch.from_numpy(CLASSES[None].astype(np.float32)))
    with pytest.raises(ImageError, match=r"it has 2 channels; objective.channels is 3"):
        value_map(Encoded(npy(values), "a"), "a", 3)
    with pytest.raises(ImageError, match="it has infinite values"):
        value_map(Encoded(npy(values * np.inf), "a"), "a", 2)


def test_sizes_are_known_from_headers(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6
    files = {
        "a.png": (encoded(Image.new("L", (7, 5)), "PNG"), (5, 7)),
        "b.jpg": (encoded(Image.new("L", (7, 5)), "JPEG", exif=turned), (7, 5)),
        "c.npy": (npy(np.zeros((5, 7))), (5, 7)),
        "d.tif": (encoded(Image.new("RGB", (7, 5)), "TIFF"), (5, 7)),
        "e.png": (b"nothing", None),
        "f.npy": (npy(np.zeros((5, 7, 3))), None),
    }
    for name, (data, size) in files.items():
        (tmp_path / name).write_bytes(data)
        assert stored_size(str(tmp_path / name)) == size, name


@pytest.mark.parametrize("turned", [(False, False, 0), (True, False, 0), (False, True, 0), (True, False, 3)])
def test_a_map_is_cut_where_its_image_is(turned):
    """In the middle of large areas the nearest class is what the image's filter gives."""
    blocks = torch.arange(6).view(2, 3).repeat_interleave(20, 0).repeat_interleave(20, 1)
    box, size = Box(3, 5, 30, 48, *turned), (24, 24)
    image = cut((40 * blocks).to(torch.uint8)[None], box, size)[0]
    classes = cut_nearest(blocks.short()[None], box, size)[0]
    assert classes.shape == image.shape
    assert (40 * classes - image.short()).abs().median() == 0
    assert ((40 * classes - image.short()).abs() < 3).float().mean() > 0.7
    whole = cut_nearest(blocks.short()[None], Box(0, 0, 40, 60, False), (40, 60))[0]
    assert whole.equal(blocks.short())


TURNS = [
    {"_target_": "torchvision.transforms.v2.RandomRotation", "degrees": [20, 20]},
    {"_target_": "torchvision.transforms.v2.RandomVerticalFlip", "p": 1.0},
    {"_target_": "torchvision.transforms.v2.ColorJitter", "brightness": [0.5, 0.5]},
]


@pytest.mark.parametrize("kind", ["classes", "numbers"])
def test_transforms_turn_both_and_leave_out_what_lies_outside(kind):
    cfg = DataConfig(image_size=32, hflip=0, crop_scale=[1, 1], crop_ratio=[1, 1], transforms=TURNS, mean=[0] * 3,
                     std=[1] * 3)  # fmt: skip
    transform = PairTransform(cfg, AugmentConfig())
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    image[:, 4:12, 16:28] = 200
    target = (image[0] > 0).short() if kind == "classes" else image[:1].float()
    crop, found = transform(image, target)
    outside = found == IGNORED if kind == "classes" else found[0].isnan()
    assert 0.05 < outside.float().mean() < 0.3
    assert outside[0, 0]
    assert not outside[12:20, 12:20].any()
    bright = (255 * crop[0]).round() == 100  # halved; the target is not
    of_target = found == 1 if kind == "classes" else found[0] == 200
    assert bright[:16].sum() == 0  # turned upside down
    assert (bright != of_target).float().mean() < 0.05
    with pytest.raises(ValueError, match="its target map has 31x32 pixels; the image has 32x32"):
        transform(image, target[..., :31])


class Twice:
    def __call__(self, image):
        return image

    def pair(self, image, target):
        return image.flip(-1), target.flip(-1)


class Once:
    def __call__(self, image):
        return image


def test_a_transform_of_the_users_changes_both_or_is_refused():
    def transform(name, **augment):
        given = [{"_target_": f"tests.unit.test_maps.{name}"}]
        return PairTransform(DataConfig(image_size=8, transforms=given), AugmentConfig(**augment))

    image = torch.randint(0, 255, (3, 8, 8), dtype=torch.uint8)
    random.seed(0)
    crop, target = transform("Twice")(image, image[0].short())
    assert crop.shape == (3, 8, 8)
    assert target.shape == (8, 8)
    with pytest.raises(ConfigError, match=r"data.transforms\[0\]: .*Once must have a method pair\(image, target\)"):
        transform("Once")
    with pytest.raises(ConfigError, match="augment.auto_augment is 'rand-m9'; must be null with target maps"):
        transform("Twice", auto_augment="rand-m9")


def test_transforms_of_transforms(tmp_path):
    """torchvision's RandomApply and RandomChoice, whose parts are named, too."""
    flips = [{"_target_": f"torchvision.transforms.v2.Random{way}Flip", "p": 1.0} for way in ("Vertical", "Horizontal")]
    given = [{"_target_": "torchvision.transforms.v2.RandomApply", "transforms": flips, "p": 1.0}]
    image = torch.arange(64, dtype=torch.uint8).view(1, 8, 8).expand(3, -1, -1)
    assert Extra(given)(image).equal(image.flip(1, 2))
    cfg = DataConfig(image_size=8, crop_zoom=[1.0, 1.0], hflip=0, transforms=given, mean=[0.0] * 3, std=[1.0] * 3)
    crop, target = PairTransform(cfg, AugmentConfig())(image, image[0].short())
    assert target.equal(image[0].flip(0, 1).short())
    torch.testing.assert_close(crop[0], target / 255)
    wrong = [{**given[0], "transforms": [flips[0], {"_target_": "torchvision.transforms.v2.RandomFlap"}]}]
    with pytest.raises(ConfigError, match=r"data.transforms\[0\].transforms\[1\]"):
        Extra(wrong)
    code = tmp_path / "code.py"
    code.write_text("open('ran', 'w')\nclass Once:\n    def __call__(self, image):\n        return image\n")
    inner = {**given[0], "transforms": [{"_target_": f"{code}:Once"}]}
    with pytest.raises(ConfigError, match="code that a file names is not run"):
        Extra([named_by(tmp_path / "checkpoint.pt", inner)])
    assert not (tmp_path / "ran").exists()
    assert not Path("ran").exists()


@pytest.mark.parametrize("zoom", [None, [0.5, 0.5], [0.5, 2.0]])
def test_padding_is_left_out_and_the_map_follows(zoom):
    """A grey level per class, and crops of images that they do not fit into, turned and mirrored."""
    cfg = DataConfig(image_size=32, fit="pad", crop_zoom=zoom, vflip=0.5, rot90=True, mean=[0.5] * 3, std=[1.0] * 3)
    transform = PairTransform(cfg, AugmentConfig())
    target = torch.zeros(40, 24, dtype=torch.int16)
    target[13:], target[:, 9:] = 1, 2
    image = (target * 100).to(torch.uint8).expand(3, -1, -1)
    random.seed(0)
    for _ in range(20):
        crop, found = transform(image, target)
        _, numbers = transform(image, target[None].float())
        assert numbers.shape == (1, 32, 32)
        assert found.shape == (32, 32)
        inside = (found != IGNORED).long()
        rows, cols = int(inside.amax(1).sum()), int(inside.amax(0).sum())
        assert inside[:rows, :cols].all()
        assert inside.sum() == rows * cols
        assert crop[:, found == IGNORED].abs().max() < 0.01 if rows * cols < 32 * 32 else True
        if zoom is not None and zoom[1] == 0.5:
            assert sorted((rows, cols)) == [12, 20]
        if zoom is None:
            assert sorted((rows, cols)) == [24, 32]
        level = (crop[0] + 0.5) * 255 / 100
        share = ((level - found).abs() < 0.3)[found != IGNORED].double().mean()
        assert share > (0.999 if zoom is None else 0.8)


def test_samples_are_functions_of_seed_epoch_and_index(tmp_path):
    write_squares(tmp_path)
    cfg = DataConfig(path=f"{tmp_path}/images", target_path=f"{tmp_path}/masks", image_size=32, crop_zoom=[0.5, 2.0],
                     transforms=TURNS)  # fmt: skip
    source = mapped_source(cfg, LoaderConfig(), train=True)
    dataset = PairedImages(source, PairTransform(cfg, AugmentConfig()), 3, Segment(3).target)
    first = dataset[2, 1]
    torch.rand(5)
    assert all(a.equal(b) for a, b in zip(first, dataset[2, 1], strict=True))
    assert not first[0].equal(dataset[3, 1][0])
    assert first[1].dtype == torch.int16
    assert v2.functional.get_size(first[0]) == [32, 32]


def test_maps_in_folders_and_tables(tmp_path):
    write_squares(tmp_path, 2)
    (tmp_path / "masks" / "s" / "0.png").unlink()
    np.save(tmp_path / "masks" / "s" / "0.npy", np.full((40, 56), 2))
    folders = DataConfig(path=f"{tmp_path}/images", target_path=[f"{tmp_path}/masks"])
    (tmp_path / "t.csv").write_text("image,mask\nimages/s/0.png,masks/s/0.npy\nimages/s/1.png,masks/s/1.png\n")
    table = DataConfig(name="table", path=f"{tmp_path}/t.csv", target_column="mask")
    for cfg in (folders, table):
        source = mapped_source(cfg, LoaderConfig(), train=True)
        assert source.classes is None
        assert Segment(3).target(source[0], source, 0).eq(2).all()
        assert Segment(3).target(source[1], source, 1).unique().tolist() == [-1, 0, 1, 2]


def test_other_images_are_never_compared_with_the_training_maps(tmp_path):
    """Where names and sizes agree, nothing else would tell."""
    for name, seed in (("a", 0), ("b", 1)):
        write_squares(tmp_path / name, 2, seed=seed)
    a, b = tmp_path / "a", tmp_path / "b"
    paths = {"path": f"{a}/images", "target_path": f"{a}/masks"}

    def target(**given):
        return mapped_source(DataConfig(**paths, **given), LoaderConfig(), train=False).target_path(0)

    told = "data.val_target_path is not set; give the folder of the target maps of data.val_path, data.val_target_path="
    with pytest.raises(UsageError, match=told):
        target(val_path=f"{b}/images")
    assert target(val_path=f"{b}/images", val_target_path=f"{b}/masks") == f"{b}/masks/s/0.png"
    assert target(val_path=[f"{a}/images/"]) == f"{a}/masks/s/0.png"  # the same images
    for command, more in (("finetune", []), ("study", ["labels=[2]"])):
        given = [f"data.{key}={value}" for key, value in paths.items()] + [f"data.val_path={b}/images", *more]
        given += ["data.name=imagefolder", "objective=segment", "objective.classes=3"]
        with pytest.raises(ConfigError, match=told):
            compose(command, given, lambda cfg: check_places(cfg, tmp_path))
        compose(command, [*given, f"data.val_target_path={b}/masks"], lambda cfg: check_places(cfg, tmp_path))


def test_another_path_replaces_the_maps_of_a_checkpoint():
    own = DataConfig(path="a/i", target_path="a/m", val_path="b/i", val_target_path="b/m")

    def merged(*given):
        data = compose("evaluate", ["checkpoint=x", *given]).merge_data(own)
        return data.target_path, data.val_target_path

    assert merged("data.val_path=b/i") == merged() == ("a/m", "b/m")
    assert merged("data.val_path=c/i") == ("a/m", None)
    assert merged("data.val_path=c/i", "data.val_target_path=c/m") == ("a/m", "c/m")
    assert merged("data.path=c/i", "data.val_path=c/i") == (None, None)


def train(folder, *overrides):
    data = (f"data.path={folder}/images", f"data.target_path={folder}/masks", "data.name=imagefolder")
    how = ("objective=segment", "objective.classes=3", "objective.width=8", "trainer.eval_every_epochs=null")
    return Finetuning(compose("finetune", [*TINY_FINETUNE[1:], *data, *how, *overrides]).settled({}))


def spoil(folder, number, array):
    Image.fromarray(np.asarray(array, np.uint8)).save(folder / "masks" / "s" / f"{number}.png")


def test_every_kind_of_wrong_map_is_named_before_training(tmp_path):
    write_squares(tmp_path, 8)
    spoil(tmp_path, 0, np.zeros((40, 40)))
    spoil(tmp_path, 1, np.full((40, 56), 7))
    spoil(tmp_path, 2, np.zeros((40, 56, 3)))
    (tmp_path / "masks/s/7.png").unlink()
    with pytest.raises(ConfigError) as error:
        train(tmp_path)
    missing, sizes, values = error.value.mistakes
    assert missing.endswith(f"no file of the same relative name (any ending) for {tmp_path}/images/s/7.png")
    assert sizes.startswith("data.target_path: 1 map of another size than the image: ")
    assert sizes.endswith("masks/s/0.png is 40x40, its image 56x40")
    assert values.startswith("data.target_path: 2 of 7 maps cannot be used: ")
    assert "1.png: it has 2,240 pixels of other classes, such as 7; 3 classes are 0 to 2 or 255 to leave" in values
    assert "2.png: it has 3 channels; a map of classes must have 1" in values


def test_a_wrong_map_that_is_not_checked_is_named_in_training(tmp_path, monkeypatch):
    monkeypatch.setattr("fcmae.data.sources.check_maps.VALUES", 1)
    monkeypatch.setattr("fcmae.data.sources.check_maps.SIZES", 1)
    write_squares(tmp_path, 4)
    task = train(tmp_path)
    for array, message in (
        (np.full((40, 56), 9), "masks/s/2.png: it has 2,240 pixels of other classes, such as 9"),
        (np.zeros((30, 30)), "images/s/2.png: its target map has 30x30 pixels; the image has 56x40"),
    ):
        spoil(tmp_path, 2, array)
        with pytest.raises(ImageError, match=message):
            task.dataset()[0, [task.source.describe(i)[-5] for i in range(4)].index("2")]


def test_a_large_network_of_a_small_file_is_not_built(tmp_path):
    """A config in a checkpoint that asks for a head of gigabytes."""
    write_squares(tmp_path, 4)
    task = train(tmp_path)
    objective = {**task.cfg.objective, "width": 2048, "classes": 30_000, "ignore_index": None}
    config = {**to_dict(task.cfg), "objective": objective}
    state = {"task": "finetune", "config": config, "model": task.model.state_dict(), "ema": None, **task.extra_state()}
    with pytest.raises(CheckpointError, match=r"has [\d,]+ weights; the network of its config needs [\d,]+"):
        model_of(state, tmp_path / "a.pt")


def test_maps_without_labels_are_named(tmp_path):
    write_squares(tmp_path, 8)
    spoil(tmp_path, 3, np.full((40, 56), 255))
    assert train(tmp_path).notes == [
        f"warning: data.target_path: 1 of 8 maps have no labelled pixel: {tmp_path}/masks/s/3.png"
    ]
    mask = np.zeros((40, 56))
    mask[:9] = 255  # the object, of a binary mask
    for number in range(8):
        spoil(tmp_path, number, mask)
    assert train(tmp_path).notes == [
        "warning: data.target_path: all labelled pixels of 8 maps are of class 0; the others are left out "
        "(objective.ignore_index); for masks of 0 and 255 set objective.values=[0,255] objective.ignore_index=null"
    ]
    for number in range(8):
        spoil(tmp_path, number, np.full((40, 56), 255))
    with pytest.raises(ConfigError, match=r"^data.target_path: 8 of 8 maps have no labelled pixel: .* and 5 more$"):
        train(tmp_path)


@pytest.mark.parametrize(
    ("change", "overrides", "message"),
    [
        (lambda f: (f / "masks/s/1.png").unlink(), [], r"no file of the same relative name .* for .*images/s/1.png$"),
        (
            lambda f: np.save(f / "masks/s/1.npy", 0),
            [],
            r"two files of one name: .*1\.(png|npy) and ",
        ),
        (None, ["data.target_path=null"], "data.target_path is not set; give the folder of the target maps of data.p"),
        (None, ["data.name=synthetic"], "data.name is synthetic; target maps are read with data.name=imagefolder"),
        (None, ["augment.mixup=0.5"], r"augment.mixup must be 0 with objective: .*Segment"),
        (None, ["data.image_size=36"], "data.image_size must be a multiple of 8, the total stride, with target maps"),
        (None, ["data.pad=2"], "data.pad must be 0 with target maps"),
        (None, ["objective.classes=null"], "classes must be a list of two or more names, or their number; got None"),
        (None, ["objective.loss=mse"], "loss must be one or several of ce, dice, as A\\+B or with positive weights"),
        (None, ["objective.ignore_index=1"], "ignore_index is 1, the number of class 1"),
        (None, ["objective.class_weights=[1]"], "class_weights must be 3 numbers that are not negative, auto or null"),
        (None, ["objective.values=[0,1]"], "values must be 3 different integers, one per class"),
        (None, ["objective=classify"], "data.target_path must be null with objective: .*Classify, which reads no maps"),
    ],
)
def test_mistakes_are_one_line(tmp_path, change, overrides, message):
    write_squares(tmp_path, 4)
    if change is not None:
        change(tmp_path)
    if "objective=classify" in overrides:
        overrides = ["~objective.classes", "~objective.width", "objective._target_=fcmae.tasks.objectives.Classify"]
    with pytest.raises(UsageError, match=message) as error:
        train(tmp_path, *overrides)
    assert len(str(error.value).splitlines()) == 1
