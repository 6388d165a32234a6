"""``fcmae embed`` and ``fcmae predict``: a row per image, whatever names the images, on any number of ranks."""

import csv
import json
import os
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

import fcmae
from fcmae.checkpoints import checkpoint
from fcmae.cli import main
from fcmae.data.pixels.decode import read_file
from fcmae.data.pixels.transforms import eval_transform, normalize
from fcmae.errors import ImageError
from fcmae.evaluation.embed import Rows, write
from fcmae.models.build import config_of
from tests.conftest import TINY_FINETUNE, TINY_PRETRAIN

SHORT = ("schedule.epochs=1", "trainer.eval_every_epochs=null")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("embed")
    assert main([*TINY_PRETRAIN, *SHORT, f"hydra.run.dir={folder}/pre"]) == 0
    fine = (f"init_from={folder}/pre", *SHORT, "optim.ema_decay=0.5", f"hydra.run.dir={folder}/fine")
    assert main([*TINY_FINETUNE, *fine]) == 0
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Five images: two in a folder of a class, one beside it, one in a tar file, one alone."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "many" / "cats").mkdir(parents=True)
    rng = np.random.default_rng(0)
    names = ["many/cats/a.png", "many/cats/b.png", "many/c.png", "d.png", "alone.png"]
    for name in names:
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(folder / name)
    with tarfile.open(folder / "one.tar", "w") as tar:
        tar.add(folder / "d.png", "d.png")
    return folder


def images(folder):
    return [str(folder / name) for name in ("alone.png", "many", "one.tar")]


def one_by_one(photos, runs, model, network):
    """The same, image by image and by timm's own forward."""
    file = checkpoint.resolve(runs / "pre")
    cfg = config_of(checkpoint.read(file), file).data
    rows = []
    for name in ("alone.png", "many/c.png", "many/cats/a.png", "many/cats/b.png", "d.png"):
        img = eval_transform(cfg)(read_file(photos / name))
        with torch.inference_mode():
            rows.append(network(model, normalize(img[None], cfg.mean, cfg.std))[0])
    return torch.stack(rows)


LAYERS = {
    "pooled": lambda m, x: m.forward_head(m.forward_features(x), pre_logits=True),
    "mean": lambda m, x: m.forward_features(x).mean((2, 3)),
    "stages": lambda m, x: torch.cat([f.mean((2, 3)) for f in m.forward_intermediates(x, intermediates_only=True)], 1),
    "stages_std": lambda m, x: torch.cat(
        [
            part
            for f in [m.forward_intermediates(x, intermediates_only=True)]
            for part in [*(each.mean((2, 3)) for each in f), *(each.std((2, 3), correction=0) for each in f)]
        ],
        1,
    ),
    "patches": lambda m, x: m.forward_features(x).permute(0, 2, 3, 1),
}


@pytest.mark.parametrize(
    ("which", "layer"),
    [
        *(("pre", layer) for layer in LAYERS),
        *(("pre/encoder.safetensors", layer) for layer in ("pooled", "patches")),
        *(("fine", layer) for layer in ("pooled", "stages_std")),
    ],
)
def test_features(runs, photos, layer, which):
    rows = fcmae.embed(str(runs / which), [*images(photos), "loader.workers=0"], layer=layer, batch_size=2)
    model = fcmae.load(runs / which)
    expected = one_by_one(photos, runs, getattr(model, "backbone", model), LAYERS[layer])
    torch.testing.assert_close(rows.values, expected, rtol=1e-4, atol=1e-5)
    ends = [path.rsplit("/", 1)[-1] for path in rows.paths]
    assert ends[:4] == ["alone.png", "c.png", "a.png", "b.png"]
    assert "one.tar" in rows.paths[4]


def test_files_of_features(runs, photos, tmp_path, capsys):
    out = tmp_path / "features.npz"
    assert main(["embed", str(runs / "pre"), *images(photos), "--out", str(out), "--batch-size", "2"]) == 0
    assert capsys.readouterr().out == f"{out}: 5 images, 24 values each\n"
    with np.load(out) as arrays:  # no pickle
        assert arrays["features"].shape == (5, 24)
        assert arrays["features"].dtype == np.float32
        assert arrays["paths"][0] == str(photos / "alone.png")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = tmp_path / "features.parquet"
    assert main(["embed", str(runs / "pre"), *images(photos), "--out", str(table), "--batch-size", "2"]) == 0
    read = parquet.read_table(table).to_pydict()
    assert read["path"][0] == str(photos / "alone.png")
    with np.load(out) as arrays:
        np.testing.assert_array_equal(np.array(read["features"], dtype=np.float32), arrays["features"])


def test_names_that_are_not_utf_8(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = Rows(["a\n.png", os.fsdecode(b"b\xff.png")], torch.zeros(2, 3), [])
    write(rows, str(tmp_path / "rows.parquet"), "features")
    assert parquet.read_table(tmp_path / "rows.parquet").to_pydict()["path"] == ["a\n.png", "b\\xff.png"]


@pytest.mark.parametrize("shape", [(2, 3), (2, 2, 2, 3), (0, 3)])
def test_a_parquet_file_says_what_its_numbers_are(tmp_path, shape):
    parquet = pytest.importorskip("pyarrow.parquet")
    values, names = torch.rand(shape), ["a", "b\n", "ü"]
    for exclusive, key in ((True, b"classes"), (False, b"columns")):
        rows = Rows([f"{number}.png" for number in range(shape[0])], values, names, exclusive)
        write(rows, str(tmp_path / "rows.parquet"), "predictions")
        table = parquet.read_table(tmp_path / "rows.parquet")
        assert json.loads(table.schema.metadata[key]) == names
        row = json.loads(table.schema.metadata[b"shape"])
        back = torch.tensor(table.column("predictions").to_pylist()).view(-1, *row)
        assert back.equal(values)
        assert (str(table.schema.types[0]), str(table.schema.types[1].value_type)) == ("string", "float")


def test_predictions(runs, photos, tmp_path):
    out = tmp_path / "predictions.csv"
    assert main(["predict", str(runs / "fine"), *images(photos), "--out", str(out)]) == 0
    with out.open() as file:
        header, *lines = csv.reader(file)
    model = fcmae.load(runs / "fine")
    expected = one_by_one(photos, runs, model, lambda m, x: m(x).softmax(1))
    assert header[:3] == ["path", "class", "probability"]
    values = torch.tensor([[float(value) for value in line[3:]] for line in lines])
    torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-5)
    assert [header[3:].index(line[1]) for line in lines] == expected.argmax(1).tolist()
    rows = fcmae.predict(str(runs / "fine"), images(photos), ema=False)
    assert rows.columns == header[3:]
    assert not torch.allclose(rows.values, expected, rtol=0, atol=1e-7)  # the weights, not their average


def test_predictions_that_are_not_numbers_are_empty_cells(tmp_path):
    values = torch.tensor([[0.25, 0.75], [float("nan"), 0.5], [float("inf"), 0.5]])
    write(Rows(["a", "b", "c"], values, ["cat", "dog"], True), str(tmp_path / "p.csv"), "predictions")
    lines = (tmp_path / "p.csv").read_text().splitlines()
    assert lines[1:] == ["a,dog,0.75,0.25,0.75", "b,,,,0.5", "c,,,,0.5"]


def test_numbers_in_csv_are_the_same_float32(tmp_path):
    values = torch.tensor([[501003.97, -0.1], [16777215.0, 1e-30]])
    write(Rows(["a", "b"], values, ["x", "y"]), str(tmp_path / "p.csv"), "predictions")
    lines = (tmp_path / "p.csv").read_text().splitlines()
    assert lines == ["path,x,y", "a,501003.97,-0.1", "b,16777215.0,1e-30"]
    assert torch.equal(torch.tensor([[float(cell) for cell in line.split(",")[1:]] for line in lines[1:]]), values)


def test_the_images_of_a_config(runs, photos):
    """data.path and loader keys as everywhere; an image that cannot be read is skipped if asked, else named."""
    rows = fcmae.embed(str(runs / "pre"), ["data.name=imagefolder", f"data.path={photos}/many"])
    assert len(rows.paths) == 3
    broken = photos.parent / "broken.png"
    broken.write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"broken.png"):
        fcmae.embed(str(runs / "pre"), [*images(photos), str(broken)])
    skip = ["loader.on_error=skip", "loader.max_bad=0.5"]
    rows = fcmae.embed(str(runs / "pre"), [str(broken), *images(photos), *skip])
    assert len(rows.paths) == 5
    assert rows.paths[0] == str(photos / "alone.png")


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("embed", ["nowhere.png", "--out", "f.npz"], "no file or folder nowhere.png"),
        ("embed", ["{photos}", "--out", "f.csv"], r"--out .*\.npz or \.parquet"),
        ("embed", ["loader.workers=0", "--out", "f.npz"], "no images are given"),
        ("predict", ["{photos}", "--out", "f.csv"], "predicts nothing; fine-tune it, or use fcmae embed"),
        ("embed", ["{photos}/alone.png", "--out", "{photos}/alone.png"], r"--out .*\.npz or \.parquet"),
    ],
)
def test_mistakes_are_one_line(runs, photos, tmp_path, monkeypatch, capsys, command, arguments, message):
    import re

    monkeypatch.chdir(tmp_path)
    arguments = [argument.format(photos=photos) for argument in arguments]
    assert main([command, str(runs / "pre"), *arguments]) == 2
    told = capsys.readouterr().err.strip().split("\n")[-1]
    assert told.startswith(f"fcmae {command}: ")
    assert re.search(message, told)
    assert not list(tmp_path.iterdir())


def test_two_ranks_are_one(runs, photos, tmp_path):
    from tests.conftest import run_python

    args = ["-m", "fcmae.cli", "embed", str(runs / "pre"), *images(photos), "--device", "cpu", "--out"]
    for ranks in (1, 2):
        run_python(tmp_path, *args, f"{ranks}.npz", ranks=ranks)
    with np.load(tmp_path / "1.npz") as one, np.load(tmp_path / "2.npz") as two:
        assert one["paths"].tolist() == two["paths"].tolist()
        np.testing.assert_allclose(one["features"], two["features"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_an_export_gives_the_features_of_its_run(runs, photos, tmp_path, library):
    pytest.importorskip(library)
    export = tmp_path / library
    assert main(["export", str(runs / "pre"), "--to", library, "--out", str(export), "--no-check"]) == 0
    expected = fcmae.embed(str(runs / "pre"), images(photos), device="cpu")
    given = fcmae.embed(str(export), images(photos), device="cpu")
    assert given.paths == expected.paths
    torch.testing.assert_close(given.values, expected.values)
    assert {path.name for path in export.iterdir()} <= {"config.json", "model.safetensors", "README.md", "LICENSE"} | {
        "preprocessor_config.json"
    }
