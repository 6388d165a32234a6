"""Detection: boxes and masks that follow their image, losses, and metrics."""

import numpy as np
import pytest
import torch
from pycocotools import mask as coco
from torchmetrics.detection import MeanAveragePrecision
from torchvision.models.detection.image_list import ImageList

from fcmae.config import AugmentConfig, DataConfig
from fcmae.data.pixels.boxes import JitteredScale, WholeOnCanvas
from fcmae.data.pixels.decode import explained
from fcmae.data.pixels.extra import Extra
from fcmae.data.pixels.instances import SIDE, boxed_mask, encoded, mask_of, pasted
from fcmae.data.pixels.pairs import PairTransform
from fcmae.data.sources.coco import Objects
from fcmae.distributed import World
from fcmae.errors import ConfigError, UsageError
from fcmae.evaluation.box_pictures import BoxPictures
from fcmae.evaluation.coco_metrics import coco_metrics
from fcmae.evaluation.summary import worst_of
from fcmae.models.detector import Detector, Found, KeyedSampler, Targets
from fcmae.models.objective import Predictions
from fcmae.randomness import sample_keys
from fcmae.tasks.objectives import Detect

CPU = World(0, 1, 0, 1, torch.device("cpu"))
DIMS, STRIDES = [4, 6, 8, 10], [4, 8, 16, 32]
KEYS = sample_keys(0, 0, range(3))


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


@pytest.mark.parametrize("masks", [True, False])
def test_a_transform_may_remove_objects(masks):
    """With a box go its label and its mask, and nothing is blamed on the image."""
    boxes = torch.tensor([[0.0, 0, 5, 5], [8, 10, 40, 20], [50, 50, 55, 55], [20, 30, 60, 60]])
    segments = [polygon(*box) for box in boxes.tolist()]
    objects = Objects(boxes, torch.arange(4), torch.zeros(4).bool(), torch.ones(4), segments, (64, 64))
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)

    def sample(**arguments):
        step = {"_target_": "torchvision.transforms.v2.SanitizeBoundingBoxes", **arguments}
        cfg = DataConfig(
            image_size=64, hflip=0.0, scale_jitter=[1, 1], mean=[0.5] * 3, std=[0.5] * 3, transforms=[step]
        )
        return JitteredScale(cfg, AugmentConfig())(image, objects, masks)

    found = sample(min_size=7)
    assert found.classes.tolist() == [1, 3]
    torch.testing.assert_close(found.boxes, boxes[[1, 3]])
    assert len(found.masks) == 2
    assert [len(part) for part in sample(min_size=63)[1:3]] == [0, 0]
    with pytest.raises(
        ConfigError, match=r"SanitizeBoundingBoxes must remove the label .* it leaves 2 boxes, 4 labels"
    ):
        sample(min_size=7, labels_getter=None)


@pytest.mark.parametrize("objective", ["detect", "segment", "classify"])
def test_an_error_of_a_transform_is_not_the_images(objective):
    step = {"_target_": "torchvision.transforms.v2.Normalize", "mean": [0.5], "std": [0.5]}  # not of bytes
    cfg = DataConfig(image_size=64, mean=[0.5] * 3, std=[0.5] * 3, transforms=[step])
    image, none = torch.zeros(3, 64, 64, dtype=torch.uint8), torch.zeros(0)
    objects = Objects(none.view(0, 4), none.long(), none.bool(), none, [], (64, 64))
    make = {
        "detect": lambda: JitteredScale(cfg, AugmentConfig())(image, objects, False),
        "segment": lambda: PairTransform(cfg, AugmentConfig())(image, torch.zeros(64, 64).long()),
        "classify": lambda: Extra(cfg.transforms)(image),
    }
    with (
        pytest.raises(UsageError, match=r"^data.transforms\[0\]: torchvision.*Normalize fails: TypeError"),
        explained("a.png"),
    ):
        make[objective]()


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
    ours, report = coco_metrics(shares(found, truth, range(12)), CPU, ["a", "b"], True, 100)
    other, same = coco_metrics(shares(found, truth, [*range(1, 12, 2), *range(0, 12, 2)]), CPU, ["a", "b"], True, 100)
    assert other == ours
    assert same.per_class == report.per_class
    assert same.errors.nan_to_num(-1).equal(report.errors.nan_to_num(-1))
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
        assert [report.per_class[name][f"{prefix}map"] for name in "ab"] == each
        for iou in ("50", "75"):
            curves = report.plots[f"{prefix}precision_recall_{iou}"].keywords["curves"]
            areas = {name: 100 * curve.mean() for name, curve in curves.items()}
            assert areas == pytest.approx({name: row[f"{prefix}map{iou}"] for name, row in report.per_class.items()})
    assert ours["images"] == 12
    none = torch.zeros(0)
    nothing = Objects(none.view(0, 4), none.long(), none.bool(), none, [], (64, 64))
    empty, report = coco_metrics(shares(found, [nothing] * 12, range(12)), CPU, ["a", "b"], True, 100)
    assert np.isnan(empty["map"])
    assert np.isnan(empty["mask_map50"])
    assert report.plots == {}


def test_the_worst_images_have_objects_that_are_missed_or_found_in_vain():
    boxes = torch.tensor([[0, 0, 10, 10], [20, 20, 40, 40], [20, 0, 30, 10.0]])
    crowd = torch.tensor([False, False, True])
    objects = Objects(boxes, torch.tensor([0, 1, 0]), crowd, torch.full((3,), 100.0), [None] * 3, (64, 64))
    right, vague, vain = torch.tensor([[0, 0, 10, 9.0]]), boxes[1:2], torch.tensor([[50, 50, 60, 60.0]])

    def found(*rows):
        parts, classes, scores = zip(*rows, strict=True)
        return Found(torch.cat(parts), torch.tensor(classes), torch.tensor(scores), None)

    images = [
        found((right, 0, 0.9), (boxes[1:2], 1, 0.6), (boxes[2:], 0, 0.9)),  # a crowd is not found in vain
        found((right, 1, 0.9), (vague, 1, 0.4), (vain, 0, 0.45)),
        found((right, 0, 0.9), (vague, 1, 0.9), (vain, 1, 0.8)),
    ]
    share = [Predictions(images, [objects] * 3, torch.tensor([4, 0, 2]))]
    report = coco_metrics(share, CPU, ["a", "b"], False, 100)[1]
    assert [int(place) for place in worst_of(report.errors)] == [0, 2]
    assert [report.caption(place) for place in (0, 2, 4)] == [
        "2 missed, 1 false", "0 missed, 1 false", "0 missed, 0 false"]  # fmt: skip
