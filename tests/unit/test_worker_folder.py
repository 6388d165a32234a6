"""The temporary folder through which data workers hand on memory: somebody may delete it while a run lasts."""

import multiprocessing
import shutil
import tempfile

import pytest
import torch

from fcmae.data import loading
from fcmae.data.loading import TrainBatches, Workers, eval_loader
from fcmae.data.plan import BatchPlan
from fcmae.errors import DiskError, UsageError, WorkerError
from tests.conftest import run_python

WORKER = Workers(1, prefetch=1, timeout=30)
"""Without an answer for 30 s torch raises a RuntimeError, which fails a test."""


class Numbers(torch.utils.data.Dataset):
    """Samples by index, or by (epoch, index), of which each is one tensor."""

    def __len__(self):
        return 6

    def __getitem__(self, key):
        return (torch.tensor([key if isinstance(key, int) else key[1]]),)


class CannotTravel(Numbers):
    def __getitem__(self, key):
        class LocalError(UsageError):
            """Cannot be pickled."""

        raise LocalError


@pytest.fixture
def config(monkeypatch, tmp_path):
    """Of this process: ``tempdir`` is the folder, which no test shares. No worker is left."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    config = multiprocessing.current_process()._config
    monkeypatch.setitem(config, "tempdir", None)
    yield config
    loading._end_workers()


def evaluated(dataset=None):
    batches = eval_loader(dataset or Numbers(), 2, rank=0, world_size=1, workers=WORKER)
    return [batch.parts[0].flatten().tolist() if batch.parts else batch.errors for batch in batches]


def test_workers_that_begin_after_their_folder_was_deleted_use_a_new_one(config):
    expected = [[0, 1], [2, 3], [4, 5]]
    assert evaluated() == expected
    shutil.rmtree(config["tempdir"])
    assert evaluated() == expected


def test_the_folder_is_deleted_with_the_process_that_made_it(tmp_path):
    script = (
        "import multiprocessing, os, sys\n"
        "from fcmae.data import loading\n"
        "loading._make_folder()\n"
        "child = os.fork()\n"
        "if not child: sys.exit()\n"
        "os.waitpid(child, 0)\n"
        "print(os.path.isdir(multiprocessing.util.get_temp_dir()))\n"
    )
    (tmp_path / "tmp").mkdir()
    (tmp_path / "script.py").write_text(script)
    assert run_python(tmp_path, "script.py", variables={"TMPDIR": f"{tmp_path}/tmp"}).stdout == "True\n"
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_folder_that_is_deleted_while_a_worker_begins_is_named(config, monkeypatch):
    loading._make_folder()
    shutil.rmtree(config["tempdir"])
    monkeypatch.setattr(loading, "_make_folder", lambda: None)
    plan = BatchPlan.create(6, 2, None, 1, seed=0)
    deleted = f"the temporary folder {config['tempdir']} was deleted; repeat the command"
    with pytest.raises(WorkerError, match=f"^a data worker could not send a batch: {deleted}$"):
        next(TrainBatches(Numbers(), plan, 0, range(3), WORKER))


def test_a_folder_that_is_deleted_while_a_worker_runs_is_named(config):
    plan = BatchPlan.create(6, 2, None, 1, seed=0)
    batches = TrainBatches(Numbers(), plan, 0, range(30), WORKER)
    first = next(batches)
    shutil.rmtree(config["tempdir"])
    with pytest.raises(WorkerError, match=f"the temporary folder {config['tempdir']} was deleted"):
        first += list(batches)  # all are kept, so that the worker has to send new memory


def test_what_a_worker_cannot_pickle_ends_the_run(config):
    ((error,), *_) = evaluated(CannotTravel())
    assert str(error).startswith("a data worker could not send a batch: Can't ")


def test_a_missing_tmpdir_is_named(config, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(DiskError, match=f"^the folder {tmp_path}/gone for temporary files cannot be written: No such "):
        evaluated()
