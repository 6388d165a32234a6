"""The commands ``pretrain`` and ``finetune`` as functions of a typed config and a run directory."""

from pathlib import Path

import torch

from fcmae.config import FinetuneConfig, PretrainConfig
from fcmae.engines import get_engine
from fcmae.errors import UsageError
from fcmae.training import distributed
from fcmae.training.lock import RunLock
from fcmae.training.loop import train
from fcmae.training.tasks import Finetuning, Pretraining, Task


def pretrain(cfg: PretrainConfig, run_dir: Path) -> Path:
    """Pretrains and returns the last checkpoint. Every rank of a launch calls this."""
    try:
        get_engine(cfg.engine.name, distributed.pick_device(cfg.trainer.device).type)
    except ImportError as error:
        raise UsageError(str(error)) from error
    return _run(Pretraining(cfg), run_dir)


def finetune(cfg: FinetuneConfig, run_dir: Path) -> Path:
    """Fine-tunes and returns the last checkpoint. Every rank of a launch calls this."""
    return _run(Finetuning(cfg), run_dir)


def _run(task: Task, run_dir: Path) -> Path:
    cfg = task.cfg
    world = distributed.connect(cfg.trainer.device)
    torch.backends.cuda.matmul.allow_tf32 = cfg.trainer.precision != "float32"
    torch.backends.cudnn.allow_tf32 = cfg.trainer.precision != "float32"
    lock = RunLock(run_dir)
    try:
        world.on_main(lock.acquire)
        return train(task, run_dir, world)
    finally:
        lock.close()
        distributed.disconnect()
