"""The commands as Python functions: the same runs and messages, with data and networks that are objects."""

import json
import signal
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import fcmae
from fcmae.api import as_overrides
from fcmae.config import compose
from fcmae.data.sources import Subset, Windows
from fcmae.data.sources.dataset import need_labels, registered
from fcmae.data.sources.own import PixelFormat, create_own
from fcmae.loggers.progress import NotebookProgress, notebook_display
from fcmae.tasks.objectives import Regress, Segment
from tests.conftest import TINY
from tests.in_process import unchanged
from tests.results import assert_same, weights

PRETRAIN = [*TINY, "model.decoder_embed_dim=16", "schedule.epochs=2", "schedule.warmup_epochs=1"]
FINETUNE = [*TINY, "augment=none", "schedule.epochs=1", "schedule.warmup_epochs=0"]
IMAGES = torch.randint(0, 256, (24, 3, 40, 40), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


class Pairs(Dataset):
    """(PIL image, label), or dicts."""

    classes = ("cat", "dog", "owl")

    def __init__(self, length=24, as_dict=False):
        self.length, self.as_dict = length, as_dict

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        image, label = Image.fromarray(IMAGES[index].permute(1, 2, 0).numpy()), torch.tensor(index % 3)
        return {"image": image, "label": label} if self.as_dict else (image, label)


@pytest.fixture(autouse=True)
def _unchanged(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with unchanged():
        yield


def test_datasets_and_a_module_train_stop_and_resume(tmp_path):
    """Interrupted after a step and called again, a run ends with the weights of one that was not."""
    network = timm.create_model("convnextv2_atto", depths=(1, 1, 1, 1), dims=(8, 12, 16, 24), num_classes=0)

    def go(out, model=network, data=IMAGES, **keys):
        overrides = [override for override in PRETRAIN if not override.startswith(("model.d", "model=", "data="))]
        options = {"model.decoder_embed_dim": 16, "data.image_size": 64, "monitor": {"knn_every_epochs": 1}, **keys}
        return fcmae.pretrain(Pairs(), out, model, val_data=Pairs(9, as_dict=True), overrides=overrides, **options)

    whole = go(tmp_path / "whole")
    with pytest.raises(fcmae.Interrupted, match=r"stopped at trainer.max_steps=2"):
        go("cut", trainer={"max_steps": 2})
    other = timm.create_model("convnextv2_atto", depths=(1, 1, 1, 1), dims=(8, 12, 16, 24), num_classes=0)
    cut = go("cut", other)  # a run with a checkpoint does not begin again
    assert_same(weights(whole.path), weights(cut.path))
    assert whole.checkpoint.is_file()
    assert whole.metrics["step"] == whole.history[-1]["step"] == 6
    assert {"loss", "val_loss", "knn10"} <= whole.metrics.keys()
    assert "<iframe" in whole._repr_html_()
    begun = fcmae.load(whole.path / "initial.safetensors").state_dict()
    assert_same(network.state_dict(), begun)
    rows = fcmae.embed(whole, Pairs(5))
    assert rows.values.shape == (5, 24)
    assert rows.values.equal(fcmae.embed(whole, IMAGES[:5]).values)


def test_fine_tuning_and_evaluation_of_a_dataset(tmp_path):
    run = fcmae.finetune(Pairs(), "ft", val_data=Pairs(9), overrides=[o for o in FINETUNE if o != "data=synthetic"])
    result = fcmae.evaluate(run, Pairs(9), precision="float32")
    assert result["images"] == 9
    assert result["top1"] == max(line["top1"] for line in run.history if "top1" in line)
    assert fcmae.predict(run, Pairs(4)).columns == ["cat", "dog", "owl"]
    assert fcmae.load(run).num_classes == 3  # a Run is a path wherever a checkpoint is named, for fcmae.export too
    with pytest.raises(fcmae.FCMAEError, match=r"give it again in Python, or images by data\.val_path$"):
        fcmae.evaluate(run)


def test_ctrl_c_saves_and_the_notebook_shows_the_run(monkeypatch):
    """The first SIGINT stops after the step; handlers are as before afterwards."""
    before = signal.getsignal(signal.SIGINT)
    shown = []

    def display(_, display_id):
        return SimpleNamespace(update=lambda html: shown.append(html))

    shell = SimpleNamespace(kernel=object())
    fake = SimpleNamespace(get_ipython=lambda: shell, display=SimpleNamespace(HTML=str, display=display))
    monkeypatch.setitem(sys.modules, "IPython", fake)
    monkeypatch.setitem(sys.modules, "IPython.display", fake.display)
    advance = NotebookProgress.advance
    monkeypatch.setattr(NotebookProgress, "advance", lambda self: (advance(self), signal.raise_signal(signal.SIGINT)))
    with pytest.raises(fcmae.Interrupted, match=r"stopped after step 1 of 6 \(SIGINT\)"):
        fcmae.pretrain(out="run", overrides=[*PRETRAIN, "logger.progress=true"])
    assert signal.getsignal(signal.SIGINT) is before
    assert "step 1/6 loss" in shown[-1]
    assert "<svg" in shown[-1]
    shell.kernel = None
    assert notebook_display() is None


def test_keys_are_those_of_the_command_line():
    given = as_overrides({
        "optim": {"lr": 1e-3, "betas": [0.9, 0.99]}, "seed": 1, "mask": "block",
        "data.foreground": {"above": 0.2, "share": 0.1},
        "logger": {"sinks": {"a": {"_target_": "it's.py:B", "n": None}}}, "init_from": "~/x",
        "target": {"pixels": None},
    })  # fmt: skip
    cfg = compose("pretrain", ["data=synthetic", "target=hog", *given])
    assert (cfg.optim.lr, list(cfg.optim.betas), cfg.seed) == (1e-3, [0.9, 0.99], 1)
    assert cfg.mask["_target_"] == "fcmae.masks.BlockMask"
    assert cfg.data.foreground == {"above": 0.2, "share": 0.1}
    assert cfg.logger.sinks["a"] == {"_target_": "it's.py:B", "n": None}
    assert not cfg.init_from.startswith("~")
    assert list(cfg.target) == ["hog"]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"data": "missing"}, "data.path: missing is not a folder"),
        ({"data": "missing", "optim": {"lr": -1}, "seeds": 1}, r"(?s)seeds.*optim.lr"),
        ({"data": Stream()}, "data must be a path, or a dataset with __len__ and __getitem__; got Stream. Without an"),
        ({"data": DataLoader(Pairs())}, "data=loader.dataset"),
        ({"data": []}, "data must be a path, or a dataset of one sample or more; got an empty list"),
        ({"optimizer": {"lr": 1}}, r"optimizer: unknown key; did you mean optim\?"),
        ({"data": [3] * 24}, r"it must be a PIL image, a tensor or an array; got a int"),
        ({"data": IMAGES.float() / 255, "data.mean": [0.5], "data.std": [1]}, "data.mean"),
        ({"model": torch.nn.Linear(1, 1)}, "model must be a name, a dict or a timm ConvNeXt; got a Linear"),
        ({"model": "convnextv3"}, "model.backbone is 'convnextv3'"),
        ({"overrides": ["hydra.run.dir=x"]}, "out=FOLDER"),
        ({"out": None}, "out must be the folder of the run"),
    ],
    ids=lambda value: None,
)
def test_mistakes_are_one_exception_of_the_same_words(arguments, message):
    overrides = [override for override in PRETRAIN if not override.startswith("model")] + ["data.image_size=64"]
    overrides = overrides if "data" not in arguments else [o for o in overrides if o != "data=synthetic"]
    overrides += arguments.pop("overrides", [])
    with pytest.raises(fcmae.FCMAEError, match=message):
        fcmae.pretrain(**{"out": "run", "overrides": overrides, **arguments})


@pytest.mark.parametrize(
    ("dataset", "to", "image"),
    [
        ([np.zeros((5, 6, 3), np.uint8)], PixelFormat(3), (3, 5, 6)),
        ([np.zeros((5, 6), np.uint8)], PixelFormat(1), (1, 5, 6)),
        ([{"pixel_values": torch.zeros(2, 5, 6)}], PixelFormat(2), (2, 5, 6)),
        ([(Image.new("L", (6, 5)), 1)], PixelFormat(3), (3, 5, 6)),
        ([(Image.new("P", (6, 5)), 1)], PixelFormat(1), (1, 5, 6)),
        ([(Image.new("I;16", (6, 5)), 1)], PixelFormat(1, 16), (1, 5, 6)),
        (TensorDataset(torch.zeros(1, 3, 5, 6), torch.tensor([0.5])), PixelFormat(3), (3, 5, 6)),
    ],
)
def test_images_of_datasets(dataset, to, image):
    with registered(dataset, "data") as given:
        assert json.loads(json.dumps(given)) == given
        assert create_own(given, "data.source", to)[0].image.shape == image


def opened(dataset):
    with registered(dataset, "data") as given:
        need_labels()
        return create_own(given, "data.source", PixelFormat(3))


def test_numbers_of_datasets_are_learned():
    numbers = torch.rand(24, 2)
    source = opened(TensorDataset(IMAGES, numbers))
    objective = Regress()
    objective.fit(source, compose("finetune", [*FINETUNE[:3], "objective=regress"]))
    assert (objective.columns, objective.outputs) == (["label_0", "label_1"], 2)
    assert Subset(source, [5, 3]).values.equal(numbers[[5, 3]])
    assert Windows(source, 2).values.equal(torch.stack([Windows(source, 2)[index].label for index in range(48)]))
    assert "are not integers" in opened([(IMAGES[0], "cat")]).unlabelled


@pytest.mark.parametrize("wrap", [torch.Tensor.clone, torch.Tensor.numpy, lambda mask: Image.fromarray(mask.numpy())])
def test_maps_of_datasets_are_learned(wrap):
    mask = torch.arange(1600).view(40, 40).remainder(3).byte()
    source = opened([(image, wrap(mask)) for image in IMAGES])
    assert (source.classes, source.values) == (None, None)
    assert Segment(3).target(source[1], source, 1).equal(mask.short())


def test_labels_of_datasets():
    def source(dataset, labelled=True):
        with registered(dataset, "data") as given:
            if labelled:
                need_labels()
            return create_own(given, "data.source", PixelFormat(3)).source

    assert source(Pairs(4)).classes == ["cat", "dog", "owl"]
    assert source(Pairs(4), labelled=False).classes is None
    assert [source(Pairs(4)).label(index) for index in range(4)] == [0, 1, 2, 0]
    numbers = source(TensorDataset(IMAGES, torch.rand(24, 2)))
    assert (numbers.classes, numbers.columns, numbers.values.shape) == (None, ["label_0", "label_1"], (24, 2))
    listed = Pairs(4)
    listed.targets = [2, 1, 0, 1]
    assert source(listed, labelled=False).label(0) == 2
    with pytest.raises(fcmae.FCMAEError, match=r"classes counted from 0; got -1"):
        source(TensorDataset(IMAGES, torch.full((24,), -1)))
