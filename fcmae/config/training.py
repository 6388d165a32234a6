"""Groups ``optim``, ``schedule``, ``trainer``, ``monitor`` and ``logger``: how a network is trained."""

import re
from dataclasses import dataclass, field
from typing import Any

from fcmae.config.checks import check, check_device, check_neighbours, check_not_negative, check_one_of, check_positive
from fcmae.plugins import is_named

EXCHANGES = ("own", "ddp")
WANDB_MODES = ("auto", "online", "offline", "disabled")


SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


def seconds_of(text: str) -> float:
    """The seconds of a time such as ``30min``; 0 if it is none."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(s|min|h|d)", str(text))
    return float(match[1]) * SECONDS[match[2]] if match else 0.0


@dataclass
class OptimConfig:
    """Group ``optim``: AdamW."""

    global_batch_size: int = 4096
    """Samples per optimizer step, over all ranks."""
    blr: float = 1.5e-4
    """Base learning rate: lr = blr * global_batch_size / 256."""
    lr: float | None = None
    """The learning rate itself, instead of blr."""
    weight_decay: float = 0.05
    """On weights with two or more dimensions; never on biases, norms, GRN or the mask token."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """AdamW's decay of the running mean of gradients and of their squares."""
    layer_decay: float | None = None
    """Factor on the learning rate for each layer further from the head; None = none."""
    layer_decay_type: str = "single"
    """``single``: every block is a layer; ``group``: three blocks of stage 3 are one, as for Base and larger."""
    clip_grad: float | None = None
    """Largest norm of the gradient; None = no clipping."""
    ema_decay: float | None = None
    """Decay of the exponential moving average of the weights; None = none."""

    def __post_init__(self) -> None:
        check_positive("optim.global_batch_size", self.global_batch_size)
        check_positive("optim.blr", self.blr)
        check_positive("optim.lr", self.lr)
        check_not_negative("optim.weight_decay", self.weight_decay)
        ok = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        check("optim.betas", self.betas, ok, "two numbers in [0, 1)")
        ok = self.layer_decay is None or 0 < self.layer_decay <= 1
        check("optim.layer_decay", self.layer_decay, ok, "a number in (0, 1], or null")
        check_one_of("optim.layer_decay_type", self.layer_decay_type, ("single", "group"))
        check_positive("optim.clip_grad", self.clip_grad)
        ok = self.ema_decay is None or 0 < self.ema_decay < 1
        check("optim.ema_decay", self.ema_decay, ok, "a number in (0, 1), or null")

    @property
    def peak_lr(self) -> float:
        """The learning rate after warm-up, before layer decay."""
        return self.lr if self.lr is not None else self.blr * self.global_batch_size / 256


@dataclass
class ScheduleConfig:
    """Group ``schedule``: linear warm-up, then half a cosine or a line to ``min_lr``, per step."""

    epochs: float = 800
    """Length of training; an epoch is as many samples as there are training images."""
    warmup_epochs: float = 40
    """Epochs of linear warm-up, part of ``epochs``."""
    min_lr: float = 0.0
    """The learning rate at the end."""
    decay: str = "cosine"
    """How the learning rate falls after warm-up: ``cosine`` or ``linear``."""

    def __post_init__(self) -> None:
        check_one_of("schedule.decay", self.decay, ("cosine", "linear"))
        check_positive("schedule.epochs", self.epochs)
        ok = 0 <= self.warmup_epochs <= self.epochs
        check("schedule.warmup_epochs", self.warmup_epochs, ok, f"from 0 to schedule.epochs ({self.epochs:g})")
        check_not_negative("schedule.min_lr", self.min_lr)


@dataclass
class TrainerConfig:
    """Group ``trainer``: how the recipe runs on the hardware at hand."""

    micro_batch_size: Any = None
    """Most samples per rank and pass; the rest is accumulated. None = a rank's whole share; ``auto`` = as many
    as fit into the GPU's memory."""
    compile: bool | None = None
    """torch.compile; None = on a GPU only."""
    cuda_graph: bool | None = None
    """Replay steps from a CUDA graph; None = where it can be: on GPUs, not in fp16, not with engine=timm."""
    exchange: str = "own"
    """What sums gradients over several ranks: ``own`` (fcmae/training/exchange.py), or ``ddp``, torch's
    DistributedDataParallel. Both give the same result (docs/scale.md)."""
    device: str = "auto"
    """``auto`` = cuda if there is one, else cpu."""
    deterministic: bool = False
    """Only deterministic algorithms of torch, cuBLAS, cuDNN and torch.compile (fcmae/training/determinism.py)."""
    log_every: int = 20
    """Steps between lines of metrics.jsonl."""
    checkpoint_every_epochs: float = 1.0
    """Epochs between checkpoints. One is also written at the end and at every stop."""
    keep_checkpoints: int = 2
    """Number of newest checkpoints to keep; fine-tuning, and pretraining with monitor.val_loss, also keep the best."""
    keep_every_epochs: float | None = None
    """Keep the checkpoint of every such number of epochs for good; None = none."""
    on_save_error: str = "stop"
    """If a checkpoint cannot be written, e.g. on a full disk: ``stop``, or ``continue`` without it."""
    on_nonfinite: str = "stop"
    """If a loss or gradient is infinite or NaN: ``stop`` before the step, or ``skip`` the step."""
    max_skipped: int = 10
    """Most steps that may be skipped; the run stops at more."""
    hang_timeout: float = 1800.0
    """Seconds without a finished step, batch of an evaluation or part of a save (the first step compiles) after which
    the run ends, leaving the stacks of every rank; also how long ranks and data workers are waited for."""
    eval_every_epochs: float | None = 1.0
    """Fine-tuning: evaluation; pretraining: a reconstruction picture and the loss on validation images, if there are
    any (monitor.val_loss); None = never, and no validation images needed."""
    resume: bool = True
    """Continue from the newest valid checkpoint of the run directory, if there is one."""
    max_steps: int | None = None
    """Stop (resumable) after this many optimizer steps of the schedule."""
    allow_changed_recipe: bool = False
    """Resume although keys outside the groups trainer, loader, engine, monitor and logger changed."""
    profile_steps: int | None = None
    """Record a trace of this many steps, after the first ten of the process, by torch.profiler (profiles/*.json.gz in
    the run directory). None = none."""
    budget: str | None = None
    """Train for about this long, such as ``90s``, ``30min`` or ``8h``, from the start of the process: the speed of some
    steps gives ``schedule.epochs``, with the same share of warm-up. A run that resumes keeps its epochs. A run shorter
    than ``checkpoint_every_epochs`` or ``eval_every_epochs`` has four of each."""
    max_hours: float | None = None
    """Save and stop (resumable) this long after the start of the process; None = never."""

    def compiles(self, device: str) -> bool:
        """Whether a run on that type of device uses torch.compile."""
        return device == "cuda" if self.compile is None else self.compile

    def __post_init__(self) -> None:
        check_device("trainer.device", self.device)
        micro = self.micro_batch_size
        ok = micro in (None, "auto") or (type(micro) is int and micro > 0)
        check("trainer.micro_batch_size", micro, ok, "a positive integer, auto or null")
        positive = ["log_every", "keep_checkpoints", "max_steps", "profile_steps"]
        positive += ["checkpoint_every_epochs", "keep_every_epochs", "eval_every_epochs", "max_hours"]
        for name in positive:
            check_positive(f"trainer.{name}", getattr(self, name))
        ok = self.budget is None or seconds_of(self.budget) > 0
        check("trainer.budget", self.budget, ok, "a time such as 90s, 30min or 8h, or null")
        check("trainer.hang_timeout", self.hang_timeout, 0 < self.hang_timeout <= 1e7, "a number of seconds up to 1e7")
        check_one_of("trainer.exchange", self.exchange, EXCHANGES)
        check_one_of("trainer.on_save_error", self.on_save_error, ("stop", "continue"))
        check_one_of("trainer.on_nonfinite", self.on_nonfinite, ("stop", "skip"))
        check_not_negative("trainer.max_skipped", self.max_skipped)


@dataclass
class MonitorConfig:
    """Group ``monitor``: measurements during pretraining (docs/monitoring.md)."""

    val_loss: bool | None = None
    """Every trainer.eval_every_epochs: the loss on validation images with fixed masks, which chooses the best
    checkpoint; it needs no labels. None = where data.val_path or data.val_source is set."""
    val_images: int | None = 5_000
    """Validation images for it, the first of a fixed random order; None = all."""
    patience: int | None = None
    """End the run after this many evaluations without a lower val_loss; None = never."""
    knn_every_epochs: float | None = None
    """k-NN accuracy of the frozen features of data.val_path against data.path; needs labels. None = never."""
    probe_every_epochs: float | None = None
    """Accuracy of a short linear probe on the same frozen features; needs labels. None = never."""
    knn_k: Any = field(default_factory=lambda: [10, 20])
    """Number of neighbours that vote: one number or several."""
    knn_gallery: int | None = 20_000
    """Training images of k-NN and the probe, the first of a fixed random order; None = all."""
    knn_queries: int | None = 5_000
    """Validation images that they classify, likewise."""

    def __post_init__(self) -> None:
        self.knn_k = check_neighbours("monitor.knn_k", self.knn_k, "monitor.knn_gallery", self.knn_gallery)
        for name in ("val_images", "patience", "knn_every_epochs", "probe_every_epochs", "knn_gallery", "knn_queries"):
            check_positive(f"monitor.{name}", getattr(self, name))


@dataclass
class LoggerConfig:
    """Group ``logger``; metrics.jsonl is always written."""

    wandb: str = "auto"
    """``auto`` = what WANDB_MODE says, else online with an API key, offline without."""
    project: str = "fcmae"
    """Project of wandb."""
    entity: str | None = None
    """Team or user of wandb; None = WANDB_ENTITY, else the account's own."""
    group: str | None = None
    """Group of runs in wandb; None = WANDB_RUN_GROUP."""
    tags: list[str] = field(default_factory=list)
    """Tags in wandb; none = WANDB_TAGS."""
    notes: str | None = None
    """A description in wandb; None = WANDB_NOTES."""
    job_type: str | None = None
    """Job type in wandb, such as pretrain; None = WANDB_JOB_TYPE."""
    artifact: bool = False
    """Upload encoder.safetensors to wandb at the end of pretraining."""
    tensorboard: bool = False
    """Write TensorBoard's files too (``pip install 'fcmae[tensorboard]'``)."""
    report: bool = False
    """Keep report.html in the run directory: the page of `fcmae report`, refreshed during the run."""
    progress: bool = True
    """A progress bar on a terminal; a line every ``trainer.log_every`` steps elsewhere."""
    channels: list[int] | None = None
    """Channels of the images that reconstruction pictures show: one as grey, or three as red, green and blue. None =
    the first as grey of one or two, the first three of more."""
    sinks: dict[str, Any] = field(default_factory=dict)
    """Further places for metrics and pictures, by a name of your own: ``_target_``, a class, and its arguments
    (docs/plugins.md)."""

    def __post_init__(self) -> None:
        check_one_of("logger.wandb", self.wandb, WANDB_MODES)
        for name, value in self.sinks.items():
            check(f"logger.sinks.{name}", value, is_named(value), "_target_: PACKAGE.CLASS and its arguments")
