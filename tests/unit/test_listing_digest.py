"""Which samples a source lists: a run, a search and a study do not continue with others of the same number."""

import json
import re
import shutil
import tarfile

import numpy as np
import pytest
import torch

from fcmae.config import compose
from fcmae.config.recipe import check_recipe
from fcmae.data.pixels.decode import PixelFormat
from fcmae.data.sources import ImageFolder, Subset, Synthetic, WebDataset
from fcmae.data.sources.array import ArrayImages
from fcmae.data.sources.base import LISTING, listing_digest
from fcmae.data.sources.coco import CocoImages, CocoObjects
from fcmae.data.sources.dataset import GivenDataset, need_labels, registered
from fcmae.data.sources.own import Own
from fcmae.data.sources.table import TableImages
from fcmae.distributed import World
from fcmae.errors import UsageError
from fcmae.studies import cells
from fcmae.studies.arms import make_plan
from fcmae.tasks.finetuning import Finetuning
from fcmae.training import setup
from fcmae.training.few_labels import _Search
from tests.bad_files import add_file, encoded, picture
from tests.coco_files import write_coco, write_json
from tests.conftest import TINY
from tests.results import newest

TABLE = "image,kind,age,map\nb/1.png,x,1.5,b/2.png\nb/2.png,y,,b/3.png\nb/3.png,x,4,b/1.png\n"


def png(seed=0):
    return encoded(picture(32, 32, seed=seed), "PNG")


def write_tar(path, names, padding=b""):
    with tarfile.open(path, "w") as tar:
        for name in names:
            add_file(tar, name, png() + padding)


@pytest.fixture
def files(tmp_path):
    """A folder of three images with a table, tar files, arrays and a COCO file of them."""
    folder = tmp_path / "here"
    (folder / "b").mkdir(parents=True)
    for number in (1, 2, 3):
        (folder / "b" / f"{number}.png").write_bytes(png(number))
    (folder / "t.csv").write_text(TABLE)
    write_tar(folder / "a.tar", ["1.png", "2.png"])
    np.save(folder / "a.npy", np.zeros((3, 8, 8), np.uint8))
    np.save(folder / "labels.npy", np.array([0, 1, 1]))
    write_coco(folder / "coco", 3)
    return folder


def table(**how):
    return lambda folder: TableImages(folder / "t.csv", image_column="image", **how)


def array(folder):
    return ArrayImages(str(folder / "a.npy"), PixelFormat(1), labels="labels.npy")


def coco(kind):
    return lambda folder: kind(folder / "coco" / "objects.json", folder / "coco" / "images", "data.annotations")


def reordered(folder):
    first, *lines = TABLE.splitlines(keepends=True)
    (folder / "t.csv").write_text("".join([first, *lines[::-1]]))


def replaced(old, new):
    return lambda folder: (folder / "t.csv").write_text(TABLE.replace(old, new))


def moved_box(folder):
    content = json.loads((folder / "coco" / "objects.json").read_text())
    content["annotations"][0]["bbox"][0] -= 0.5
    write_json(folder / "coco", content)


def images_turned(folder):
    content = json.loads((folder / "coco" / "objects.json").read_text())
    content["images"].reverse()
    write_json(folder / "coco", content)


@pytest.mark.parametrize(
    ("read", "change"),
    [
        (table(), reordered),
        (table(), replaced("b/1.png,x", "b/2.png,x")),
        (table(label_column="kind"), replaced("1.png,x", "1.png,y")),
        (table(label_column=["age"]), replaced("1.5", "1.75")),
        (table(label_column=["age"]), replaced("y,,", "y,0,")),
        (table(target_column="map"), replaced("4,b/1.png", "4,b/2.png")),
        (lambda folder: ImageFolder(folder), lambda folder: (folder / "b" / "1.png").rename(folder / "b" / "4.png")),
        (lambda folder: WebDataset(folder / "a.tar"), lambda folder: write_tar(folder / "a.tar", ["2.png", "1.png"])),
        (array, lambda folder: np.save(folder / "labels.npy", np.array([1, 0, 1]))),
        (coco(CocoImages), images_turned),
        (coco(CocoObjects), moved_box),
    ],
)
def test_other_samples_in_other_order_with_other_labels(files, read, change):
    first = listing_digest(read(files))
    assert first is not None
    assert listing_digest(Subset(read(files), [0])) == first  # chosen by a seed, from the same samples
    shutil.copytree(files, files.parent / "there")
    assert listing_digest(read(files.parent / "there")) == first
    change(files)
    assert listing_digest(read(files)) != first


def test_other_spellings_of_a_tables_paths(files):
    """As programs write them. Runs that began with one of them before they counted as the same continue, too."""
    read = table(target_column="map")
    first = listing_digest(read(files))
    (files / "t.csv").write_text(TABLE.replace("b/1", "./b/1").replace("b/2", "b//2").replace("b/3", f"{files}/./b/3"))
    assert listing_digest(read(files)) == first
    before = listing_digest(read(files), earlier=True)
    assert before != first
    assert setup.changed_listing(3, before, read(files)) == setup.changed_listing(3, None, read(files)) == {}
    shutil.copy(files / "b" / "1.png", files / "1.png")
    (files / "b" / "link").symlink_to(files / "b")  # so that b/link/../1.png is not b/1.png
    (files / "t.csv").write_text(TABLE.replace("b/1", "b/link/../1"))
    assert listing_digest(read(files)) != first


def test_tables_of_earlier_versions_keep_their_digest(files):
    assert listing_digest(table(label_column="kind")(files)) == "4107639b45ee0a35"


def test_places_of_the_same_names_in_another_order(tmp_path):
    names = ["here/day1/a", "here/day2/a", "there/day1/a", "there/day2/a"]
    for name in names:
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "1.png").write_bytes(png())
        np.save(tmp_path / name / "a.npy", np.zeros((3, 8, 8), np.uint8))
    folders = [tmp_path / name for name in names]
    arrays = [str(folder / "a.npy") for folder in folders]
    for read, places in ((ImageFolder, folders), (lambda given: ArrayImages(given, PixelFormat(1)), arrays)):
        first, turned, moved = (listing_digest(read([places[i] for i in order])) for order in ((0, 1), (1, 0), (2, 3)))
        assert first == moved != turned


def test_a_column_that_is_not_read_may_change(files):
    first = listing_digest(table(label_column="kind")(files))
    replaced("1.5", "2.5")(files)
    assert listing_digest(table(label_column="kind")(files)) == first


def test_other_sizes_in_tar_files_are_not_called_other_names_alone(files):
    before = listing_digest(WebDataset(files / "a.tar"))
    write_tar(files / "a.tar", ["1.png", "2.png"], padding=b"\0")
    numbers = setup.changed_listing(2, before, WebDataset(files / "a.tar"))
    with pytest.raises(UsageError, match=r"\n  names, .* \(of data=webdataset and hf their sizes in bytes, too\): "):
        check_recipe({}, {}, numbers)


def test_a_source_that_cannot_say():
    assert listing_digest(Synthetic(3, 3, (8, 8))) is None


def test_own_sources_and_datasets(monkeypatch):
    own = Own(Synthetic(3, 3, (8, 8)), PixelFormat(3))
    assert listing_digest(own) is None
    monkeypatch.setattr(Synthetic, "listing_parts", lambda self: [b"names"], raising=False)
    monkeypatch.setattr(Synthetic, "source", "a name that an own source may have", raising=False)
    assert listing_digest(own) is not None
    digests = [
        given([(np.zeros((3, 8, 8), np.uint8), label) for label in labels]) for labels in ((0, 1), (0, 1), (1, 0))
    ]
    assert digests[0] == digests[1] != digests[2]


def given(dataset):
    with registered(dataset, "data") as named:
        need_labels()
        return listing_digest(GivenDataset(*list(named.values())[1:]))


def test_a_checkpoints_text_is_only_text(files):
    ((old, new),) = setup.changed_listing(3, "\x1b[31m" + "x" * 99, table()(files)).values()
    assert old.isprintable()
    assert len(old) < 60
    assert old != new
    assert setup.changed_listing(4, "other", table()(files)) == {}  # their number is said instead


def test_a_run_does_not_resume_with_an_edited_table(fcmae_here, files):
    tiny = [each for each in TINY if not each.startswith(("data=", "data.length", "optim.global"))]
    run = ("finetune", *tiny, "data=table", f"data.path={files}/t.csv", "data.label_column=[age]", "objective=regress")
    run += ("schedule.epochs=3", "optim.global_batch_size=2", "trainer.eval_every_epochs=null", "hydra.run.dir=run")
    fcmae_here(*run, "trainer.max_steps=1", check=75)
    whole = (files / "t.csv").read_text()
    replaced("1.5", "2.5")(files)
    told = fcmae_here(*run, check=2).stderr
    assert f"\n  {LISTING}: " in told
    assert "trainer.allow_changed_recipe=true to continue with these" in told
    (files / "t.csv").write_text(whole)
    fcmae_here(*run, "trainer.max_steps=2", check=75)
    replaced("1.5", "2.5")(files)
    fcmae_here(*run, "trainer.allow_changed_recipe=true")
    state = newest(files.parent / "run")
    assert state["listing"] == listing_digest(table(label_column=["age"])(files))


def test_a_search_does_not_continue_with_an_edited_table(files, monkeypatch):
    monkeypatch.chdir(files)
    overrides = ["recipe=auto", "data=table", "data.path=t.csv", "data.label_column=kind", "model=demo"]
    overrides += ["data.image_size=32", "trainer.eval_every_epochs=null"]

    def begin():
        task = Finetuning(compose("finetune", overrides))
        _Search(task, files / "run", World(0, 1, 0, 1, torch.device("cpu")), None, None)._begin()

    begin()
    begin()
    whole = (files / "run" / "auto" / "recipe.json").read_text()
    for damaged in ({}, {"config": 1, "images": 3, "weights": None, "init_from": None}):
        (files / "run" / "auto" / "recipe.json").write_text(json.dumps(damaged))
        with pytest.raises(UsageError, match=r"auto/recipe.json is damaged \(without config.*\); delete it"):
            begin()
    (files / "run" / "auto" / "recipe.json").write_text(whole)
    replaced("1.png,x", "1.png,y")(files)
    with pytest.raises(UsageError, match=re.escape(f"\n  {LISTING}: ")):
        begin()


def test_a_study_does_not_continue_with_an_edited_table(files, monkeypatch):
    monkeypatch.chdir(files)
    shutil.copy("t.csv", "val.csv")
    overrides = ["data=table", "data.path=t.csv", "data.label_column=kind", "data.val_path=val.csv", "arms=[scratch]"]
    overrides += ["labels=[all]", "model=demo", "data.image_size=32"]
    cells.begin(make_plan(compose("study", overrides)), files / "study")
    recipe = json.loads((files / "study" / cells.RECIPE).read_text())
    cells.begin(make_plan(compose("study", overrides)), files / "study")
    (files / "study" / cells.RECIPE).write_text(json.dumps({**recipe, "weights": None}))
    with pytest.raises(UsageError, match=r"study/recipe.json is damaged \(without weights\); delete it"):
        cells.begin(make_plan(compose("study", overrides)), files / "study")
    (files / "study" / cells.RECIPE).write_text(json.dumps(recipe))
    (files / "val.csv").write_text(TABLE.replace("1.png,x", "1.png,y"))
    with pytest.raises(UsageError, match=re.escape(f"\n  {cells.SHOWN['val_listing']}: ")):
        cells.begin(make_plan(compose("study", overrides)), files / "study")
    (files / "val.csv").write_text(TABLE)
    reordered(files)
    with pytest.raises(UsageError, match=re.escape(f"\n  {LISTING}: ")):
        cells.begin(make_plan(compose("study", overrides)), files / "study")
    del recipe["listing"]  # of an earlier version
    (files / "study" / cells.RECIPE).write_text(json.dumps(recipe))
    cells.begin(make_plan(compose("study", overrides)), files / "study")
