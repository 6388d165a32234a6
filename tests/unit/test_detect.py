"""Detection: COCO files, boxes and masks that follow their image, losses, metrics, and a run from end to end."""

import copy
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco
from torchmetrics.detection import MeanAveragePrecision
from torchvision.models.detection.image_list import ImageList

import fcmae as package
from fcmae.checkpoints import checkpoint
from fcmae.config import AugmentConfig, DataConfig, compose, to_dict
from fcmae.data.pixels.boxes import JitteredScale, WholeOnCanvas
from fcmae.data.pixels.instances import SIDE, boxed_mask, encoded, mask_of, pasted
from fcmae.data.sources.coco import CocoImages, CocoObjects, Objects
from fcmae.distributed import World
from fcmae.errors import ConfigError
from fcmae.evaluation.box_pictures import BoxPictures
from fcmae.evaluation.coco_metrics import coco_metrics
from fcmae.models.detector import Detector, Found, KeyedSampler, Targets
from fcmae.models.objective import Predictions
from fcmae.precision import autocast
from fcmae.randomness import sample_keys
from fcmae.tasks.finetuning import Finetuning
from fcmae.tasks.objectives import Detect
from tests.coco_files import write_coco, write_json
from tests.conftest import TINY_FINETUNE, TINY_PRETRAIN, run_python

CPU = World(0, 1, 0, 1, torch.device("cpu"))
DIMS, STRIDES = [4, 6, 8, 10], [4, 8, 16, 32]
KEYS = sample_keys(0, 0, range(3))


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    folder = tmp_path_factory.mktemp("squares")
    write_coco(folder)
    return folder


def rectangle(top, left, bottom, right, size=(64, 64)):
    mask = torch.zeros(size, dtype=torch.uint8)
    mask[top:bottom, left:right] = 1
    return mask


def polygon(left, top, right, bottom):
    return [[left, top, right, top, right, bottom, left, bottom]]


# Masks


def test_polygons_and_run_lengths_are_the_same_mask():
    mask = rectangle(3, 5, 9, 20, (12, 30))
    text = coco.encode(np.asfortranarray(mask.numpy()))["counts"].decode()
    changes = np.flatnonzero(np.diff(mask.numpy().T.ravel())) + 1
    counts = np.diff([0, *changes, mask.numel()]).tolist()
    for segment in (polygon(5, 3, 20, 9), {"size": [12, 30], "counts": text}, {"size": [12, 30], "counts": counts}):
        assert mask_of(segment, (12, 30)).equal(mask)
    assert encoded(mask) == {"size": [12, 30], "counts": text}
    noise = (torch.rand(12, 30) > 0.5).to(torch.uint8)  # runs long and short, of which differences are negative
    assert mask_of(encoded(noise), (12, 30)).equal(noise)


@pytest.mark.parametrize(
    ("segment", "message"),
    [
        ({"size": [8, 8], "counts": "0"}, "its run lengths are of 8x8 pixels, the image has 30x12"),
        ({"size": [12, 30], "counts": "0"}, "do not fill an image of 30x12"),
        ({"size": [12, 30], "counts": [5, -5, 360]}, "do not fill"),
        ({"size": [12, 30], "counts": [400]}, "do not fill"),
        ({"size": [12, 30], "counts": "o" * 99}, "not compressed run lengths"),
        ({"size": [12, 30], "counts": "\u00e9"}, "not compressed run lengths"),
        ({"size": [12, 30], "counts": "P"}, "cut off"),
        ({"size": [12, 30]}, "must be a list or a text"),
        ([[0, 0, 1, 1]], "3 or more x, y"),
        ([[0, 0, 1e9, 1, 1, 1]], "outside of the image"),
        ([[0, 0, float("nan"), 1, 1, 1]], "outside of the image"),
        ([[0, 0, "a", 1, 1, 1]], "numbers only"),
        ([[0, 0, 10**400, 1, 1, 1]], "numbers only"),
        ([[0, 0, 30, 12] * 50_000], "too many points"),
        ([[0, 0, [1], 1, 1, 1]], "numbers only"),
    ],
)
def test_wrong_masks_are_refused(segment, message):
    with pytest.raises(ValueError, match=message):
        mask_of(segment, (12, 30))


def test_a_mask_in_its_box_is_pasted_back():
    mask = rectangle(10, 8, 40, 50)
    mask[10:20, 8:20] = 0
    for box in ([8.0, 10.0, 50.0, 40.0], [5.5, 7.0, 53.0, 44.25]):
        assert pasted(boxed_mask(mask, box) / 255, box, (64, 64)).equal(mask)
    assert not pasted(torch.ones(4, 4), [70.0, 70.0, 80.0, 80.0], (64, 64)).any()


# Boxes and masks follow the image


def test_boxes_and_masks_follow_the_image():
    cfg = DataConfig(image_size=[64, 96], scale_jitter=[0.3, 2.0], vflip=0.5, mean=[0.5] * 3, std=[0.5] * 3)
    transform = JitteredScale(cfg, AugmentConfig())
    image = torch.zeros(3, 50, 80, dtype=torch.uint8)
    image[0, 10:30, 12:52] = 255
    image[0, 10:20, 12:32] = 0  # the object is an L, whose mask shows how it is turned
    mask = (image[0] > 0).to(torch.uint8)
    objects = Objects(
        torch.tensor([[12.0, 10, 52, 30], [0, 0, 5, 5], [0, 0, 70, 40]]), torch.tensor([1, 0, 0]),
        torch.tensor([False, False, True]), torch.ones(3), [encoded(mask), polygon(0, 0, 5, 5), None], (50, 80),
    )  # fmt: skip
    shown = turned = 0
    for seed in range(30):
        sample = transform(image, objects, True, np.random.default_rng(seed).random)
        rows, cols = sample.extent.tolist()
        assert sample.image.shape == (3, 64, 96)
        assert (sample.image[:, rows:].abs() < 0.01).all()  # the mean
        assert (sample.image[:, :, cols:].abs() < 0.01).all()
        index = (sample.classes == 1).nonzero()[:, 0].tolist()
        if not index:
            continue
        left, top, right, bottom = sample.boxes[index[0]].tolist()
        found = torch.zeros(64, 96, dtype=torch.uint8)
        found[:rows, :cols] = sample.image[0, :rows, :cols] > 0
        ours = pasted(sample.masks[index[0]] / 255, (left, top, right, bottom), (64, 96))
        if min(right - left, bottom - top) < 8:
            continue
        shown, turned = shown + 1, turned + bool(ours.flatten().argmax() % 96 < (left + right) / 2)
        assert (found != ours).float().sum() < 4 + 0.5 * (right - left + bottom - top)  # of the edge
    assert shown > 10
    assert 0 < turned < shown
    filled = transform(image, objects, True).filled(9)
    assert [part.shape[0] for part in filled[1:3]] == [9, 9]
    assert filled.masks.shape == (9, SIDE, SIDE)
    with pytest.raises(ValueError, match="it has 80x50 pixels; its annotations say 80x51"):
        transform(image, objects._replace(size=(51, 80)), True)


@pytest.mark.parametrize("masks", [True, False])
def test_transforms_of_torchvision_move_boxes_and_masks(masks):
    turn = {"_target_": "torchvision.transforms.v2.RandomRotation", "degrees": [90, 90]}
    cfg = DataConfig(image_size=[64, 64], hflip=0.0, mean=[0.5] * 3, std=[0.5] * 3, transforms=[turn])
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    image[:, 10:20, 8:40] = 255
    objects = Objects(torch.tensor([[8.0, 10, 40, 20]]), torch.tensor([1]), torch.tensor([False]), torch.ones(1),
                      [polygon(8, 10, 40, 20)], (64, 64))  # fmt: skip
    sample = JitteredScale(cfg, AugmentConfig())(image, objects, masks)
    found = (sample.image[0] > 0).to(torch.uint8)
    rows, cols = (found.any(dim=dim).nonzero()[:, 0].tolist() for dim in (1, 0))
    assert sample.boxes[0].tolist() == pytest.approx([cols[0], rows[0], cols[-1] + 1, rows[-1] + 1], abs=1)
    if masks:
        assert pasted(sample.masks[0] / 255, sample.boxes[0].tolist(), (64, 64)).equal(found)
    empty = objects._replace(boxes=torch.zeros(0, 4), classes=torch.zeros(0).long(), crowd=torch.zeros(0).bool())
    assert len(JitteredScale(cfg, AugmentConfig())(image, empty, masks).boxes) == 0
    own = DataConfig(image_size=64, transforms=[{"_target_": "tests.unit.test_detect.Nothing"}])
    with pytest.raises(ConfigError, match="must be a transform of torchvision's v2 with objective=detect"):
        JitteredScale(own, AugmentConfig())


class Nothing:
    def __call__(self, image):
        return image


def test_what_is_found_is_drawn():
    cfg = DataConfig(image_size=64, mean=[0.5] * 3, std=[0.5] * 3)
    canvas = torch.full((3, 64, 64), -1.0)
    objects = Objects(torch.tensor([[0.0, 0, 50, 50]]), torch.tensor([0]), torch.tensor([False]), torch.ones(1),
                      [polygon(0, 0, 50, 50)], (100, 100))  # fmt: skip
    boxes = torch.tensor([[50.0, 50, 90, 90], [0, 0, 20, 20]])
    found = Found(boxes, torch.tensor([0, 1]), torch.tensor([0.9, 0.1]), torch.ones(2, 28, 28))
    pictures = BoxPictures(cfg)
    for masks in (found.masks, None):
        pictures.take(canvas, [64, 64, 100, 100], found._replace(masks=masks), objects)
    rows = [[np.array(image).any(axis=2) for image in row] for row in pictures.rows]
    assert not rows[0][0].any()
    assert rows[0][1][10:20, 10:20].all()
    assert not rows[0][1][40:, 40:].any()
    assert rows[0][2][40:50, 40:50].all()
    assert not rows[0][2][:20, :20].any()
    assert not rows[1][1][10:20, 10:20].any()
    assert rows[1][2][32, 40]
    assert pictures.draw() is not None


def test_whole_images_just_fit_the_canvas():
    cfg = DataConfig(image_size=[64, 96], mean=[0.5] * 3, std=[0.5] * 3)
    canvas, sizes = WholeOnCanvas(cfg)(torch.full((3, 100, 100), 255, dtype=torch.uint8))
    assert sizes.tolist() == [64, 64, 100, 100]
    assert canvas.dtype == torch.uint8
    assert (canvas[:, :, :64] == 255).all()
    assert (canvas[:, :, 64:] == 128).all()


# The detector


def maps_of(count=3, side=64):
    rng = torch.Generator().manual_seed(1)
    return [torch.randn(count, dim, side // stride, side // stride, generator=rng)
            for dim, stride in zip(DIMS, STRIDES, strict=True)]  # fmt: skip


def targets_of(count=3):
    """Two objects, one, and none."""
    boxes = torch.tensor([[[4.0, 6, 40, 50], [20, 20, 60, 44]], [[10, 0, 30, 22], [0] * 4], [[0] * 4, [0] * 4]])
    classes = torch.tensor([[0, 1], [1, -1], [-1, -1]])
    masks = torch.full((3, 2, SIDE, SIDE), 255, dtype=torch.uint8)
    return Targets(boxes[:count], classes[:count], torch.tensor([[64, 64]] * 3)[:count], masks[:count])


def detector(masks=True):
    torch.manual_seed(0)
    return Detector(DIMS, STRIDES, 2, masks, width=8).train()


def test_the_loss_of_an_image_is_torchvisions():
    ours, maps, targets = detector(), maps_of(1), targets_of(1)
    losses = ours.losses(maps, targets, KEYS[:1])
    truth = [{"boxes": targets.boxes[0], "labels": targets.classes[0] + 1,
              "masks": torch.stack([rectangle(6, 4, 50, 40), rectangle(20, 20, 44, 60)])}]  # fmt: skip
    ours.rpn.fg_bg_sampler.keys = ours.roi_heads.fg_bg_sampler.keys = KEYS[:1]
    features = ours._features(maps)
    proposals, theirs = ours.rpn(ImageList(torch.zeros(1, 3, 64, 64), [(64, 64)]), features, truth)
    theirs |= ours.roi_heads(features, proposals, [(64, 64)], truth)[1]
    names = {"objectness": "loss_objectness", "rpn_boxes": "loss_rpn_box_reg", "classes": "loss_classifier",
             "boxes": "loss_box_reg"}  # fmt: skip
    for name, other in names.items():
        assert losses[name].item() == theirs[other].item(), name
    # torchvision's masks lie half a pixel off.
    torch.testing.assert_close(losses["masks"][0], theirs["loss_mask"], rtol=0.02, atol=0)


@pytest.mark.parametrize("masks", [True, False])
def test_losses_do_not_depend_on_the_other_images(masks):
    ours, maps, targets = detector(masks), maps_of(), targets_of()
    together = ours.losses(maps, targets, KEYS)
    assert set(together) == {"objectness", "rpn_boxes", "classes", "boxes", *(["masks"] if masks else [])}
    for n in range(3):
        alone = ours.losses([x[n : n + 1] for x in maps], Targets(*(x[n : n + 1] for x in targets)), KEYS[n : n + 1])
        for name, value in alone.items():
            torch.testing.assert_close(value[0], together[name][n], rtol=1e-5, atol=1e-6)
    # Only images without an object: the exchange between ranks needs every gradient.
    none = Targets(*(x[2:] for x in targets))
    sum(x.sum() for x in ours.losses([x[2:] for x in maps], none, KEYS[2:]).values()).backward()
    assert [name for name, value in ours.named_parameters() if value.grad is None] == []


def test_draws_are_functions_of_the_key():
    labels = [torch.tensor([1.0] * 300 + [0.0] * 700 + [-1.0] * 50), torch.tensor([1.0] * 3 + [0.0] * 20)]
    sampler = KeyedSampler(256, 0.5, 2**30)
    before = torch.get_rng_state()
    sampler.keys = KEYS[:2]
    positive, negative = sampler(labels)
    assert torch.get_rng_state().equal(before)
    assert [(int(p.sum()), int(n.sum())) for p, n in zip(positive, negative, strict=True)] == [(128, 128), (3, 20)]
    for n in range(2):
        assert (labels[n][positive[n]] == 1).all()
        assert (labels[n][negative[n]] == 0).all()
    sampler.keys = KEYS[:1]
    assert sampler(labels[:1])[0][0].equal(positive[0])
    sampler.keys = KEYS[1:2]
    assert not sampler(labels[:1])[0][0].equal(positive[0])


def test_strides_and_anchors_must_fit():
    with pytest.raises(ConfigError, match="model.strides must be 2 between stages"):
        Detector(DIMS, [4, 8, 8, 16], 2, False)
    with pytest.raises(ConfigError, match="objective.anchors must have 5 values, one per level; got \\[8\\]"):
        Detector(DIMS, STRIDES, 2, False, anchors=[8])
    for arguments, message in (
        ({"model": "yolo"}, "model must be one of faster_rcnn, mask_rcnn"),
        ({"best": "top1"}, "best must be one of map, map50, map75 or map_CLASS, or after mask_"),
        ({"width": 0}, "width must be an integer from 1"),
        ({"anchors": [0]}, "anchors must be a list of positive integers"),
    ):
        with pytest.raises(ValueError, match=message):
            Detect(**arguments)


# Metrics


def made_up(count=12):
    """What was found in images, and their objects."""
    rng = torch.Generator().manual_seed(0)
    found, truth = [], []
    for _ in range(count):
        corners = torch.randint(0, 30, (4, 2), generator=rng).float()
        boxes = torch.cat([corners, corners + torch.randint(8, 30, (4, 2), generator=rng)], 1)
        classes = torch.randint(0, 2, (4,), generator=rng)
        moved = (boxes + torch.randint(-3, 4, (4, 4), generator=rng)).clamp(0, 63)
        scores = torch.rand(4, generator=rng)
        masks = (torch.rand(4, 28, 28, generator=rng) > 0.2).float()
        found.append(Found(moved, classes, scores, masks))
        segments = [polygon(*box) for box in boxes.tolist()]
        areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        truth.append(Objects(boxes, classes, torch.rand(4, generator=rng) < 0.2, areas, segments, (64, 64)))
    return found, truth


def shares(found, truth, order):
    for places in torch.tensor(order).split(5):
        yield Predictions([found[n] for n in places], [truth[n] for n in places], places)


def test_metrics_are_cocos_and_do_not_depend_on_the_order_of_images():
    found, truth = made_up()
    ours = coco_metrics(shares(found, truth, range(12)), CPU, ["a", "b"], True, 100)
    assert coco_metrics(shares(found, truth, [*range(1, 12, 2), *range(0, 12, 2)]), CPU, ["a", "b"], True, 100) == ours
    # Its own thresholds are rounded to float32.
    exact = {"iou_thresholds": np.linspace(0.5, 0.95, 10).tolist(), "rec_thresholds": np.linspace(0, 1, 101).tolist()}
    for kind, prefix in (("bbox", ""), ("segm", "mask_")):
        metric = MeanAveragePrecision(iou_type=kind, class_metrics=True, **exact)
        for image, objects in zip(found, truth, strict=True):
            masks = [pasted(m, b, (64, 64)) for m, b in zip(image.masks, image.boxes.tolist(), strict=True)]
            given = {"boxes": image.boxes, "scores": image.scores, "labels": image.classes}
            true = {"boxes": objects.boxes, "labels": objects.classes, "iscrowd": objects.crowd.int(),
                    "area": objects.areas,
                    "masks": torch.stack([mask_of(s, (64, 64)) for s in objects.segments]).bool()}  # fmt: skip
            metric.update([{**given, "masks": torch.stack(masks).bool()}], [true])
        theirs = metric.compute()
        for name, other in (("map", "map"), ("map50", "map_50"), ("map75", "map_75")):
            assert ours[prefix + name] == pytest.approx(100 * float(theirs[other]), rel=1e-5), kind
        each = [ours[f"{prefix}map_{name}"] for name in "ab"]
        assert each == pytest.approx((100 * theirs["map_per_class"]).tolist(), rel=1e-5)
    assert ours["images"] == 12
    none = torch.zeros(0)
    nothing = Objects(none.view(0, 4), none.long(), none.bool(), none, [], (64, 64))
    empty = coco_metrics(shares(found, [nothing] * 12, range(12)), CPU, ["a", "b"], True, 100)
    assert np.isnan(empty["map"])
    assert np.isnan(empty["mask_map50"])


# Files


def changed(squares, change):
    content = json.loads((squares / "objects.json").read_text())
    change(content)
    return CocoObjects(write_json(squares, content, "changed.json"), squares / "images", "data.annotations")


def test_objects_are_read_image_by_image(squares):
    content = json.loads((squares / "objects.json").read_text())
    source = CocoObjects(squares / "objects.json", squares / "images", "data.annotations")
    assert (source.class_names, source.category_ids, source.most) == (["red", "green"], [3, 7], 2)
    assert source.notes == ["data.annotations: 1 of 6 images have no boxes"]
    assert len(source[5].label.boxes) == 0
    for index, image in enumerate(content["images"]):
        mine = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        found = source.objects(index)
        for number, annotation in enumerate(mine):
            left, top, width, height = annotation["bbox"]
            assert found.boxes[number].tolist() == [left, top, left + width, top + height]
            assert found.classes[number] == {3: 0, 7: 1}[annotation["category_id"]]
            assert found.crowd[number] == bool(annotation["iscrowd"])
            assert found.segments[number] == annotation["segmentation"]
    assert CocoImages(squares / "objects.json", squares / "images", "x")[0].label is None


def test_all_mistakes_are_told_together_with_the_first_offenders(squares):
    def spoil(content):
        images, annotations = content["images"], content["annotations"]
        images[1]["file_name"], images[2]["file_name"] = "gone.png", "../objects.json"
        images[3]["id"] = images[0]["id"]
        images.append({"id": 99})
        annotations[0]["bbox"], annotations[1]["bbox"] = [5, 5, 0, 9], [50, 5, 20, 9]
        annotations[8]["category_id"] = 1
        annotations[9]["id"] = 1
        annotations.append({**annotations[0], "id": 77, "image_id": 5})
        annotations.append({**annotations[0], "id": 78, "bbox": [1, 1, 5, 5],
                            "segmentation": {"size": [5, 5], "counts": [25]}})  # fmt: skip
        content["categories"].append({"id": 3, "name": "again"})
        for number, box in enumerate(("x", [1, 1, 1], [1, 1, "2", 2], [10**400, 1, 2, 2], [float("nan"), 1, 2, 2])):
            annotations.append({**annotations[0], "id": 100 + number, "area": 10**400, "bbox": box})

    with pytest.raises(ConfigError) as error:
        changed(squares, spoil)
    lines = error.value.mistakes
    where = f"data.annotations: {squares / 'changed.json'}: "
    assert all(line.startswith(where) for line in lines)
    told = "\n".join(line.removeprefix(where) for line in lines)
    for line in (
        rf"1 images are not in {squares / 'images'}: gone.png",
        rf"1 images lie outside of {squares / 'images'}: ../objects.json",
        r"1 images have the id of another: 3.png \(10\)",
        r"1 images without file_name, id, height or width: number 7",
        r"7 boxes have no area in their image, or reach out of it: annotation 1 of 3.png, annotation 2 of 3.png, anno",
        r"1 annotations are of a category that is not listed: annotation 9 \(category_id 1\)",
        r"1 annotations have no id, or that of another: annotation 1",
        r"\d annotations are of an image that is not listed: annotation .* \(image_id 13\)",
        r"1 masks are wrong: annotation 78 of 3.png: its run lengths are of 5x5 pixels, the image has 56x40",
        r"1 categories have the id or name of another: again \(3\)",
    ):
        assert re.search(f"^{line}", told, re.MULTILINE), (line, told)
    assert len(lines) == 10


def test_other_files_are_refused_in_one_line(squares):
    for text, message in (
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "must be a COCO file, .*; got a list"),
        ('{"images": 1}', "must be a COCO file, .*; got no list `images`"),
        ('{"images": [], "annotations": []}', "its list images is empty"),
    ):
        (squares / "other.json").write_text(text)
        with pytest.raises(ConfigError, match=message) as error:
            CocoObjects(squares / "other.json", squares / "images", "data.annotations")
        assert all(line.startswith("data.annotations: ") for line in error.value.mistakes)


def test_sizes_of_images_are_compared_with_the_file(squares):
    with pytest.raises(ConfigError, match=r"1 images have another size than it says: 5.png is 56x40, not 56x41"):
        changed(squares, lambda content: content["images"][5].update(height=41))


def test_wrong_boxes_are_left_out_if_asked(squares):
    content = json.loads((squares / "objects.json").read_text())
    content["annotations"][0]["bbox"][2] = 0
    file = write_json(squares, content, "changed.json")
    source = CocoObjects(file, squares / "images", "data.annotations", skip=True)
    assert "1 boxes have no area in their image, or reach out of it: annotation 1 of 0.png; left out" in source.notes[0]
    assert len(source.boxes) == len(content["annotations"]) - 1


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
    states = [checkpoint.read(checkpoint.resolve(f"{tmp_path}/{run}@last")) for run in ("whole", "cut")]
    for kind in ("model", "ema"):
        assert all(value.equal(states[1][kind][name]) for name, value in states[0][kind].items())
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert {"loss_objectness", "loss_rpn_boxes", "loss_classes", "loss_boxes", "loss_masks"} <= lines[0].keys()
    last = [line for line in lines if "map" in line][-1]
    assert states[0]["best"]["score"] == max(line["ema_map"] for line in lines if "ema_map" in line)
    (picture,) = (tmp_path / "whole" / "reconstructions").glob("*.png")
    with Image.open(picture) as image:
        assert image.size == (4 * 4 + 3 * 32, 5 * 4 + 4 * 23)
    assert (states[0]["classes"], states[0]["objective"]["category_ids"]) == (["red", "green"], [3, 7])
    evaluate = ("evaluate", "checkpoint=whole@last", "loader.workers=0")
    fcmae_here(*evaluate, "out=result.json", "batch_size=4")
    result = json.loads((tmp_path / "result.json").read_text())
    for name in ("ema_map", "ema_mask_map50", "map_red"):
        assert result[name] == pytest.approx(last[name], rel=1e-4, abs=1e-4)
    check_predictions(fcmae_here, tmp_path, squares)


def check_predictions(fcmae_here, folder, squares):
    given = (f"data.path={squares}/images", f"data.annotations={squares}/objects.json", "loader.workers=0")
    fcmae_here("predict", "whole@last", *given, "--out", "found.json", "--batch-size", "4")
    found = json.loads((folder / "found.json").read_text())
    assert found
    assert {row["image_id"] for row in found} <= set(range(10, 16))
    assert {row["category_id"] for row in found} <= {3, 7}
    assert mask_of(found[0]["segmentation"], (40, 56)).shape == (40, 56)
    images = [f"{squares}/images", "loader.workers=0"]
    boxes = package.predict(f"{folder}/whole@last", images, out=f"{folder}/found.csv")
    assert boxes.columns == ["red", "green"]
    assert sum(map(len, boxes.masks)) == sum(map(len, boxes.scores)) == len(found)
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
    message = "1 images have objects without a mask: 1.png; objective.model=faster_rcnn takes boxes alone"
    with pytest.raises(ConfigError, match=message):
        task_of(squares, f"data.annotations={file}", "objective.model=mask_rcnn")
    other = copy.deepcopy(content)
    other["categories"][0]["name"] = "blue"
    file = write_json(squares, other, "others.json")
    with pytest.raises(ConfigError, match=r"data.val_annotations: .*: 1 classes are not in data.path: blue"):
        task_of(squares, f"data.val_annotations={file}")


def test_an_image_of_another_size_is_named_in_training(squares, tmp_path):
    content = write_coco(tmp_path, 6)
    task = task_of(tmp_path)
    Image.new("RGB", (20, 20)).save(tmp_path / "images" / "2.png")
    assert content
    with pytest.raises(Exception, match=r"2.png: it has 20x20 pixels; its annotations say 56x40"):
        task.dataset()[0, 2]


@pytest.mark.slow
def test_two_ranks_are_one(squares, tmp_path):
    results = []
    for ranks in (1, 2):
        args = detecting(squares, "optim.ema_decay=null", "schedule.epochs=1", f"hydra.run.dir=run{ranks}")
        run_python(tmp_path, "-m", "fcmae.cli", *args, ranks=ranks)
        lines = (tmp_path / f"run{ranks}" / "metrics.jsonl").read_text().splitlines()
        results.append([json.loads(line) for line in lines])
    for name in ("loss", "loss_masks", "map", "mask_map", "map_red"):
        one, two = ([line[name] for line in lines if name in line] for lines in results)
        assert one
        assert one == pytest.approx(two, rel=1e-5, abs=1e-4), name


@pytest.mark.slow
def test_a_detector_learns(fcmae_here, tmp_path, squares):
    fcmae_here(*detecting(squares, "objective.width=16", "objective.detections=20", "optim.ema_decay=null",
                          "data.image_size=64", "schedule.epochs=50", "optim.layer_decay=null", "optim.lr=1e-2",
                          "model.drop_path_rate=0", "data.scale_jitter=[0.8,1.2]", "trainer.eval_every_epochs=50",
                          "objective.anchors=[8,16,24,32,64]", "hydra.run.dir=run"))  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "map50" in line][-1]
    assert last["map50"] > 40
    assert last["mask_map50"] > 40
