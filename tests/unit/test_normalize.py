"""``data.normalize``: the same pixels in training, evaluation and exports; exact statistics in bounded memory."""

import weakref

import numpy as np
import pytest
import torch
import yaml

from fcmae.config import AugmentConfig, DataConfig, EvaluateConfig, LoaderConfig, PrepareConfig, from_dict, to_dict
from fcmae.config.prepare import PreparedDataConfig
from fcmae.config.unset import UnsetDataConfig, settled
from fcmae.data.pixels.decode import read_file
from fcmae.data.pixels.transforms import eval_transform, finetune_transform, normalized, pretrain_transform
from fcmae.data.prepare import measure
from fcmae.data.prepare.command import prepare
from fcmae.data.prepare.statistics import ascending, from_ascending
from fcmae.errors import ConfigError, WeightsError
from fcmae.interchange import preprocessing

SIZE = 32
ALONE = LoaderConfig(workers=0)
LOW, HIGH = [0.25, 0.1], [0.75, 0.8]
TYPES = {"uint8": ({}, 255), "uint16": ({"bit_depth": 16}, 65535), "float32": ({"dtype": "float32"}, 1)}
MODES = {
    "dataset": {"mean": [0.5, 0.4], "std": [0.2, 0.3]},
    "image": {},
    "window": {"low": LOW, "high": HIGH},
    "percentile": {"low": LOW, "high": HIGH},
    "none": {},
}


def images(dtype, count=1):
    rng = np.random.default_rng(0)
    values = rng.random((count, 2, SIZE, SIZE))
    return values.astype("float32") if dtype == "float32" else (values * TYPES[dtype][1]).round().astype(dtype)


def expected(array, mode):
    """By the definition, in float64."""
    mean, std = (np.array(MODES["dataset"][name])[:, None, None] for name in ("mean", "std"))
    low, high = np.array(LOW)[:, None, None], np.array(HIGH)[:, None, None]
    if mode == "dataset":
        return (array - mean) / std
    if mode == "image":
        return (array - np.nanmean(array, (1, 2), keepdims=True)) / np.nanstd(array, (1, 2), keepdims=True)
    return array if mode == "none" else 2 * (array.clip(low, high) - low) / (high - low) - 1


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("mode", MODES)
def test_every_way_to_read_gives_the_same_pixels(tmp_path, mode, dtype):
    array = images(dtype)[0]
    np.save(tmp_path / "a.npy", array)
    keys, white = TYPES[dtype]
    cfg = DataConfig(in_chans=2, image_size=SIZE, normalize=mode, crop_scale=[1, 1], crop_ratio=[1, 1], crop_pct=1.0,
                     hflip=0.0, **keys, **MODES[mode])  # fmt: skip
    image = read_file(tmp_path / "a.npy")
    found = [normalized(read(image), cfg) for read in (pretrain_transform(cfg), eval_transform(cfg))]
    found.append(finetune_transform(cfg, AugmentConfig())(image))
    for pixels in found:
        assert pixels.dtype == torch.float32
        np.testing.assert_allclose(pixels.numpy(), expected(array / white, mode), atol=2e-5)
    assert from_dict(DataConfig, to_dict(cfg)) == cfg  # as a checkpoint keeps it


def test_pixels_without_a_value_do_not_count_in_an_images_own_mean(tmp_path):
    array = images("float32")[0]
    array[0, :4], array[1, 5:9, 5:9] = np.nan, -1
    np.save(tmp_path / "a.npy", array)
    keys = {"dtype": "float32", "nodata": [None, -1], "normalize": "image", "in_chans": 2, "image_size": 40}
    cfg = DataConfig(fit="pad", hflip=0.0, **keys)
    crop, valid = pretrain_transform(cfg).seen(read_file(tmp_path / "a.npy"))
    array[1, 5:9, 5:9] = np.nan
    assert np.array_equal(valid[:, :SIZE, :SIZE].numpy(), ~np.isnan(array))
    wanted = np.pad(np.nan_to_num(expected(array.astype(np.float64), "image")), [(0, 0), (0, 8), (0, 8)])
    np.testing.assert_allclose(crop.numpy(), wanted, atol=1e-5)
    whole = DataConfig(**{**keys, "image_size": SIZE}, crop_pct=1.0)
    np.testing.assert_allclose(eval_transform(whole)(read_file(tmp_path / "a.npy")), wanted[:, :SIZE, :SIZE], atol=1e-5)


def test_a_constant_channel_is_0_by_its_own_mean(tmp_path):
    for dtype in ("uint8", "float32"):
        np.save(tmp_path / "a.npy", np.full((1, SIZE, SIZE), 7, dtype))
        keys = {"dtype": "float32"} if dtype == "float32" else {}
        cfg = DataConfig(in_chans=1, image_size=SIZE, normalize="image", **keys)
        assert eval_transform(cfg)(read_file(tmp_path / "a.npy")).abs().max() < 1e-5  # of the resize


def run(folder, **given):
    keys = {"path": str(folder), "in_chans": 2, "stats": True, "normalize": "percentile", **given}
    said = prepare(PrepareConfig(loader=ALONE, data=PreparedDataConfig(**keys)))
    return yaml.safe_load(said)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("reverse", [False, True], ids=["in order", "as other processes end"])
def test_percentiles_are_exact(tmp_path, dtype, reverse, monkeypatch):
    array = images(dtype, 7)
    if dtype == "float32":
        array = (array - 0.5) * 1e3
    for i, image in enumerate(array):
        np.save(tmp_path / f"{i}.npy", image)
    if reverse:
        given = measure.in_processes
        monkeypatch.setattr(measure, "in_processes", lambda *args: reversed(list(given(*args))))
    monkeypatch.setattr(measure, "CHUNK", 2)
    keys, white = TYPES[dtype]
    found = run(tmp_path, percentiles=[1, 99.5], **keys)
    for channel in range(2):
        values = array[:, channel].ravel()
        low, high = (np.percentile(values, p, method="inverted_cdf") / white for p in (1, 99.5))
        assert found["low"][channel] == pytest.approx(low, rel=1e-5)
        assert found["high"][channel] == pytest.approx(high, rel=1e-5)
    assert DataConfig(**found).clips


def test_the_order_of_float32s_bits_is_that_of_the_numbers():
    values = np.array([-np.inf, -2.5, -1e-40, -0.0, 0.0, 1e-40, 3, np.inf], np.float32)
    bits = ascending(values)
    assert (np.diff(bits.astype(np.int64)) > 0).sum() == 6  # -0 is 0
    assert np.array_equal(from_ascending(bits), values)


def test_memory_does_not_grow_with_the_images(monkeypatch, tmp_path):
    """No process's result is kept."""
    kept = []
    monkeypatch.setattr(measure, "CHUNK", 1)
    for i, image in enumerate(images("uint16", 5)):
        np.save(tmp_path / f"{i}.npy", image)
    given = measure.in_processes

    def watched(*args):
        for i, (sums, counts) in given(*args):
            kept.append(weakref.ref(counts))
            assert sum(ref() is not None for ref in kept) <= 3
            yield i, (sums, counts)
            del counts

    monkeypatch.setattr(measure, "in_processes", watched)
    run(tmp_path, bit_depth=16)
    assert len(kept) == 5


def test_a_prepared_data_set_keeps_them(tmp_path):
    for i, image in enumerate(images("uint8", 4)):
        np.save(tmp_path / f"{i}.npy", image)
    out = tmp_path / "out"
    data = PreparedDataConfig(path=str(tmp_path), in_chans=2, stats=True, normalize="percentile")
    said = prepare(PrepareConfig(loader=ALONE, data=data, out=str(out)))
    assert f"--config-dir {out}/conf data=prepared" in said
    given = yaml.safe_load((out / "conf" / "data" / "prepared.yaml").read_text())
    cfg = from_dict(DataConfig, given)
    assert (cfg.name, cfg.path, cfg.normalize) == ("webdataset", str(out), "percentile")
    assert len(cfg.low) == len(cfg.mean) == 2
    assert (
        prepare(PrepareConfig(loader=ALONE, data=data, out=str(out))) == said
    )  # the folder is still one of the command


def test_commands_take_it_from_a_checkpoint():
    own = DataConfig(in_chans=2, normalize="window", low=0.2, high=[0.8, 0.9])
    assert (own.mean, own.std) == ([0.5, 0.55], pytest.approx([0.3, 0.35]))
    assert settled(DataConfig, UnsetDataConfig(), to_dict(own)).mean == own.mean
    assert settled(DataConfig, UnsetDataConfig(normalize="image"), to_dict(own)).mean == []
    cfg = from_dict(EvaluateConfig, {"checkpoint": "x", "data": {"low": 0.4}}).merge_data(own)
    assert cfg.mean == pytest.approx([0.6, 0.65])
    cfg = from_dict(EvaluateConfig, {"checkpoint": "x", "data": {"normalize": "image"}}).merge_data(own)
    assert cfg.mean == []
    old = {name: value for name, value in to_dict(DataConfig()).items() if name not in ("normalize", "low", "high")}
    assert from_dict(DataConfig, old) == DataConfig()


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"normalize": "minmax"}, "data.normalize must be one of dataset, image, window, percentile, none; got 'minm"),
        ({"normalize": "window"}, "data.low=None and data.high=None must both be set with data.normalize=window"),
        ({"low": 1}, "data.low=1 and data.high=None must both be set"),
        ({"normalize": "window", "low": 1, "high": [2, 1, 2]}, "data.low must be a number or a list of 3, one per"),
        ({"normalize": "window", "low": [1, 2], "high": 3}, "data.low must be a number or a list of 3"),
        ({"normalize": "image", "mean": [1, 2, 3], "std": [1, 1, 1]}, "data.mean must be unset, as data.std, with"),
        ({"normalize": "image", "decode_on": "gpu"}, "and normalize not image"),
    ],
)  # fmt: skip
def test_mistakes(given, problem):
    with pytest.raises(ConfigError, match=problem):
        DataConfig(**given)


def test_augmentation_of_8_bits_is_refused_for_float32():
    with pytest.raises(ConfigError, match="auto_augment must be null with data.normalize=image"):
        finetune_transform(DataConfig(normalize="image"), AugmentConfig(auto_augment="rand-m9"))


@pytest.mark.parametrize("mode", MODES)
def test_exports_say_it_or_are_refused(mode, tmp_path):
    cfg = DataConfig(in_chans=2, image_size=SIZE, crop_pct=1.0, normalize=mode, **MODES[mode])
    for library in ("timm", "transformers"):
        if mode in ("dataset", "none"):
            preprocessing.check_normalisation(cfg, library)
        else:
            with pytest.raises(WeightsError, match=rf"data.normalize={mode}.*--to onnx, official or viscy"):
                preprocessing.check_normalisation(cfg, library)
    preprocessing.check_normalisation(cfg, "onnx")
    array = images("uint8")[0]
    np.save(tmp_path / "a.npy", array)
    values = {}
    exec(preprocessing.steps(cfg).replace("FILE.npy", str(tmp_path / "a.npy")), values)
    np.testing.assert_allclose(values["imgs"][0].numpy(), expected(array / 255, mode), atol=1e-5)
    assert DataConfig(**{**preprocessing.read_extra({"fcmae": preprocessing.extra(cfg)}), "in_chans": 2,
                         "mean": cfg.mean, "std": cfg.std}).normalize == mode  # fmt: skip
