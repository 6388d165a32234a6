"""The commands and the Python of the tutorials, to their end, on tiny images with a tiny network."""

import re
import shlex

import numpy as np
import pytest
import timm
from PIL import Image
from safetensors.torch import save_file

from fcmae import api
from tests.conftest import TESTS
from tests.in_process import unchanged

FOLDER = TESTS.parent / "docs" / "tutorials"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
TRAINING = {
    "model.depths": "[1,1,1,1]", "model.dims": "[8,12,16,24]", "model.decoder_embed_dim": "16", "data.image_size": "32",
    "schedule.epochs": "1", "schedule.warmup_epochs": "0", "optim.global_batch_size": "8", "loader.workers": "0",
    "logger": "quiet", "precision": "float32",
}  # fmt: skip
FEW = {"auto.lrs": "[1e-3]", "auto.layer_decays": "[0.7]", "auto.folds": "2"}
CHANGED = {
    "pretrain": TRAINING,
    "finetune": {key: value for key, value in TRAINING.items() if not key.startswith(("model", "data"))},
    "probe": {"loader.workers": "0", "cache": "null"},
    "knn": {"loader.workers": "0", "cache": "null"},
    "evaluate": {"loader.workers": "0"},
}
"""Keys with other values than on the pages."""


def commands(page):
    """The words of each command, and the Python, in the order of the page; files are written."""
    for language, block in BLOCK.findall((FOLDER / f"{page}.md").read_text()):
        if language == "yaml":
            name = re.match(r"# (\S+)\n", block)[1]
            yield "file", (name, block)
        elif language == "python":
            yield "python", block
        else:
            for line in block.replace("\\\n", " ").splitlines():
                if line.startswith("fcmae "):
                    yield "fcmae", shlex.split(line, comments=True)[1:]


def changed(words, more):
    command, *rest = words
    keys = {**CHANGED.get(command, {}), **more.get(command, {})}
    if not {"model=demo", "experiment=own/small"} & set(rest):  # weights or a checkpoint say what the network is
        keys = {key: value for key, value in keys.items() if not key.startswith("model.d")}
    if command == "probe":
        keys |= {key: TRAINING[key] for key in ("model.depths", "model.dims") if "checkpoint=random" in rest}
    if command == "doctor":
        rest += ["--contact-sheet", "sheet.png"]  # not in the user's cache
    kept = [word for word in rest if word.partition("=")[0] not in keys]
    return [command, *kept, *(f"{key}={value}" for key, value in keys.items())]


def follow(page, fcmae_here, here, more=None):
    for kind, what in commands(page):
        if kind == "file":
            file = here / what[0]
            file.parent.mkdir(parents=True)
            file.write_text(what[1].replace("image_size: 64", "image_size: 32"))
        elif kind == "python":
            exec(what.replace("1, 12, 64, 64", "1, 12, 32, 32"), {})
        else:
            fcmae_here(*changed(what, more or {}))


def photographs(folder, count, size=40, seed=0):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for number in range(count):
        Image.fromarray(rng.integers(0, 256, (size, size, 3), np.uint8)).save(folder / f"{number}.png")


def labelled(folder, names, count=6):
    for seed, name in enumerate(names):
        photographs(folder / "train" / name, count, seed=seed)
        photographs(folder / "val" / name, 2, seed=10 + seed)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_photographs(fcmae_here, here):
    photographs(here / "photos", 16)
    labelled(here / "labelled", ("cat", "dog"))
    follow("photographs", fcmae_here, here)
    assert (here / "predictions.csv").read_text().startswith("path,class,probability,cat,dog")
    assert (here / "photos.html").stat().st_size > 1000


@pytest.mark.slow
def test_microscopy(fcmae_here, here, capsys):
    (here / "cells").mkdir()
    rng = np.random.default_rng(0)
    for number in range(8):
        pages = [Image.fromarray(rng.integers(0, 9000, (40, 40), np.uint16)) for _ in range(5)]
        pages[0].save(here / "cells" / f"{number}.tif", save_all=True, append_images=pages[1:])
    follow("microscopy", fcmae_here, here)
    assert "looks like" in capsys.readouterr().out


@pytest.mark.slow
def test_satellite_tiles(fcmae_here, here, capsys):
    (here / "tiles").mkdir()
    rng = np.random.default_rng(0)
    for number in range(8):
        tile = rng.integers(0, 3000, (12, 40, 40), np.int16)
        tile[:, :9] = -9999
        np.save(here / "tiles" / f"{number}.npy", tile)
    follow("satellite", fcmae_here, here)
    assert "(1, 24, " in capsys.readouterr().out


@pytest.mark.slow
def test_inspection(fcmae_here, here, capsys):
    photographs(here / "parts", 8)
    labelled(here / "labelled", ("defect", "good"))
    follow("inspection", fcmae_here, here, {"finetune": {**FEW, "optim.global_batch_size": "4"}})
    assert "label these next" in capsys.readouterr().out


@pytest.mark.slow
def test_segmentation(fcmae_here, here):
    for part in ("train", "val"):
        photographs(here / part / "images", 8)
        (here / part / "masks").mkdir()
        for file in (here / part / "images").iterdir():
            mask = np.random.default_rng(0).integers(0, 3, (40, 40), np.uint8)
            Image.fromarray(mask).save(here / part / "masks" / file.name)
    follow("segmentation", fcmae_here, here, {"pretrain": {"model.decoder_embed_dim": "64"}})
    assert len(list((here / "masks").rglob("*.png"))) == 8


@pytest.mark.slow
def test_published_weights(fcmae_here, here):
    """From a file instead of a download."""
    photographs(here / "photos", 8, size=64)
    labelled(here / "labelled", ("cat", "dog"))
    network = timm.create_model("convnextv2_atto", num_classes=0)
    save_file(network.state_dict(), here / "published.safetensors")
    start = {"init_from": "published.safetensors", "data.image_size": "64"}
    follow("published_weights", fcmae_here, here, {"pretrain": start, "finetune": start})
    assert (here / "exported" / "model.safetensors").is_file()


def test_every_tutorial_is_followed():
    names = {"imagenet_slurm"} | {re.sub(r"^test_", "", name) for name in globals() if name.startswith("test_")}
    pages = {file.stem for file in FOLDER.glob("*.md")}
    assert {page for page in pages if not any(name.startswith(page) for name in names)} == set()


def test_every_page_is_in_the_site():
    listed = set(re.findall(r"[\w/]+\.md", (TESTS.parent / "mkdocs.yml").read_text()))
    docs = TESTS.parent / "docs"
    assert {str(file.relative_to(docs)) for file in docs.rglob("*.md")} <= listed


@pytest.mark.slow
def test_the_page_of_python(here, monkeypatch, capsys):
    """With the settings of the tutorials instead of the page's."""
    photographs(here / "photos", 8, size=64)
    compose = api._compose

    def smaller(command, overrides, folder):
        keys = {**CHANGED.get(command, {}), "data.image_size": "64"}
        small = "model=convnextv2_atto" in overrides or "experiment=in1k/pretrain_1600ep" in overrides
        keys = {key: value for key, value in keys.items() if small or not key.startswith("model.d")}
        kept = [override for override in overrides if override.partition("=")[0] not in keys]
        return compose(command, [*kept, *(f"{key}={value}" for key, value in keys.items())], folder)

    monkeypatch.setattr(api, "_compose", smaller)
    names = {}
    with unchanged():
        for language, block in BLOCK.findall((FOLDER.parent / "python.md").read_text()):
            if language == "python":
                exec(block, names)
    assert names["features"].shape == (16, 24)
    assert names["network"].stem[0].out_channels == 8
    assert capsys.readouterr().out.count("\n") == 2
