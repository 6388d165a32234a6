"""Supervised training of a whole network for an objective, from pretrained or random weights."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.data import Dataset

from fcmae.config import DataConfig, FinetuneConfig, check_channels
from fcmae.config.checks import as_list
from fcmae.data.pixels.boxes import JitteredScale
from fcmae.data.pixels.pairs import PairTransform
from fcmae.data.pixels.transforms import finetune_transform
from fcmae.data.plan import BatchPlan
from fcmae.data.samples import BoxedImages, LabelledImages, PairedImages
from fcmae.data.sources import Source, few_labels, gives_float, some_images
from fcmae.distributed import World
from fcmae.engines.dense import dense
from fcmae.errors import ConfigError, UsageError
from fcmae.evaluation.box_pictures import BoxPictures
from fcmae.evaluation.classify import predictions
from fcmae.evaluation.detections import detections
from fcmae.evaluation.features import check_image_size
from fcmae.evaluation.map_pictures import MapPictures
from fcmae.evaluation.windows import whole_predictions
from fcmae.loggers.logger import RunLogger
from fcmae.models.build import build_network
from fcmae.models.detector import Detector, Targets
from fcmae.models.drop_path import draw_paths_by_sample
from fcmae.models.headed import Headed, dense_outputs, freeze
from fcmae.models.objective import BoxObjective, DenseObjective, Objective, score, sign_and_name
from fcmae.plugins import create
from fcmae.randomness import sample_keys, step_generator
from fcmae.tasks.dense import sourced
from fcmae.tasks.initial import Start, find_start, load_initial, settle
from fcmae.tasks.mixup import Mixup
from fcmae.tasks.monitors import Monitor, Wish, at_evaluations
from fcmae.tasks.task import Losses


class Finetuning:
    """Supervised training of the dense network, from pretrained or random weights, for what ``objective`` names."""

    name = "finetune"
    mixes_micro_batch = False

    def __init__(self, cfg: FinetuneConfig, start: Start | None = None) -> None:
        self.start = find_start(cfg) if start is None else start
        cfg, self.notes = settle(cfg, self.start)
        self.cfg = cfg
        self.objective: Objective = create(cfg.objective, "objective", Objective)
        self.transform = self._transform()
        self.source, notes = sourced(cfg, self.objective, train=True)
        self.notes += notes
        policy = cfg.augment.auto_augment
        if policy is not None and cfg.data.source is not None and gives_float(self.source):
            raise ConfigError(f"augment.auto_augment is {policy!r}; must be null for a source of float32 (data.source)")
        if cfg.data.num_images is not None:  # before the objective learns from the labels
            self.source = some_images(self.source, cfg.data.num_images, cfg.seed)
        self.objective.fit(self.source, cfg)
        self._check_classes()
        self.monitors: list[Monitor] = []
        if cfg.trainer.eval_every_epochs is not None:
            self.val_source, notes = _validation(cfg, self.objective)
            self.notes += notes
            self.monitors = at_evaluations(cfg.trainer, self._measure)
        if cfg.data.labels_per_class is not None:
            self.source = few_labels(self.source, cfg.data.labels_per_class, cfg.seed)
        if cfg.recipe is None:  # which would take a smaller batch
            _check_batch(len(self.source), cfg)
        self.model = build_network(cfg, self.objective)
        maps = isinstance(self.objective, DenseObjective)
        if maps:
            torch.backends.cudnn.deterministic = True  # of heads: a resumed run ends with the same bits
        if maps or isinstance(self.objective, BoxObjective):
            check_image_size(cfg.data, self.model, "target maps" if maps else "objective=detect")
            check_channels("logger.channels", cfg.logger.channels, cfg.data.in_chans)
        freeze(self.model, cfg.freeze)
        self.keys = draw_paths_by_sample(self.model)
        self._compiled = False
        self.pairs = cfg.augment.mixup > 0 or cfg.augment.cutmix > 0
        self.mixup = Mixup(cfg.augment.mixup, cfg.augment.cutmix, self.objective.num_classes or 0, cfg.data.size)

    def initialise(self) -> None:
        if self.start.path is not None:
            how = self.cfg.init_channels, self.cfg.init_decoder
            self.notes.append(load_initial(self.model, self.start.path, *how))

    def _transform(self) -> Any:
        """What makes a sample of an image, or of an image and its target map or objects."""
        cfg = self.cfg
        how: Any = finetune_transform
        if cfg.augment.on == "gpu" and isinstance(self.objective, (DenseObjective, BoxObjective)):
            raise ConfigError(
                f"augment.on must be cpu with {self._named()}, whose targets are maps or boxes; got 'gpu'"
            )
        for kind, of_kind in ((DenseObjective, PairTransform), (BoxObjective, JitteredScale)):
            how = of_kind if isinstance(self.objective, kind) else how
        return how(cfg.data, cfg.augment, cfg.loader.max_pixels)

    def dataset(self) -> Dataset:
        of = self.objective
        if isinstance(of, BoxObjective):
            return BoxedImages(self.source, self.transform, self.cfg.seed, of.most, of.masks)
        samples = PairedImages if isinstance(self.objective, DenseObjective) else LabelledImages
        return samples(self.source, self.transform, self.cfg.seed, self.objective.target)

    def prepare(self, plan: BatchPlan) -> None:
        pass

    def compile(self) -> None:
        if self.cfg.engine.name == "dense":
            self._compiled = True
        else:
            self.model.compile()

    def draw(self, step: int, positions: range) -> list[Tensor]:
        drawn = [sample_keys(self.cfg.seed, step, positions)]
        if self.pairs:
            pairs = (self.cfg.optim.global_batch_size + 1) // 2
            mixes = self.mixup.draw(step_generator(self.cfg.seed, step), pairs)
            drawn.append(mixes[torch.tensor(positions) // 2])
        return drawn

    def loss(self, model: nn.Module, batch: Sequence[Tensor], weight: Tensor | None = None) -> Losses:
        if isinstance(self.objective, BoxObjective):
            return self._box_loss(model, batch, weight)
        imgs, targets, self.keys.values, *mixes = batch
        if mixes:
            imgs, targets = self.mixup(imgs, targets, *mixes)
        outputs = tree_map_only(Tensor, Tensor.float, self._outputs(model, imgs))
        losses, parts = self.objective.loss(outputs, targets)
        if losses.shape != (len(imgs),):
            raise ConfigError(
                f"{self._named()}: loss must give one value per sample [{len(imgs)}]; got {list(losses.shape)}"
            )
        return _mean(losses, weight), {name: _mean(part.detach(), weight) for name, part in parts.items()}

    def _box_loss(self, model: nn.Module, batch: Sequence[Tensor], weight: Tensor | None) -> Losses:
        """Of a detector, which takes part in its loss."""
        imgs, *targets, keys = batch
        self.keys.values = keys
        assert isinstance(model, Headed)
        assert isinstance(model.head, Detector)
        parts = model.head.losses(dense(model.backbone, imgs, **self._how()), Targets(*targets), keys)
        return _mean(sum(parts.values(), torch.zeros_like(keys, dtype=torch.float32)), weight), {
            name: _mean(part.detach(), weight) for name, part in parts.items()
        }

    def _named(self) -> str:
        return f"objective: {self.cfg.objective['_target_']}"

    def _check_classes(self) -> None:
        """Raises ConfigError for keys that mean something for classes only."""
        if self.objective.num_classes is not None:
            return
        augment = self.cfg.augment
        for name in ("mixup", "cutmix", "label_smoothing"):
            value = getattr(augment, name)
            if value:
                raise ConfigError(
                    f"augment.{name} must be 0 with {self._named()}, whose targets are no classes; got {value:g}"
                )
        if self.cfg.data.labels_per_class is not None:
            raise ConfigError(f"data.labels_per_class must be null with {self._named()}, whose targets are no classes")

    def _outputs(self, model: nn.Module, imgs: Tensor) -> Any:
        if self.cfg.engine.name == "timm":
            return model(imgs)
        return dense_outputs(model, imgs, **self._how())

    def _how(self) -> dict[str, Any]:
        return {"compiled": self._compiled, "recompute_stages": self.cfg.engine.recompute_stages}

    def _measure(self, ema: nn.Module | None, step: int, logger: RunLogger, world: World, stop: Wish) -> float:
        metrics: dict[str, float] = {}
        pictures: MapPictures | None = None
        for prefix, network in (("", self.model), ("ema_", ema)):
            if network is None:
                continue
            was_training = network.training
            cfg, of = self.cfg, self.objective
            batch_size = cfg.trainer.micro_batch_size or max(1, cfg.optim.global_batch_size // world.size)
            how = (self.val_source, cfg.data, cfg.loader, batch_size, cfg.precision, world, stop)
            if isinstance(of, DenseObjective):
                pictures = MapPictures(of, cfg.data, cfg.logger.channels)
                share = whole_predictions(network, of, *how, pictures if world.is_main else None)
            elif isinstance(of, BoxObjective):
                pictures = boxes = BoxPictures(cfg.data, cfg.logger.channels)
                share = detections(network, *how, pictures=boxes if world.is_main else None)
            else:
                share = predictions(network, *how, of.target)
            result = of.metrics(share, world)
            metrics |= {f"{prefix}{name}": value for name, value in result.items() if name != "images"}
            network.train(was_training)
        logger.log(step, metrics)
        picture = None if pictures is None else pictures.draw()  # of the last network, whose score counts
        if picture is not None:
            logger.picture(step, "predictions", picture)
        return self._score(metrics)

    def _score(self, metrics: dict[str, float]) -> float:
        """What the best checkpoint is chosen by, of the averaged weights where the run keeps some."""
        _, name = sign_and_name(self.objective.best)
        if name not in metrics:
            known = ", ".join(name for name in metrics if not name.startswith("ema_"))
            raise ConfigError(f"{self._named()}: best must be one of {known}; got {name!r}")
        return score(self.objective.best, {name: metrics.get(f"ema_{name}", metrics[name])})

    def extra_metrics(self) -> dict[str, float]:
        return {}

    def warning(self, step: int, metrics: dict[str, float]) -> None:
        return None

    def extra_state(self) -> dict[str, Any]:
        state = self.objective.state_dict()
        classes = {"classes": state.pop("classes")} if "classes" in state else {}
        return {**classes, "objective": state, **self.start.state()}

    def finish(self, run_dir: Path, ema: nn.Module | None, step: int) -> None:
        pass


def _check_batch(images: int, cfg: FinetuneConfig) -> None:
    """Raises ConfigError if the keys that take some of the images leave fewer than a batch has."""
    names = ("labels_per_class", "num_images")
    given = [f"data.{name}={getattr(cfg.data, name)}" for name in names if getattr(cfg.data, name) is not None]
    batch, fits = cfg.optim.global_batch_size, max(1, images - images % 2)  # mixup needs pairs
    if given and images < batch:
        raise ConfigError(
            f"{' and '.join(given)} leaves {images} training images, fewer than "
            f"optim.global_batch_size={batch}; give optim.global_batch_size={fits}"
        )


def _mean(values: Tensor, weight: Tensor | None) -> Tensor:
    return values.mean() if weight is None else (values * weight).mean()


def _validation(cfg: FinetuneConfig, objective: Objective) -> tuple[Source, list[str]]:
    """The validation images that suit the objective, and lines for the user. Raises UsageError."""
    try:
        source, notes = sourced(cfg, objective, train=False)
    except ConfigError:  # of target maps
        raise
    except UsageError as error:
        if cfg.data.val_path is not None:
            raise
        raise UsageError(f"{error}; or train without evaluating: trainer.eval_every_epochs=null") from error
    source, more = objective.validation(source, "data.val_path", "data.path")
    return source, notes + more + _shared(cfg.data)


def _shared(data: DataConfig) -> list[str]:
    """A line if the paths alone say that validation images are training images."""
    if data.name not in ("imagefolder", "webdataset", "array") or data.source is not None or data.val_path is None:
        return []
    all_in_folders = data.name == "imagefolder" and data.num_images is None and data.labels_per_class is None
    for val, train in itertools.product(as_list(data.val_path), as_list(data.path)):
        one, other = Path(val).resolve(), Path(train).resolve()  # of URLs and patterns, too: equal if these are
        if one == other or (all_in_folders and (one in other.parents or other in one.parents)):
            return [f"data.val_path={val} shares images with data.path={train}: training images are measured"]
    return []
