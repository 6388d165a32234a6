"""Tar files, tables, listings and folders made to do harm, each with what reads it.

``python -m tests.hostile_sources`` prints a table of these and those of :mod:`tests.hostile`: size of the file, MiB of
memory, seconds of CPU time, what was said.
"""

import gzip
import json
import os
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fcmae.data.prepare import command as prepare
from fcmae.data.sources import FashionMNIST, ImageFolder, WebDataset, listing
from fcmae.data.sources import kept as arrays
from fcmae.evaluation.labels import read_accepted
from tests.bad_files import encoded, picture
from tests.hostile import IMAGES, MIB, Case, Read, measure, sparse, table
from tests.hostile_arrays import ARRAYS
from tests.hostile_formats import FORMATS

PNG = encoded(picture(8, 8), "PNG")


def archive(*files: tuple[str, bytes], size: int | None = None) -> bytes:
    """A tar file, by default with an image first; of the last file the header has other numbers than its content."""
    content = b""
    for i, (name, data) in enumerate([("0.png", PNG), *files]):
        member = tarfile.TarInfo(name)
        member.size = size if size is not None and i == len(files) else len(data)
        content += member.tobuf(tarfile.GNU_FORMAT) + _padded(data)
    return content + bytes(2 * tarfile.BLOCKSIZE)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % tarfile.BLOCKSIZE)


START = archive()[:-1024]
"""A tar file with an image and without an end."""


def tar(*files: tuple[str, bytes], size: int | None = None) -> Callable[[Path], Read]:
    """What a data set of one tar file gives: its labels, and its last image."""

    def make(folder: Path) -> Read:
        (folder / "a.tar").write_bytes(archive(*files, size=size))
        return lambda: read_tar(folder)

    return make


def read_tar(folder: Path) -> str:
    source = WebDataset(folder / "a.tar", allow_cut=True)
    labels = [source.label(i) for i in range(len(source))]
    assert source.classes is None or len(source.classes) < 10**6
    return f"{source.unlabelled if source.classes is None else labels}; {len(source[len(source) - 1].image.data)} bytes"


def gnu_sparse(name: str, size: int) -> bytes:
    """A file of zeros stored as GNU's kind of sparse file: a map of one block at the end."""
    header = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
    header[156:157] = tarfile.GNUTYPE_SPARSE
    header[124:136] = b"00000001000\0"  # 512 bytes are stored
    header[386:398] = tarfile.itn(size - 512, 12, tarfile.GNU_FORMAT)
    header[398:410] = b"00000001000\0"
    header[483:495] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)
    header[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(header))[0]
    return bytes(header) + b"1" * 512


def tar_of(content: Callable[[], bytes]) -> Callable[[Path], Read]:
    def make(folder: Path) -> Read:
        (folder / "a.tar").write_bytes(START + content() + bytes(1024))
        return lambda: read_tar(folder)

    return make


def long_name(folder: Path) -> Read:
    """A header of a name of 64 GiB in a file with a hole."""
    member = tarfile.TarInfo("././@LongLink")
    member.type, member.size = tarfile.GNUTYPE_LONGNAME, 2**36
    (folder / "a.tar").write_bytes(START + member.tobuf(tarfile.GNU_FORMAT))
    os.truncate(folder / "a.tar", 2**36 + 4096)
    return lambda: read_tar(folder)


def attributes(*records: str, junk: bytes = b"") -> Callable[[], bytes]:
    """Attributes that POSIX's format puts before a file, and the file."""
    lines = (f"{len(record) + 4:02} {record}\n".encode() for record in records)
    content = b"".join(lines) + junk
    before, member = tarfile.TarInfo("attributes"), tarfile.TarInfo("1.png")
    before.type, before.size, member.size = tarfile.XHDTYPE, len(content), len(PNG)
    return lambda: before.tobuf() + _padded(content) + member.tobuf() + _padded(PNG)


def classes_file(make: Callable[[Path], Any]) -> Callable[[Path], Read]:
    def made(folder: Path) -> Read:
        (folder / "a.tar").write_bytes(archive(("0.cls", b"0")))
        make(folder / "classes.txt")
        return lambda: read_tar(folder)

    return made


DEEP = b"[" * 100_000


def kept(change: Callable[[dict, dict], Any], mode: int = 0o644) -> Callable[[Path], Read]:
    """A listing beside a folder of two images, made by somebody else; what is then listed."""

    def make(folder: Path) -> Read:
        root = folder / "images"
        (root / "cat").mkdir(parents=True)
        for name in ("1.png", "2.png"):
            (root / "cat" / name).write_bytes(PNG)
        for path in (root / "cat", root):
            os.utime(path, (1, 1))
        listing.KEEP_FROM, arrays.HOME = 1, folder / "home"
        ImageFolder(root)
        file = folder / ".images.fcmae-listing"
        made = arrays.Arrays.open(file)
        values = {name: np.array(value) for name, value in made.arrays.items()}
        change(values, made.meta)
        file.unlink()
        arrays.Arrays(values, made.meta).save(file)
        file.chmod(mode)
        return lambda: [os.path.relpath(ImageFolder(root).describe(i), folder) for i in range(2)]

    return make


def named(*names: bytes) -> Callable[[dict, dict], Any]:
    def change(values: dict, meta: dict) -> None:
        strings = arrays.StringsBuilder()
        for name in names:
            strings.append(name)
        values.update({name: np.array(array) for name, array in strings.arrays("names").items()})

    return change


def deep_folder(folder: Path) -> Read:
    path = Path()
    here = os.getcwd()
    try:
        os.chdir(folder)
        for _ in range(1500):
            os.mkdir("d")
            os.chdir("d")
        Path("a.png").write_bytes(PNG)
    finally:
        os.chdir(here)
    assert path is not None
    return lambda: len(ImageFolder(folder))


def linked_folders(folder: Path) -> Read:
    """Twenty folders, each with eight links to the next."""
    for i in range(20):
        (folder / "f" / str(i)).mkdir(parents=True)
        (folder / "f" / str(i) / "a.png").write_bytes(PNG)
        for j in range(8):
            (folder / "f" / str(i) / f"l{j}").symlink_to(folder / "f" / str(i + 1))
    return lambda: len(ImageFolder(folder / "f" / "0"))


def parquet(rows: list[dict | None], prepare: Callable[[Path], Any] = lambda _: None) -> Callable[[Path], Read]:
    """Images by their paths in a table."""

    def make(folder: Path) -> Read:
        import datasets
        import pyarrow.parquet

        from fcmae.data.sources.huggingface import HuggingFace

        datasets.disable_progress_bars()
        datasets.config.HF_DATASETS_CACHE = folder / "cache"
        given = [row and {"bytes": None, **row} for row in rows]
        kind = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
        (folder / "data").mkdir()
        pyarrow.parquet.write_table(pyarrow.table({"image": pyarrow.array(given, kind)}), folder / "data/train.parquet")
        prepare(folder)
        source = HuggingFace(str(folder / "data"), "train", "image")
        return lambda: source[0].image.data[:20]

    return make


def saved(folder: Path) -> Read:
    """A data set as ``save_to_disk`` writes it, whose description names a file elsewhere."""
    import datasets

    from fcmae.data.sources.huggingface import HuggingFace

    datasets.disable_progress_bars()
    rows = datasets.Dataset.from_dict({"image": [{"bytes": PNG, "path": None}]})
    rows.cast_column("image", datasets.Image(decode=False)).save_to_disk(folder / "data")
    state = json.loads((folder / "data" / "state.json").read_text())
    (folder / "data" / state["_data_files"][0]["filename"]).rename(folder / "secret.arrow")
    state["_data_files"][0]["filename"] = "../secret.arrow"
    (folder / "data" / "state.json").write_text(json.dumps(state))
    return lambda: HuggingFace(str(folder / "data"), "train", "image")[0].image.data[:4]


def progress(folder: Path) -> Read:
    """What ``fcmae prepare`` notes of its work, with names of other folders."""
    shards = [{"name": "../a.tar", "samples": 1, "bytes": 3, "sha256": "", "unreadable": []}]
    shards += [
        {**shards[0], "name": name, "unreadable": bad} for name, bad in (("b.tar", 7), ("b.tar", ["x"]), (5, []))
    ]
    (folder / "out").mkdir()
    for name in ("a.tar", "out/b.tar"):
        (folder / name).write_text("abc")
    (folder / "out" / "manifest.json").write_text(json.dumps({"shards": shards}))
    (folder / "out" / "progress.jsonl").write_bytes(b"7\n" + DEEP + b"\n[]\n")
    return lambda: list(prepare._written(folder / "out"))


def fashion(folder: Path) -> Read:
    """100 MB of zeros."""
    for kind, size in (("images-idx3", 100), ("labels-idx1", 0)):
        with gzip.open(folder / f"train-{kind}-ubyte.gz", "wb", compresslevel=3) as file:
            for _ in range(size):
                file.write(bytes(MIB))
    return lambda: len(FashionMNIST(folder, train=True))


def labels(content: bytes) -> Callable[[Path], Read]:
    def make(folder: Path) -> Read:
        (folder / "a.json").write_bytes(content)
        (folder / "b.png").write_bytes(PNG)
        return lambda: read_accepted(folder / "a.json", ImageFolder(folder), ["cat"])

    return make


SOURCES = {
    "tar: label of 600 MB, sparse": Case(tar_of(lambda: gnu_sparse("0.cls", 600 * MIB)), "0.png has no number"),
    "tar: image of 2^61 bytes, sparse": Case(
        tar_of(lambda: gnu_sparse("1.png", 2**61)), "1.png: it is stored as a spa"
    ),
    "tar: image of 2^61 bytes": Case(tar(("1.png", PNG), size=2**61), "1.png: the tar file ends after .* of its 23"),
    "tar: image of -512 bytes": Case(tar(("1.png", b""), size=-512), "0.png has no number"),
    "tar: attributes of a size below 0": Case(tar_of(attributes("size=-512")), "0.png has no number"),
    "tar: attributes without an end": Case(tar_of(attributes(junk=b"1 " * 30_000)), "0.png has no number"),
    "tar: sparse map of 10^9 entries": Case(
        tar_of(attributes("GNU.sparse.major=1", "GNU.sparse.minor=0", "GNU.sparse.name=2.png")),
        "2.png: it is stored as a sparse file",
    ),
    "tar: name of 64 GiB": Case(long_name, "0.png has no number"),
    "tar: class 3000000": Case(tar(("0.cls", b"3000000")), "0.png has the class 3000000, but there are 1 images"),
    "tar: class of 5000 digits": Case(tar(("0.cls", b"9" * 5000)), "0.png has no number"),
    "tar: class 2^40 in JSON": Case(tar(("0.json", b'{"label": 1099511627776}')), "0.png has no number"),
    "tar: deep JSON": Case(tar(("0.json", DEEP)), "0.png has no number"),
    "tar: JSON of 24 MB": Case(tar(("0.json", b'{"label": "' + b"a" * 24 * MIB + b'"}')), "0.png has no number"),
    "classes.txt is a pipe": Case(classes_file(os.mkfifo), "classes.txt cannot be read: not a regular file"),
    "classes.txt of 64 GiB": Case(
        classes_file(lambda path: sparse(path.name)(path.parent)), "classes.txt cannot be re"
    ),
    "classes.txt is no text": Case(
        classes_file(lambda path: path.write_bytes(b"\xff\xfe\0")), "classes.txt cannot be r"
    ),
    "listing: names with ..": Case(kept(named(b"../../a", b"cat/../../b")), "images/cat/1.png', 'images/cat/2.png"),
    "listing: absolute names": Case(kept(named(b"/etc/passwd", b"/etc/group")), "images/cat/1.png', 'images/cat/2.png"),
    "listing: others may write it": Case(kept(named(b"cat/1.png", b"cat/1.png"), 0o666), "1.png', 'images/cat/2.png"),
    "listing: labels that are not there": Case(
        kept(lambda values, _: values.update(labels=np.array([7, -9], np.int32))), "cat/1.png', 'images/cat/2.png"
    ),
    "listing: names without an end": Case(
        kept(lambda values, _: values["names_offsets"].__setitem__(1, 2**60)), "cat/1.png', 'images/cat/2.png"
    ),
    "listing: of another folder": Case(
        kept(lambda values, meta: (named(b"cat/3.png", b"cat/4.png")(values, meta), meta.update(root="/elsewhere"))),
        "cat/1.png', 'images/cat/2.png",
    ),
    "folders in 1500 folders": Case(deep_folder, "^1$"),
    "20 folders with links": Case(linked_folders, "is reached by more than 1000 links"),
    "Parquet: /etc/passwd": Case(parquet([{"path": "/etc/passwd"}]), r"/etc/passwd.* outside of the folder"),
    "Parquet: ..": Case(
        parquet([{"path": "../a.png"}], lambda folder: (folder / "a.png").write_bytes(PNG)), "outside of the folder"
    ),
    "Parquet: a link": Case(
        parquet([{"path": "a.png"}], lambda folder: (folder / "data" / "a.png").symlink_to("/etc/passwd")), "outside of"
    ),
    "Parquet: a pipe": Case(
        parquet([{"path": "a.png"}], lambda folder: os.mkfifo(folder / "data" / "a.png")), "not a regular file"
    ),
    "Parquet: null": Case(
        parquet([{"path": None}, None]), r"ImageError: .*train\[0\]: it has neither bytes nor a path"
    ),
    "saved data set: a file elsewhere": Case(saved, "names the file .*secret.arrow, which is outside of it"),
    "prepare: notes of other folders": Case(progress, r"^\[\]$"),
    "Fashion-MNIST of 100 MB": Case(fashion, "train-images-idx3-ubyte.gz cannot be read: .*47040016", 128),
    "labels: deep JSON": Case(labels(DEEP), "labels .*a.json cannot be read"),
    "labels: a number of 5000 digits": Case(
        labels(json.dumps({"b.png": "X"}).encode().replace(b'"X"', b"9" * 5000)), "l"
    ),
}
CASES = IMAGES | FORMATS | SOURCES | ARRAYS


if __name__ == "__main__":
    chosen = {name: case for name, case in CASES.items() if not sys.argv[1:] or any(a in name for a in sys.argv[1:])}
    print(*table(measure(chosen)), sep="\n")
