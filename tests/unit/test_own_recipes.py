"""``experiment=own/*``: settings that follow from the images, each of which the user may set instead."""

import random

import numpy as np
import pytest
from PIL import Image

from fcmae.config import compose, own
from fcmae.config.own import Facts, recommend
from fcmae.config.training import seconds_of
from fcmae.data.pixels.crops import RandomCrop
from fcmae.errors import ConfigError
from fcmae.messages import print_once


@pytest.mark.parametrize(
    ("facts", "size", "expected"),
    [
        # image size, zoom, crops, strides, mask ratio, batch, lr, epochs, warm-up
        (Facts(2000, 300, 300, True), "small", (224, None, 4, None, 0.6, 256, 1.5e-3, 1000, 50)),  # as the solar cells
        (Facts(2000, 300, 300, False), "small", (224, None, 1, None, 0.6, 16, 5e-4, 100, 5)),
        (Facts(60_000, 28, 28, True), "medium", (32, None, 1, [1, 2, 2, 2], 0.5, 1024, 2.4e-3, 333, 16.65)),
        (Facts(5300, 64, 64, True), "small", (64, None, 1, [1, 2, 2, 2], 0.6, 256, 1.5e-3, 377, 18.85)),
        (Facts(100_000, 120, 100, True), "medium", (96, None, 1, [2, 2, 2, 2], 0.6, 1024, 2.4e-3, 200, 10)),
        (Facts(10**6, 400, 500, True), "large", (224, None, 4, None, 0.6, 4096, 2.4e-3, 200, 10)),
        (Facts(20, 400, 500, True), "small", (224, None, 1, None, 0.6, 16, 5e-4, 2000, 100)),
        (Facts(1, 10, 5000, True), "small", (32, [3.2, 7.16], 1, [1, 2, 2, 2], 0.5, 1, 5e-4, 2000, 100)),
        (Facts(1, 3000, 3000, True, 20_000), "small", (224, None, 4, None, 0.6, 256, 1.5e-3, 100, 5)),
    ],
)
def test_the_rules(facts, size, expected):
    assert tuple(recommend(facts, size).values()) == expected


@pytest.fixture
def photos(tmp_path):
    for number in range(40):
        pixels = np.zeros((100 + number, 130, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    return tmp_path


def test_a_config_has_them_and_what_the_user_sets_counts(photos, capsys):
    own._told.clear()
    print_once.cache_clear()
    cfg = compose("pretrain", ["experiment=own/small", f"data.path={photos}", "trainer.device=cpu"])
    assert (cfg.data.size, cfg.model.strides, cfg.model.mask_ratio) == ((96, 96), [2, 2, 2, 2], 0.6)
    assert cfg.data.crop_zoom is None
    assert (cfg.optim.global_batch_size, cfg.optim.lr, cfg.schedule.epochs) == (16, 5e-4, 2000)
    assert (cfg.schedule.warmup_epochs, cfg.trainer.checkpoint_every_epochs) == (100, 200)
    said = capsys.readouterr().err
    assert said.count("own/small: 40 images, about 119 x 130 px, on a CPU: data.image_size=96") == 1
    given = ["data.image_size=64", "optim.global_batch_size=32", "schedule.epochs=10"]
    cfg = compose("pretrain", ["experiment=own/medium", f"data.path={photos}", "trainer.device=cpu", *given])
    assert (cfg.model.strides, cfg.model.mask_ratio, cfg.model.backbone) == ([1, 2, 2, 2], 0.6, "convnextv2_tiny")
    assert (cfg.optim.lr, cfg.schedule.warmup_epochs, cfg.trainer.eval_every_epochs) == (5.3e-4, 0.5, 1)
    said = capsys.readouterr().err
    assert (
        "data.image_size=64 data.crop_zoom=null data.crops_per_image=1 model.strides=[1,2,2,2] model.mask_ratio=0.6 "
        in said
    )
    assert " model.mask_ratio=0.6 optim.global_batch_size=32 optim.lr=0.00053 schedule.epochs=10 " in said
    assert " schedule.warmup_epochs=0.5\n" in said
    assert "experiment=own/small is made for 40 images" in said
    cfg = compose("pretrain", ["experiment=own/small", f"data.path={photos}", "model.strides=null"])
    assert (cfg.model.strides, cfg.model.mask_ratio) == (None, 0.5)  # 9 patches


def test_crops_show_all_of_long_images(tmp_path, capsys):
    """The boxes of data.crop_scale do not fit: the sampler would take the same central one every time."""
    own._told.clear()
    print_once.cache_clear()
    for name in ("one", "two"):
        Image.new("RGB", (1000, 100)).save(tmp_path / f"{name}.png")
    command = ["experiment=own/small", f"data.path={tmp_path}", "trainer.device=cpu"]
    data = compose("pretrain", command).data
    assert (data.size, data.crop_zoom) == ((96, 96), [0.96, 2.15])
    boxes = [RandomCrop(data).box((100, 1000), random.Random(seed).random) for seed in range(50)]
    assert min(box.left for box in boxes) < 100
    assert max(box.left + box.width for box in boxes) > 900
    assert {round(box.height / 20) for box in boxes} == {2, 3, 4, 5}
    said = capsys.readouterr().err
    assert "see the middle 96 x 96 px alone; data.image_size=[96,960] shows whole images" in said
    data = compose("pretrain", [*command, "data.image_size=[96,960]"]).data
    assert data.crop_zoom == [0.96, 2.15]
    for given in ("data.crop_scale=[0.01,0.1]", "data.crop_ratio=[9,11]", "data.fit=pad"):
        assert compose("pretrain", [*command, given]).data.crop_zoom is None


def test_windows_count_as_images(tmp_path, capsys):
    """A slide had batches of one window and 2,000 epochs of all of them."""
    Image.new("RGB", (640, 640)).save(tmp_path / "slide.png")
    command = ["experiment=own/small", f"data.path={tmp_path}", "trainer.device=cpu", "data.fit=pad"]
    cfg = compose("pretrain", [*command, "data.windows_per_image=4000"])
    assert (cfg.optim.global_batch_size, cfg.schedule.epochs) == (16, 50)
    said = capsys.readouterr().err
    assert "own/small: 1 image of 4,000 windows, about 640 x 640 px" in said
    assert "memorises" not in said


def test_a_folder_of_one_image_has_a_line(tmp_path, capsys):
    Image.new("RGB", (64, 64)).save(tmp_path / "one.png")
    compose("pretrain", ["experiment=own/small", f"data.path={tmp_path}", "trainer.device=cpu"])
    said = capsys.readouterr().err
    assert "own/small: 1 image, about 64 x 64 px" in said
    assert "own/small: 1 image: a network memorises so few; add images or start from published weights" in said


def test_mistakes_that_the_recipe_meets_too_are_said_once(photos):
    with pytest.raises(ConfigError) as raised:
        compose("pretrain", ["experiment=own/small", f"data.path={photos}", "data.in_chans=1", "trainer.device=cpu"])
    assert [line.split(" (")[0] for line in raised.value.mistakes] == [
        "data.mean must be 1 number, one per channel",
        "data.std must be 1 positive number, one per channel",
    ]


def test_images_that_cannot_be_read_are_refused_before_a_config_is_printed(fcmae_here, tmp_path):
    Image.fromarray(np.full((40, 40), 300, np.uint16)).save(tmp_path / "one.png")
    unreadable = "cannot read the image {}/one.png: its pixels have 16 bits; data.bit_depth is 8; set it to the bits"
    given = ("pretrain", "experiment=own/small", f"data.path={tmp_path}", "trainer.device=cpu")
    for more in (["--cfg", "job", "--resolve"], ["hydra.run.dir=run"]):
        said = fcmae_here(*given, *more, check=2)
        assert said.stdout == ""
        assert [line.split(", 9")[0] for line in said.stderr.splitlines()] == [
            f"fcmae pretrain: {unreadable.format(tmp_path)} that are used"
        ]
    assert not (tmp_path / "run").exists()


def test_without_images_another_message_says_so():
    cfg = compose("pretrain", ["experiment=own/large", "data.path=/nowhere"])
    assert cfg.data.size == (224, 224)


def test_times():
    assert [seconds_of(text) for text in ("90s", "30min", "1.5h", "2d", "5", "min", "-3h")] == [
        *(90, 1800, 5400, 172_800),
        *(0, 0, 0),
    ]
    with pytest.raises(
        ConfigError, match="trainer.budget must be a time such as 90s, 30min or 8h, or null; got 'long'"
    ):
        compose("pretrain", ["data=synthetic", "trainer.budget=long"])
