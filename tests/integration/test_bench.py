import functools
import json
import sys
import types

import pytest
import torch

from fcmae.bench import augment, feed, start
from fcmae.bench.profile import _kind
from fcmae.cli import main
from fcmae.errors import UsageError
from tests.conftest import run_python, start_python

STEP = ["bench", "step", "models=[convnextv2_atto]", "device=cpu", "precision=float32", "batch_size=2", "image_size=64"]


def test_step_measures_every_engine_and_writes_json(tmp_path, capsys):
    assert main([*STEP, "repeats=2", "--json", str(tmp_path / "out" / "step.json"), "warm_up=1"]) == 0
    printed = capsys.readouterr().out
    assert "packed is" in printed
    report = json.loads((tmp_path / "out" / "step.json").read_text())
    assert [row["engine"] for row in report["results"]] == ["packed", "masked", "timm"]
    assert all(row["images_per_second"] > 0 for row in report["results"])
    assert report["machine"]["torch"]
    assert report["config"]["batch_size"] == 2


def test_fine_tuning_is_measured_against_timm(capsys, tmp_path):
    assert main([*STEP, "task=finetune", "repeats=1", "warm_up=1"]) == 0
    assert "convnextv2_atto: dense is " in capsys.readouterr().out
    few = ["bench", "evaluate", *STEP[2:], "repeats=1", "rounds=1", "warm_up=1"]
    assert main([*few, "--json", str(tmp_path / "evaluate.json")]) == 0
    rows = json.loads((tmp_path / "evaluate.json").read_text())["results"]
    assert [row["engine"] for row in rows] == ["dense", "timm"]
    assert all(row["images_per_second"] > 0 and row["difference"] < 1e-5 for row in rows)


@pytest.mark.slow
def test_the_start_of_a_command_is_measured(tmp_path, monkeypatch):
    """Only the first process imports everything, which takes seconds."""
    started = []

    def popen(command, env, stdout, stderr):
        started.append(command)
        fresh = len(started) == 1
        return start_python(tmp_path, *command[1:], fresh=fresh, stdout=stdout, stderr=stderr, variables=env)

    monkeypatch.setattr(start, "subprocess", types.SimpleNamespace(Popen=popen))
    tiny = ("model.dims=[8,12,16,24]", "model.depths=[1,1,1,1]", "trainer.device=cpu", "loader.workers=0")
    cfg = ("tasks=[pretrain]", "model=demo", "batch_size=2", "image_size=32", "repeats=1")
    given = [*cfg, f"overrides=[{','.join(map(json.dumps, tiny))}]"]
    results = start.run(given, tmp_path / "start.json")
    assert [result.caches for result in results] == ["empty", "filled"]
    for result in results:
        assert 0 < result.first_step <= result.tenth_step <= result.end
    with pytest.raises(UsageError, match=r"fcmae pretrain ended with 2: .*optim.lrr: unknown key"):
        start.run([*cfg, "overrides=[optim.lrr=1]"])
    assert {command[0] for command in started} == {sys.executable}


@pytest.mark.slow
def test_step_takes_the_decoder(capsys):
    assert main([*STEP, "engines=[packed]", "decoder=unet", "pred_patch_size=4", "repeats=1", "warm_up=1"]) == 0
    assert "convnextv2_atto   packed" in capsys.readouterr().out


FORKED = """
import functools, sys
import torch.multiprocessing as mp
mp.spawn = functools.partial(mp.start_processes, start_method="fork")  # importing torch takes seconds
from fcmae.cli import main
from fcmae.errors import UsageError
sys.exit(main())
"""


@pytest.mark.slow
@pytest.mark.parametrize("what", [(), ("task=finetune", "exchange=ddp")])
def test_scaling_measures_one_and_two_ranks(tmp_path, what):
    sizes = ("models=[convnextv2_atto]", "batch_size=2", "image_size=64", "repeats=1", "warm_up=1", "ranks=[1,2]")
    run_python(
        tmp_path,
        "-c",
        FORKED,
        "bench",
        "scaling",
        *sizes,
        *what,
        "device=cpu",
        "precision=float32",
        "--json",
        "scaling.json",
    )
    rows = json.loads((tmp_path / "scaling.json").read_text())["results"]
    shapes = [(row["mode"], row["ranks"], row["batch_size"]) for row in rows]
    assert shapes == [("weak", 1, 2), ("weak", 2, 2), ("strong", 1, 2), ("strong", 2, 1)]
    for row in rows:
        assert row["images_per_second"] == pytest.approx(row["ranks"] * row["batch_size"] / row["ms"] * 1e3)
        assert row["exposed_ms"] >= 0
        assert (row["bus_gb_per_second"] > 0) == (row["ranks"] > 1)
    assert rows[0]["efficiency"] == rows[2]["efficiency"] == 1


def test_a_profile_knows_our_kernels():
    kernels = pytest.importorskip("fcmae.kernels.depthwise_triton")
    names = [name for name in vars(kernels) if name.endswith("_kernel")]
    assert len(names) == 3
    assert {_kind(name) for name in names} == {"depthwise"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_kernels_need_a_gpu(capsys):
    assert main(["bench", "kernels"]) == 2
    assert "bench kernels needs a GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("engines=[sparse]", "engines must be some of packed, masked, minkowski, timm, dense, fp8; got 'sparse'"),
        ("engines=[packed,fp8]", "precision=fp8 needs stages whose width is a multiple of 16"),
        ("batch=3", "batch: unknown key; must be one of models, task, engines"),
        ("decoder=large", "decoder must be one of light, unet; got 'large'"),
        ("pred_patch_size=12", "pred_patch_size must be a divisor of 32"),
        ("repeats=0", "repeats must be a positive integer; got 0"),
        ("models=[resnet18]", "not a ConvNeXt known to timm"),
    ],
)
def test_a_mistake_is_named(override, message, capsys):
    assert main([*STEP, override]) == 2
    assert message in capsys.readouterr().err


DATA = ["bench", "data", "images=64", "batch_size=8", "workers=2", "repeats=1", "device=cpu", "data.image_size=64"]


def photo_folder(folder):
    from tests.unit.test_crops import texture
    from tests.unit.test_pixels import encoded

    (folder / "photos").mkdir()
    (folder / "photos" / "a.png").write_bytes(encoded(texture(320, 400), "PNG").data)
    return f"photos={folder / 'photos'}"


@pytest.mark.slow
def test_data_compares_reading_with_torchvision_and_feeds_a_step(tmp_path, capsys, monkeypatch):
    tiny = {"decoder_embed_dim": 16, "depths": (1, 1, 1, 1)}
    monkeypatch.setattr(feed, "FCMAE", functools.partial(feed.FCMAE, **tiny))
    arguments = [
        *DATA,
        photo_folder(tmp_path),
        "models=[convnextv2_atto]",
        "crops=[1,2]",
        "step_batch=8",
        "seconds=0.1",
    ]
    assert main([*arguments, "variants=[baseline,files,shards]", "--json", str(tmp_path / "data.json")]) == 0
    report = json.loads((tmp_path / "data.json").read_text())
    assert [row["variant"] for row in report["results"]] == ["baseline", "files", "shards"]
    for row in report["results"]:
        assert row["images_per_second"] > 0
        assert list(row["stages"]) == ["read", "decode", "crop", "collate", "copy"]
    names = ["synthetic", "files", "files, 2 crops", "shards", "shards, 2 crops"]
    assert [row["feed"] for row in report["feeds"]] == names
    assert report["feeds"][0]["share"] == 1
    assert "GPUs at 4000/s" in capsys.readouterr().out


def test_data_of_ones_own_is_measured_too(tmp_path, capsys):
    from fcmae.bench import photos

    jpegs = tmp_path / "mine"
    photos.write_folder(jpegs, photos.variations([photos._clouds(0, 300, 300)], 32))
    arguments = [*DATA, photo_folder(tmp_path), f"data.path={jpegs}", "variants=[]", f"folder={tmp_path}"]
    assert main(arguments) == 0
    assert "\nown " in capsys.readouterr().out


@pytest.mark.slow
def test_augmentation_is_measured_on_both_sides(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(augment, "CROPS", 8)
    arguments = [*DATA, photo_folder(tmp_path), "finetune=[convnextv2_atto]", "step_batch=8", "seconds=0.1"]
    assert main([*arguments, "variants=[shards]", "--json", str(tmp_path / "augment.json")]) == 0
    rows = json.loads((tmp_path / "augment.json").read_text())["results"]["shards"]
    found = {(row["measured"], row["on"]) for row in rows}
    places = {(measured, place) for measured in (augment.ALONE, augment.READ) for place in augment.PLACES}
    assert found == places | {("convnextv2_atto", on) for on in (*augment.PLACES, "synthetic")}
    assert all(row["images_per_second"] > 0 for row in rows)
    assert "augment.on=gpu" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("variants=[disk]", "variants must be some of baseline, files, shards, raw; got 'disk'"),
        ("images=63", "images must be 64 or more"),
        ("photos=nowhere", "photos is nowhere; it has no RGB or grey images"),
    ],
)
def test_a_mistake_about_data_is_named(override, message, capsys):
    assert main([*DATA, override]) == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("ranks=[3]", "batch_size must be a multiple of 3 in mode strong; got 256"),
        ("ranks=[0]", "ranks must be positive integers; got [0]"),
        ("modes=[strange]", "modes must be some of weak, strong; got 'strange'"),
        ("models=[resnet18]", "not a ConvNeXt known to timm"),
        ("image_size=65", "65"),
    ],
)
def test_a_mistake_in_scaling_is_named(override, message, capsys):
    assert main(["bench", "scaling", "device=cpu", override]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_step_measures_the_price_of_targets(tmp_path, capsys):
    kinds = "targets=[pixels,hog,laplacian,labels,teacher]"
    args = ("engines=[packed]", "repeats=1", "warm_up=1", "teacher=test_vit", "--json", str(tmp_path / "step.json"))
    assert main([*STEP, *args, kinds]) == 0
    assert len(json.loads((tmp_path / "step.json").read_text())["results"]) == 1
    assert main([*STEP, *args, "targets=[pixels,depth]"]) == 2
    assert "targets must be some of pixels, hog, laplacian, labels, teacher; got 'depth'" in capsys.readouterr().err
    assert main([*STEP, *args, kinds, "teacher=no_such_network"]) == 2
    assert "teacher=no_such_network gives no feature map: " in capsys.readouterr().err


def test_formats_are_measured_against_a_plain_dataset(tmp_path, capsys):
    args = ["images=32", "batch_size=4", "workers=1", "repeats=1", "device=cpu", "data.image_size=64"]
    assert main(["bench", "data", "formats=[npy]", *args, "--json", str(tmp_path / "formats.json")]) == 0
    assert capsys.readouterr().out.splitlines()[0].split()[:3] == ["format", "plain", "img/s"]
    (row,) = json.loads((tmp_path / "formats.json").read_text())["results"]
    assert row["format"] == "npy"
    assert min(row["plain"], row["ours"], row["plain_per_cpu"], row["ours_per_cpu"]) > 0
    assert main(["bench", "data", "formats=[bmp]", *args]) == 2
    assert "formats must be some of npy, tiff, zarr, s3; got 'bmp'" in capsys.readouterr().err
