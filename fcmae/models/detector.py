"""torchvision's Faster R-CNN and Mask R-CNN with a feature pyramid, as a head on the stages of a ConvNeXt.

Losses are per image, and what is drawn in training is a function of the sample's key, so results do not depend on the
division into micro-batches and ranks, up to rounding.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import fastrcnn_loss, maskrcnn_inference
from torchvision.models.detection.rpn import RegionProposalNetwork, concat_box_prediction_layers
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign, roi_align
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from fcmae.engines import convnext
from fcmae.errors import ConfigError
from fcmae.randomness import uniform

ANCHOR = 8
"""Side of an anchor in sites of its level, as torchvision's 32 px at a stride of 4."""
RATIOS = (0.5, 1.0, 2.0)
ANCHORS, REGIONS = 2**30, 2**31
"""The first counters of what is drawn among anchors and among regions; drop path counts from 0."""


class Targets(NamedTuple):
    """A batch of :class:`fcmae.data.pixels.boxes.Boxed` without the images: M objects per image, class -1 = none."""

    boxes: Tensor
    classes: Tensor
    extents: Tensor
    masks: Tensor


class Found(NamedTuple):
    """What was found in an image, the highest score first.

    ``boxes``: ``[n, 4]``, left, top, right, bottom in pixels. ``classes``: int64 ``[n]``, from 0. ``scores``: ``[n]``.
    ``masks``: probabilities ``[n, m, m]`` inside the boxes, if the network predicts masks.
    """

    boxes: Tensor
    classes: Tensor
    scores: Tensor
    masks: Tensor | None


Sizes = list[tuple[int, int]]
"""Height and width of each image."""


class KeyedSampler(BalancedPositiveNegativeSampler):
    """torchvision's choice of anchors or regions for the loss, whose draws are functions of the sample's key.

    Args:
        first: the first counter.
    """

    def __init__(self, size: int, positive: float, first: int) -> None:
        super().__init__(size, positive)
        self.first = first
        self.keys: Tensor | None = None
        """int64 ``[N]``, of the images that the next call is about."""

    def __call__(self, matched_idxs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        assert self.keys is not None, "the keys of the images are not set"
        chosen: tuple[list[Tensor], list[Tensor]] = [], []
        for key, labels in zip(self.keys, matched_idxs, strict=True):
            draws = uniform(key, self.first + torch.arange(len(labels), device=labels.device))
            left = self.batch_size_per_image
            for kind, of_kind in enumerate((labels >= 1, labels == 0)):
                places = of_kind.nonzero()[:, 0]
                most = int(self.batch_size_per_image * self.positive_fraction) if kind == 0 else left
                places = places[draws[places].argsort(stable=True)[:most]]
                left -= len(places)
                chosen[kind].append(torch.zeros_like(of_kind).index_fill_(0, places, True))
        return chosen


class _Pyramid(nn.Module):
    """Stands for the backbone where torchvision's constructors ask for its width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.out_channels = width


class Detector(nn.Module):
    """Everything after the backbone. Weights are named as torchvision's: ``fpn.*``, ``rpn.*``, ``roi_heads.*``.

    A LayerNorm on the features of each stage comes first, as in the official ConvNeXt detectors.

    Args:
        dims: channels of each stage's features, finest first.
        strides: pixels per side of a site of each stage; each twice the one before.
        classes: how many, without the background.
        masks: Mask R-CNN instead of Faster R-CNN.
        width: channels of the pyramid and of the mask head; the box head has four times as many.
        anchors: side of the square anchor of each level, of which the last is coarser than the last stage; None = 8
            sites.
        detections: most that are found in an image.

    Raises ConfigError for other strides.
    """

    def __init__(
        self,
        dims: Sequence[int],
        strides: Sequence[int],
        classes: int,
        masks: bool,
        width: int = 256,
        anchors: Sequence[int] | None = None,
        detections: int = 100,
    ) -> None:
        super().__init__()
        if any(2 * first != second for first, second in itertools.pairwise(strides)):
            raise ConfigError(f"model.strides must be 2 between stages with objective=detect; got {list(strides)}")
        levels = len(strides) + 1
        sides = [ANCHOR * stride for stride in (*strides, 2 * strides[-1])] if anchors is None else list(anchors)
        if len(sides) != levels:
            raise ConfigError(f"objective.anchors must have {levels} values, one per level; got {sides}")
        self.stride = strides[0]
        self.norms = nn.ModuleList(nn.LayerNorm(dim, eps=1e-6) for dim in dims)
        self.fpn = FeaturePyramidNetwork(list(dims), width, LastLevelMaxPool())
        names, hidden = [str(number) for number in range(len(dims))], 4 * width
        of_boxes = {
            "rpn_anchor_generator": AnchorGenerator(tuple((side,) for side in sides), (RATIOS,) * levels),
            "box_roi_pool": MultiScaleRoIAlign(names, 7, 2),
            "box_head": TwoMLPHead(49 * width, hidden),
            "box_predictor": FastRCNNPredictor(hidden, classes + 1),
            "box_detections_per_img": detections,
        }
        of_masks = {
            "mask_roi_pool": MultiScaleRoIAlign(names, 14, 2),
            "mask_head": MaskRCNNHeads(width, (width,) * 4, 1),
            "mask_predictor": MaskRCNNPredictor(width, width, classes + 1),
        }
        made = MaskRCNN(_Pyramid(width), **of_boxes, **of_masks) if masks else FasterRCNN(_Pyramid(width), **of_boxes)
        assert isinstance(made.rpn, RegionProposalNetwork)
        self.rpn, self.roi_heads = made.rpn, made.roi_heads
        for part, first in ((self.rpn, ANCHORS), (self.roi_heads, REGIONS)):
            given = part.fg_bg_sampler
            part.fg_bg_sampler = KeyedSampler(given.batch_size_per_image, given.positive_fraction, first)
        # The maps are channels last, and so is the gradient of a convolution's weight that data parallelism exchanges.
        self.to(memory_format=torch.channels_last)

    def forward(self, maps: Sequence[Tensor], extents: Tensor | None = None) -> list[Found]:
        """What is found in images on a canvas, in its pixels.

        Args:
            maps: ``[N, dims[i], H / strides[i], W / strides[i]]`` of all stages.
            extents: int64 ``[N, 2]``, height and width of each image at the upper left of its canvas; None = all of it.
        """
        sizes, canvas = self._sizes(maps, extents)
        features = self._features(maps)
        objectness, deltas, anchors, counts = self._propose(features, canvas)
        proposals = self._proposals(objectness, deltas, anchors, counts, sizes)
        heads = self.roi_heads
        logits, offsets = heads.box_predictor(heads.box_head(heads.box_roi_pool(features, proposals, canvas)))
        boxes, scores, labels = heads.postprocess_detections(logits.float(), offsets.float(), proposals, sizes)
        masks: Sequence[Tensor | None] = [None] * len(boxes)
        if heads.has_mask():
            found = heads.mask_predictor(heads.mask_head(heads.mask_roi_pool(features, boxes, canvas))).float()
            masks = [mask[:, 0] for mask in maskrcnn_inference(found, labels)]
        return [Found(b, c - 1, s, m) for b, c, s, m in zip(boxes, labels, scores, masks, strict=True)]

    def losses(self, maps: Sequence[Tensor], targets: Targets, keys: Tensor) -> dict[str, Tensor]:
        """The parts of each image's loss ``[N]`` by name, as torchvision computes them for a batch of this image.

        Args:
            keys: of the samples, int64 ``[N]`` (:func:`fcmae.randomness.sample_keys`).
        """
        sizes, canvas = self._sizes(maps, targets.extents)
        truth = [
            {"boxes": boxes[classes >= 0], "labels": classes[classes >= 0] + 1, "masks": masks[classes >= 0]}
            for boxes, classes, masks in zip(targets.boxes, targets.classes, targets.masks, strict=True)
        ]
        features = self._features(maps)
        objectness, deltas, anchors, counts = self._propose(features, canvas)
        rows: list[dict[str, Tensor]] = []
        labels, matched = self.rpn.assign_targets_to_anchors(anchors, truth)
        wanted = self.rpn.box_coder.encode(list(matched), anchors)
        scores, offsets = (part.split(len(anchors[0])) for part in (objectness, deltas))
        for key, score, offset, label, want in zip(keys, scores, offsets, labels, wanted, strict=True):
            self.rpn.fg_bg_sampler.keys = key[None]
            lost = self.rpn.compute_loss(score, offset, [label], [want])
            rows.append(dict(zip(("objectness", "rpn_boxes"), lost, strict=True)))
        proposals = self._proposals(objectness, deltas, anchors, counts, sizes)
        for row, more in zip(rows, self._of_regions(features, proposals, canvas, truth, keys), strict=True):
            row.update(more)
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def _sizes(self, maps: Sequence[Tensor], extents: Tensor | None) -> tuple[Sizes, Sizes]:
        """Of the images and of their canvases."""
        height, width = (self.stride * side for side in maps[0].shape[-2:])
        canvas = [(height, width)] * len(maps[0])
        return canvas if extents is None else [(rows, cols) for rows, cols in extents.tolist()], canvas

    def _features(self, maps: Sequence[Tensor]) -> dict[str, Tensor]:
        normed = (
            convnext.layer_norm(x.permute(0, 2, 3, 1), norm).permute(0, 3, 1, 2)  # type: ignore[arg-type]
            for x, norm in zip(maps, self.norms, strict=True)
        )
        return self.fpn({str(number): x for number, x in enumerate(normed)})

    def _propose(self, features: dict[str, Tensor], canvas: Sizes) -> tuple[Tensor, Tensor, list[Tensor], list[int]]:
        """Of all images, one after another, the objectness and offsets of anchors; the anchors of each; how many per
        level."""
        maps = list(features.values())
        objectness, deltas = ([x.float() for x in part] for part in self.rpn.head(maps))
        blank = maps[0].new_zeros(1, dtype=torch.float32).expand(1, 1, *canvas[0])
        anchors = self.rpn.anchor_generator(ImageList(blank, canvas), [x.float() for x in maps])
        counts = [x.shape[1] * x.shape[2] * x.shape[3] for x in objectness]
        return *concat_box_prediction_layers(objectness, deltas), anchors, counts

    @torch.no_grad()
    def _proposals(
        self, objectness: Tensor, deltas: Tensor, anchors: list[Tensor], counts: list[int], sizes: Sizes
    ) -> list[Tensor]:
        boxes = self.rpn.box_coder.decode(deltas, anchors).view(len(anchors), -1, 4)
        return self.rpn.filter_proposals(boxes, objectness, sizes, counts)[0]

    def _of_regions(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        canvas: Sizes,
        truth: list[dict[str, Tensor]],
        keys: Tensor,
    ) -> list[dict[str, Tensor]]:
        heads = self.roi_heads
        heads.fg_bg_sampler.keys = keys
        proposals, matched, labels, wanted = heads.select_training_samples(proposals, truth)
        counts = [len(each) for each in labels]
        logits, offsets = heads.box_predictor(heads.box_head(heads.box_roi_pool(features, proposals, canvas)))
        rows = []
        for logit, offset, label, want in zip(
            logits.float().split(counts), offsets.float().split(counts), labels, wanted, strict=True
        ):
            lost = fastrcnn_loss(logit, offset, [label], [want])
            rows.append(dict(zip(("classes", "boxes"), lost, strict=True)))
        if heads.has_mask():
            found = [label > 0 for label in labels]
            regions = [boxes[mine] for boxes, mine in zip(proposals, found, strict=True)]
            masks = heads.mask_predictor(heads.mask_head(heads.mask_roi_pool(features, regions, canvas))).float()
            for row, mask, mine, label, match, region, true in zip(
                rows, masks.split([len(r) for r in regions]), found, labels, matched, regions, truth, strict=True
            ):
                row["masks"] = _mask_loss(mask, label[mine], match[mine], region, true)
        return rows


def _mask_loss(masks: Tensor, labels: Tensor, matched: Tensor, regions: Tensor, truth: dict[str, Tensor]) -> Tensor:
    """The mean binary cross entropy of the masks ``[n, K + 1, m, m]`` of an image's regions; 0 without a region."""
    if not len(labels):
        return masks.sum() * 0
    # In cells of the mask inside the true box, with a border of one empty cell.
    boxes, cells = truth["boxes"][matched], truth["masks"]
    side = cells.shape[-1]
    padded = F.pad(cells.float() / 255, (1, 1, 1, 1))[:, None]
    corner, sides = boxes[:, :2].repeat(1, 2), (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    places = 1 + side * (regions - corner) / sides
    rows = torch.cat([matched[:, None].to(places), places], dim=1)
    wanted = roi_align(padded, rows, masks.shape[-1], aligned=True)[:, 0]
    return F.binary_cross_entropy_with_logits(masks[torch.arange(len(labels), device=labels.device), labels], wanted)
