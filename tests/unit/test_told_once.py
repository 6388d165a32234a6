"""One mistake, one line, on any number of ranks; and only a data worker's death is reported as one."""

import functools
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import pytest
import torch
from torch.distributed import DistNetworkError, DistStoreError

from fcmae import distributed
from fcmae.cli import _tells, main
from fcmae.data.loading import _opened, explained
from fcmae.data.prepare import workers
from fcmae.data.shared_memory import Exchange
from fcmae.distributed import World
from fcmae.errors import ConfigError, LostRankError, PeerError, UsageError, WorkerError

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Among(World):
    """A rank of two, whose peer gives fixed values to every reduction."""

    peer: tuple[int, int] = (0, 0)

    def _reduce(self, value, op):
        return torch.maximum(value, torch.tensor(self.peer))


def among(rank, peer):
    return Among(rank, 2, rank, 2, CPU, peer)


def fail():
    raise ConfigError("k is 0")


def test_the_first_rank_that_fails_tells():
    """The peer gives its exit code and how many ranks, itself included, come after it."""
    for rank, peer in ((0, (2, 1)), (0, (0, 0)), (1, (0, 0))):
        with pytest.raises(ConfigError, match="k is 0") as caught:
            among(rank, peer).together(fail)
        assert caught.value.raised_by == "rank"
    with pytest.raises(PeerError) as silent:
        among(1, (2, 2)).together(fail)
    assert silent.value.exit_code == 2
    with pytest.raises(PeerError):
        among(0, (1, 1)).together(lambda: None)
    assert among(0, (0, 0)).together(lambda: 7) == 7


GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] {} [127.0.0.1]:4711"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError(GLOO.format("Connection closed by peer")), "(its connection is closed)"),
        (RuntimeError(GLOO.format("Timed out waiting 30000ms for recv operation to complete")), "(no answer)"),
        (RuntimeError("Application timeout caused pair closure"), "(no answer)"),
        (DistStoreError("wait timeout after 35000ms, keys: /0//cpu//0/0"), "(no answer)"),
        (DistNetworkError("Connection reset by peer"), "(its connection is closed)"),
    ],
)
def test_a_rank_that_others_lost_is_a_line(monkeypatch, error, told):
    def lose():
        with distributed.lost_ranks_explained():
            raise error

    for name, value in {"RANK": 0, "WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(LostRankError) as caught:
        lose()
    assert str(caught.value) == f"lost contact with another rank {told}"
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(type(error)):
        lose()


@pytest.mark.parametrize("error", [EOFError("unexpected EOF"), BrokenProcessPool(), BrokenPipeError()])
def test_a_killed_process_of_prepare_is_a_line(monkeypatch, error):
    class Pool:
        def __init__(self, *_):
            pass

        def submit(self, *_):
            raise error

        def shutdown(self, **_):
            pass

    monkeypatch.setattr(workers.concurrent.futures, "ProcessPoolExecutor", Pool)
    with pytest.raises(WorkerError, match="^a process of the pool was killed; the same command continues$"):
        list(workers.in_processes(2, fail, None, [(1,), (2,)]))


MISTAKES = {
    "unknown key": ("pretrain", "data=synthetic", "optim.lrr=1"),
    "no config": ("pretrain", "data=synthetic", "model=foo"),
    "no command": ("pretain",),
    "sweep": ("pretrain", "-m", "hydra.run.dir=x"),
}


@pytest.mark.parametrize("case", MISTAKES)
@pytest.mark.parametrize("rank", [0, 1])
def test_what_every_rank_reads_in_its_command_is_told_by_the_first(monkeypatch, capsys, case, rank):
    for name, value in {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    assert main(MISTAKES[case]) == 2
    assert len(capsys.readouterr().err.splitlines()) == (1 if rank == 0 else 0)


@pytest.mark.parametrize(("local_rank", "lines"), [(0, 1), (1, 0)])
def test_what_a_machine_lacks_is_told_by_its_first_rank(monkeypatch, capsys, tmp_path, local_rank, lines):
    (tmp_path / "file").touch()
    for name, value in {"RANK": 2 + local_rank, "WORLD_SIZE": 4, "LOCAL_RANK": local_rank}.items():
        monkeypatch.setenv(name, str(value))
    assert main(["pretrain", f"hydra.run.dir={tmp_path}/file/run"]) == 2
    assert capsys.readouterr().err.count("hydra.run.dir cannot be created") == lines


def test_the_same_error_of_several_ranks_is_told_once(monkeypatch):
    """Where it is not raised together: by the store that the ranks share."""

    class Store:
        count: dict[str, int] = {}  # noqa: RUF012

        def add(self, key, number):
            self.count[key] = self.count.get(key, 0) + number
            return self.count[key]

        def check(self, keys):
            return keys[0] in self.count

    store = functools.cache(lambda: (Store(), 0, 2))
    store()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(distributed, "_store", store)
    monkeypatch.setattr(distributed, "PATIENCE", 0.1)
    lost = [LostRankError(f"lost contact with another rank ({why})") for why in "ab"]
    assert [_tells(error) for error in lost] == [True, False]  # nobody says why; one line is enough
    Store.count.clear()
    said = [_tells(UsageError(line)) for line in ("a", "a", "b")]
    assert said == [True, False, True]
    assert not _tells(lost[0])  # another rank has said why


def raising(error):
    raise error
    yield


def test_a_worker_that_dies_is_told_as_such():
    for error in (EOFError(), ConnectionResetError(104, "Connection reset by peer")):
        with pytest.raises(WorkerError, match="a data worker died while it sent a batch"):
            next(_opened(raising(error), Exchange(1)))


def test_a_worker_whose_folder_is_deleted_is_told_as_such():
    error = FileNotFoundError(2, "No such file or directory")
    with pytest.raises(WorkerError, match="^a data worker could not send a batch: No such file or directory$"):
        next(_opened(raising(error), Exchange(1)))


def test_a_connection_of_others_is_not_told_as_a_dead_worker():
    """By a sample that is read over a network, or by anything else in training."""
    reading = ConnectionError("Caught ConnectionError in DataLoader worker process 0.\nOriginal Traceback ...")
    with pytest.raises(ConnectionError, match="Caught"):
        next(_opened(raising(reading), Exchange(1)))
    with pytest.raises(ConnectionError, match="of a logger"), explained():
        raise ConnectionError("of a logger")
    with pytest.raises(UsageError), explained():
        raise UsageError("another")
