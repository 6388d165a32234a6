import contextlib
import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from fcmae.config import DataConfig, LoaderConfig, compose
from fcmae.data.pixels.transforms import normalize
from fcmae.data.sources import ImageFolder, Sample, few_labels, train_source, val_source
from fcmae.distributed import World
from fcmae.errors import ConfigError, UsageError
from fcmae.evaluation import classify, run
from fcmae.evaluation.classify import accuracy, predictions
from fcmae.evaluation.features import Extractor, Features, one_class
from fcmae.evaluation.knn import knn_accuracy, knn_of, knn_predict, warn_of_copies
from fcmae.evaluation.labels import read_accepted
from fcmae.evaluation.tables import write_confusion, write_per_class
from fcmae.models import create_backbone
from fcmae.models.build import build_fcmae
from fcmae.models.headed import dense_outputs
from fcmae.models.objective import Predictions
from fcmae.tasks import monitors
from fcmae.tasks.monitors import OnlineKnn
from fcmae.tasks.pretraining import Pretraining
from tests.conftest import TINY_PRETRAIN, relative_error

CPU = World(0, 1, 0, 1, torch.device("cpu"))
DATA = DataConfig(name="synthetic", image_size=32, length=23, crop_pct=1.0)
LOADER = LoaderConfig(workers=0)


class Known:
    """Images whose every pixel is their label's number, in 10 classes."""

    classes = [str(i) for i in range(10)]  # noqa: RUF012  # as the protocol has it

    def __len__(self):
        return 23

    def __getitem__(self, index):
        return Sample(torch.full((3, 32, 32), index % 10, dtype=torch.uint8), index % 10)


class Guess(nn.Module):
    """Logits that are right for labels up to 6, second best for 7 and 8, and last for 9."""

    def forward(self, imgs):
        raw = imgs[:, 0, 0, 0] * DATA.std[0] + DATA.mean[0]
        label = (raw * 255).round().long()
        logits = torch.zeros(len(imgs), 10)
        logits.scatter_(1, label[:, None], torch.tensor([2.0] * 7 + [0.5, 0.5, -1.0])[label][:, None])
        logits[torch.arange(len(imgs)), (label + 1) % 10] += 1
        return logits


@pytest.mark.parametrize("images", [10, classify.COMPILE_FROM])
def test_on_a_gpu_the_dense_engine_gives_what_timm_gives(monkeypatch, images):
    """Many images: compiled, for one size of batch."""
    sizes = []

    def uncompiled(model, imgs, compiled=False):
        sizes.append((len(imgs), compiled))
        return dense_outputs(model, imgs)

    monkeypatch.setattr(classify, "dense_outputs", uncompiled)
    monkeypatch.setattr(classify.toolchain, "missing", lambda device: None)
    model = create_backbone("convnextv2_atto", depths=(1, 1, 1, 1), dims=(8, 12, 16, 24), num_classes=5).eval()
    forward = classify.forward_of(model, torch.device("cuda"), images, 4)
    imgs = torch.randn(4, 3, 64, 64)
    with torch.inference_mode():
        for count in (4, 3):
            assert relative_error(forward(imgs[:count]), model(imgs[:count])) < 1e-5
    many = images == classify.COMPILE_FROM
    assert sizes == [(4, many), (4 if many else 3, many)]


def test_accuracy_counts_every_image_once():
    result = accuracy(predictions(Guess(), Known(), DATA, LOADER, 5, "float32", CPU), CPU)
    assert result["images"] == 23
    assert result["top1"] == pytest.approx(100 * 17 / 23)  # labels 0-6 of two rounds, and 0-2
    assert result["top5"] == pytest.approx(100 * 21 / 23)


def test_every_accepted_class_is_right_and_images_without_one_are_left_out():
    labels = [[index % 10] for index in range(23)]
    labels[9] = [9, 0]  # Guess takes a 9 for a 0
    labels[0] = []
    result = accuracy(predictions(Guess(), Known(), DATA, LOADER, 5, "float32", CPU), CPU, accepted=labels)
    assert result["images"] == 22
    assert result["top1"] == pytest.approx(100 * 17 / 22)  # the 9 instead of the first 0


def test_confusion_counts_predictions_by_true_class():
    confusion = torch.zeros(10, 10, dtype=torch.int64)
    accuracy(predictions(Guess(), Known(), DATA, LOADER, 5, "float32", CPU), CPU, confusion=confusion)
    expected = torch.zeros(10, 10, dtype=torch.int64)
    for index in range(23):
        label = index % 10
        expected[label, label if label < 7 else (label + 1) % 10] += 1
    assert torch.equal(confusion, expected)


def test_tables_of_classes(tmp_path):
    confusion = torch.tensor([[3, 1], [0, 0]])
    for name in ("a.json", "a.csv"):
        write_per_class(tmp_path / name, ["cat", "dog"], confusion)
    expected = {
        "cat": {"images": 4, "right": 3, "top1": 75.0},
        "dog": {"images": 0, "right": 0, "top1": None},
    }
    assert json.loads((tmp_path / "a.json").read_text()) == expected
    assert (tmp_path / "a.csv").read_text().split() == ["class,images,right,top1", "cat,4,3,75.0", "dog,0,0,"]
    write_confusion(tmp_path / "b.csv", ["cat", "dog"], confusion)
    assert (tmp_path / "b.csv").read_text().splitlines() == ["true class,cat,dog", "cat,3,1", "dog,0,0"]
    write_confusion(tmp_path / "b.json", ["cat", "dog"], confusion)
    assert json.loads((tmp_path / "b.json").read_text()) == {"classes": ["cat", "dog"], "matrix": [[3, 1], [0, 0]]}


class Named:
    """Images that are only names."""

    names = ("val/b/2.png", "val/a/1.png", "val/a/3.png")

    def __len__(self):
        return 3

    def describe(self, index):
        return self.names[index]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("real.json", "[[1], [0, 1], []]"),  # in order of file name: 1.png, 2.png, 3.png
        ("labels.json", '{"2.png": [0, "dog"], "a/1.png": "dog", "1.png": "cat", "val/a/3.png": []}'),
        ("labels.csv", "2.png,cat,1\na/1.png,dog\n3.png,\n"),
    ],
)
def test_labels_are_found_by_name_or_order(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert read_accepted(tmp_path / name, Named(), ["cat", "dog"]) == [[0, 1], [1], []]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("l.json", "[[1]]", "has 1 entries for 3 images"),
        ("l.json", "{", "cannot be read"),
        ("l.json", "3", "must hold a list or an object; got a int"),
        ("l.csv", "1.png,cat\n2.png,dog", "has no entry for val/a/3.png"),
        ("l.csv", "1.png,cow\n2.png,dog\n3.png,cat", "a class must be its name or 0 to 1; got 'cow'"),
        ("l.csv", "1.png,2\n2.png,dog\n3.png,cat", "got '2'"),
        ("l.json", '{"1.png": true, "2.png": 0, "3.png": 0}', "got True"),
        ("l.json", "[[], [], []]", "has no class for any image"),
        ("l.csv", "1.png,cat\n2.png,dog\n3.png,cat\n1.png,dog", "cannot be read: 1.png is there twice"),
        ("l.json", '{"1.png": 0, "1.png": 1}', "cannot be read: 1.png is there twice"),
    ],
)
def test_a_mistake_in_a_file_of_labels_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=message):
        read_accepted(tmp_path / name, Named(), ["cat", "dog"])


class SameNames(Named):
    names = ("val/a/1.png", "val/b/1.png", "val/b/2.png")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "l.csv",
            "1.png,cat\n2.png,dog",
            "entry 1.png fits val/a/1.png and val/b/1.png; name them with",
        ),
        (
            "l.json",
            "[[0], [1], [1]]",
            "val/a/1.png and val/b/1.png, whose file names have no order",
        ),
    ],
)
def test_labels_that_fit_several_images_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=message):
        read_accepted(tmp_path / name, SameNames(), ["cat", "dog"])
    (tmp_path / "folders.csv").write_text("a/1.png,cat\n1.png,dog\n2.png,dog")
    assert read_accepted(tmp_path / "folders.csv", SameNames(), ["cat", "dog"]) == [[0], [1], [1]]


def test_knn_votes_by_similarity():
    gallery = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9], [-1.0, 0.0]])
    labels = torch.tensor([0, 0, 1, 1, 2])
    queries = torch.tensor([[2.0, 0.1], [0.0, 3.0], [-5.0, 0.0]])
    assert knn_predict(queries, gallery, labels, [3], 0.07, 3)[0].tolist() == [[0, 1, 2]]


def test_one_very_near_neighbour_outvotes_two_far_ones():
    gallery = torch.tensor([[1.0, 0.0], [0.5, 0.87], [0.5, -0.87]])
    query, labels = torch.tensor([[1.0, 0.0]]), torch.tensor([0, 1, 1])
    assert knn_predict(query, gallery, labels, [3], 0.07, 2)[0].tolist() == [[0]]
    assert knn_predict(query, gallery, labels, [3], 10.0, 2)[0].tolist() == [[1]]


@pytest.mark.parametrize("temperature", [10.0, 0.07, 0.0114, 0.005, 1e-4])
def test_votes_do_not_overflow_at_any_temperature(temperature):
    gallery, labels, queries = torch.randn(200, 8), torch.randint(0, 5, (200,)), torch.randn(100, 8)
    gallery = F.normalize(gallery + 0.3 * F.one_hot(labels, 8))
    similarity, nearest = (F.normalize(queries).double() @ gallery.double().t()).topk(20)
    votes = torch.zeros(100, 5, dtype=torch.float64)
    votes.scatter_add_(1, labels[nearest], torch.softmax(similarity / temperature, 1))
    assert torch.equal(knn_predict(queries, gallery, labels, [20], temperature, 5)[0][0], votes.argmax(1))


def test_several_k_at_once_and_in_chunks_are_what_each_is_alone(monkeypatch):
    gallery, labels, queries = torch.randn(40, 8), torch.randint(0, 4, (40,)), torch.randn(30, 8)
    together, _ = knn_predict(queries, gallery, labels, [1, 5, 100], 0.07, 4)
    monkeypatch.setattr("fcmae.evaluation.knn.SIMILARITIES", 280)
    for row, k in zip(together, [1, 5, 100], strict=True):
        assert torch.equal(row, knn_predict(queries, gallery, labels, [k], 0.07, 4)[0][0])
    nearest = (F.normalize(queries) @ F.normalize(gallery).t()).argmax(1)
    assert torch.equal(together[0], labels[nearest])


def of_stages(maps, *parts):
    how = {"mean": {}, "std": {"correction": 0}}
    return torch.cat([getattr(maps[number - 1], part)((2, 3), **how[part]) for part, number in parts], 1)


ROWS = {
    "pooled": ([], lambda m, maps: m.head.norm(maps[-1].mean((2, 3), keepdim=True)).flatten(1)),
    "mean": ([], lambda m, maps: of_stages(maps, ("mean", 4))),
    "stages": ([], lambda m, maps: of_stages(maps, ("mean", 1), ("mean", 2), ("mean", 3), ("mean", 4))),
    "stages_std": ([3, 2], lambda m, maps: of_stages(maps, ("mean", 3), ("mean", 2), ("std", 3), ("std", 2))),
}


@pytest.mark.parametrize("layer", ROWS)
def test_features_of_a_layer(layer):
    """``std`` is over a map's sites, without Bessel's correction."""
    backbone = create_backbone("convnextv2_atto", depths=(1, 1, 1, 1), dims=(8, 12, 16, 24))
    torch.nn.init.normal_(backbone.head.norm.weight)
    stages, row = ROWS[layer]
    extract = Extractor(backbone, DATA, CPU, loader=LOADER, batch_size=7, layer=layer, stages=stages or None)
    features = extract(Known())
    assert features.labels.tolist() == [index % 10 for index in range(23)]
    assert features.values.shape == (23, extract.width)
    imgs = normalize(Known()[4].image[None], DATA.mean, DATA.std)
    with torch.no_grad():
        maps = backbone.eval().forward_intermediates(imgs, intermediates_only=True)
    torch.testing.assert_close(features.values[4:5], row(backbone, maps), rtol=1e-4, atol=1e-5)


def test_a_stage_that_the_network_lacks_is_named():
    backbone = create_backbone("convnextv2_atto", depths=(1, 1, 1, 1), dims=(8, 8, 8, 8))
    with pytest.raises(ConfigError, match=r"stages must be from 1 to 4, the stages of the network; got \[2, 5\]"):
        Extractor(backbone, DATA, CPU, loader=LOADER, layer="stages", stages=[2, 5])(Known())


def test_extracting_leaves_the_model_in_training_mode():
    backbone = create_backbone("convnextv2_atto", depths=(1, 1, 1, 1), dims=(8, 8, 8, 8))
    Extractor(backbone.train(), DATA, CPU, loader=LOADER)(Known())
    assert all(module.training for module in backbone.modules())


@pytest.mark.parametrize("command", ["knn", "probe"])
def test_few_labels_are_drawn_by_the_seed(monkeypatch, command):
    """As in fine-tuning: the same images for the same seed, others for another."""
    data = DataConfig(name="synthetic", image_size=32, length=100, labels_per_class=3)
    seen = []

    def extract(source):
        seen.append(getattr(source, "indices", None))
        raise KeyboardInterrupt

    @contextlib.contextmanager
    def frozen(cfg):
        yield SimpleNamespace(data=data, world=CPU), extract

    monkeypatch.setattr(run, "_frozen", frozen)
    for seed in (0, 1, 1):
        with pytest.raises(KeyboardInterrupt):
            getattr(run, command)(compose(command, ["checkpoint=x", f"seed={seed}"]))
    assert seen == [few_labels(train_source(data), 3, seed).indices for seed in (0, 1, 1)]
    assert seen[0] != seen[1]


def test_knn_of_identical_images_is_perfect():
    backbone = create_backbone("convnextv2_atto", depths=(1, 1, 1, 1), dims=(8, 8, 8, 8))
    features = Extractor(backbone, DATA, CPU, loader=LOADER)(val_source(DATA))
    result = knn_accuracy(features, features, 10, CPU, ks=[1])
    assert result == {"knn1": 100, "copies": 23}


def test_validation_images_in_the_gallery_and_one_class_are_said(capsys):
    gallery = Features(torch.randn(40, 8), torch.arange(40) % 2)
    queries = Features(torch.cat([gallery.values[:3] * 2, torch.randn(7, 8)]), torch.zeros(10, dtype=torch.int64))
    result = knn_accuracy(gallery, queries, 2, CPU, ks=[1, 5])
    assert result["copies"] == 3
    warn_of_copies({**result, "copies": 0}, 10, CPU)
    assert capsys.readouterr().err == ""
    warn_of_copies(result, 10, CPU)
    assert capsys.readouterr().err.startswith("warning: 3 of 10 validation images have the features of a training")
    assert one_class([]) == one_class(["cat", "dog"]) == []
    assert one_class(["cat"]) == ["warning: all images are of one class, cat: any network has an accuracy of 100 %"]


@pytest.mark.parametrize(("classes", "reported"), [(5, False), (6, True)])
def test_top5_is_reported_of_six_classes_or_more(classes, reported):
    share = [Predictions(torch.randn(8, classes), torch.arange(8) % classes, torch.arange(8))]
    assert ("top5" in accuracy(share, CPU)) == reported
    result = accuracy(share, CPU, accepted=[[index % classes] for index in range(8)])
    assert result.keys() == {"top1", "images"} | ({"top5"} if reported else set())


def test_the_monitor_measures_the_averaged_weights(monkeypatch, capsys):
    """The run's encoder file, ``init_from`` and ``fcmae knn`` take them too."""
    cfg = compose("pretrain", [*TINY_PRETRAIN[1:], "monitor=knn"])
    weights, average = build_fcmae(cfg), build_fcmae(dataclasses.replace(cfg, seed=1))
    monitor = OnlineKnn(weights.backbone, cfg)
    measured = []

    def accuracy(gallery, *_, **__):
        measured.append(gallery.values)
        return {"knn10": 50.0, "copies": 24}

    monkeypatch.setattr(monitors, "knn_accuracy", accuracy)
    for ema, expected in ((average, average), (None, weights)):
        monitor(ema, 1, SimpleNamespace(log=lambda *_: None), CPU, lambda: False)  # type: ignore[arg-type]
        assert torch.equal(
            measured[-1], Extractor(expected.backbone, cfg.data, CPU, loader=LOADER)(monitor.gallery).values
        )
    assert not torch.equal(*measured)
    assert capsys.readouterr().err.count("warning: 24 of 24 validation images have the features of a training") == 1


def test_too_many_neighbours_are_refused_before_features_are_extracted():
    """And before pretraining, where ``monitor=knn`` asks for them."""
    extract = pytest.fail
    with pytest.raises(ConfigError, match=r"k must be at most 23, the number of images.*; got \[3, 24\]"):
        knn_of(DATA, LOADER, extract, CPU, ks=[3, 24])
    with pytest.raises(ConfigError, match=r"k must be at most 5.*; got \[6\]"):
        knn_of(DATA, LOADER, extract, CPU, ks=[6], gallery=5)
    cfg = compose("pretrain", [*TINY_PRETRAIN[1:], "monitor=knn", "monitor.knn_k=[1,25]"])
    with pytest.raises(ConfigError, match=r"monitor.knn_k must be at most 24.*; got \[1, 25\]"):
        Pretraining(cfg)


def test_outputs_that_are_not_finite_count_as_wrong(capsys):
    logits = torch.eye(6).repeat(2, 1)
    logits[:3] = torch.tensor([torch.nan, torch.inf, -torch.inf])[:, None]
    confusion = torch.zeros(6, 6, dtype=torch.int64)
    share = [Predictions(logits, torch.arange(12) % 6, torch.arange(12))]
    result = accuracy(share, CPU, confusion=confusion)
    assert result == {"top1": 75.0, "top5": 75.0, "images": 12}
    assert torch.equal(confusion, confusion.diagonal().diag())
    assert "warning: the outputs for 3 images are not finite, and count as wrong" in capsys.readouterr().err


def test_features_that_are_not_finite_are_near_to_nothing(capsys):
    backbone = create_backbone("convnextv2_atto", depths=(1, 1, 1, 1), dims=(8, 8, 8, 8))
    clean = Extractor(backbone, DATA, CPU, loader=LOADER)(Known())
    poisoned = Extractor(backbone, DATA, CPU, loader=LOADER)
    pool = type(poisoned)._pool
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Extractor, "_pool", lambda self, imgs: pool(self, imgs).index_fill(0, torch.tensor([4]), torch.nan)
        )
        features = poisoned(Known())
    assert features.values[4].eq(0).all()
    assert torch.equal(features.values[5:], clean.values[5:])
    assert "warning: the features of 1 image are not finite, and count as zero" in capsys.readouterr().err
    found = knn_predict(clean.values[5:], features.values, features.labels, [1], 0.07, 10)[0][0]
    assert torch.equal(found, clean.labels[5:])


def test_an_evaluation_of_nothing_is_an_error(tmp_path):
    """With ``loader.on_error=skip`` and any ``loader.max_bad``."""
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_bytes(b"damaged")
    source, lenient = ImageFolder(tmp_path), LoaderConfig(workers=0, on_error="skip", max_bad=1.0)
    share = predictions(nn.Flatten(), source, DATA, lenient, 1, "float32", CPU)
    with pytest.raises(UsageError, match="none of the 2 images could be read"):
        accuracy(share, CPU)
    Image.new("RGB", (8, 8)).save(tmp_path / "b" / "x.png")
    assert len(list(predictions(nn.Flatten(), source, DATA, lenient, 1, "float32", CPU))) == 1
