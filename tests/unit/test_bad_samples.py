"""Images that cannot be read: one clear line, or another in their place, the same whatever reads them."""

import hashlib
import json
import os
import tarfile
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from fcmae.config import DataConfig
from fcmae.data.collate import Batch
from fcmae.data.loading import TrainBatches, Workers, eval_loader
from fcmae.data.pixels.transforms import eval_transform, pretrain_transform
from fcmae.data.plan import BatchPlan
from fcmae.data.samples import EvaluationImages, MaskedImages
from fcmae.data.sources import ImageFolder, WebDataset, heads
from fcmae.data.sources.coco import CocoImages
from fcmae.data.sources.table import TableImages
from fcmae.data.unreadable import TRIES, BadSamples, check_share, readable
from fcmae.errors import ImageError, UsageError
from fcmae.messages import print_once
from tests.bad_files import READABLE, UNREADABLE, add_file, encoded, permissions_count, picture
from tests.more_files import every_format

CFG = DataConfig(image_size=32)


@pytest.fixture(autouse=True)
def nothing_told():
    print_once.cache_clear()


@pytest.fixture
def folder():
    """A folder of four images that everybody may look into."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        for i in range(4):
            (Path(name) / f"good_{i}.png").write_bytes(encoded(picture(seed=i), "PNG"))
        yield Path(name)


def batches(source, skip, plan=None, rank=0, steps=range(2), workers=0):
    plan = plan or BatchPlan.create(len(source), len(source), None, 1, seed=0)
    dataset = MaskedImages(source, pretrain_transform(CFG), (2, 2), plan.seed)
    return TrainBatches(dataset, plan, rank, steps, Workers(workers), skip)


@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_cannot_be_read_is_named_or_replaced(folder, kind, capsys):
    name, make, reason = UNREADABLE[kind]
    (folder / name).touch()
    source = ImageFolder(folder)  # sees a file, whatever it is later
    (folder / name).unlink()
    make(folder / name)
    message = f"cannot read the image {folder / name}: "
    with permissions_count():
        with pytest.raises(ImageError, match=f"{message}.*{reason}.*on_error=skip") as seen:
            next(batches(source, skip=False))
        assert "\n" not in str(seen.value)
        ours = batches(source, skip=True)
        first = list(ours)
        again = list(batches(source, skip=True))
    assert capsys.readouterr().err.count(message) == 1
    assert [len(images) for images, _ in first] == [5, 5]
    total, *epochs = ours.bad_samples(2)
    assert total == sum(epochs)
    assert min(epochs) >= 1  # more where it was drawn to take its own place
    for one, other in zip(first, again, strict=True):
        assert all(map(torch.equal, one, other))


@pytest.mark.parametrize("kind", READABLE)
def test_what_looks_wrong_but_can_be_read(folder, kind):
    name, make = READABLE[kind]
    make(folder / name)
    images, _ = next(batches(ImageFolder(folder), skip=False))
    assert images.shape == (5, 3, 32, 32)


def test_a_folder_named_like_an_image_is_a_folder(folder):
    (folder / "x.jpg").mkdir()
    assert len(ImageFolder(folder)) == 4


def test_a_folder_without_permission_is_named(folder):
    (folder / "closed").mkdir(mode=0)
    with permissions_count(), pytest.raises(UsageError, match=rf"cannot list the folder {folder}/closed: Permission"):
        ImageFolder(folder)


class Numbered(Dataset):
    """Source and dataset at once: sample i is the number i; those of ``bad`` cannot be read. Counts what is read."""

    def __init__(self, length, bad=()):
        self.length = length
        self.bad = bad
        self.reads = []

    def __len__(self):
        return self.length

    def __getitem__(self, key):
        index = key[1] if isinstance(key, tuple) else key
        self.reads.append(index)
        if index in self.bad:
            raise ImageError(f"number {index}", "bad")
        return (torch.tensor(key),)


def read(dataset, plan, steps, rank=0, skip=False):
    return TrainBatches(dataset, plan, rank, steps, Workers(), skip)


def test_replacements_differ_by_epoch_and_seed_and_keep_their_place():
    plan = BatchPlan.create(100, 100, None, 1, seed=0)
    bad = set(range(0, 100, 10))
    other_seed = BatchPlan.create(100, 100, None, 1, seed=1)
    (first,), (second,) = read(Numbered(100, bad), plan, range(2), skip=True)
    ((other,),) = read(Numbered(100, bad), other_seed, range(1), skip=True)

    def replaced(batch, plan, epoch):
        order = plan.order(epoch)
        changed = order != batch[:, 1]
        assert set(order[changed].tolist()) == bad
        assert not set(batch[:, 1].tolist()) & bad
        return dict(zip(order[changed].tolist(), batch[changed, 1].tolist(), strict=True))

    ways = [replaced(first, plan, 0), replaced(second, plan, 1), replaced(other, other_seed, 0)]
    assert all(way != another for i, way in enumerate(ways) for another in ways[:i])


def test_where_nothing_can_be_read_the_search_ends():
    plan = BatchPlan.create(4, 4, None, 1, seed=0)
    with pytest.raises(ImageError, match=rf"it was the last of {1 + TRIES} tried for the same place"):
        next(read(Numbered(4, range(4)), plan, range(1), skip=True))


def test_bad_samples_are_counted_by_epoch():
    plan = BatchPlan.create(8, 2, None, 1, seed=0)
    ours = read(Numbered(8, [3]), plan, range(2, 12), skip=True)
    met = [step for step in range(2, 12) if 3 in {index for _, index in plan.global_batch(step)}]
    seen = []
    for step in range(2, 12):
        next(ours)
        seen.append(ours.bad_samples(step + 1))
    # a replacement may be number 3 again, which counts
    assert [since > 0 for since, *_ in seen] == [step in met for step in range(2, 12)]
    for (_, *before), (since, *epochs), step in zip(seen, seen[1:], range(3, 12), strict=False):
        assert epochs[-1] == since + (before[-1] if step % 4 else 0)
        assert len(epochs) == (1 if step % 4 else 2)


def test_a_bad_sample_is_counted_by_one_rank():
    """Of three ranks that share two samples one reads the first again, for its shapes."""
    plan = BatchPlan.create(100, 2, None, 3, seed=0)
    bad = [plan.global_batch(0)[0][1]]
    ranks = [read(Numbered(100, bad), plan, range(1), rank, skip=True) for rank in range(3)]
    firsts = [next(rank)[0][0].tolist() for rank in ranks]
    assert len({tuple(first) for first in firsts}) == 2
    assert sum(rank.bad_samples(1)[0] for rank in ranks) == 1


def test_the_hint_is_right_where_all_files_are_alike(folder):
    for i in range(4):
        (folder / f"good_{i}.png").unlink()
        np.save(folder / f"{i}.npy", np.ones((3, 40, 40), np.float32))
    wrong = "its pixels are float32; with data.dtype=uint they must be uint8, uint16; set data.dtype=float32"
    hint = r"\(no image of this batch of 4 can be read; loader.on_error=skip would not help\)"
    with pytest.raises(ImageError, match=f"npy: {wrong} {hint}"):
        next(batches(ImageFolder(folder), skip=False))
    (folder / "good.png").write_bytes(encoded(picture(), "PNG"))
    with pytest.raises(ImageError, match=f"npy: {wrong}.*\\(loader.on_error=skip would continue without it\\)"):
        next(batches(ImageFolder(folder), skip=False))


def test_evaluation_leaves_out_what_cannot_be_read(folder, capsys):
    (folder / "a.jpg").write_text("no image")
    dataset = EvaluationImages(ImageFolder(folder), eval_transform(CFG))

    def evaluate(skip, max_bad=0.5, batch_size=2):
        loader = eval_loader(dataset, batch_size, rank=0, world_size=1, workers=Workers())
        return sum(len(images) for images, _ in readable(loader, len(dataset), skip, max_bad))

    assert evaluate(skip=True) == evaluate(skip=True, batch_size=1) == 4
    assert "a.jpg: " in capsys.readouterr().err
    with pytest.raises(ImageError, match=r"a.jpg: .*\(loader.on_error=skip would continue without it\)"):
        evaluate(skip=False)
    with pytest.raises(UsageError, match=r"1 of 5 samples of the evaluation could not be read; .* at most 0.1"):
        evaluate(skip=True, max_bad=0.1)


@pytest.mark.parametrize(
    ("count", "max_bad", "keys"),
    [(1000, 0.001, ""), (999, 0.001, " loader.max_bad=0.003"), (31, 0.001, " loader.max_bad=0.1"), (31, 0.04, ""),
     (2, 0.001, " loader.max_bad=1"), (10, 0.0, " loader.max_bad=0.3")],
)  # fmt: skip
def test_the_hint_suffices_where_one_sample_is_more_than_the_share(count, max_bad, keys):
    batch = Batch([], [ImageError("a.jpg", "damaged")], 0)
    with pytest.raises(ImageError, match=rf"\(loader.on_error=skip{keys} would continue without it[);]") as told:
        BadSamples(False, count, max_bad).take(batch, 0, replaced=True)
    assert str(told.value).endswith(f"; 1 of {count} samples is more than loader.max_bad={max_bad:g})") == bool(keys)
    if keys:
        check_share(1, count, float(keys.partition("=")[2]), "an epoch")


def steps(source, ranks, micro, workers, start=0, stop=5):
    """A hash of every pixel and mask of each step, over the ranks and micro-batches in the order of the samples."""
    plan = BatchPlan.create(len(source), 8, micro, ranks, seed=5)
    loaders = [batches(source, True, plan, rank, range(start, stop), workers) for rank in range(ranks)]
    hashes = []
    for _ in range(start, stop):
        digest = hashlib.sha256()
        parts = [next(loader) for _ in range(plan.accum_steps) for loader in loaders]
        for part in zip(*parts, strict=True):
            digest.update(torch.cat(part).numpy().tobytes())
        hashes.append(digest.hexdigest())
    return hashes


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """JPEG files of several sizes, of which some cannot be read."""
    root = tmp_path_factory.mktemp("many")
    for i in range(20):
        content = encoded(picture(30 + i, 60 - i, seed=i), "JPEG")
        (root / f"{i:02d}.jpg").write_bytes(content[: 0 if i % 7 == 3 else None])
    return ImageFolder(root)


@pytest.mark.parametrize(
    ("ranks", "micro", "workers"),
    [(1, 8, 1), (1, 8, 3), (1, 2, 2), (2, 4, 0), (2, 2, 1), (4, 1, 0), (8, 1, 0), (3, 2, 1)],
)
@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")  # on a small machine
def test_batches_are_the_same_for_any_ranks_micro_batches_and_workers(many, ranks, micro, workers):
    assert steps(many, ranks, micro, workers) == steps(many, 1, 8, 0)


@pytest.mark.parametrize("start", [1, 2, 3, 4])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_same_after_a_restart_in_the_middle_of_an_epoch(many, start, workers):
    """20 samples are two steps of 8 an epoch."""
    assert steps(many, 1, 4, workers, start) == steps(many, 1, 8, 0)[start:]


def test_skipping_to_a_step_reads_nothing():
    plan = BatchPlan.create(1000, 10, 5, 1, seed=0)
    dataset = Numbered(1000)
    ours = read(dataset, plan, range(5077, 5079))
    assert dataset.reads == []
    next(ours)
    assert dataset.reads == [index for _, index in plan.global_batch(5077)][:5]
    assert len(list(ours)) == 3
    assert len(dataset.reads) == 20


def test_the_bad_samples_of_the_first_epoch_are_told_once_at_its_end(capsys):
    """With their number over all ranks and the first names; not of a later epoch, and nothing without any."""
    plan, two_ranks = BatchPlan.create(8, 2, None, 1, seed=0), SimpleNamespace(sum=lambda value: 2 * value)
    bad = read(Numbered(8, [1, 3, 4, 6]), plan, range(2, 12), skip=True)
    good = read(Numbered(8, []), plan, range(2, 12), skip=True)
    told = []
    for step in range(3, 13):
        next(bad)
        next(good)
        bad.tell_first_epoch(step, two_ranks)
        good.tell_first_epoch(step, two_ranks)
        told += [(step, line) for line in capsys.readouterr().err.splitlines() if line.startswith("epoch ")]
    count, names = bad.bad.counts[0], bad.bad.names[0]
    assert len(set(names)) == len(names) <= 3
    line = f"epoch 1: {2 * count} of 8 samples could not be read and were replaced, such as {', '.join(names)}"
    assert told == [(4, line)]


def test_what_cannot_be_read_is_counted_at_the_start(tmp_path, capsys):
    """One line per folder, table, COCO file and tar file, without decoding an image."""
    photos, good = tmp_path / "photos", encoded(picture(), "PNG")
    photos.mkdir()
    files = {"a.jpg": b"no image", "b.jpg": b"", "c.jpg": b"", "d.png": good, "e.png": good[:100]}
    for name, content in files.items():
        (photos / name).write_bytes(content)
    (photos / "list.txt").write_text("a.jpg\nc.jpg\nc.jpg\n")
    images = [{"id": number, "file_name": name, "height": 40, "width": 50} for number, name in enumerate(files)]
    (tmp_path / "coco.json").write_text(json.dumps({"images": images, "annotations": [], "categories": []}))
    (tmp_path / "classes.txt").write_text("cat\ndog\ncow\n")
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for name in files:
            tar.add(photos / name, name)
            add_file(tar, f"{name[0]}.cls", b"2")
    ImageFolder(photos)
    TableImages(photos / "list.txt")
    CocoImages(tmp_path / "coco.json", photos, "data.annotations")
    WebDataset(tmp_path / "t.tar")
    folder, table, coco, tar = (line.partition(" image")[2] for line in capsys.readouterr().err.splitlines())
    found = f"; 2 images without content, such as {photos}/b.jpg; 1 image of no format that is read, such as "
    assert folder.endswith(f"; not read: 1 .txt, such as list.txt{found}{photos}/a.jpg")
    assert table == (
        f"s; 1 rows name the file of an earlier row, such as {photos}/c.jpg{found.replace('b.jpg', 'c.jpg')}"
        f"{photos}/a.jpg"
    )
    assert coco == f"s{found}{photos}/a.jpg"
    assert tar == (
        f"s; 2 images without content, such as {tmp_path}/t.tar/b.jpg; 1 image of no format that is read, such as "
        f"{tmp_path}/t.tar/a.jpg; 2 of 3 classes have no image, such as cat"
    )


def test_what_is_looked_at_when_a_command_starts(monkeypatch):
    """Each format that is read passes; what fails is counted among those that the time allows."""
    starts = [data[: heads.LENGTH] for data in every_format().values()]
    assert heads.unreadable(len(starts), starts.__getitem__, str) == ""
    monkeypatch.setattr(heads, "SECONDS", -1.0)
    monkeypatch.setattr(heads, "LEAST", 3)
    looked = []

    def closed(index):
        looked.append(index)
        raise PermissionError(13, "Permission denied")

    told = heads.unreadable(10**9, closed, str)
    some = min(map(str, looked))
    assert told == f"; of 3 looked at, 3 images that cannot be opened, such as {some} (Permission denied)"
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert heads.unreadable(10, closed, str) == ""
    assert len(looked) == 3
