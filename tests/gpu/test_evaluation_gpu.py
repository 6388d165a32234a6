"""Features, k-NN and probe on a GPU agree with the CPU; looking during pretraining changes no bit of it."""

import gzip
import json
from itertools import repeat

import pytest
import torch

from fcmae.cli import main
from fcmae.config import DataConfig, LoaderConfig, ProbeConfig
from fcmae.data.sources import val_source
from fcmae.distributed import World
from fcmae.evaluation.features import Extractor
from fcmae.evaluation.knn import knn_accuracy
from fcmae.evaluation.probe import probe
from fcmae.models import create_backbone
from tests.conftest import TINY_FINETUNE, TINY_PRETRAIN, relative_error, run_python
from tests.integration.test_evaluation_ranks import SCRIPT
from tests.results import metrics_of

pytestmark = pytest.mark.gpu

DATA = DataConfig(name="synthetic", image_size=64, length=100)
LOADER = LoaderConfig(workers=0)
CPU, GPU = (World(0, 1, 0, 1, torch.device(name)) for name in ("cpu", "cuda"))


def test_features_knn_and_probe_agree_with_the_cpu():
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    backbone = create_backbone("convnextv2_atto")
    source = val_source(DATA)
    on_cpu = Extractor(backbone, DATA, CPU, loader=LOADER)(source)
    on_gpu = Extractor(backbone.cuda(), DATA, GPU, loader=LOADER)(source)
    assert relative_error(on_gpu.values.cpu(), on_cpu.values) < 1e-5
    assert knn_accuracy(on_gpu, on_gpu, 10, GPU, ks=[1, 5]) == knn_accuracy(on_cpu, on_cpu, 10, CPU, ks=[1, 5])
    cfg = ProbeConfig(checkpoint="x", train_batch_size=50, epochs=20, warmup_epochs=2, blr=[0.1, 10.0])
    heads = [probe(repeat(part), part, 10, cfg, world) for part, world in ((on_cpu, CPU), (on_gpu, GPU))]
    for cpu, gpu in zip(*heads, strict=True):
        assert gpu["top1"] == pytest.approx(cpu["top1"], abs=2)  # of 100 images, by the order of summation


def test_watching_changes_no_bit(tmp_path):
    """With CUDA graphs, which replay fixed addresses between the looks, and a profiler."""
    args = [*TINY_PRETRAIN, "data.image_size=64", "precision=bf16", "trainer.device=cuda", "schedule.epochs=5"]
    looks = ["monitor=knn", "monitor.knn_every_epochs=1", "monitor.probe_every_epochs=1", "monitor.val_loss=true"]
    for name, monitor in (("watched", [*looks, "trainer.profile_steps=2"]), ("alone", [])):
        assert main([*args, *monitor, f"hydra.run.dir={tmp_path}/{name}"]) == 0
    lines = [metrics_of(tmp_path / name) for name in ("watched", "alone")]
    watched, alone = ([line["loss"] for line in run if "loss" in line] for run in lines)
    assert watched == alone
    for name in ("knn10", "probe_top1", "val_loss", "effective_rank"):
        assert sum(name in line for line in lines[0]) == 5
    assert all(0 <= line["data_wait"] <= 1 for line in lines[0] if "loss" in line)
    [trace] = (tmp_path / "watched" / "profiles").iterdir()
    with gzip.open(trace) as file:
        assert any(event.get("cat") == "kernel" for event in json.load(file)["traceEvents"])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_share_the_work(tmp_path):
    """Over NCCL."""
    (tmp_path / "commands.py").write_text(SCRIPT)
    assert main([*TINY_PRETRAIN, "schedule.epochs=2", f"hydra.run.dir={tmp_path}/pretrained"]) == 0
    assert main([*TINY_FINETUNE, "optim.ema_decay=0.5", f"hydra.run.dir={tmp_path}/fine"]) == 0
    evaluated, knn, *probes = json.loads(run_python(tmp_path, "commands.py", "2", ranks=2).stdout)
    alone = json.loads(run_python(tmp_path, "commands.py", "1").stdout)
    assert (evaluated, knn) == (alone[0], alone[1])
    for two, one in zip(probes, alone[2:], strict=True):
        assert two["top1"] == pytest.approx(one["top1"], abs=7)  # of 31 images, by the order of summation
