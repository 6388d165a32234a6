"""Runs from an S3 server on loopback (moto): the samples are those of local files, whatever happens to either."""

import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from fcmae.config import DataConfig, LoaderConfig
from fcmae.data.loading import TrainBatches, Workers
from fcmae.data.pixels.transforms import pretrain_transform
from fcmae.data.plan import BatchPlan
from fcmae.data.remote.objects import filesystem
from fcmae.data.samples import MaskedImages
from fcmae.data.sources import train_source
from tests.conftest import TINY_PRETRAIN, run_python, start_python
from tests.faults.runs import steps, wait_until
from tests.results import metrics_of
from tests.unit.test_remote import write_tar

pytestmark = pytest.mark.slow
OUTAGE = 20.0
"""Seconds."""
RUN = (*TINY_PRETRAIN, "data=webdataset", "schedule.epochs=10", "trainer.eval_every_epochs=10", "loader.workers=1")
IN_PARTS = "loader.cache_size=0"


class Store:
    """A server whose files outlive its stops."""

    def __init__(self, server, variables):
        self.server, self.variables = server, variables

    def stop(self):
        self.server.stop()

    def start(self):
        self.server.start()


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    moto = pytest.importorskip("moto.server")
    boto3 = pytest.importorskip("boto3")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    server._port = port  # of the next start
    names = {"aws_access_key_id": "x", "aws_secret_access_key": "x", "region_name": "us-east-1"}
    url = f"http://{host}:{port}"
    client = boto3.client("s3", endpoint_url=url, **names)
    client.create_bucket(Bucket="bucket")
    folder = tmp_path_factory.mktemp("tars")
    for number in range(2):
        write_tar(folder / f"t-{number}.tar", range(12 * number, 12 * number + 12))
        client.upload_file(str(folder / f"t-{number}.tar"), "bucket", f"train/t-{number}.tar")
    variables = {name.upper(): value for name, value in names.items() if name != "region_name"}
    store = Store(server, {**variables, "AWS_DEFAULT_REGION": "us-east-1", "AWS_ENDPOINT_URL": url})
    store.folder = folder
    yield store
    server.stop()


def metrics(folder):
    return [(line["step"], line["loss"]) for line in metrics_of(folder) if "loss" in line]


@pytest.fixture(scope="module")
def expected(store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("local")
    run_python(folder, "-m", "fcmae.cli", *RUN, f"data.path={store.folder}", "hydra.run.dir=local")
    return metrics(folder / "local")


def wait_for_step(folder, step, process):
    wait_until(lambda: process.poll() is not None or max(steps(folder), default=0) >= step)
    assert process.poll() is None


def test_a_bucket_is_read_like_a_folder(fcmae, store, tmp_path, expected):
    """Copied and in parts, by one rank and by two, and prepared."""
    path = "data.path=s3://bucket/train"
    copied = f"loader.cache_dir={tmp_path}/cache"
    fcmae(*RUN, path, copied, "hydra.run.dir=copied", variables=store.variables)
    assert metrics(tmp_path / "copied") == expected
    fcmae(*RUN, f"data.path={store.folder}", "hydra.run.dir=two", "trainer.max_steps=6", ranks=2, check=1)  # torchrun's
    how = (IN_PARTS, "hydra.run.dir=ranks", "trainer.max_steps=6")
    fcmae(*RUN, path, *how, ranks=2, variables=store.variables, check=1)
    assert metrics(tmp_path / "ranks") == metrics(tmp_path / "two")
    for name, from_ in (("a", f"data.path={store.folder}"), ("b", path)):
        how = ("data=webdataset", "samples_per_shard=10", "loader.workers=1", f"out={name}", copied)
        fcmae("prepare", from_, *how, variables=store.variables)
    for number in range(3):
        name = f"train-{number:06}.tar"
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_zarr_in_a_bucket_is_read_like_a_folder(store, tmp_path, monkeypatch):
    """Also a sharded array, chunks that are not there, a pattern of several, and while the server is away."""
    zarr = pytest.importorskip("zarr")
    for name, value in store.variables.items():
        monkeypatch.setenv(name, value)
    filesystem("s3://bucket").clear_instance_cache()
    images = np.random.default_rng(0).integers(1, 4096, (8, 2, 40, 48), np.uint16)
    images[5] = 0
    how = {"shape": images.shape, "dtype": "uint16"}
    zarr.create_array(tmp_path / "a" / "plain.zarr", chunks=(1, 2, 16, 16), **how)[:] = images
    zarr.create_array(tmp_path / "a" / "shards.zarr", chunks=(1, 2, 8, 8), shards=(2, 2, 40, 48), **how)[:] = images
    filesystem("s3://bucket").put(f"{tmp_path}/a", "bucket/arrays", recursive=True)

    def batches(path, workers=0, first=0):
        data = DataConfig(name="array", path=path, in_chans=2, bit_depth=12, normalize="none", image_size=16)
        source = train_source(data, LoaderConfig(retry_seconds=60))
        plan = BatchPlan.create(len(source), 4, None, 1, seed=0)
        dataset = MaskedImages(source, pretrain_transform(data), (1, 1), seed=0)
        for number, batch in enumerate(TrainBatches(dataset, plan, 0, range(first, 6), Workers(workers))):
            yield [part.clone() for part in batch]
            if number == 1 and not workers and path.startswith("s3"):
                store.stop()
                threading.Timer(2, store.start).start()

    for where in ("*.zarr", "shards.zarr"):
        for workers, first in ((0, 0), (1, 1)):
            expected = batches(f"{tmp_path}/a/{where}", workers, first)
            found = batches(f"s3://bucket/arrays/{where}", workers, first)
            for ours, theirs in zip(found, expected, strict=True):
                assert all(map(torch.equal, ours, theirs))


def test_a_run_continues_after_the_server_was_away(store, tmp_path, expected):
    args = (*RUN, "data.path=s3://bucket/train", IN_PARTS, "hydra.run.dir=away")
    with (tmp_path / "stderr.txt").open("ab") as log:
        process = start_python(tmp_path, "-m", "fcmae.cli", *args, stderr=log, variables=store.variables)
    wait_for_step(tmp_path / "away", 5, process)
    store.stop()
    time.sleep(OUTAGE)
    store.start()
    assert process.wait(600) == 0, (tmp_path / "stderr.txt").read_text()
    said = (tmp_path / "stderr.txt").read_text()
    assert said.count("waiting for s3://bucket/train/t-") == said.count("continues to read s3://") > 0
    assert metrics(tmp_path / "away") == expected


def test_a_killed_run_continues_with_the_same_samples(fcmae, store, tmp_path, expected):
    args = (
        *RUN,
        "data.path=s3://bucket/train",
        IN_PARTS,
        "hydra.run.dir=killed",
        "trainer.checkpoint_every_epochs=1.34",
    )
    process = start_python(tmp_path, "-m", "fcmae.cli", *args, variables=store.variables)
    wait_for_step(tmp_path / "killed", 8, process)  # in the middle of an epoch of three steps
    os.killpg(process.pid, 9)
    process.wait()
    fcmae(*args, variables=store.variables)
    assert metrics(Path(tmp_path / "killed")) == expected
