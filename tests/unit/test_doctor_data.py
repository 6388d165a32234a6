"""``fcmae doctor data.path=...``: what it says of folders, tables, arrays and tar files, and what it suggests."""

import re
import stat
import sys
import tempfile

import numpy as np
import pytest
from PIL import Image, ImageDraw

from fcmae import cli, opening
from fcmae.config import DataConfig, from_dotlist
from fcmae.data.pixels.decode import PixelFormat
from fcmae.data.prepare.shards import Encoding, write_shard
from fcmae.data.sources import ImageFolder
from fcmae.doctor import dataset
from tests.bad_files import encoded, picture


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for i in range(12):
        (folder / "ab"[i % 2]).mkdir(exist_ok=True)
        (folder / "ab"[i % 2] / f"{i}.jpg").write_bytes(encoded(picture(60 + i, 80, seed=i), "JPEG"))
    (folder / "a" / "copy.jpg").write_bytes((folder / "a" / "2.jpg").read_bytes())
    (folder / "a" / "black.png").write_bytes(encoded(Image.new("RGB", (80, 64)), "PNG"))
    (folder / "b" / "wide.png").write_bytes(encoded(picture(8, 400), "PNG"))
    (folder / "b" / "cut.jpg").write_bytes(encoded(picture(), "JPEG")[:300])
    (folder / "b" / "none.jpg").touch()
    (folder / "b" / "scan.xyz").touch()
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Not the user's."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(dataset, "cache_folder", lambda kind: opening.private_folder(folder / kind))
    return folder


def look(capsys, *args):
    code = cli.main(["doctor", *map(str, args)])
    said = capsys.readouterr().out.splitlines()
    return code, said


def words(said, title):
    return [line.removeprefix(title).strip() for line in said if line.startswith(title)]


def test_a_folder(photos, tmp_path, capsys, monkeypatch):
    sheet, told = tmp_path / "sheet.png", []
    monkeypatch.setattr(ImageDraw.ImageDraw, "multiline_text", lambda canvas, place, text, **_: told.append(text))
    code, said = look(capsys, f"data.path={photos}", "--contact-sheet", sheet)
    assert code == 0
    assert words(said, "data") == [f"{photos} (imagefolder): 17 images in 2 classes"]
    assert words(said, "looked at") == ["17 images"]
    assert words(said, "unreadable") == ["2"]
    assert any(f"{photos}/b/none.jpg: its bytes are of no image" in line for line in said)
    assert words(said, "duplicates")[0].startswith("1, such as ")
    assert words(said, "size") == ["80x8 to 400x71 px (width x height), median 80x64"]
    assert words(said, "format") == ["JPEG (13), PNG (2)"]
    assert words(said, "channels") == ["3 (15)"]
    assert words(said, "type") == ["uint8 (15)"]
    assert len(words(said, "range")) == 3
    odd = [line.strip() for line in said if line.startswith("      ")]
    assert f"{photos}/a/black.png: one value everywhere, 0" in odd
    assert f"{photos}/b/wide.png: shape 400x8" in odd
    assert sum(line.startswith("suggested") and "data.image_size=64" in line for line in said) == 1
    with Image.open(sheet) as image:
        pixels = np.asarray(image)
    assert (pixels == (200, 0, 0)).all(axis=2).any()  # an odd one's edge
    assert {text.split("/")[0] for text in told} == {"a", "b"}  # files of two classes may have one name


def test_a_sample_of_it(photos, cache, tmp_path, capsys, monkeypatch):
    """The contact sheet is private and the next one replaces it: each call left a folder of its own behind."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for _ in range(2):
        said = look(capsys, f"data.path={photos}", "--images", 5)[1]
    assert words(said, "looked at") == ["5 images, drawn at random (--images)"]
    where = words(said, "contact sheet")[0].split(": ")[0]
    assert where == f"{cache}/doctor/contact_sheet.png"
    assert stat.S_IMODE((cache / "doctor").stat().st_mode) == 0o700
    assert not list(tmp_path.iterdir())


def test_tables_and_tar_files(photos, tmp_path, capsys):
    (tmp_path / "list.csv").write_text("image\na/0.jpg\na/2.jpg\na/0.jpg\n")
    said = look(capsys, f"data.path={tmp_path}/list.csv", f"data.root={photos}")[1]
    assert words(said, "data") == [f"{tmp_path}/list.csv (table): 3 images"]
    assert words(said, "duplicates") == [f"1, such as {photos}/a/0.jpg = {photos}/a/0.jpg"]
    write_shard(ImageFolder(photos), range(5), tmp_path / "a.tar", Encoding(PixelFormat(3)))
    said = look(capsys, f"data.path={tmp_path}/a.tar")[1]
    assert words(said, "data")[0].startswith(f"{tmp_path}/a.tar (webdataset): ")


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.random.default_rng(0).normal(300, 2, (6, 2, 40, 40)).astype("float32"),
         ["data.in_chans=2", "data.dtype=float32", "data.image_size=32", "data.mean=[300"]),
        (np.random.default_rng(0).integers(0, 3000, (6, 40, 40)).astype("uint16"),
         ["data.in_chans=1", "data.bit_depth=12"]),
        (np.random.default_rng(0).integers(-1024, 3000, (6, 40, 40)).astype("int16"),
         ["data.dtype=float32", "data.mean=[9"]),
        (np.stack([np.random.default_rng(i).normal(50 * i, 1, (40, 40)) for i in range(6)]).astype("float32"),
         ["data.normalize=image"]),
        (np.random.default_rng(0).standard_cauchy((6, 40, 40)).astype("float32"),
         ["data.normalize=percentile data.low=[-"]),
    ],
)  # fmt: skip
def test_what_it_suggests_for_arrays_can_be_set(array, expected, tmp_path, capsys):
    np.save(tmp_path / "a.npy", array)
    code, said = look(capsys, f"data.path={tmp_path}/a.npy")
    assert code == 0
    given = [line.split("  ")[0] for line in words(said, "suggested")]
    assert all(any(line.startswith(start) for line in given) for start in expected)
    overrides = [part for line in given for part in line.split() if part.startswith("data.")]
    from_dotlist(DataConfig, overrides, "data")


def test_grey_tiff_of_16_bits_is_read_without_tifffile(tmp_path, capsys, monkeypatch):
    """As pretraining reads it. Of what only tifffile reads, a line names the file."""
    monkeypatch.setitem(sys.modules, "tifffile", None)
    for number in range(3):
        values = np.random.default_rng(number).integers(0, 4000, (40, 40), np.uint16)
        (tmp_path / f"{number}.tif").write_bytes(encoded(Image.fromarray(values), "TIFF"))
    code, said = look(capsys, f"data.path={tmp_path}")
    assert (code, words(said, "unreadable"), words(said, "format")) == (0, ["0"], ["TIFF (3)"])
    assert (words(said, "channels"), words(said, "type")) == (["1 (3)"], ["uint16 (3)"])
    Image.new("L", (40, 40)).save(tmp_path / "pages.tif", save_all=True, append_images=[Image.new("L", (40, 40))])
    assert cli.main(["doctor", f"data.path={tmp_path}"]) == 2
    line = f"cannot read the image {tmp_path}/pages.tif: this kind of TIFF needs tifffile: pip install 'fcmae[tiff]'"
    assert capsys.readouterr().err.splitlines() == [f"fcmae doctor: {line}"]


def test_images_of_one_value_are_said_to_be(tmp_path, capsys):
    np.save(tmp_path / "a.npy", np.full((4, 32, 32), 7, np.float32))
    lines = words(look(capsys, f"data.path={tmp_path}/a.npy")[1], "suggested")
    assert re.fullmatch(r"data.mean=\[7\] data.std=\[1\] +every image has one value everywhere: .*", lines[-1])
    np.save(tmp_path / "a.npy", np.arange(4, dtype=np.float32).repeat(32 * 32).reshape(4, 32, 32))
    lines = words(look(capsys, f"data.path={tmp_path}/a.npy")[1], "suggested")
    assert re.fullmatch(r"data.mean=\[1.5\] data.std=\[1.118\] +every image has .*", lines[-1])
    np.save(tmp_path / "a.npy", np.stack([np.zeros((32, 32)), np.eye(32)])[None].astype(np.float32))
    lines = words(look(capsys, f"data.path={tmp_path}/a.npy", "data.axes=NCYX")[1], "suggested")
    assert any("data.std=[1,0.17" in line for line in lines)


@pytest.mark.parametrize("given", [None, 14, 16])
def test_mean_and_deviation_are_on_the_scale_of_the_bit_depth(given, tmp_path, capsys):
    np.save(tmp_path / "a.npy", np.random.default_rng(0).integers(0, 3000, (6, 40, 40)).astype("uint16"))
    depth = [] if given is None else [f"data.bit_depth={given}"]
    said = words(look(capsys, f"data.path={tmp_path}/a.npy", *depth)[1], "suggested")
    assert any("data.bit_depth=12" in line for line in said) == (given is None)
    mean = next(re.search(r"data.mean=\[([\d.]+)\]", line)[1] for line in said if "data.mean" in line)
    stats = ["data.name=array", f"data.path={tmp_path}/a.npy", "data.in_chans=1", f"data.bit_depth={given or 12}"]
    assert cli.main(["prepare", *stats, "data.stats=true"]) == 0
    measured = re.search(r"mean: \[([\d.]+)\]", capsys.readouterr().out)[1]
    assert float(mean) == pytest.approx(float(measured), rel=1e-3)


def tiles(value, dtype="int16", seed=0):
    """Three channels from 100 to 4000; a quarter of half of the images, and all of one, hold ``value``."""
    array = np.random.default_rng(seed).integers(100, 4000, (8, 3, 40, 40)).astype(dtype)
    array[::2, :, :20, :20] = array[1] = value
    return array


@pytest.mark.parametrize("given", [[], ["data.nodata=-9999"], ["data.nodata=[-9999,-9999,-9999]"]])
def test_pixels_without_a_value_are_found_and_left_out(given, tmp_path, capsys):
    """They decided mean and deviation, and data.nodata of an array was refused as not from 0 to 255."""
    np.save(tmp_path / "a.npy", tiles(-9999))
    code, said = look(capsys, f"data.path={tmp_path}/a.npy", *given)
    assert code == 0
    assert words(said, "range")[0].startswith("int16, channel 0 of 3: 101 to 3999, mean 2044")
    assert any("a.npy[1]: a channel without a value" in line for line in said)
    suggested = [line.split("  ")[0] for line in words(said, "suggested")]
    assert suggested[0] == "data=array"
    assert ("data.nodata=-9999" in suggested) == (not given)
    means, stds = re.search(r"data.mean=\[([^]]*)\] data.std=\[([^]]*)\]", suggested[-1]).groups()
    stats = ["data.name=array", f"data.path={tmp_path}/a.npy", "data.in_chans=3", "data.dtype=float32"]
    assert cli.main(["prepare", *stats, "data.nodata=-9999", "data.stats=true"]) == 0
    measured = dict(re.findall(r"(mean|std): \[(.*)\]", capsys.readouterr().out))
    for name, numbers in (("mean", means), ("std", stds)):
        assert [float(x) for x in numbers.split(",")] == pytest.approx(
            [float(x) for x in measured[name].split(",")], rel=1e-2
        )


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (tiles(65535, "uint16"), ["data.nodata=65535", "data.bit_depth=16"]),
        (tiles(np.finfo("f4").min, "float32"), ["data.nodata=-3.40282347e+38"]),
        (tiles(0), []),
        (np.minimum(tiles(0, "int64") * 20, 65535).astype("uint16"), ["data.bit_depth=16"]),  # saturated
        (tiles(2, "uint8"), []),
    ],
)
def test_which_values_seem_to_mark_pixels_without_one(array, expected, tmp_path, capsys):
    np.save(tmp_path / "a.npy", array)
    said = words(look(capsys, f"data.path={tmp_path}/a.npy")[1], "suggested")
    found = [line.split("  ")[0] for line in said if line.startswith(("data.nodata", "data.bit_depth"))]
    assert found == expected


def test_a_channel_of_one_value_per_image_is_no_reason_to_normalise_each_by_itself(tmp_path, capsys):
    array = np.random.default_rng(0).normal(100, 10, (6, 2, 40, 40))
    array[:, 1] = np.arange(0, 60, 10)[:, None, None]
    np.save(tmp_path / "a.npy", array.astype(np.float32))
    said = words(look(capsys, f"data.path={tmp_path}/a.npy")[1], "suggested")
    assert said[-1].startswith("data.mean=[100.1,25] data.std=[9.99,17.08]")


def test_nothing_that_can_be_read(tmp_path, capsys):
    (tmp_path / "a.jpg").touch()
    code, said = look(capsys, f"data.path={tmp_path}")
    assert code == 1
    assert words(said, "unreadable") == ["1"]
    assert cli.main(["doctor", "path=x"]) == 2
    said = capsys.readouterr().err
    assert "must be data.KEY=VALUE or loader.KEY=VALUE, such as data.path=photos; got 'path=x'" in said
