"""Runs with objective=detect: from pretraining to predictions, micro-batches, ranks, and what cannot be done."""

import copy
import json
import re

import pytest
import torch
from PIL import Image

import fcmae as package
from fcmae.checkpoints import checkpoint
from fcmae.config import compose, to_dict
from fcmae.data.pixels.instances import mask_of
from fcmae.data.sources import ImageFolder
from fcmae.data.sources.coco import CocoImages
from fcmae.distributed import World
from fcmae.errors import ConfigError
from fcmae.evaluation.predict_boxes import BoxNetwork, _category_ids
from fcmae.models import detector
from fcmae.models.detector import Found
from fcmae.precision import autocast
from fcmae.tasks.finetuning import Finetuning
from tests.coco_files import write_coco, write_json
from tests.conftest import TINY_FINETUNE, TINY_PRETRAIN, run_python
from tests.results import assert_same, metrics_of, newest

CPU = World(0, 1, 0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    folder = tmp_path_factory.mktemp("squares")
    write_coco(folder)
    return folder


# Runs


def detecting(folder, *overrides):
    files = (f"data.path={folder}/images", *(f"data.{part}annotations={folder}/objects.json" for part in ("", "val_")))
    how = ("optim.ema_decay=0.5", "optim.layer_decay=0.8", "model.drop_path_rate=0.2", "optim.global_batch_size=4")
    tiny = [word for word in TINY_FINETUNE if word != "data=synthetic"]
    return (*tiny, "objective=detect", *files, "objective.width=8", "objective.detections=4", *how, *overrides)


def test_a_run_from_pretraining_to_predictions(fcmae_here, tmp_path, squares):
    images = ("data=coco", f"data.path={squares}/images", f"data.annotations={squares}/objects.json")
    pretrain = [word for word in TINY_PRETRAIN if word != "data=synthetic"]
    fcmae_here(*pretrain, *images, "trainer.eval_every_epochs=null", "schedule.epochs=1", "hydra.run.dir=pre",
               "optim.global_batch_size=4")  # fmt: skip
    command, *how = detecting(squares, "init_from=pre", "trainer.eval_every_epochs=2", "trainer.micro_batch_size=4")
    args = (command, "experiment=coco/mask_rcnn", *how)
    fcmae_here(*args, "hydra.run.dir=whole")
    fcmae_here(*args, "hydra.run.dir=cut", "trainer.max_steps=1", check=75)
    fcmae_here(*args, "hydra.run.dir=cut")
    states = [newest(tmp_path / run) for run in ("whole", "cut")]
    for kind in ("model", "ema"):
        assert_same(states[0][kind], states[1][kind])
    lines = metrics_of(tmp_path / "whole")
    assert {"loss_objectness", "loss_rpn_boxes", "loss_classes", "loss_boxes", "loss_masks"} <= lines[0].keys()
    last = [line for line in lines if "map" in line][-1]
    assert states[0]["best"]["score"] == max(line["ema_map"] for line in lines if "ema_map" in line)
    (picture,) = (tmp_path / "whole" / "reconstructions").glob("*.png")
    with Image.open(picture) as image:
        assert image.size == (4 * 4 + 3 * 32, 5 * 4 + 4 * 23)
    assert (states[0]["classes"], states[0]["objective"]["category_ids"]) == (["red", "green"], [3, 7])
    evaluate = ("evaluate", "checkpoint=whole@last", "loader.workers=0")
    fcmae_here(*evaluate, "out=result.json", "batch_size=4", "report=run")
    result = json.loads((tmp_path / "result.json").read_text())
    report = tmp_path / "whole" / "evaluation"
    curves = [f"{kind}precision_recall_{iou}.png" for kind in ("", "mask_") for iou in (50, 75)]
    assert sorted(file.name for file in report.iterdir()) == sorted(
        ["metrics.csv", "metrics.json", "per_class.csv", "worst.csv", "worst.png", *curves]
    )
    worst = (report / "worst.csv").read_text().splitlines()[1:]
    with Image.open(report / "worst.png") as image:
        assert image.height == 16 + 4 + len(worst) * (4 + 23)
    for name in ("ema_map", "ema_mask_map50", "map_red"):
        assert result[name] == pytest.approx(last[name], rel=1e-4, abs=1e-4)
    check_predictions(fcmae_here, tmp_path, squares)


def test_ids_of_classes_follow_their_names(squares):
    network = BoxNetwork(torch.nn.Identity(), ["red", "green"], [3, 7])
    content = json.loads((squares / "objects.json").read_text())

    def ids(*categories):
        content["categories"] = [{"id": identity, "name": name} for name, identity in categories]
        return _category_ids(CocoImages(write_json(squares, content, "ids.json"), squares / "images", "x"), network)

    assert ids(("red", 20), ("green", 5)) == [20, 5]
    assert ids(("green", 3), ("red", 7)) == [7, 3]
    assert ids(("red", 20)) == [20, 7]
    assert ids() == _category_ids(ImageFolder(squares), network) == [3, 7]
    with pytest.raises(ConfigError, match=r"ids.json has no category green, and its id in training, 7, is that of red"):
        ids(("red", 7))


def check_predictions(fcmae_here, folder, squares):
    content = json.loads((squares / "objects.json").read_text())
    content["categories"] = [{"id": 20, "name": "red"}, {"id": 5, "name": "green"}]  # not the training file's ids
    given = (f"data.path={squares}/images", f"data.annotations={write_json(folder, content)}", "loader.workers=0")
    fcmae_here("predict", "whole@last", *given, "--out", "found.json", "--batch-size", "4")
    found = json.loads((folder / "found.json").read_text())
    assert found
    assert {row["image_id"] for row in found} <= set(range(10, 16))
    assert mask_of(found[0]["segmentation"], (40, 56)).shape == (40, 56)
    images = [f"{squares}/images", "loader.workers=0"]
    boxes = package.predict(f"{folder}/whole@last", images, out=f"{folder}/found.csv")
    assert boxes.columns == ["red", "green"]
    assert sum(map(len, boxes.masks)) == sum(map(len, boxes.scores)) == len(found)
    assert [row["category_id"] for row in found] == [[20, 5][k] for k in torch.cat(boxes.classes).tolist()]
    assert boxes.scores[0][0].item() == pytest.approx(found[0]["score"], rel=1e-5)
    left, top, right, bottom = boxes.boxes[0][0].tolist()
    assert found[0]["bbox"] == pytest.approx([left, top, right - left, bottom - top], abs=1e-3)
    assert (folder / "found.csv").read_text().splitlines()[0] == "path,class,score,left,top,right,bottom"
    assert package.embed(f"{folder}/whole@last", images).values.shape == (6, 24)
    rows = package.load(f"{folder}/whole@last")(torch.zeros(1, 3, 32, 32))
    assert isinstance(rows[0], Found)
    with pytest.raises(ConfigError, match="must be a file whose name ends in .json or .csv; got"):
        package.predict(f"{folder}/whole@last", images, out=f"{folder}/found.npz")


def test_a_detector_starts_another(tmp_path, squares):
    first = task_of(squares)
    given = first.model.state_dict()
    state = {"task": first.name, "config": to_dict(first.cfg), **first.extra_state(), "model": given}
    checkpoint.CheckpointDir(tmp_path / "run").save({**state, "step": 0, "ema": None})
    content = json.loads((squares / "objects.json").read_text())
    content["categories"].append({"id": 9, "name": "blue"})
    file = write_json(squares, content, "three.json")
    whole = len([name for name in given if name.startswith("head.")])
    for overrides, fits in (
        ((), f"and {whole} of {whole} tensors"),
        ((f"data.annotations={file}",), f"and {whole - 6} of {whole} tensors"),
        (("init_decoder=false",), "; the head is new"),
    ):
        cfg = compose("finetune", [*detecting(squares)[1:], f"init_from={tmp_path}/run", "seed=1", *overrides])
        task = Finetuning(cfg)
        task.initialise()
        assert fits in task.notes[-1]
        name = "rpn.head.bbox_pred.weight"
        assert task.model.head.state_dict()[name].equal(given[f"head.{name}"]) == ("new" not in fits)


def task_of(squares, *overrides):
    return Finetuning(compose("finetune", [*detecting(squares)[1:], *overrides]).settled({}))


def test_frozen_weights_have_no_gradient(squares):
    task = task_of(squares, "freeze=stages:2", "objective.model=faster_rcnn")
    assert not task.objective.masks
    trained = {name.split(".")[1] for name, value in task.model.named_parameters() if value.requires_grad}
    assert trained == {"stages", "norms", "fpn", "rpn", "roi_heads"}
    samples = [task.dataset()[0, index] for index in range(2)]
    batch = [torch.stack(column) for column in zip(*samples, strict=True)]
    assert batch[-1].shape[2:] == (1, 1)
    loss, _ = task.loss(task.model, [*batch, *task.draw(0, range(2))])
    with autocast(torch.device("cpu"), "bf16"):
        rounded, _ = task.loss(task.model, [*batch, *task.draw(0, range(2))])
    assert rounded.item() == pytest.approx(loss.item(), rel=0.05)
    loss.backward()
    assert len(task_of(squares, "data.num_images=4").dataset()[0, 3]) == 5
    assert task.model.backbone.stages[0].blocks[0].mlp.fc1.weight.grad is None
    assert task.model.backbone.stages[2].blocks[0].mlp.fc1.weight.grad.abs().sum() > 0


def test_micro_batches_do_not_change_a_step(squares):
    task = task_of(squares, "model.drop_path_rate=0.5")
    samples = [task.dataset()[0, index] for index in range(4)]
    losses = []
    for size in (4, 2):
        task.model.zero_grad()
        for first in range(0, 4, size):
            batch = [torch.stack(column) for column in zip(*samples[first : first + size], strict=True)]
            loss, _ = task.loss(task.model, [*batch, *task.draw(0, range(first, first + size))])
            (loss * size / 4).backward()
        losses.append([p.grad.clone() for p in task.model.parameters() if p.grad is not None])
    for one, two in zip(*losses, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("engine=timm",), "engine.name must be dense with objective=detect"),
        (("trainer.cuda_graph=true", "trainer.device=cuda"), "cuda_graph must be false or null with objective=detect"),
        (("data.image_size=45",), "data.image_size must be a multiple of 8"),
        (("data.rot90=true",), "data.rot90 must be False with objective=detect"),
        (("augment=in1k",), "augment.auto_augment must be None with objective=detect"),
        (("augment.mixup=0.5",), "augment.mixup must be 0"),
        (("data.val_annotations=null",), "data.val_annotations is not set; give the COCO JSON file"),
        (("data.name=imagefolder",), "data.name must be coco with objective=detect"),
        (("objective.anchors=[4]",), "objective.anchors must have 5 values"),
        (("objective.best=map_blue",), "objective.best must be one of map, map50, map75, map_red, map_green, mask_map"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_told_before_training(squares, overrides, message):
    with pytest.raises(ConfigError, match=re.escape(message).replace(r"\ ", " ")):
        task_of(squares, *overrides)


def test_scale_jitter_is_of_detection_alone():
    with pytest.raises(ConfigError, match="data.scale_jitter must be null unless objective=detect"):
        compose("finetune", ["data.scale_jitter=[1,2]"])


def test_masks_must_be_there_if_asked_for(squares):
    content = json.loads((squares / "objects.json").read_text())
    other = copy.deepcopy(content)
    other["annotations"][2].pop("segmentation")
    file = write_json(squares, other, "without.json")
    assert not task_of(squares, f"data.annotations={file}").objective.masks
    message = "1 image with objects without a mask: 1.png; objective.model=faster_rcnn takes boxes alone"
    with pytest.raises(ConfigError, match=message):
        task_of(squares, f"data.annotations={file}", "objective.model=mask_rcnn")
    other = copy.deepcopy(content)
    other["categories"][0]["name"] = "blue"
    file = write_json(squares, other, "others.json")
    with pytest.raises(ConfigError, match=r"data.val_annotations: .*: 1 classes are not in data.path: blue"):
        task_of(squares, f"data.val_annotations={file}")


def test_an_image_of_another_size_is_named_in_training(squares, tmp_path):
    write_coco(tmp_path, 6)
    task = task_of(tmp_path)
    Image.new("RGB", (20, 20)).save(tmp_path / "images" / "2.png")
    with pytest.raises(Exception, match=r"2.png: it has 20x20 pixels; its annotations say 56x40"):
        task.dataset()[0, 2]


@pytest.mark.slow
def test_two_ranks_are_one(squares, tmp_path):
    results = []
    for ranks in (1, 2):
        args = detecting(squares, "optim.ema_decay=null", "schedule.epochs=1", f"hydra.run.dir=run{ranks}")
        run_python(tmp_path, "-m", "fcmae.cli", *args, ranks=ranks)
        results.append(metrics_of(tmp_path / f"run{ranks}"))
    for name in ("loss", "loss_masks", "map", "mask_map", "map_red"):
        one, two = ([line[name] for line in lines if name in line] for lines in results)
        assert one
        assert one == pytest.approx(two, rel=1e-5, abs=1e-4), name


@pytest.mark.slow
def test_a_detector_learns(fcmae_here, tmp_path, squares, monkeypatch):
    """Of 64 regions and anchors of an image: 256 and 512 take longer, and it then learns more slowly."""
    sampler = detector.KeyedSampler
    monkeypatch.setattr(detector, "KeyedSampler", lambda size, *rest: sampler(min(size, 64), *rest))
    fcmae_here(*detecting(squares, "objective.width=16", "objective.detections=20", "optim.ema_decay=null",
                          "data.image_size=64", "schedule.epochs=32", "optim.layer_decay=null", "optim.lr=1e-2",
                          "model.drop_path_rate=0", "data.scale_jitter=[0.8,1.2]", "trainer.eval_every_epochs=32",
                          "objective.anchors=[8,16,24,32,64]", "hydra.run.dir=run"))  # fmt: skip
    lines = metrics_of(tmp_path / "run")
    last = [line for line in lines if "map50" in line][-1]
    assert last["map50"] > 40
    assert last["mask_map50"] > 40
