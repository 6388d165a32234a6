"""Tar files made of any source, and the mean and deviation of its images."""

import hashlib
import io
import json
import os
import tarfile

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from fcmae.config import compose
from fcmae.data.pixels.crops import resize
from fcmae.data.pixels.decode import Encoded, PixelFormat, decode, to_stored
from fcmae.data.prepare.command import prepare
from fcmae.data.prepare.shards import Encoding, encode
from fcmae.data.sources import ImageFolder, WebDataset
from fcmae.errors import ConfigError, FCMAEError, ImageError, UsageError
from tests.bad_files import encoded, npy, picture


@pytest.fixture
def folder(tmp_path):
    """60 JPEG files of several sizes in two classes, two of which cannot be read."""
    for i in range(60):
        path = tmp_path / "images" / ("cat", "dog")[i % 2] / f"{i:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"" if i in (7, 33) else encoded(picture(30 + i, 90 - i, seed=i), "JPEG"))
    return tmp_path / "images"


def run(folder, *overrides):
    own = [f"data.path={folder}", "loader.workers=1", "samples_per_shard=16"]
    return prepare(compose("prepare", [*own, *overrides]))


def contents(out):
    """Everything but when it was made."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in out.iterdir() if "fcmae-index" not in p.name}


def test_the_files_as_they_are_shuffled(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert "58 images in 4 tar files" in run(folder, f"out={out}")
    assert "60 images in 4 tar files: about" in capsys.readouterr().err
    source, shards = ImageFolder(folder), WebDataset(out)
    assert shards.classes == source.classes
    seen = []
    for i, sample in enumerate(shards):
        index = int(os.path.basename(shards.describe(i)).split(".")[0])
        assert (sample.image.data, sample.label) == (source[index].image.data, source.label(index))
        seen.append(index)
    unreadable = (out / "unreadable.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in unreadable] == [str(folder / "dog" / f"{i:02d}.jpg") for i in (7, 33)]
    bad = {i for i in range(60) if source.describe(i) in {line.split("\t")[0] for line in unreadable}}
    assert sorted(seen) == sorted(set(range(60)) - bad)
    assert seen != sorted(seen)
    run(folder, f"out={tmp_path / 'unshuffled'}", "shuffle=false")
    assert [s.label for s in WebDataset(tmp_path / "unshuffled")] == sorted(s.label for s in shards)
    run(folder, f"out={tmp_path / 'seed'}", "seed=1")
    assert contents(tmp_path / "seed")["train-000000.tar"] != contents(out)["train-000000.tar"]


def test_a_short_side_is_resized_and_small_images_stay(folder, tmp_path):
    out = tmp_path / "out"
    run(folder, f"out={out}", "short_side=40", "quality=95")
    source, shards = ImageFolder(folder), WebDataset(out)
    for i, sample in enumerate(shards):
        original = source[int(os.path.basename(shards.describe(i)).split(".")[0])].image
        pixels = decode(original, 3)
        if min(pixels.shape[1:]) <= 40:
            assert sample.image.data == original.data
        else:
            resized = Image.fromarray(resize(pixels, [40]).permute(1, 2, 0).numpy())
            assert min(resized.size) == 40
            assert sample.image.data == encoded(resized, "JPEG", quality=95, restart_marker_rows=1, optimize=True)
            plain = Encoded(encoded(resized, "JPEG", quality=95), "plain")
            assert torch.equal(decode(sample.image, 3), decode(plain, 3))


def test_pixels_instead_of_files(folder, tmp_path):
    out = tmp_path / "out"
    run(folder, f"out={out}", "short_side=40", "encode=npy")
    source, shards = ImageFolder(folder), WebDataset(out)
    for i, sample in enumerate(shards):
        assert sample.image.data.startswith(b"\x93NUMPY")
        pixels = decode(source[int(os.path.basename(shards.describe(i)).split(".")[0])].image, 3)
        wanted = resize(pixels, [40]) if min(pixels.shape[1:]) > 40 else pixels
        assert torch.equal(decode(sample.image, 3), wanted)


@pytest.mark.parametrize(
    ("shape", "dtype", "bit_depth", "ending"),
    [
        ((1, 50, 60), torch.uint8, 8, "png"),
        ((3, 50, 60), torch.uint8, 8, "png"),
        ((4, 50, 60), torch.uint8, 8, "png"),
        ((5, 50, 60), torch.uint8, 8, "npy"),
        ((1, 50, 60), torch.uint16, 16, "npy"),
    ],
)
def test_pixels_without_a_file_are_kept_exactly(shape, dtype, bit_depth, ending):
    pixels = torch.randint(0, 2**bit_depth, shape, dtype=torch.int32).to(dtype)
    to = PixelFormat(shape[0], bit_depth)
    found, content = encode(pixels, Encoding(to))
    assert found == ending
    assert torch.equal(decode(Encoded(content, "x"), *to), pixels)
    small, content = encode(pixels, Encoding(to, short_side=25))
    assert small == ("jpg" if shape[0] in (1, 3) and bit_depth == 8 else ending)
    assert decode(Encoded(content, "x"), *to).shape == (shape[0], 25, 30)


@pytest.mark.parametrize("encode_as", ["jpeg", "npy"])
def test_resized_images_of_12_bits_are_read_as_those_that_are_kept(encode_as, tmp_path):
    (tmp_path / "images").mkdir()
    for name, side in (("large", 100), ("small", 48)):
        Image.fromarray(np.full((side, side), 2048, np.uint16)).save(tmp_path / "images" / f"{name}.png")
    depth = ("data.in_chans=1", "data.bit_depth=12", "data.mean=[0.5]", "data.std=[0.5]")
    run(tmp_path / "images", f"out={tmp_path / 'out'}", "short_side=64", f"encode={encode_as}", *depth)
    shards = WebDataset(tmp_path / "out")
    decoded = [decode(sample.image, 1, 12) for sample in shards]
    assert sorted(len(pixels[0]) for pixels in decoded) == [48, 64]
    white = 2048 / 4095 * 65535
    assert all((pixels.int() - white).abs().max() < 1 for pixels in decoded)


@pytest.mark.parametrize("bit_depth", range(9, 17))
def test_what_is_stored_is_decoded_to_what_it_was(bit_depth):
    stored = np.arange(2**bit_depth, dtype=np.uint16)[None]
    decoded = decode(Encoded(npy(stored), "x.npy"), 1, bit_depth)
    assert torch.equal(to_stored(decoded, bit_depth), torch.from_numpy(stored)[None])


def test_files_are_named_by_what_they_hold():
    assert encode(Encoded(encoded(picture(), "PNG"), "a.JPEG"), Encoding(PixelFormat(3)))[0] == "png"
    assert encode(Encoded(encoded(picture(), "PPM"), "a.ppm"), Encoding(PixelFormat(3)))[0] == "ppm"
    assert encode(Encoded(encoded(picture(), "PPM"), "set:train[3]"), Encoding(PixelFormat(3)))[0] == "ppm"
    assert encode(Encoded(encoded(picture(), "AVIF"), "a.scan"), Encoding(PixelFormat(3)))[0] == "avif"


def test_they_are_ordinary_tar_files(folder, tmp_path):
    run(folder, f"out={tmp_path / 'out'}")
    with tarfile.open(tmp_path / "out" / "train-000003.tar") as tar:
        members = tar.getmembers()
        assert [m.name.split(".")[1] for m in members[:4]] == ["jpg", "cls", "jpg", "cls"]
        assert Image.open(io.BytesIO(tar.extractfile(members[0]).read())).format == "JPEG"
        assert tar.extractfile(members[1]).read() in (b"0", b"1")


def test_stopped_and_started_again_is_as_if_never_stopped(folder, tmp_path, monkeypatch):
    run(folder, f"out={tmp_path / 'whole'}")
    out = tmp_path / "out"
    written = []
    write = prepare.__globals__["write_shard"]

    def noted(source, indices, path, how):
        if len(written) == 2:
            (out / f".{path.name}.1.part").write_bytes(b"half")
            raise KeyboardInterrupt
        written.append(path.name)
        return write(source, indices, path, how)

    monkeypatch.setattr("fcmae.data.prepare.command.write_shard", noted)
    with pytest.raises(KeyboardInterrupt):
        run(folder, f"out={out}")
    with (out / "progress.jsonl").open("a") as progress:
        progress.write('{"name": "train-00')  # cut off
    monkeypatch.setattr(
        "fcmae.data.prepare.command.write_shard", lambda *args: written.append(args[2].name) or write(*args)
    )
    run(folder, f"out={out}")
    assert written == [f"train-{i:06d}.tar" for i in range(4)]
    assert contents(out) == contents(tmp_path / "whole")
    run(folder, f"out={out}")
    assert len(written) == 4
    (out / "train-000001.tar").unlink()
    run(folder, f"out={out}")
    assert written[4:] == ["train-000001.tar"]
    assert contents(out) == contents(tmp_path / "whole")


def test_what_was_written_is_read_back(folder, tmp_path):
    out = tmp_path / "out"
    run(folder, f"out={out}")
    shard = out / "train-000002.tar"
    content = bytearray(shard.read_bytes())
    content[700] ^= 1
    shard.write_bytes(content)
    with pytest.raises(FCMAEError, match=r"train-000002.tar does not hold what was written into it; remove that file"):
        run(folder, f"out={out}")


def test_other_settings_need_another_folder(folder, tmp_path):
    run(folder, f"out={tmp_path / 'out'}")
    with pytest.raises(UsageError, match=r"was begun with other settings \(short_side: None -> 40\)"):
        run(folder, f"out={tmp_path / 'out'}", "short_side=40")
    (folder / "cat" / "new.jpg").write_bytes(encoded(picture(), "JPEG"))
    with pytest.raises(UsageError, match=r"other settings \(images: 60 -> 61, names of the images"):
        run(folder, f"out={tmp_path / 'out'}")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("train-000000.tar", "somebody's"),
        ("classes.txt", "somebody's"),
        ("settings.json", '{"lr": 1}'),
        ("settings.json", "["),
        ("manifest.json", "{}"),
    ],
)
@pytest.mark.parametrize("more", [(), ("dry_run=true",)])
def test_a_folder_with_files_of_others_is_refused(name, content, more, folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text(content)
    with pytest.raises(UsageError, match=f"has files that are not of fcmae prepare, such as {name}; it must be a new"):
        run(folder, f"out={tmp_path / 'out'}", *more)
    assert contents(tmp_path / "out") == {name: hashlib.sha256(content.encode()).hexdigest()}


def test_neither_the_source_nor_a_file_is_a_folder_to_write_to(folder, tmp_path):
    with pytest.raises(UsageError, match="has files that are not of fcmae prepare, such as cat"):
        run(folder, f"out={folder}")
    with pytest.raises(UsageError, match="out must be a folder"):
        run(folder, f"out={folder / 'cat' / '00.jpg'}")


def test_a_tar_file_too_many_is_refused(folder, tmp_path):
    """Readers of the folder would read it too."""
    run(folder, f"out={tmp_path / 'out'}")
    (tmp_path / "out" / "train-000004.tar").touch()
    with pytest.raises(UsageError, match=r"has train-000004.tar, which is not of fcmae prepare"):
        run(folder, f"out={tmp_path / 'out'}")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("manifest.json", b"{"),
        ("manifest.json", b'{"shards": false}'),
        ("progress.jsonl", b'{"name": "train-0\xff'),
        (
            "progress.jsonl",
            b'{"name": "train-000000.tar", "samples": "a\\nb", "bytes": %d, "sha256": "%s", "unreadable": []}',
        ),
    ],
)
def test_a_damaged_manifest_is_written_anew(name, content, folder, tmp_path):
    """Also of a run that was stopped."""
    run(folder, f"out={tmp_path / 'out'}")
    before = contents(tmp_path / "out")
    if b"%s" in content:
        content %= ((tmp_path / "out" / "train-000000.tar").stat().st_size, before["train-000000.tar"].encode())
    (tmp_path / "out" / name).write_bytes(content)
    run(folder, f"out={tmp_path / 'out'}")
    assert contents(tmp_path / "out") == before


def test_what_is_quoted_of_a_folder_does_not_end_the_line(folder, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "a\nb").touch()
    with pytest.raises(UsageError, match=r"not of fcmae prepare, such as 'a\\nb'; it must"):
        run(folder, f"out={out}")
    (out / "a\nb").unlink()
    run(folder, f"out={out}")
    (out / "settings.json").write_text((out / "settings.json").read_text().replace('"jpeg"', '"a\\nb"'))
    with pytest.raises(UsageError, match=r"other settings \(encode: 'a\\nb' -> jpeg\); it must"):
        run(folder, f"out={out}")


def test_a_dry_run_writes_nothing(folder, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    run(folder, f"out={tmp_path / 'out'}", "dry_run=true")
    estimate = capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before
    run(folder, f"out={tmp_path / 'out'}")
    size = sum(p.stat().st_size for p in (tmp_path / "out").glob("*.tar"))
    assert float(estimate.split("about ")[1].split(" MB")[0]) == pytest.approx(size / 1e6, rel=0.3)


def test_where_nothing_can_be_read_nothing_is_written(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").touch()
    with pytest.raises(ImageError, match="a.jpg"):
        run(tmp_path / "images", f"out={tmp_path / 'out'}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("split=test", "split must be one of train, val.*; got 'test'"),
        ("quality=0", "quality must be from 1 to 100.*; got 0"),
        ("short_side=-1", "short_side must be a positive number.*; got -1"),
        ("seed=1", "out must be a folder to write to.*; got None"),
        ("data.stats_samples=0", "data.stats_samples must be a positive number.*; got 0"),
    ],
)
def test_a_mistake_is_one_line(override, message):
    with pytest.raises(ConfigError, match=message):
        compose("prepare", [override])


def test_statistics_are_those_of_all_pixels(tmp_path, capsys):
    pixels = []
    for i in range(150):  # more than one part
        image = picture(8 + i % 5, 9, "L", seed=i)
        (tmp_path / f"{i:03d}.png").write_bytes(encoded(image, "PNG"))
        pixels.append(np.asarray(image).ravel() / 255)
    (tmp_path / "bad.png").touch()
    expected = np.concatenate(pixels)
    said = run(tmp_path, "data.stats=true", "data.in_chans=1", "data.stats_samples=null")
    assert said.startswith("# of 150 of 151 images (seed 0)\nin_chans: 1\n")
    values = yaml.safe_load(said)
    assert values["mean"] == pytest.approx([expected.mean()], rel=6e-6)
    assert values["std"] == pytest.approx([expected.std()], rel=6e-6)
    assert "left out " + str(tmp_path / "bad.png") + ": " in capsys.readouterr().err
    few = ("data.stats=true", "data.in_chans=1", "data.stats_samples=20")
    assert run(tmp_path, *few) == run(tmp_path, *few) != said
    assert run(tmp_path, *few, "seed=1").split("\n")[1:] != run(tmp_path, *few).split("\n")[1:]


def test_statistics_of_16_bits(tmp_path):
    np.save(tmp_path / "a.npy", np.full((2, 8, 8), 1023, np.uint16))
    said = run(tmp_path, "data.stats=true", "data.in_chans=2", "data.bit_depth=12")
    assert yaml.safe_load(said) == {"in_chans": 2, "bit_depth": 12, "mean": [0.249821, 0.249821], "std": [1.0, 1.0]}
    assert said.endswith("# a channel has one value everywhere; a std of 1 leaves it as it is")
    said = run(tmp_path, "data.stats=true", "data.in_chans=2", "data.bit_depth=12", "data.normalize=percentile")
    assert said.splitlines()[-1].startswith("# low is high in a channel, which is refused; take data.percentiles")


def test_small_statistics_keep_their_digits(tmp_path):
    """12-bit microscopy in 16-bit files: four decimals would be 1 % of such a deviation."""
    pixels = np.random.default_rng(0).integers(400, 700, (6, 32, 32)).astype(np.uint16)
    np.save(tmp_path / "a.npy", pixels)
    said = run(tmp_path, "data.stats=true", "data.in_chans=6", "data.bit_depth=16")
    values = (pixels / 65535).reshape(6, -1)
    assert yaml.safe_load(said)["mean"] == pytest.approx(values.mean(1), rel=6e-6)
    assert yaml.safe_load(said)["std"] == pytest.approx(values.std(1), rel=6e-6)
    assert "one value" not in said


def test_what_holds_for_all_images_is_said_once(tmp_path, capsys):
    for i in range(9):
        np.save(tmp_path / f"{i}.npy", np.full((8, 8), 5000 + i, np.uint16))
    np.save(tmp_path / "small.npy", np.full((8, 8), 5, np.uint16))
    run(tmp_path, "data.stats=true", "data.in_chans=1", "data.bit_depth=12")
    err = capsys.readouterr().err
    assert err.count("data.bit_depth") == 1
    assert " and 8 more images: its values must be at most 4095" in err
    with pytest.raises(UsageError, match="none of 10 images could be read"):
        run(tmp_path, "data.stats=true", "data.in_chans=1")
    assert capsys.readouterr().err.count("its pixels have 16 bits") == 1


def test_tables_are_prepared_with_a_column_of_classes(folder, tmp_path):
    images = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix in (".png", ".jpg"))
    lines = [f"{name},{number % 2},{number}" for number, name in enumerate(images)]
    (tmp_path / "t.csv").write_text("\n".join(["image,a,b", *lines]))
    table = ["data=table", f"data.path={tmp_path}/t.csv", f"data.root={folder}", f"out={tmp_path}/out"]
    with pytest.raises(UsageError, match="label_column must have classes or be null"):
        prepare(compose("prepare", [*table, "data.label_column=[a,b]"]))
    assert not (tmp_path / "out").exists()
    prepare(compose("prepare", [*table, "data.label_column=a", "shuffle=false"]))
    shards = WebDataset(tmp_path / "out")
    assert [shards.label(i) for i in range(4)] == [0, 1, 0, 1]
    with pytest.raises(UsageError, match=r"label_column"):
        prepare(compose("prepare", [*table, "data.label_column=b", "shuffle=false"]))


def test_any_source_can_be_prepared(tmp_path):
    out = tmp_path / "out"
    own = ["data=synthetic", "data.length=10", "data.image_size=32", "loader.workers=1"]
    assert "10 images in 1 tar files" in prepare(compose("prepare", [*own, f"out={out}"]))
    shards = WebDataset(out)
    assert len(shards.classes) == 10
    assert json.loads((out / "manifest.json").read_text())["images"] == 10
