"""Fine-tuning for a class per pixel: loss, metrics, windows, and a run from pretraining to predictions."""

import io
import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex
from torchmetrics.segmentation import DiceScore

import fcmae as package
from fcmae.checkpoints import checkpoint
from fcmae.config import FinetuneConfig, compose
from fcmae.data.pixels.maps import IGNORED
from fcmae.data.sources import Sample
from fcmae.distributed import World
from fcmae.errors import ConfigError, ImageError, UsageError
from fcmae.evaluation.features import Images
from fcmae.evaluation.windows import Windows, over_windows, starts
from fcmae.models.dense_head import DenseHead, enlarged
from fcmae.models.headed import Headed
from fcmae.models.objective import Predictions
from fcmae.optim.adamw import create_optimizer, set_lr
from fcmae.tasks.finetuning import Finetuning
from fcmae.tasks.objectives import Segment
from tests.conftest import TINY_FINETUNE, TINY_PRETRAIN, run_python
from tests.dense_files import write_squares
from tests.results import assert_same, metrics_of, newest

CPU = World(0, 1, 0, 1, torch.device("cpu"))


class Listed:
    """A source of maps in memory."""

    def __init__(self, maps):
        self.maps = maps

    def __len__(self):
        return len(self.maps)

    def __getitem__(self, index):
        return Sample(torch.zeros(3, *self.maps[index].shape, dtype=torch.uint8), self.maps[index])

    def describe(self, index):
        return f"map {index}"


def outputs_and_targets(classes=4, count=3):
    logits = torch.randn(count, classes, 8, 8)
    target = torch.randint(0, classes, (count, 8, 8), dtype=torch.int16)
    target[:, :2] = IGNORED
    return logits, target


def test_cross_entropy_is_the_mean_over_labelled_pixels():
    logits, target = outputs_and_targets()
    target[2] = IGNORED
    weights = [1.0, 2.0, 0.5, 3.0]
    losses, parts = Segment(4, class_weights=weights).loss(logits, target)
    assert list(parts) == ["ce"]
    for number in range(2):
        of = target[number] != IGNORED
        rows, classes = logits[number][:, of].T, target[number][of].long()
        each = F.cross_entropy(rows, classes, torch.tensor(weights), reduction="none")
        torch.testing.assert_close(losses[number], each.mean())
    assert losses[2] == 0


def test_dice_is_that_of_hard_predictions_and_sums_have_weights():
    """Of certain predictions, soft dice is torchmetrics' but for the smoothing of one pixel."""
    _, target = outputs_and_targets()
    guess = torch.where(torch.rand(target.shape) < 0.3, (target + 1) % 4, target).clamp(min=0).long()
    logits = 100 * F.one_hot(guess, 4).permute(0, 3, 1, 2).float()
    losses, _ = Segment(4, loss="dice").loss(logits, target)
    for number in range(3):
        of = target[number] != IGNORED
        score = DiceScore(4, average="none", input_format="index")
        each = score(guess[number][of][None], target[number][of][None].long())
        assert losses[number].item() == pytest.approx(1 - each.mean().item(), abs=0.05)
    both, parts = Segment(4, loss={"ce": 0.5, "dice": 2}).loss(logits, target)
    torch.testing.assert_close(both, 0.5 * parts["ce"] + 2 * parts["dice"])
    torch.testing.assert_close(parts["dice"], losses)


def test_left_out_pixels_have_no_gradient():
    logits, target = outputs_and_targets()
    logits.requires_grad_()
    Segment(4, loss="ce+dice").loss(logits, target)[0].sum().backward()
    assert (logits.grad[:, :, :2] == 0).all()
    assert (logits.grad[:, :, 2:] != 0).all()


def test_metrics_are_those_of_torchmetrics_and_count_what_is_not_finite_as_wrong():
    logits, target = outputs_and_targets(count=4)
    segment = Segment(["a", "b", "c", "d"])
    share = [Predictions(logits[i : i + 1], target[i : i + 1], torch.tensor([i])) for i in range(4)]
    found = segment.metrics(share, CPU)
    truth = target.long()
    iou = MulticlassJaccardIndex(4, average="none", ignore_index=IGNORED)(logits, truth)
    accuracy = MulticlassAccuracy(4, average="micro", ignore_index=IGNORED)(logits, truth)
    assert found["miou"] == pytest.approx(100 * iou.mean().item())
    assert [found[f"iou_{name}"] for name in "abcd"] == pytest.approx((100 * iou).tolist())
    assert [found[f"dice_{name}"] for name in "abcd"] == pytest.approx((200 * iou / (1 + iou)).tolist())
    assert found["accuracy"] == pytest.approx(100 * accuracy.item())
    assert found["images"] == 4
    assert segment.confusion.sum() == (target != IGNORED).sum()
    broken = logits.clone()
    broken[0] = math.nan
    share[0] = share[0]._replace(outputs=broken[:1])
    right = (logits[1:].argmax(1) == target[1:]).sum()
    assert segment.metrics(share, CPU)["accuracy"] == pytest.approx(100 * (right / (target != IGNORED).sum()).item())


def test_class_weights_are_inverse_frequencies():
    maps = [torch.tensor([[0, 0, 0, 1], [0, 0, 255, 255]], dtype=torch.uint8)] * 3
    segment = Segment(3, class_weights="auto")
    segment.fit(Listed(maps), FinetuneConfig())
    torch.testing.assert_close(segment.weights, torch.tensor([6 / (2 * 5), 6 / (2 * 1), 3.0]))
    again = Segment(3, class_weights="auto")
    again.load_state_dict(segment.state_dict())
    assert again.weights.equal(segment.weights)


def test_numbers_in_files_stand_for_classes():
    """As of masks of 0 and 255, and of files whose 0 is not labelled."""
    segment = Segment(["bg", "cell"], values=[0, 255], ignore_index=None)
    given = torch.tensor([[0, 255], [255, 0]], dtype=torch.uint8)
    target = segment.target(Sample(None, given), Listed([given]), 0)
    assert target.tolist() == [[0, 1], [1, 0]]
    predicted = torch.stack([target == 0, target == 1]).float()
    assert segment.final(predicted).equal(given.long())
    ade = Segment(2, reduce_zero_label=True)
    files = torch.tensor([[0, 1], [2, 255]], dtype=torch.uint8)
    assert ade.target(Sample(None, files), Listed([files]), 0).tolist() == [[IGNORED, 0], [1, IGNORED]]
    assert ade.final(torch.tensor([0.1, 0.9]).view(2, 1, 1)).tolist() == [[2]]
    with pytest.raises(ImageError, match="it has 1 pixel of other classes, such as 3; 2 classes are 1 to 2 or 0 or "):
        ade.target(Sample(None, files + 1), Listed([files]), 0)
    with pytest.raises(ValueError, match="reduce_zero_label must be true or false, false with values; got True"):
        Segment(2, values=[1, 2], reduce_zero_label=True)
    shifted = Segment(2, values=[2, 1], ignore_index=0)
    assert shifted.target(Sample(None, given // 100), Listed([given]), 0).tolist() == [[IGNORED, 0], [0, IGNORED]]


@pytest.mark.parametrize("factor", [2, 4])
def test_enlarging_is_bilinear_interpolation(factor):
    x = torch.randn(2, 3, 5, 7, requires_grad=True)
    ours, theirs = enlarged(x, factor), F.interpolate(x, scale_factor=factor, mode="bilinear")
    torch.testing.assert_close(ours, theirs)
    grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in (ours, theirs)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


def test_the_head_gives_a_prediction_per_pixel():
    head = DenseHead([4, 6, 8], [2, 4, 8], outputs=5, width=8)
    maps = [torch.randn(2, dim, 32 // stride, 48 // stride) for dim, stride in zip([4, 6, 8], [2, 4, 8], strict=True)]
    out = head(maps)
    assert out.shape == (2, 5, 32, 48)
    assert out.dtype == torch.float32


@pytest.mark.parametrize("overlap", [0.0, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("side", [32, 33, 47, 64, 65, 200])
def test_windows_cover_a_line_and_overlap(side, overlap):
    places = starts(side, 32, overlap)
    assert places[0] == 0
    assert places[-1] == side - 32
    gaps = np.diff(places)
    assert (gaps > 0).all()
    assert (gaps <= 32 * (1 - overlap) + 1).all()


def test_windows_are_averaged_and_every_pixel_counts_once():
    """A network that copies its input gives back the image, whatever its size and the batch size."""
    images = [Images(torch.randn(1, 2, height, width), torch.zeros(1), torch.tensor([place]))
              for place, (height, width) in enumerate([(16, 16), (50, 37), (9, 70), (12, 12)])]  # fmt: skip
    seen = []

    def network(windows):
        seen.append(len(windows))
        return windows.sum(1, keepdim=True)

    for batch_size in (1, 5, 100):
        seen.clear()
        found = list(over_windows(network, images, Windows((16, 16), 0.5, batch_size)))
        assert [int(image.places) for image, _ in found] == [0, 1, 2, 3]
        for image, predicted in found:
            torch.testing.assert_close(predicted, image.imgs[0].sum(0, keepdim=True))
        assert sum(seen) == 1 + 6 * 4 + 8 + 1
        assert max(seen) <= batch_size


def segmenting(folder):
    data = (f"data.path={folder}/images", f"data.target_path={folder}/masks", f"data.val_path={folder}/images")
    of = ("objective=segment", "objective.classes=[bg,red,green]", "objective.width=8", "objective.loss=ce+dice")
    how = ("data.name=imagefolder", "optim.ema_decay=0.5", "optim.layer_decay=0.8", "model.drop_path_rate=0.2")
    return (*TINY_FINETUNE, *data, *of, *how, "optim.global_batch_size=4", "objective.class_weights=auto")


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    return write_squares(tmp_path_factory.mktemp("squares"), 8)


def test_a_run_from_pretraining_to_an_evaluation(fcmae_here, tmp_path, squares):
    images = (f"data.path={squares}/images", "data.name=imagefolder", "trainer.eval_every_epochs=null")
    fcmae_here(*TINY_PRETRAIN, *images, "schedule.epochs=1", "hydra.run.dir=pre")
    args = (*segmenting(squares), "init_from=pre")
    fcmae_here(*args, "hydra.run.dir=whole")
    fcmae_here(*args, "hydra.run.dir=again", "trainer.max_steps=1", check=75)
    shutil.copytree(tmp_path / "again", tmp_path / "cut")
    fcmae_here(*args, "hydra.run.dir=cut", "trainer.micro_batch_size=2", "engine.recompute_stages=[1]",
               "trainer.max_steps=2", check=75)  # fmt: skip
    fcmae_here(*args, "hydra.run.dir=again")
    states = [newest(tmp_path / run) for run in ("whole", "again")]
    for kind in ("model", "ema"):
        assert_same(states[0][kind], states[1][kind])
    assert states[0]["classes"] == ["bg", "red", "green"]
    measured = metrics_of(tmp_path / "whole")
    last = [line for line in measured if "miou" in line][-1]
    assert {"loss_ce", "loss_dice"} <= measured[0].keys()
    assert states[0]["best"]["score"] == max(line["ema_miou"] for line in measured if "ema_miou" in line)
    evaluate = ("evaluate", "checkpoint=whole@last", "out=result.json", "confusion=confusion.json", "loader.workers=0")
    fcmae_here(*evaluate, "batch_size=3")
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["ema_miou"] == pytest.approx(last["ema_miou"], rel=1e-5)
    counts = json.loads((tmp_path / "confusion.json").read_text())
    assert np.sum(counts["matrix"]) == 8 * 38 * 56
    model = package.load(f"{tmp_path}/whole@last")
    assert isinstance(model, Headed)
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 3, 32, 32)
    assert "per_class must be null" in fcmae_here(*evaluate, "per_class=x.csv", check=2).stderr
    check_predictions(fcmae_here, tmp_path, squares, counts["matrix"])


def check_predictions(fcmae_here, folder, squares, matrix):
    """The files of ``fcmae predict`` are those that ``evaluate`` counted."""
    images = f"{squares}/images"
    fcmae_here("predict", "whole@last", images, "--out", "maps", "--batch-size", "5", "loader.workers=0")
    found = np.zeros((3, 3), np.int64)
    for number in range(8):
        predicted, truth = (np.array(Image.open(root / "s" / f"{number}.png"))
                            for root in (folder / "maps", squares / "masks"))  # fmt: skip
        assert predicted.dtype == np.uint8
        np.add.at(found, (truth[2:].ravel(), predicted[2:].ravel()), 1)
    assert found.tolist() == matrix
    maps = package.predict(f"{folder}/whole@last", [f"{images}/s/3.png", "loader.workers=0"])
    assert maps.columns == ["bg", "red", "green"]
    assert maps.paths == [f"{images}/s/3.png"]
    assert maps.maps[0].numpy().tolist() == np.array(Image.open(folder / "maps" / "s" / "3.png")).tolist()
    for out, message in (
        (images, f"--out {images}: .*png is an image that is read; give another folder"),
        ("rows.csv", "--out must be a folder, because .* predicts a map per image"),
    ):
        told = fcmae_here("predict", "whole@last", images, "--out", out, check=2).stderr
        assert re.search(message, told), told
    (folder / "some").mkdir()
    (folder / "maps" / "1.png").write_bytes(b"of an earlier run")
    (folder / "some" / "0.png").write_bytes((squares / "images" / "s" / "0.png").read_bytes())
    (folder / "some" / "1.png").write_bytes(b"damaged")
    lenient = ("loader.workers=0", "loader.on_error=skip", "loader.max_bad=0.5")
    maps = package.predict(f"{folder}/whole@last", [f"{folder}/some", *lenient], out=folder / "maps")
    assert maps.paths == [f"{folder}/some/0.png"]
    twice = fcmae_here("predict", "whole@last", f"{images}/s", f"{images}/s", "--out", "twice", check=2).stderr
    assert "would be one file, twice/0.png" in twice


def task_of(squares, *overrides):
    cfg = compose("finetune", [*segmenting(squares)[1:], *overrides])
    return Finetuning(cfg if cfg.init_from else cfg.settled({}))


def test_a_pretrained_unet_starts_the_head(fcmae_here, tmp_path, squares):
    images = (f"data.path={squares}/images", "data.name=imagefolder", "trainer.eval_every_epochs=null")
    unet = ("model.decoder=unet", "model.decoder_embed_dim=8", "optim.ema_decay=0.5", "hydra.run.dir=pre")
    pretrain = [word for word in TINY_PRETRAIN if not word.startswith("model.decoder_embed_dim")]
    fcmae_here(*pretrain, *images, "schedule.epochs=1", *unet)
    given = checkpoint.read(checkpoint.resolve(f"{tmp_path}/pre"))["ema"]
    init = f"init_from={tmp_path}/pre"

    def started(*overrides):
        task = task_of(squares, init, *overrides)
        task.initialise()
        own = task.model.head.unet.state_dict()
        return task.notes[-1], [value.equal(given[f"decoder.unet.{name}"]) for name, value in own.items()]

    note, same = started()
    assert note.endswith("and its U-Net")
    assert all(same)
    note, same = started("init_decoder=false")
    assert note.endswith("; the U-Net is new (init_decoder=false)")
    assert not all(same)
    other = "; the U-Net is new, because init_from has one of another width (objective.width=8 would take it)"
    assert started("objective.width=16")[0].endswith(other)


@pytest.mark.parametrize(
    ("what", "frozen"), [("encoder", ("stem", "stages")), ("stages:2", ("stem", "stages.0", "stages.1"))]
)
def test_frozen_weights_stay_as_they_are(squares, what, frozen):
    task = task_of(squares, f"freeze={what}", "model.drop_path_rate=0")
    optimizer = create_optimizer(task.model, task.cfg.optim)
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    set_lr(optimizer, 0.1)
    target = torch.randint(0, 3, (2, 32, 32), dtype=torch.int16)
    task.loss(task.model, [torch.randn(2, 3, 32, 32), target, *task.draw(0, range(2))])[0].backward()
    optimizer.step()
    after = task.model.state_dict()
    names = tuple(f"backbone.{name}" for name in frozen)
    for name, value in before.items():
        assert value.equal(after[name]) == name.startswith((*names, "backbone.head")), name
    with pytest.raises(ConfigError, match="freeze must name one of 4 stages; got 'stages:5'"):
        task_of(squares, "freeze=stages:5")


@pytest.mark.parametrize("engine", ["timm"])
def test_engines_agree(squares, engine):
    losses = []
    for name in ("dense", engine):
        task = task_of(squares, f"engine={name}", "model.drop_path_rate=0")
        imgs = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        target = (imgs[:, 0] > 0).short()
        losses.append(task.loss(task.model, [imgs, target, *task.draw(0, range(2))])[0])
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("head", ["unet", "upernet"])
def test_two_ranks_are_one(squares, tmp_path, head):
    """Of different numbers of images, of which one rank has none of the last window batch."""
    args = (*segmenting(squares), f"objective.head={head}")
    results = []
    for ranks in (1, 2):
        run = ("-m", "fcmae.cli", *args, f"hydra.run.dir=run{ranks}", "schedule.epochs=1", "optim.ema_decay=null")
        run_python(tmp_path, *run, ranks=ranks)
        lines = (tmp_path / f"run{ranks}" / "metrics.jsonl").read_text().splitlines()
        results.append([json.loads(line) for line in lines])
    for name in ("loss", "miou", "dice", "iou_red"):
        one, two = ([line[name] for line in lines if name in line] for lines in results)
        assert one
        assert one == pytest.approx(two, rel=1e-6)


@pytest.mark.parametrize("best", ["iou_nope", "dice_nope", "miou_b", "top1"])
def test_the_best_metric_is_known_before_training(best):
    with pytest.raises(ValueError, match="best must be one of miou, dice, accuracy, iou_a, iou_b, dice_a, dice_b"):
        Segment(["a", "b"], best=best)
    assert Segment(["a", "b"], best="iou_b").best == "iou_b"


def test_a_best_class_that_does_not_occur_ends_no_training():
    objective = Segment(["a", "b", "c"], best="iou_c")
    share = [
        Predictions(torch.eye(3)[None, :, :2, None], torch.tensor([[[0], [1]]], dtype=torch.int16), torch.zeros(1))
    ]
    metrics = objective.metrics(share, CPU)
    assert (metrics["iou_a"], metrics["miou"]) == (100, 100)
    assert math.isnan(metrics["iou_c"])


@pytest.mark.parametrize("classes", [["a", None], [True, False], [1e3, 2]])
def test_a_class_that_yaml_reads_as_something_else_is_named(classes, capsys):
    Segment(classes).fit(Listed([]), FinetuneConfig.__new__(FinetuneConfig))
    told = capsys.readouterr().err
    assert f"YAML has read a name as {', '.join(str(name) for name in classes if name not in ('a', 2))}, its" in told


@pytest.mark.parametrize("values", [[-1, 0], [0, 65536]])
def test_a_number_that_a_png_cannot_hold_is_not_written_as_another(values):
    with pytest.raises(UsageError, match=f"need objective.values of 0 to 65535; got {values[0]} to {values[1]}"):
        Segment(2, values).write(torch.tensor([values]), io.BytesIO())
