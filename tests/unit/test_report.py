"""The page that shows runs: whole, without a network, whatever is in their folders."""

import base64
import html.parser
import json
import math
import re
import shutil
import sys

import pytest
import torch
from PIL import Image

from benchmarks import screenshots
from fcmae.cli import main
from fcmae.data.sheet import keep_sheet
from fcmae.data.sources.base import Sample
from fcmae.errors import ImageError
from fcmae.evaluation import summary
from fcmae.loggers import report_page
from fcmae.models.objective import Report
from fcmae.report import page as page_module
from fcmae.report.charts import Line, chart, number, thinned, ticks
from fcmae.report.page import render
from fcmae.report.read import PICTURE_BYTES, read_run, read_runs
from fcmae.report.study import read_study
from fcmae.status import describe, read_status
from tests.conftest import TINY_PRETRAIN
from tests.unit.test_status import training, write


class Page(html.parser.HTMLParser):
    """Tags and their attributes, and the visible text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += f"{data}\n"

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def run(tmp_path):
    lines = [training(step, 200 - step, 1 / step) for step in range(10, 110, 10)]
    lines[5:5] = [{"step": 50, "knn10": 60.0}]
    folder = write(tmp_path / "a", [*lines, {"step": 100, "knn10": 70.0, "val_loss": 0.5}], steps=(100,))
    (folder / "reconstructions").mkdir()
    for step in (50, 100):
        Image.new("RGB", (1200, 300), (step, 0, 0)).save(folder / "reconstructions" / f"pixels_{step:08d}.png")
    return folder


def test_a_page_of_two_runs(run, tmp_path, capsys):
    other = write(tmp_path / "b", [training(10, 1)], config="name: pretrain\noptim: {global_batch_size: 8}\nseed: 3\n")
    out = tmp_path / "page.html"
    assert main(["report", str(run), str(other), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    page = Page(out.read_text())
    charts = [json.loads(svg["data-lines"]) for svg in page.all("svg")]
    assert [line[0] for line in charts[0]["lines"]] == ["a", "b"]
    assert charts[0]["lines"][0][1][0] == [10, 0.1]
    assert [point for line in charts for name, points in line["lines"] for point in points if point[1] == 70]
    assert [image["data-step"] for image in page.all("img")] == ["50", "100"]
    assert len(page.all("input")) == 1
    assert "optim.global_batch_size" in page.text
    assert "\nseed\n3\n" in re.sub(r"\n·", "", page.text)


def test_nothing_is_loaded_from_elsewhere_and_names_are_only_text(tmp_path):
    hostile = "<script>alert(1)</script>"
    config = f"name: '{hostile}'\ndata: {{name: '\"{hostile}'}}\n"
    lines = [training(1, 1), {"step": 1, hostile: 3.0, f'"{hostile}': 4.0}]
    folder = write(tmp_path / "<b onload=x>", lines, config=config)
    page = Page(render(read_runs([str(folder)])))
    assert len(page.all("script")) == 1
    assert not [attributes for _, attributes in page.tags if any(name.startswith("on") for name in attributes)]
    addresses = [attributes[name] for _, attributes in page.tags for name in ("src", "href") if name in attributes]
    assert addresses
    assert all(address.startswith(("data:", "#")) for address in addresses)
    (policy,) = [meta["content"] for meta in page.all("meta") if "http-equiv" in meta]
    assert policy.startswith("default-src 'none'")


def test_the_page_of_a_long_run_is_small(run):
    with (run / "metrics.jsonl").open("w") as file:
        file.writelines(json.dumps(training(step, 5)) + "\n" for step in range(20, 1_000_001, 20))
    for step in range(15):
        Image.effect_noise((900, 600), 90).save(run / "reconstructions" / f"noise_{step}.png")
    content = read_run(run, "a")
    assert sum(len(picture.source) for picture in content.pictures) < PICTURE_BYTES + 1000
    assert content.pictures[-1].step == 100
    assert len(content.series["loss"]) < 9_000
    page = render([content])
    assert len(page) < 5_000_000
    points = json.loads(Page(page).all("svg")[0]["data-lines"])["lines"][0][1]
    assert len(points) == 400
    assert points[-1][0] == 1_000_000


def test_restarts_versions_and_evaluations_are_shown(run):
    """Whatever is in the files of anybody's run."""
    events = [
        {"step": 0, "time": 1.7e9, "host": "a", "ranks": 4, "versions": {"torch": "2.14"}, "notes": ["<b>grey</b>"]},
        {"step": 50, "time": 1e300, "host": ["b"], "ranks": "many", "versions": 3, "notes": {}},
        *2 * [{"step": 70, "time": "now", "warning": "<b>collapse</b>"}],
        {"step": 70, "warning": 3},
    ]
    (run / "events.jsonl").write_text("\n".join([*map(json.dumps, events), '{"step": NaN}', "[", "{}"]))
    (run / "result.json").write_text('{"top1": 81.5, "images": 100}')
    (run / "other.json").write_text('{"top1": [1]}')
    text = render([read_run(run, "a")])
    page = Page(text)
    assert text.count('class="mark"') == text.count('class="warning" d=') == len(page.all("svg"))
    for expected in ("torch 2.14", "a, step 0: <b>grey</b>", "81.5", "result", "A dotted line"):
        assert expected in page.text
    assert page.text.split("\n").count("<b>collapse</b>") == 1
    assert "other" not in page.text
    assert not page.all("b")


def test_a_warning_at_the_start_has_a_triangle_as_any_other_once(run):
    few = "warning: 10 steps of 8 images fit"
    events = [{"step": step, "notes": [few, "a note", 3]} for step in (0, 50)]
    (run / "events.jsonl").write_text("\n".join(map(json.dumps, events)))
    text = render([read_run(run, "a")])
    assert text.count('<i class="warning"') == 1
    assert Page(text).text.split("\n").count(few) == 1


def test_what_evaluate_wrote_is_shown(run):
    """Tables, plots and worst images; what is damaged or hostile is left out, and names are only text."""
    folder = run / "evaluation"
    metrics = {"top1": 81.5, "ece": math.nan, "ema_top1": 82.25, "auroc_<i>cat</i>": 99.0}
    per_class = {"<i>cat</i>": {"recall": 66.66666, "images": 3.0}}
    summary.write(folder, metrics, Report(per_class, {"confusion": lambda figure: figure.subplots()}))
    Image.effect_noise((1600, 400), 90).save(folder / "worst.png")
    (folder / "roc.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (run / "elsewhere").mkdir()
    (run / "elsewhere" / "metrics.json").write_text('{"mae": 2.5}')
    (run / "linked").symlink_to(folder)
    page = Page(render([read_run(run, "a")]))
    cells = page.text.split("\n")
    for expected in ("81.5", "82.25", "2.5", "66.67", "3", "elsewhere", "evaluation, averaged weights"):
        assert expected in cells
    assert "99" not in cells  # of a single class, which has a row
    assert "linked" not in cells
    assert not page.all("i")
    kinds = [image["src"].split(";")[0] for image in page.all("img")]
    assert kinds == ["data:image/png", *["data:image/jpeg"] * 3]


def test_the_images_of_a_run_are_shown(run):
    class Images:
        classes = ("a", "b")

        def __len__(self):
            return 50

        def __getitem__(self, index):
            if index == 4:
                raise ImageError("x", "is damaged")
            shape = (3, 40, 64) if index else (3, 10, 10)
            return Sample(torch.full(shape, 99, dtype=torch.uint8), 0)

        def describe(self, index):
            return f"folder/<b>{index}</b>.png"

    keep_sheet(Images(), run, 10**6)
    file = run / "data_sheet.json"
    before = file.read_bytes()
    keep_sheet(None, run, 10**6)  # a run that resumes
    assert file.read_bytes() == before
    page = Page(render([read_run(run, "a")]))
    for expected in ("50", "2", "1 of 12 that were looked at", "10 × 10 to 64 × 40, median 64 × 40", "tensor", "uint8"):
        assert expected in page.text.split("\n")
    assert not page.all("b")
    assert page.text.count("64 × 40, tensor\n") == 10
    sheet = json.loads(before)
    for example, wrong in zip(sheet["examples"], ("x", b"GIF89a", 7, None, [], "AAAA"), strict=False):
        example["picture"] = base64.b64encode(wrong).decode() if isinstance(wrong, bytes) else wrong
    sheet["examples"][6]["size"], sheet["examples"][7]["size"] = [3], [math.inf, 1]
    for content in (json.dumps(sheet), "[]", "{", '{"examples": [1, {}], "images": "many"}', "[" * 10**5):
        file.write_text(content)
        assert len(Page(render([read_run(run, "a")])).all("img")) == (2 + 3 if content[2:8] == "images" else 2), content


def test_a_run_keeps_its_page(fcmae_here, tmp_path, monkeypatch):
    """Also where it stops; and a page that cannot be written does not end it."""
    monkeypatch.setattr(report_page, "LEAST_SECONDS", 0)
    monkeypatch.setattr(report_page, "SHARE", math.inf)
    fresh = (*TINY_PRETRAIN, "logger.report=true", "hydra.run.dir=run")
    writes = []
    write_page = page_module.write
    monkeypatch.setattr(page_module, "write", lambda *given: (writes.append(given), write_page(*given)))
    fcmae_here(*fresh, "trainer.max_steps=2", check=75)
    assert len(writes) == 3  # after each step, and at the end
    assert "stopped" in Page((tmp_path / "run" / "report.html").read_text()).text

    def broken(*_):
        raise OSError("no space")

    monkeypatch.setattr(page_module, "write", broken)
    said = fcmae_here(*fresh).stderr
    assert "ReportPage could not write: no space\n" in said
    assert "report.html could not be written: no space\n" in said
    monkeypatch.undo()
    text = Page(render([read_run(tmp_path / "run", "run")])).text
    assert "\ndone\n" in text
    assert "A dotted line" in text


def test_damaged_files_are_left_out(run):
    (run / "reconstructions" / "pixels_00000100.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 100)
    (run / "config.yaml").write_bytes(b"\xff")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 110, "loss": NaN, "x": 1e400}\n{"step"')
    content = read_run(run, "a")
    assert [picture.step for picture in content.pictures] == [50]
    assert content.series["loss"][-1][0] == 100
    assert render([content])


def test_numbers_that_are_almost_infinite(run):
    """Whose sums and roundings are: JSON in the page would not be read."""
    largest = sys.float_info.max
    (run / "metrics.jsonl").write_text("".join(json.dumps({"step": n, "loss": largest - n}) + "\n" for n in (1, 2)))
    (run / "result.json").write_text(json.dumps({"top1": largest}))
    text = render([read_run(run, "a")])
    assert "Infinity" not in text
    assert describe(read_status(run))


def test_a_folder_without_a_run_is_one_line(tmp_path, run, capsys):
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "p.html")]) == 2
    assert "holds no run" in capsys.readouterr().err
    assert main(["report", str(run), str(run), "--out", str(tmp_path / "p.html")]) == 2
    assert "is given twice" in capsys.readouterr().err
    assert main(["report", str(run), "--out", str(tmp_path / "p.pdf")]) == 2
    assert "--out must be a file that ends in .html; got " in capsys.readouterr().err
    assert not (tmp_path / "p.html").exists()


def test_charts():
    points = [(step, float(step)) for step in range(1, 1001)]
    assert thinned(points, 10)[-1] == (1000, 950.5)
    assert math.isclose(sum(y for _, y in thinned(points, 10)) / 10, sum(y for _, y in points) / 1000)
    assert ticks(0.31, 0.9, 4, around=True) == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(0, 5000, 4) == [0, 2000, 4000]
    for low, high in ((0, 0), (4.1, 4.1), (-3, -3), (1e-12, 2e-12), (0, 1e15)):
        given = ticks(low, high, 5, around=True)
        assert given[0] <= low <= high <= given[-1]
        assert 2 <= len(given) <= 8
    assert [number(x) for x in (5.0, 12000, 0.123456, 2.5e6, 1234.5)] == ["5", "12k", "0.1235", "2.5M", "1234"]
    assert "polyline" not in chart("one point", [Line("a", 0, [(5, 1.0)])])


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, screenshots.BROWSERS)), reason="needs a Chromium")
def test_a_browser_shows_it_without_errors(run, tmp_path):
    """In light and dark, wide and narrow; nothing is wider than the window."""
    page, narrow = tmp_path / "page.html", tmp_path / "narrow.html"
    text = render([read_run(run, "a"), read_run(run, "a run with a name that is as long as names are in practice")])
    page.write_text(text)
    screenshots.looks(page, tmp_path, 900)
    pictures = {path.name: Image.open(path).convert("L") for path in tmp_path.glob("*.png")}
    assert {name: picture.width for name, picture in pictures.items()} == {
        f"page_{colours}_{width}.png": width for colours in ("light", "dark") for width in (1400, 400)
    }
    assert pictures["page_light_400.png"].getpixel((2, 2)) > 200 > 60 > pictures["page_dark_400.png"].getpixel((2, 2))
    narrow.write_text(text + "<script>if(document.documentElement.scrollWidth>400)throw Error('too wide')</script>")
    screenshots.screenshot(narrow, tmp_path / "narrow.png", 400, 900)
    narrow.write_text(text + "<script>throw Error('broken')</script>")
    with pytest.raises(RuntimeError, match="broken"):
        screenshots.screenshot(narrow, tmp_path / "narrow.png", 400, 900)
    table = [
        "| top1 | 2 per class | 10 per class |",
        "| finetuned minus the best of random weights | +5 ± 15.9 | -20 ± 38.1 |",
    ]
    (tmp_path / "study.json").write_text(json.dumps({"sentence": "no gain", "table": table}))
    assert main(["report", str(tmp_path), "--out", str(page)]) == 0
    hidden = "const w=document.querySelector('.wide');if(w.scrollWidth>w.clientWidth)throw Error('hidden numbers')"
    narrow.write_text(f"{page.read_text()}<script>{hidden}</script>")
    screenshots.screenshot(narrow, tmp_path / "narrow.png", 400, 900)


def test_a_study_is_shown_beside_runs_and_cannot_bring_code(run, tmp_path):
    study = tmp_path / "study"
    study.mkdir()
    table = ["| top1 | 10 per class |", "|---|---|", "| scratch | 50.0 ± 1.0 |", "| <script>x</script> | 61.0 |"]
    budgets = [{"label": n, "text": f"{n} per class", "images": n} for n in (2, 8)]
    results = [{"arm": arm, "labels": label, "seed": seed, "metrics": {"top1": value + seed}}
               for arm, value in (("scratch", 50), ("auto", 60)) for label in (2, 8) for seed in (0, 2)]  # fmt: skip
    numbers = {"metric": "top1", "budgets": budgets, "arms": ["scratch", "auto", "<script>x</script>"]}
    numbers |= {"without": ["scratch"], "others": {}, "results": [*results, {**results[0], "metrics": {"top1": None}}]}
    (study / "study.json").write_text(json.dumps({"sentence": "worth <b>4</b> times", "table": table, **numbers}))
    assert main(["report", str(study), str(run), "--out", str(tmp_path / "page.html")]) == 0
    page = Page((tmp_path / "page.html").read_text())
    assert "\nStudy\n" in page.text
    assert "Worth <b>4</b> times" in page.text
    assert "<script>x</script>" in page.text
    assert len(page.all("script")) == 1
    assert "top1 by the number of labelled images" in page.text
    assert page.text.count("After ± is one standard deviation over the seeds") == 1
    scratch, auto = read_study(study).lines[:2]
    assert scratch.points == [(1, 51), (3, 51)]
    assert auto.band[0] == (1, 61 - 2**0.5, 61 + 2**0.5)
    assert (scratch.colour, auto.colour) == (7, 0)
    assert "loss" in page.text
    (study / "study.json").write_text(json.dumps({"sentence": "a", "table": table, **numbers, "budgets": [{}]}))
    assert main(["report", str(study), "--out", str(tmp_path / "page.html")]) == 2
    (study / "study.json").write_text('{"sentence": 1, "table": []}')
    assert main(["report", str(study), "--out", str(tmp_path / "page.html")]) == 2
