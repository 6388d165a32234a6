"""``fcmae prepare``: writes any source as shuffled tar files, or computes the mean and deviation of its images.

Each tar file is a function of the source and the settings. So a run that was stopped continues with the missing files
and gives the same result.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fcmae.config import PrepareConfig
from fcmae.data.pixels.decode import PixelFormat
from fcmae.data.prepare.measure import statistics, worker_count
from fcmae.data.prepare.shards import Encoding, Shard, encode, write_shard
from fcmae.data.prepare.workers import in_processes
from fcmae.data.sources import Source, train_source, val_source
from fcmae.data.sources.tar_index import index_shard
from fcmae.data.sources.webdataset import CLASSES_FILE, WebDataset
from fcmae.errors import FCMAEError, ImageError, UsageError, counted, shown
from fcmae.files import STRAY, delete_strays, json_lines, json_object, nearest, one_at_a_time, write_output
from fcmae.messages import say
from fcmae.opening import open_to_append, read_regular
from fcmae.randomness import Stream, generator

SETTINGS_FILE = "settings.json"
PROGRESS_FILE = "progress.jsonl"
MANIFEST_FILE = "manifest.json"
UNREADABLE_FILE = "unreadable.txt"
CONF_FOLDER, CONF_NAME = "conf", "prepared"
"""With data.stats=true: the folder for --config-dir, and the name of its config of group data."""
MAX_JSON = 2**28
"""Bytes of one of these files."""
TRIED = 64
"""Samples that the estimate is based on."""
EXPECTED = "it must be a new or empty folder, or one of the same command"
TOLD = {"table": ("label_column",), "array": ("label_column", "dataset", "axes", "planes", "planes_as")}
"""Other keys of ``data`` that determine the files, by the kind of source."""


def prepare(cfg: PrepareConfig) -> str:
    """Runs the command and returns its message. Raises FCMAEError."""
    source = train_source(cfg.data, cfg.loader) if cfg.split == "train" else val_source(cfg.data, cfg.loader)
    if cfg.data.stats and cfg.out is None:
        return "\n".join(statistics(cfg, source))
    if getattr(source, "values", None) is not None:
        raise UsageError("data.label_column must have classes or be null, as tar files hold one class per image")
    order = sample_order(cfg, len(source))
    how = Encoding(PixelFormat.of(cfg.data, cfg.loader.max_pixels), cfg.short_side, cfg.encode, cfg.quality)
    names, now = shard_names(cfg, len(order)), settings(cfg, source)
    if cfg.out is not None:
        _check_folder(Path(cfg.out), names, now)
    say(estimate(cfg, source, how, order))
    if cfg.dry_run:
        return "nothing was written (dry_run=true)"
    assert cfg.out is not None
    out = Path(cfg.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"out={out} cannot be created: {error.strerror}") from error
    try:
        with one_at_a_time(out):
            _check_folder(out, names, now)
            if not (out / SETTINGS_FILE).is_file():
                write_output("out", out / SETTINGS_FILE, json.dumps(now, indent=1) + "\n")
            shards = _write_missing(cfg, source, how, order, out)
            told = _finish(cfg, source, shards, out)
        return f"{told}\n{_measure(cfg, out)}" if cfg.data.stats else told
    except OSError as error:
        raise FCMAEError(f"cannot write to {out}: {error}; the same command continues where it stopped") from error


def sample_order(cfg: PrepareConfig, count: int) -> list[int]:
    """The samples in the order in which they are written."""
    if not cfg.shuffle:
        return list(range(count))
    return torch.randperm(count, generator=generator(cfg.seed, Stream.ORDER)).tolist()


def shard_names(cfg: PrepareConfig, count: int) -> list[str]:
    """The names of the tar files of ``count`` samples."""
    return [f"{cfg.split}-{i:06d}.tar" for i in range(-(-count // cfg.samples_per_shard))]


def estimate(cfg: PrepareConfig, source: Source, how: Encoding, order: list[int]) -> str:
    """Size and time, estimated from some samples. Raises ImageError if none of them can be read."""
    tried = order[:: max(1, len(order) // TRIED)][:TRIED]
    sizes: list[int] = []
    failure: ImageError | None = None
    started = time.perf_counter()
    for index in tried:
        try:
            sizes.append(len(encode(source[index].image, how)[1]))
        except ImageError as error:
            failure = error
    if not sizes:
        assert failure is not None
        raise failure
    seconds = (time.perf_counter() - started) / len(tried) * len(order) / worker_count(cfg)
    size = sum(sizes) / len(tried) * len(order) + 1536 * len(order)  # two headers, and the label's block
    shards = -(-len(order) // cfg.samples_per_shard)
    free = f", {_gb(shutil.disk_usage(nearest(Path(cfg.out))).free)} free there" if cfg.out else ""
    bad = f"; {len(tried) - len(sizes)} of {len(tried)} tried cannot be read" if failure is not None else ""
    return (
        f"{len(order):,} images in {shards:,} tar files: about {_gb(size)}{free}, {seconds / 60:.1f} minutes with "
        f"{worker_count(cfg)} processes{bad}"
    )


def _write_missing(cfg: PrepareConfig, source: Source, how: Encoding, order: list[int], out: Path) -> list[Shard]:
    """Writes the missing tar files. Returns the contents of all."""
    delete_strays(out)
    for partial in out.glob(".*.part"):
        partial.unlink()
    done = {shard.name: shard for shard in _written(out)}
    parts = [order[first : first + cfg.samples_per_shard] for first in range(0, len(order), cfg.samples_per_shard)]
    names = shard_names(cfg, len(order))
    missing = [(part, out / name, how) for name, part in zip(names, parts, strict=True) if name not in done]
    left = sum(len(part) for part, _, _ in missing)
    with (
        open_to_append(out / PROGRESS_FILE) as progress,
        tqdm(total=len(order), initial=len(order) - left, desc="writing", unit=" images", disable=None) as bar,
    ):
        progress.write("\n")  # after a line that was cut off
        for i, shard in in_processes(worker_count(cfg), write_shard, source, missing):
            bar.update(len(missing[i][0]))
            progress.write(json.dumps(dataclasses.asdict(shard)) + "\n")
            progress.flush()
            done[shard.name] = shard
    return [done[name] for name in names]


def _finish(cfg: PrepareConfig, source: Source, shards: list[Shard], out: Path) -> str:
    """Verifies all tar files and writes the manifest. Raises FCMAEError if they differ from what was written."""
    unreadable = [entry for shard in shards for entry in shard.unreadable]
    with tqdm(total=len(source), desc="verifying", unit=" images", disable=None) as bar:
        wrong = []
        with concurrent.futures.ThreadPoolExecutor(worker_count(cfg)) as pool:
            for shard, problem in zip(shards, pool.map(functools.partial(verify, out), shards), strict=True):
                bar.update(shard.samples)
                wrong.append(problem)
    if any(wrong):
        raise FCMAEError(f"{next(filter(None, wrong))}; remove that file, and the same command writes it again")
    count = sum(shard.samples for shard in shards)
    if count + len(unreadable) != len(source):
        raise FCMAEError(f"{out} has {count} images and {len(unreadable)} are unreadable, of {len(source)}")
    if source.classes is not None:
        write_output("out", out / CLASSES_FILE, "".join(f"{name}\n" for name in source.classes))
    write_output("out", out / UNREADABLE_FILE, "".join(f"{name}\t{reason}\n" for name, reason in sorted(unreadable)))
    manifest = {"images": count, "unreadable": len(unreadable), "shards": [dataclasses.asdict(s) for s in shards]}
    write_output("out", out / MANIFEST_FILE, json.dumps(manifest, indent=1) + "\n")
    (out / PROGRESS_FILE).unlink(missing_ok=True)
    named = f", {len(unreadable)} unreadable, listed in {out / UNREADABLE_FILE}" if unreadable else ""
    return f"{out}: {count:,} images in {len(shards)} tar files, {_gb(sum(s.bytes for s in shards))}, verified{named}"


def _measure(cfg: PrepareConfig, out: Path) -> str:
    """Writes a config of group ``data`` to train from the tar files, with their mean and deviation or percentiles."""
    lines = statistics(cfg, WebDataset(str(out)))
    file = out / CONF_FOLDER / "data" / f"{CONF_NAME}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    where = ["name: webdataset", f"path: {json.dumps(str(out.absolute()))}"]
    write_output("out", file, "\n".join([lines[0], *where, *lines[1:], ""]))
    return "\n".join([*lines, f"train with --config-dir {out / CONF_FOLDER} data={CONF_NAME}"])


def verify(out: Path, shard: Shard) -> str:
    """What is wrong with a tar file; empty if its checksum and number of images are as recorded."""
    path = out / shard.name
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != shard.sha256:
        return f"{path} does not hold what was written into it"
    found = len(index_shard(path))
    return "" if found == shard.samples else f"{path} has {counted(found, 'image')}; {shard.samples} were written"


def settings(cfg: PrepareConfig, source: Source) -> dict[str, Any]:
    """The settings and images that determine the tar files."""
    names = hashlib.sha256()
    for index in range(len(source)):
        names.update(source.describe(index).encode(errors="surrogateescape") + b"\0")
    keys = ("split", "short_side", "encode", "quality", "samples_per_shard", "shuffle", "seed")
    own = {key: getattr(cfg, key) for key in keys}
    told = ("in_chans", "bit_depth", *TOLD.get(cfg.data.name, ()), *(["dtype"] if cfg.data.dtype != "uint" else []))
    data = {f"data.{key}": getattr(cfg.data, key) for key in told}
    return {**own, **data, "images": len(source), "names of the images": names.hexdigest()}


def _check_folder(out: Path, names: list[str], now: dict[str, Any]) -> None:
    """Raises UsageError for a folder that has other files or was begun with other settings."""
    if not out.is_dir():
        if os.path.lexists(out):
            raise UsageError(f"out must be a folder; got {str(out)!r}")
        return
    try:
        found = sorted(name for name in os.listdir(out) if not name.startswith(".") and not STRAY.search(name))
    except OSError as error:
        raise UsageError(f"out={out} cannot be read: {error.strerror}") from error
    if not found:
        return
    before = json_object(out / SETTINGS_FILE, MAX_JSON) if SETTINGS_FILE in found else {}
    if not now.keys() <= before.keys():
        raise UsageError(f"out={out} has files that are not of fcmae prepare, such as {shown(found[0])}; {EXPECTED}")
    changed = [f"{key}: {shown(str(before[key]))} -> {value}" for key, value in now.items() if before[key] != value]
    if changed:
        raise UsageError(f"out={out} was begun with other settings ({', '.join(changed)}); {EXPECTED}")
    foreign = [name for name in found if name.endswith(".tar") and name not in names]
    if foreign:
        raise UsageError(f"out={out} has {shown(foreign[0])}, which is not of fcmae prepare; {EXPECTED}")


def _written(out: Path) -> Iterator[Shard]:
    """The tar files that an earlier run finished and whose size is unchanged."""
    shards = json_object(out / MANIFEST_FILE, MAX_JSON).get("shards")
    entries = shards if isinstance(shards, list) else []
    if os.path.lexists(out / PROGRESS_FILE):
        entries += [entry for _, entry in json_lines(read_regular(out / PROGRESS_FILE, MAX_JSON, links=False))]
    for entry in entries:
        with contextlib.suppress(TypeError):  # changed since it was written
            shard = Shard(**entry)
            if [type(value) for value in dataclasses.astuple(shard)] != [str, int, int, str, list]:
                raise TypeError("not of this program")
            if os.path.basename(shard.name) != shard.name or not all(
                isinstance(pair, list) and [type(text) for text in pair] == [str, str] for pair in shard.unreadable
            ):
                raise TypeError("not of this program")
            file = out / shard.name
            if file.is_file() and file.stat().st_size == shard.bytes:
                yield shard


def _gb(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
