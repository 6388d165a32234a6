"""Pretraining and few-label fine-tuning on Fashion-MNIST at 128 px, of the experiments fashion_mnist/*: one table.

    python benchmarks/fashion_mnist.py --out runs/fashion_mnist --json benchmarks/fashion_mnist-MACHINE-DATE.json

About seven minutes on an H100. k-NN compares all 10,000 test images with 20,000 training images.
"""

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean

from fcmae.bench.measure import machine
from fcmae.config import compose
from fcmae.data.cores import default_workers
from fcmae.distributed import World, pick_device
from fcmae.evaluation.features import Extractor
from fcmae.evaluation.knn import knn_of
from fcmae.models.build import build_fcmae

LABELS = (100, 600)
SEEDS = (0, 1)
INITS = ("scratch", "pretrained")


def metrics(run_dir: Path, key: str) -> list[float]:
    """All values of a metric that a run logged."""
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [line[key] for line in lines if key in line]


def fcmae(command: str, run_dir: Path, *overrides: str) -> str:
    """Runs a command to its end and returns what it printed."""
    program = [sys.executable, "-m", "fcmae.cli", command, *overrides, f"hydra.run.dir={run_dir}"]
    return subprocess.run(program, check=True, stdout=subprocess.PIPE, text=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="a folder with Fashion-MNIST's four .gz files")
    parser.add_argument("--out", type=Path, default=Path("runs/fashion_mnist"), help="folder of the runs")
    parser.add_argument("--jobs", type=int, default=4, help="fine-tunings at a time (default: %(default)s)")
    parser.add_argument("--only", choices=INITS, help="fine-tune from this start alone (default: both)")
    parser.add_argument("--json", type=Path, help="write the result to a file")
    parser.add_argument("overrides", nargs="*", help="of the pretraining, KEY=VALUE; data.KEY of the fine-tunings too")
    given = parser.parse_intermixed_args()
    data = ["logger=quiet", *([f"data.path={given.data}"] if given.data else [])]
    data += [override for override in given.overrides if override.startswith("data.")]
    device = pick_device("auto")
    inits = (given.only,) if given.only else INITS

    pretraining = ["experiment=fashion_mnist/pretrain", *data, *given.overrides]
    cfg = compose("pretrain", pretraining)
    world = World(0, 1, 0, 1, device)
    extract = Extractor(build_fcmae(cfg).backbone.to(device), cfg.data, world)
    before = knn_of(cfg.data, cfg.loader, extract, world, ks=[10])["knn10"]
    pretrained = given.out / "pretrain"
    fcmae("pretrain", pretrained, *pretraining)
    print(f"{pretrained}: loss {metrics(pretrained, 'loss')[-1]:.4f}", flush=True)
    after = json.loads(fcmae("knn", given.out, f"checkpoint={pretrained}"))["knn10"]

    print(f"10-NN accuracy {before:.2f} % before, {after:.2f} % after", flush=True)
    workers = max(1, default_workers(device, 1) // given.jobs)

    def finetune(labels: int, seed: int, init: str) -> float:
        run_dir = given.out / f"{init}_{labels}_{seed}"
        start = [f"init_from={pretrained}"] if init == "pretrained" else []
        experiment = [f"experiment=fashion_mnist/finetune_{labels}", f"seed={seed}"]
        fcmae("finetune", run_dir, *experiment, *data, f"loader.workers={workers}", *start)
        top1 = metrics(run_dir, "top1")[-1]
        print(f"{labels} labels, seed {seed}, {init}: top-1 {top1:.2f} %", flush=True)
        return top1

    jobs = [(labels, seed, init) for labels in LABELS for seed in SEEDS for init in inits]
    with ThreadPoolExecutor(given.jobs) as pool:
        top1 = dict(zip(jobs, pool.map(lambda job: finetune(*job), jobs), strict=True))

    loss, speed = metrics(pretrained, "loss")[-1], metrics(pretrained, "images_per_second")
    print(f"{cfg.schedule.epochs:g} epochs, loss {loss:.3f}, {sorted(speed)[len(speed) // 2]:.0f} images/s")
    print(f"{'Fashion-MNIST at 128 px':36}{'random weights':>16}{'pretrained':>16}")
    print(f"{'10-NN accuracy of frozen features':36}{before:>15.1f}%{after:>15.1f}%")
    for labels in LABELS:
        means = [mean(top1[labels, seed, init] for seed in SEEDS) if init in inits else None for init in INITS]
        columns = "".join(f"{'-':>16}" if value is None else f"{value:>15.1f}%" for value in means)
        print(f"{f'{labels} labels, top-1, mean of {len(SEEDS)} seeds':36}{columns}")
    if given.json is not None:
        result = {"loss": loss, "knn_before": before, "knn_after": after, "images_per_second": speed}
        finetuned = [
            {"labels": n, "seed": seed, "init": init, "top1": value} for (n, seed, init), value in top1.items()
        ]
        report = {"machine": machine(device), **result, "finetuned": finetuned}
        given.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
