"""The screenshots of docs/images: reports of one run, of two and of a study, and the site's first page.

    python -m benchmarks.screenshots --work build/screenshots

Trains small networks on Fashion-MNIST, about 4 CPU-minutes, and continues what the folder holds; the study is the
measured one of docs/learning.md. Needs a Chromium or Chrome; the site's first page is taken if ``make docs`` has built
it. Each page is looked at in light and dark, 1400 and 400 px wide, and an error of its script ends the command. All
pictures are in the folder; the docs get copies of theirs.
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

from PIL import Image

from fcmae.config import compose
from fcmae.data.sources import train_source, val_source
from fcmae.studies import compare

ROOT = Path(__file__).parents[1]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
COLOURS, MOST_BYTES = 255, 150_000
DARK = ("@media(prefers-color-scheme:dark)", "@media all")
PRETRAIN = (
    *("pretrain", "experiment=demo/pretrain", "schedule.epochs=0.16", "schedule.warmup_epochs=0.02"),
    *("trainer.log_every=2", "trainer.eval_every_epochs=0.02", "monitor=knn", "monitor.knn_every_epochs=0.04"),
    *("monitor.knn_gallery=1000", "monitor.knn_queries=500", "monitor.val_loss=true", "monitor.val_images=256"),
)
LABELLED = {"train": 50, "val": 20}
"""Images of each class in a folder of their own."""
FINETUNE = (
    *("experiment=demo/finetune", "data.name=imagefolder", "data.in_chans=1", "data.mean=[0.25]", "data.std=[0.33]"),
    *("data.labels_per_class=null", "optim.global_batch_size=10", "loader.workers=0"),
)
MEASURED = ROOT / "benchmarks" / "study_cells-h200-2026-11-30.json"
FROM_RANDOM = ["random_probe", "scratch"]
ARMS = [*FROM_RANDOM, "pretrained_probe", "finetuned", "auto"]


def make_runs(work: Path) -> None:
    """Two pretraining runs (the first stops and resumes), fine-tuning with its evaluation, and a study's result."""
    if not (work / "random" / "encoder.safetensors").exists():
        fcmae(*PRETRAIN, f"hydra.run.dir={work}/random", "trainer.max_steps=60", check=False)
    for name, mask in (("random", "random"), ("block", "block")):
        if not (work / name / "encoder.safetensors").exists():
            fcmae(*PRETRAIN, f"mask={mask}", f"hydra.run.dir={work}/{name}")
    images = [f"data.path={work}/labelled/train", f"data.val_path={work}/labelled/val"]
    if not (work / "labelled").exists():
        write_labelled(work / "labelled")
    given = (*FINETUNE, *images, f"init_from={work}/random")
    if not (work / "classifier" / "evaluation").exists():
        often = (
            "schedule.epochs=3",
            "schedule.warmup_epochs=0.3",
            "trainer.log_every=2",
            "trainer.eval_every_epochs=0.3",
        )
        fcmae("finetune", *given, *often, f"hydra.run.dir={work}/classifier")
        fcmae("evaluate", f"checkpoint={work}/classifier", "loader.workers=0")
    write_study(work / "solar_cells")


def write_study(folder: Path) -> None:
    """study.json of the measured scores, as ``fcmae study`` writes it."""
    measured = json.loads(MEASURED.read_text())
    results, metric = measured["results"], measured["metric"]
    sizes = {result["labels"]: result["images"] for result in sorted(results, key=lambda each: each["images"])}
    budgets = [
        compare.Budget(label, f"all {images:,} images" if label == "all" else f"{label} per class", images)
        for label, images in sizes.items()
    ]
    scores: dict[str, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for result in results:
        scores[str(result["labels"])][result["arm"]][result["seed"]] = result["metrics"][metric]
    found = compare.verdict(scores, budgets, ARMS[-1], FROM_RANDOM, metric)
    summary = {
        **compare.plain(found),
        "metric": metric,
        "budgets": [budget._asdict() for budget in budgets],
        "arms": ARMS,
        "without": FROM_RANDOM,
        "others": {},
        "results": results,
        "table": compare.markdown(scores, budgets, ARMS, metric),
    }
    folder.mkdir(exist_ok=True)
    (folder / "study.json").write_text(json.dumps(summary))


def write_labelled(folder: Path) -> None:
    """A few images of each class as PNG files."""
    data = compose("pretrain", ["experiment=demo/pretrain"]).data
    for part, source in (("train", train_source(data)), ("val", val_source(data))):
        counts: Counter[int] = Counter()
        for index in range(len(source)):
            sample = source[index]
            if counts[sample.label] == LABELLED[part]:
                continue
            place = folder / part / source.classes[sample.label].replace("/", "-").replace(" ", "-").lower()
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(sample.image[0].numpy()).save(place / f"{counts[sample.label]:02}.png")
            counts[sample.label] += 1
            if counts.total() == LABELLED[part] * len(source.classes):
                break


def fcmae(*words: str, check: bool = True) -> None:
    print("fcmae", *words, flush=True)
    subprocess.run([sys.executable, "-m", "fcmae.cli", *words], check=check, cwd=ROOT)


def screenshot(page: Path, picture: Path, width: int, height: int, top: int = 0, lenient: bool = False) -> None:
    """Saves what a browser shows of a page. Raises RuntimeError if the page's script has an error.

    Args:
        top: pixels that are left out.
        lenient: errors do not count: the site's search needs a server.
    """
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise RuntimeError(f"needs one of {', '.join(BROWSERS)}")
    frame = picture.with_suffix(".frame.html")  # a window is at least 500 pixels wide
    style = f"width:{width}px;height:{height + top}px;border:0"
    frame.write_text(f'<body style="margin:0"><iframe src="{page.resolve().as_uri()}" style="{style}"></iframe></body>')
    size = f"--window-size={max(width, 500)},{height + top}"
    how = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr")
    command = [browser, *how, size, f"--screenshot={picture}", frame.resolve().as_uri()]
    said = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stderr
    frame.unlink()
    errors = [line for line in said.splitlines() if "CONSOLE" in line]
    if errors and not lenient:
        raise RuntimeError(f"{page}: {errors[0]}")
    with Image.open(picture) as shown:
        shown.convert("RGB").crop((0, top, width, height + top)).quantize(COLOURS).save(picture, optimize=True)


def looks(page: Path, work: Path, height: int) -> None:
    """Pictures of a page in light and dark, wide and narrow."""
    dark = work / f"{page.stem}_dark.html"
    text = page.read_text()
    if DARK[0] not in text:
        raise RuntimeError(f"{page} has no dark colours")
    dark.write_text(text.replace(*DARK).replace("color-scheme:light dark", "color-scheme:dark"))
    for name, file in (("light", page), ("dark", dark)):
        for width, most in ((1400, height), (400, 4 * height)):
            screenshot(file, work / f"{page.stem}_{name}_{width}.png", width, most)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "screenshots")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs" / "images", help="where pictures of the docs go")
    given = parser.parse_args()
    work = given.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    make_runs(work)
    pages = {"report": ["classifier"], "report_runs": ["random", "block"], "report_study": ["solar_cells"]}
    for name, runs in pages.items():
        fcmae("report", *(str(work / run) for run in runs), "--out", str(work / f"{name}.html"))
        looks(work / f"{name}.html", work, 2600)
    wanted = {"report": (1200, 1000), "report_runs": (1200, 1000), "report_study": (900, 820)}
    for name, (width, height) in wanted.items():
        keep(work / f"{name}.html", given.docs / f"{name}.png", width, height)
    site = ROOT / "site" / "index.html"
    if site.is_file():
        keep(site, given.docs / "site.png", 1320, 800, lenient=True)


def keep(page: Path, picture: Path, width: int, height: int, lenient: bool = False) -> None:
    screenshot(page, picture, width, height, lenient=lenient)
    if picture.stat().st_size > MOST_BYTES:
        raise RuntimeError(f"{picture} has {picture.stat().st_size:,} bytes, more than {MOST_BYTES:,}")
    print(picture)


if __name__ == "__main__":
    main()
