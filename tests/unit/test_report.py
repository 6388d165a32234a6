"""The page that shows runs: whole, without a network, whatever is in their folders."""

import html.parser
import json
import math
import re

import pytest
from PIL import Image

from fcmae.cli import main
from fcmae.loggers import report_page
from fcmae.report import page as page_module
from fcmae.report.charts import Line, chart, number, thinned, ticks
from fcmae.report.page import render
from fcmae.report.read import PICTURE_BYTES, read_run, read_runs
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
    addresses = [attributes.get(name, "data:") for _, attributes in page.tags for name in ("src", "href")]
    assert all(address.startswith("data:") for address in addresses)
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
    ]
    (run / "events.jsonl").write_text("\n".join([*map(json.dumps, events), '{"step": NaN}', "[", "{}"]))
    (run / "result.json").write_text('{"top1": 81.5, "images": 100}')
    (run / "other.json").write_text('{"top1": [1]}')
    text = render([read_run(run, "a")])
    page = Page(text)
    assert text.count('class="mark"') == len(page.all("svg"))
    for expected in ("torch 2.14", "a, step 0: <b>grey</b>", "81.5", "result", "A dotted line"):
        assert expected in page.text
    assert "other" not in page.text
    assert not page.all("b")


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


def test_a_study_is_shown_beside_runs_and_cannot_bring_code(run, tmp_path):
    study = tmp_path / "study"
    study.mkdir()
    table = ["| top1 | 10 per class |", "|---|---|", "| scratch | 50.0 ± 1.0 |", "| <script>x</script> | 61.0 |"]
    (study / "study.json").write_text(json.dumps({"sentence": "worth <b>4</b> times", "table": table}))
    Image.new("RGB", (700, 450), "white").save(study / "study.png")
    assert main(["report", str(study), str(run), "--out", str(tmp_path / "page.html")]) == 0
    page = Page((tmp_path / "page.html").read_text())
    assert "Study study" in page.text
    assert "worth <b>4</b> times" in page.text
    assert "<script>x</script>" in page.text
    assert len(page.all("script")) == 1
    assert page.all("img")[0]["src"].startswith("data:image/jpeg;base64,")
    assert "loss" in page.text
    (study / "study.json").write_text('{"sentence": 1, "table": []}')
    assert main(["report", str(study), "--out", str(tmp_path / "page.html")]) == 2
