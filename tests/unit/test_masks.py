"""Mask strategies: exact counts, what each of them does, the user's own, and what is said of a wrong one."""

import dataclasses

import pytest
import torch

from fcmae.config import DataConfig, compose, portable, to_dict, upgraded, without_arguments
from fcmae.config.recipe import check_recipe
from fcmae.data.loading import TrainBatches, Workers, explained
from fcmae.data.pixels.decode import Encoded
from fcmae.data.pixels.transforms import pretrain_transform
from fcmae.data.plan import BatchPlan
from fcmae.data.samples import MaskedImages
from fcmae.data.sources.base import Sample
from fcmae.errors import ConfigError, UsageError
from fcmae.masks import BlockMask, GridMask, RandomMask, WeightedMask, create_mask, draw_scores
from fcmae.masks.patches import random_mask
from tests.bad_files import encoded, picture
from tests.conftest import TINY_PRETRAIN

STRATEGIES = {
    "random": RandomMask(),
    "block": BlockMask(),
    "grid": GridMask(),
    "weighted": WeightedMask(),
    "channel": WeightedMask(channel=1),
}


def crops(count=16, size=(64, 96)):
    """Noise on the right half, grey on the left."""
    pixels = torch.full((count, 3, *size), 90, dtype=torch.uint8)
    half = size[1] // 2
    rng = torch.Generator().manual_seed(2)
    pixels[..., half:] = torch.randint(0, 256, (count, 3, size[0], half), dtype=torch.uint8, generator=rng)
    return pixels


def masks_of(mask, count=16, grid=(8, 12), keep=38):
    rng = torch.Generator().manual_seed(5)
    scores = torch.stack([draw_scores(mask, rng, grid, crop) for crop in crops(count)])
    return random_mask(scores, keep)


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("grid", [(8, 12), (4, 3), (1, 1)])
def test_every_strategy_keeps_the_same_number_in_every_image_and_is_a_function_of_the_generator(name, grid):
    keep = max(1, int(0.4 * grid[0] * grid[1]))
    masks = masks_of(STRATEGIES[name], 16, grid, keep)
    assert ((~masks).sum(dim=1) == keep).all()
    torch.manual_seed(1)  # the global generator plays no part
    torch.rand(3)
    assert torch.equal(masks_of(STRATEGIES[name], 16, grid, keep), masks)
    assert keep == grid[0] * grid[1] or len(masks.unique(dim=0)) > 1


def test_random_masks_have_the_bits_of_before_there_were_others():
    noise = draw_scores(RandomMask(), torch.Generator().manual_seed(7), (7, 7), None)
    assert torch.equal(noise, torch.rand(49, generator=torch.Generator().manual_seed(7)))


def neighbours_that_differ(masks, grid=(8, 12)):
    maps = masks.view(-1, *grid)
    return (maps.diff(dim=1).sum() + maps.diff(dim=2).sum()).item()


def test_block_masks_are_contiguous_and_grid_masks_are_spread():
    block, even, grid = (neighbours_that_differ(masks_of(STRATEGIES[name])) for name in ("block", "random", "grid"))
    assert block < 0.6 * even < even < grid
    quarters = (~masks_of(GridMask(), keep=24)).view(16, 4, 2, 6, 2).sum(dim=(2, 4))
    assert (quarters == 1).all()  # one of each four neighbours is visible


def test_weighted_masks_hide_what_varies_or_where_a_channel_is_bright():
    noisy = masks_of(WeightedMask()).view(16, 8, 12)[..., 6:].float().mean()
    calm = masks_of(WeightedMask(power=-1.0)).view(16, 8, 12)[..., 6:].float().mean()
    same = masks_of(WeightedMask(power=0.0)).view(16, 8, 12)[..., 6:].float().mean()
    assert calm < 0.35 < 0.55 < same < 0.65 < 0.85 < noisy
    bright = torch.zeros(3, 32, 32, dtype=torch.uint8)
    bright[1, 8:16] = 200
    hidden = random_mask(draw_scores(WeightedMask(1, floor=1e-6), torch.Generator(), (4, 4), bright)[None], 12)
    assert hidden.view(4, 4).tolist() == [[False] * 4, [True] * 4, [False] * 4, [False] * 4]


class Files:
    classes = None

    def __len__(self):
        return 24

    def __getitem__(self, index):
        return Sample(Encoded(encoded(picture(seed=index), "JPEG"), f"{index}.jpg"), None)

    def label(self, index):
        return None

    def describe(self, index):
        return f"{index}.jpg"


def batches(mask, workers=0, start=0, ranks=1, rank=0, per_image=1, **options):
    data = DataConfig(image_size=32, crops_per_image=per_image)
    dataset = MaskedImages(Files(), pretrain_transform(data), (4, 4), 3, per_image, mask=mask, **options)
    plan = BatchPlan.create(24, 8, None, ranks, 3, per_image)
    return list(TrainBatches(dataset, plan, rank, range(start, 3), Workers(workers)))


@pytest.mark.parametrize("name", ["block", "weighted"])
def test_masks_are_the_same_for_any_workers_ranks_threads_and_restart(name):
    mask = STRATEGIES[name]
    whole = [noise for _, noise in batches(mask)]
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    again = [noise for _, noise in batches(mask, workers=1, start=1)]
    torch.set_num_threads(threads)
    shares = [[noise for _, noise in batches(mask, ranks=2, rank=rank)] for rank in (0, 1)]
    assert all(torch.equal(a, b) for a, b in zip(whole[1:], again, strict=True))
    assert all(torch.equal(a, torch.cat(parts)) for a, parts in zip(whole, zip(*shares, strict=True), strict=True))


def test_each_crop_of_an_image_has_its_own_mask_by_its_own_pixels():
    class Brightness:
        needs_pixels = True

        def scores(self, rng, rows, cols, crop):
            return crop.float().mean().expand(rows * cols)

    for imgs, scores in batches(Brightness(), per_image=2):
        assert torch.equal(scores[:, 0], imgs.float().mean(dim=(1, 2, 3)))


def test_jpegs_for_the_gpu_are_masked_without_their_pixels():
    decoded = [noise for _, noise in batches(BlockMask())]
    undecoded = [noise for _, noise in batches(BlockMask(), on_device=True)]
    assert all(torch.equal(a, b) for a, b in zip(decoded, undecoded, strict=True))


class Wrong:
    needs_pixels = False

    def __init__(self, gives):
        self.gives = gives

    def scores(self, rng, rows, cols, crop):
        if isinstance(self.gives, str):
            raise ValueError(self.gives)
        return self.gives


class Incomplete:
    def scores(self, rng, rows, cols, crop):
        return torch.zeros(rows * cols)


class Static:
    needs_pixels = False

    @staticmethod
    def scores(rng, rows, cols, crop):
        return torch.zeros(rows * cols)


class OtherArguments:
    needs_pixels = False

    def scores(self, crop):
        return crop


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("gives", "message"),
    [
        (torch.zeros(15), r"Wrong.scores must return a float tensor \[16\]; got torch.float32 \[15\]"),
        (torch.zeros(16, dtype=torch.int64), r"float tensor \[16\]; got torch.int64 \[16\]"),
        ([0.5] * 16, r"float tensor \[16\]; got list"),
        (torch.full((16,), torch.nan), "must return finite numbers; got infinity or NaN"),
        ("no cell in the image", "mask: tests.unit.test_masks.Wrong fails: no cell in the image"),
    ],
)
def test_wrong_scores_are_one_line(gives, message, workers):
    with pytest.raises(UsageError, match=message) as raised, explained():
        batches(Wrong(gives), workers)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"_target_": f"{__name__}.Incomplete"}, "mask: .*Incomplete must have the attribute needs_pixels"),
        ({"_target_": f"{__name__}.OtherArguments"}, r"whose scores must take \(rng, rows, cols, crop\); it takes \(s"),
        ({"_target_": "fcmae.masks.RandomMask", "ratio": 0.5}, "mask: .*RandomMask does not take these arguments"),
        ({"_target_": "fcmae.masks.BlockMask", "area": [0.4, 0.1]}, r"mask.area must be two numbers.*got \[0.4, 0.1\]"),
        ({"_target_": "fcmae.masks.BlockMask", "aspect": 2}, r"aspect must be in \(0, 1\]; got 2"),
        ({"_target_": "fcmae.masks.BlockMask", "area": ["a", 1]}, "could not convert string to float: 'a'"),
        ({"_target_": "fcmae.masks.BlockMask", "aspect": [0.5]}, "float.* must be a .* number, not 'list'"),
        ({"_target_": "fcmae.masks.WeightedMask", "power": "high"}, "could not convert string to float: 'high'"),
        ({"_target_": "fcmae.masks.WeightedMask", "power": "nan"}, "power must be finite; got nan"),
        ({"_target_": "fcmae.masks.WeightedMask", "channel": "red"}, "channel must be the number of a channel"),
        ({"_target_": "fcmae.masks.WeightedMask", "channel": -1}, "channel must be the number of a channel"),
        ({"_target_": "fcmae.masks.WeightedMask", "floor": 0}, r"floor must be in \(0, 1\]; got 0"),
        ({"_target_": "torch.nn.Linear"}, "mask._target_ is 'torch.nn.Linear', which must be a class with the methods"),
        ({"_target_": "nowhere.Mask"}, "mask._target_ is 'nowhere.Mask'; expected a class that Python finds"),
    ],
)
def test_a_wrong_mask_is_refused_in_one_line(given, message):
    with pytest.raises(ConfigError, match=message) as raised:
        create_mask(given)
    assert "\n" not in str(raised.value)


def test_a_mask_that_reads_pixels_is_refused_where_the_gpu_decodes():
    given = {"_target_": "fcmae.masks.WeightedMask"}
    with pytest.raises(ConfigError, match="data.decode_on must be cpu with .*WeightedMask, which reads the pixels"):
        create_mask(given, "data.decode_on")
    create_mask({"_target_": "fcmae.masks.BlockMask"}, "gpu")
    create_mask({"_target_": f"{__name__}.Static"}, "gpu")


def test_a_channel_that_images_lack_is_refused_in_one_line():
    with pytest.raises(UsageError, match=r"channel must be from 0 to 2 \(data.in_chans=3\); got 3"):
        draw_scores(WeightedMask(channel=3), torch.Generator(), (2, 2), crops(1)[0])


def test_the_command_line_chooses_strategies_and_their_arguments():
    def mask(*overrides):
        return compose("pretrain", list(overrides)).mask

    assert mask() == {"_target_": "fcmae.masks.RandomMask"}
    assert mask("mask=block", "mask.area=[0.1,0.3]") == {
        "_target_": "fcmae.masks.BlockMask",
        "area": [0.1, 0.3],
        "aspect": 0.3,
    }
    assert mask("mask._target_=tube.py:Tube", "mask.width=3") == {"_target_": "tube.py:Tube", "width": 3}
    assert mask("mask={_target_: a.B, width: 3}") == {"_target_": "a.B", "width": 3}
    for name in ("random", "block", "grid", "weighted"):
        create_mask(mask(f"mask={name}"))
    with pytest.raises(ConfigError, match="mask must be .*; got {'_target_': None}"):
        mask("mask._target_=null")


def test_the_mask_is_part_of_the_recipe():
    def config(*overrides):
        return to_dict(compose("pretrain", list(overrides)))

    check_recipe(config("mask=block"), config("mask=block"))
    for changed in (["mask=random"], ["mask=block", "mask.aspect=0.5"]):
        with pytest.raises(UsageError, match="the recipe differs.*\n  mask: .*BlockMask"):
            check_recipe(config("mask=block"), config(*changed))


def test_an_old_config_had_random_masks_and_the_norm_that_it_says():
    old = to_dict(compose("pretrain", []))
    del old["mask"], old["target"]
    old["model"]["norm_pix_loss"] = False
    new = upgraded(old)
    assert new["mask"] == {"_target_": "fcmae.masks.RandomMask"}
    assert new["target"]["pixels"]["norm"] == "none"
    with pytest.raises(
        UsageError, match="the recipe differs.*\n  mask: .*RandomMask.*\n  target.pixels.norm: 'none' -> 'patch'"
    ):
        check_recipe(new, to_dict(compose("pretrain", ["mask=block"])))
    check_recipe(new, to_dict(compose("pretrain", ["target.pixels.norm=none"])))
    with pytest.raises(ConfigError, match="^model.norm_pix_loss is now target.pixels.norm; patch stands for true"):
        compose("pretrain", ["model.norm_pix_loss=false"])


def test_arguments_of_the_users_own_classes_stay_on_the_machine():
    own = ("mask._target_=a.B", "mask.password=p", "target.own._target_=a.C", "target.own.password=p")
    config = to_dict(compose("pretrain", list(own)))
    assert "password" not in str(without_arguments(config))
    assert without_arguments(config)["target"]["pixels"]["norm"] == "patch"
    kept = portable(config)
    assert "mask" not in kept
    assert "target" not in kept
    assert portable(to_dict(compose("pretrain", ["mask=block"])))["mask"]["aspect"] == 0.3


def test_a_mask_that_a_checkpoint_names_is_called_only_if_it_is_ours_or_allowed(tmp_path):
    from fcmae.models.build import config_of

    cfg = compose("pretrain", [*TINY_PRETRAIN[1:], f"mask._target_={__name__}.Wrong", "mask.gives=null"])
    state = {"task": "pretrain", "config": dataclasses.asdict(cfg), "model": {}}
    with pytest.raises(ConfigError, match=rf"x.pt names the class {__name__}.Wrong as its mask; .*allow=\["):
        create_mask(config_of(state, tmp_path / "x.pt").mask)
    create_mask(config_of(state, tmp_path / "x.pt", [f"{__name__}.Wrong"]).mask)
    state["config"]["mask"] = {"_target_": "fcmae.masks.GridMask"}
    create_mask(config_of(state, tmp_path / "x.pt").mask)
