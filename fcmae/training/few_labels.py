"""``fcmae finetune recipe=auto``: a probe or fine-tuning from it, whichever is better in cross-validation.

All that is chosen is chosen on the training images. Every result is kept in the run's folder ``auto`` as soon as it is
known, so that a search that was stopped continues, and ends as if it had not been.
"""

import contextlib
import gc
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fcmae.checkpoints import checkpoint
from fcmae.checkpoints.checkpoint import CheckpointDir
from fcmae.config import FinetuneConfig, to_dict
from fcmae.config.recipe import check_recipe
from fcmae.data.plan import BatchPlan
from fcmae.data.sources import Subset
from fcmae.data.sources.base import listing_digest
from fcmae.distributed import World
from fcmae.errors import EvaluationStopped, Interrupted, UsageError, counted
from fcmae.evaluation.class_metrics import metrics_of
from fcmae.evaluation.classify import predictions
from fcmae.evaluation.features import Features
from fcmae.evaluation.fold_scores import clearly_better, mean_of, shown_score
from fcmae.evaluation.logistic import Chosen, Linear, cross_validate, fit, stratified_folds
from fcmae.files import as_read, read_result, set_aside, write_result
from fcmae.loggers.search_progress import SearchProgress, Size
from fcmae.messages import say
from fcmae.models.objective import score
from fcmae.status import PROGRESS_FILE
from fcmae.tasks.few_labels import FromHead, class_lines, frozen_features
from fcmae.tasks.finetuning import Finetuning
from fcmae.tasks.initial import find_start
from fcmae.tasks.objectives import Classify
from fcmae.training import setup
from fcmae.training.agree_to_stop import StopAgreement
from fcmae.training.loop import train
from fcmae.training.run_dir import write_config
from fcmae.training.watchdog import Watchdog

FOLDER = "auto"
CHOSEN = {"kept": str, "layer": str, "l2": object, "lr": object, "layer_decay": object}
"""What ``chosen.json`` names, and the types of its values."""
BATCH_SIZE = 256
"""Images at once without gradients, at most."""
Result = dict[str, Any]


def search(task: Finetuning, run_dir: Path, world: World, watchdog: Watchdog, stop: StopAgreement) -> Path:
    """Finds the better of probe and fine-tuning, and leaves it in ``run_dir``, as training does.

    Args:
        task: with the config of the command; it is not trained.

    Returns:
        The last checkpoint.

    Raises what ``train`` raises. Interrupted: the same command continues.
    """
    return _Search(task, run_dir, world, watchdog, stop).run()


class _Search:
    def __init__(self, task: Finetuning, run_dir: Path, world: World, watchdog: Watchdog, stop: StopAgreement) -> None:
        assert isinstance(task.objective, Classify)
        self.task, self.cfg, self.auto, self.objective = task, task.cfg, task.cfg.auto, task.objective
        self.run_dir, self.folder = run_dir, run_dir / FOLDER
        self.world, self.watchdog, self.stop = world, watchdog, stop
        self.labels = torch.tensor([task.source.label(i) for i in range(len(task.source))])
        self.folds = stratified_folds(self.labels, self.auto.folds, self.cfg.seed)
        self.measured = self._measured_folds()
        self.grid = [(lr, decay) for lr in self.auto.lrs for decay in self.auto.layer_decays]
        self.features: dict[str, Features] = {}

    def _measured_folds(self) -> list[int]:
        """The folds on which fine-tuning and probe are compared (``auto.held_out``)."""
        sizes = self.folds[self.folds >= 0].bincount(minlength=self.auto.folds).tolist()
        folds: list[int] = []
        for fold, size in enumerate(sizes):
            if size and sum(sizes[:fold]) < self.auto.held_out:
                folds.append(fold)
        return folds

    def run(self) -> Path:
        self.world.on_main(self._begin)
        setup.settle_precision(self.cfg, self.world, None, self.task.model)
        found = self._kept("chosen", **CHOSEN)
        own = self.world.from_main(CheckpointDir(self.run_dir).paths) if self.cfg.trainer.resume else []
        if found is not None and own:
            return own[-1] if found["kept"] == "probe" else self._train(found, _no_head)
        self.world.together(self._load)
        objective = self.objective
        lines = class_lines(self.labels, objective.classes, self.auto.folds, objective.best)
        self.world.say(*self.task.notes, *lines)
        if found is None:
            found = self._choose(self._progress())
        head = self._head(found, torch.ones(len(self.labels), dtype=torch.bool))
        return self._save(found, head) if found["kept"] == "probe" else self._train(found, head)

    def _begin(self) -> None:
        """Compares the config with that of the search so far. Raises UsageError."""
        cfg, file = self.cfg, self.folder / "recipe.json"
        if not cfg.trainer.resume and self.folder.exists():
            set_aside(self.folder, say)
        path = self.task.start.path
        now: Result = {
            "config": as_read(to_dict(cfg)),
            "images": len(self.labels),
            "listing": listing_digest(self.task.source),
            "classes": self.objective.classes,
            "weights": checkpoint.identity(path),
            "init_from": path,
        }
        old = read_result(file, config=dict, images=int, weights=object, init_from=object)
        if old is None:
            write_result(file, now)
        elif not cfg.trainer.allow_changed_recipe:
            numbers = {"training images": (old["images"], now["images"])}
            numbers |= setup.changed_classes(old.get("classes"), now["classes"])
            numbers |= setup.changed_listing(old.get("images"), old.get("listing"), self.task.source)
            check_recipe(old["config"], now["config"], numbers)
            if path is not None and old["weights"] != now["weights"]:
                raise UsageError(
                    f"init_from was {old['init_from']} when this run began; now it is {path}, which holds other weights"
                )

    def _load(self) -> None:
        self.task.initialise()
        self.task.model.to(self.world.device)

    def _kept(self, name: str, **needed: type) -> Result | None:
        """What the first rank finds in a file of an earlier process."""
        return self.world.from_main(lambda: read_result(self.folder / f"{name}.json", **needed))

    def _keep(self, name: str, make: Callable[[], Result]) -> Result:
        """What ``make`` gives on the first rank, on every rank and in a file."""

        def made() -> Result:
            result = make()
            write_result(self.folder / f"{name}.json", result)
            return result

        return self.world.from_main(made)

    def _wish(self) -> bool:
        self.watchdog.beat()
        return self.stop.wished()

    def _features(self, layer: str) -> Features:
        if layer not in self.features:
            micro = self.cfg.trainer.micro_batch_size
            size = min(micro, BATCH_SIZE) if isinstance(micro, int) else BATCH_SIZE
            try:
                self.features[layer] = frozen_features(self.task, layer, size, self.world, self._wish)
            except EvaluationStopped:
                self.stop.before_training(self.run_dir)
                raise
        return self.features[layer]

    def _probe(self) -> Result:
        """The layer and l2 with the least log loss of held-out images, and the metrics of each fold."""
        kept = self._kept("probe", layer=str, l2=object, metrics=list)
        if kept is not None:
            return kept
        folds = int(self.folds.max()) + 1
        self.world.say(
            f"recipe=auto: a probe on the features of {counted(len(self.labels), 'image')}, cross-validated in "
            f"{folds} folds with {counted(len(self.auto.layers), 'choice')} of layers and {len(self.auto.l2)} of l2"
        )
        values = {layer: self._features(layer).values for layer in self.auto.layers}

        def choose() -> Result:
            found = {layer: self._cross_validated(layer, rows) for layer, rows in values.items()}
            layer = min(found, key=lambda name: min(found[name].log_loss.values()))
            logits = found[layer].logits.cpu()
            held = [self.folds == fold for fold in self.measured]
            return {
                "layer": layer,
                "l2": found[layer].l2,
                "metrics": [metrics_of(logits[part], self.labels[part]) for part in held],
                "log_loss": {
                    name: {f"{l2:g}": loss for l2, loss in each.log_loss.items()} for name, each in found.items()
                },
            }

        result = self._keep("probe", choose)
        if self.world.is_main:
            shutil.rmtree(self.folder / "probe", ignore_errors=True)
        return result

    def _cross_validated(self, layer: str, rows: Tensor) -> Chosen:
        labels, weights, classes = self.labels.to(rows.device), self.objective.weights, len(self.objective.classes)
        folder = self.folder / "probe" / layer
        with self._stops():
            return cross_validate(rows, labels, classes, self.folds, self.auto.l2, weights, self._wish, folder)

    @contextlib.contextmanager
    def _stops(self) -> Iterator[None]:
        """For work of the first rank alone: Interrupted where it is stopped."""
        try:
            yield
        except EvaluationStopped:
            self.stop.raise_before_training(self.run_dir)

    def _head(self, probe: Result, images: Tensor) -> Callable[[], Linear]:
        """What gives the probe's classifier, learned from some images."""
        values, labels = self._features(probe["layer"]).values, self.labels
        classes, l2 = len(self.objective.classes), probe["l2"]

        def head() -> Linear:
            rows = values[images.to(values.device)]
            with self._stops():
                return fit(rows, labels[images].to(rows.device), classes, [l2], self.objective.weights, self._wish)[l2]

        return head

    def _progress(self) -> SearchProgress:
        """What is left to train."""
        images = {fold: int((self.folds != fold).sum()) for fold in self.measured}
        sizes = {_name(fold, *each): self._size(count) for each in self.grid for fold, count in images.items()}
        done = self.world.from_main(lambda: [name for name in sizes if (self.folder / name / "result.json").is_file()])
        return SearchProgress(self.folder / PROGRESS_FILE, sizes, self._size(len(self.labels)), done, self.world)

    def _size(self, images: int) -> Size:
        """Of a training on so many images."""
        batch = min(self.cfg.optim.global_batch_size, images)
        plan = BatchPlan.create(images, batch, None, 1, self.cfg.seed)
        return Size(setup.create_schedule(self.cfg, plan).total_steps, batch)

    def _choose(self, progress: SearchProgress) -> Result:
        """Fine-tunes on every fold with every learning rate and layer decay; the best of all, and the probe."""
        probe = self._probe()
        self.world.together(lambda: self._check_metric(probe["metrics"][0]))
        tried: list[Result] = []
        for lr, decay in self.grid:
            folds = [self._score(self._fold(fold, lr, decay, probe, progress)) for fold in self.measured]
            tried.append({"lr": lr, "layer_decay": decay, "score": mean_of(folds), "folds": folds})
        scores = [self._score(metrics) for metrics in probe["metrics"]]
        best = max(tried, key=lambda each: each["score"])
        kept = "probe" if clearly_better(scores, best["folds"]) else "finetuned"

        def made() -> Result:
            return {
                "kept": kept,
                "metric": self.objective.best,
                "layer": probe["layer"],
                "l2": probe["l2"],
                "lr": best["lr"],
                "layer_decay": best["layer_decay"],
                "probe": {"score": mean_of(scores), "folds": scores},
                "finetuned": tried,
            }

        found = self._keep("chosen", made)
        self.world.say(summary(found))
        return found

    def _check_metric(self, metrics: dict[str, float]) -> None:
        if self.objective.best.removeprefix("-") not in metrics:
            known = ", ".join(metrics)
            raise UsageError(f"objective.best must be one of {known} with recipe=auto; got {self.objective.best}")

    def _score(self, metrics: dict[str, float]) -> float:
        return score(self.objective.best, metrics)

    def _fold(self, fold: int, lr: float, decay: float, probe: Result, progress: SearchProgress) -> dict[str, float]:
        """The metrics of the held-out images of a fold, after fine-tuning on the others."""
        name = _name(fold, lr, decay)
        kept = self._kept(f"{name}/result")
        if kept is not None:
            return kept
        progress.start(name)
        folder, others = self.folder / name, self.folds != fold
        whole = not CheckpointDir(folder).paths()
        cfg = self._of_fold(self._config(probe["layer"], lr, decay, int(others.sum())))
        start = self.world.from_main(lambda: find_start(cfg, folder))
        head, images = self._head(probe, others), others.nonzero()[:, 0].tolist()
        task = self.world.together(lambda: FromHead(cfg, start, head, self.task.model, images))
        try:
            train(task, folder, self.world, self.watchdog, self.stop)
        except Interrupted as error:
            raise Interrupted(str(error).replace(str(folder), str(self.run_dir))) from error
        metrics = self._measure(task, (~others).nonzero()[:, 0].tolist())
        result = self._keep(f"{name}/result", lambda: metrics)
        del task
        gc.collect()  # cycles of the run hold a GPU's memory, which Python's collector does not count
        if self.world.is_main:
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        of_fold = f"{self.objective.best} {self._score(result):.1f}"
        ended = progress.end(whole)
        self.world.say(f"recipe=auto: fold {fold + 1}, lr={lr:g}, layer_decay={decay:g}: {of_fold} {ended}")
        return result

    def _measure(self, task: Finetuning, images: list[int]) -> dict[str, float]:
        cfg = task.cfg
        batch_size = min(BATCH_SIZE, cfg.trainer.micro_batch_size or cfg.optim.global_batch_size)
        share = predictions(
            task.model,
            Subset(self.task.source, images),
            cfg.data,
            cfg.loader,
            batch_size,
            cfg.precision,
            self.world,
            self._wish,
            self.objective.target,
        )
        try:
            return task.objective.metrics(share, self.world)
        except EvaluationStopped:
            self.stop.before_training(self.run_dir)
            raise

    def _config(self, layer: str, lr: float, decay: float, images: int) -> FinetuneConfig:
        """The config of a run on so many images."""
        cfg = self.cfg
        objective = cfg.objective if layer == "pooled" else {**cfg.objective, "layer": layer}
        batch = min(cfg.optim.global_batch_size, images)
        optim = replace(cfg.optim, lr=lr, layer_decay=decay, global_batch_size=batch)
        return replace(cfg, objective=objective, optim=optim, trainer=replace(cfg.trainer))

    @staticmethod
    def _of_fold(cfg: FinetuneConfig) -> FinetuneConfig:
        """Without compilation, which takes longer than it saves, and without what only a final result needs."""
        trainer = replace(
            cfg.trainer,
            compile=cfg.trainer.compile or False,
            checkpoint_every_epochs=cfg.schedule.epochs,
            keep_checkpoints=1,
            keep_every_epochs=None,
        )
        logger = replace(cfg.logger, wandb="disabled", tensorboard=False, progress=False, sinks={})
        return replace(cfg, trainer=trainer, logger=logger)

    def _final(self, found: Result, head: Callable[[], Linear]) -> FromHead:
        """The task on all training images."""
        cfg = self._config(found["layer"], found["lr"], found["layer_decay"], len(self.labels))
        start = self.world.from_main(lambda: find_start(cfg, self.run_dir))
        return self.world.together(lambda: FromHead(cfg, start, head, self.task.model))

    def _train(self, found: Result, head: Callable[[], Linear]) -> Path:
        return train(self._final(found, head), self.run_dir, self.world, self.watchdog, self.stop)

    def _save(self, found: Result, head: Callable[[], Linear]) -> Path:
        """A checkpoint of the frozen network with the probe's classifier."""
        task = self._final(found, head)

        def save() -> Path:
            task.initialise()
            config, checkpoints = to_dict(task.cfg), CheckpointDir(self.run_dir)
            checkpoints.set_aside(-1, say)
            write_config(self.run_dir, config)
            state = {"task": task.name, "config": config, **task.extra_state(), "model": task.model.state_dict()}
            return checkpoints.save({**state, "step": 0, "ema": None})

        return self.world.from_main(save)


def _name(fold: int, lr: float, decay: float) -> str:
    """Of the folder of a training."""
    return f"fold{fold + 1}_lr{lr:g}_decay{decay:g}"


def _no_head() -> Linear:
    raise AssertionError("a run that resumes has its own classifier")


def summary(found: Result) -> str:
    """The line that says what was kept, and why."""
    best = max(found["finetuned"], key=lambda each: each["score"])
    metric, folds = found["metric"], counted(len(found["probe"]["folds"]), "fold")
    fine = f"fine-tuning (lr={best['lr']:g}, layer_decay={best['layer_decay']:g}) {shown_score(best['score'])}"
    probe = f"the probe (layer={found['layer']}, l2={found['l2']:g}) {shown_score(found['probe']['score'])}"
    first, second = (fine, probe) if found["kept"] == "finetuned" else (probe, fine)
    close = found["kept"] == "finetuned" and found["probe"]["score"] > best["score"]
    doubt = ", not better by more than a standard error" if close else ""
    return f"recipe=auto keeps {first}; {second}{doubt}: {metric} of held-out training images, mean of {folds}"
