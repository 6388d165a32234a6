"""Images of every format, arrays, tar files, tables and COCO files, damaged."""

import functools
import gzip
import multiprocessing
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from fcmae.config import DataConfig
from fcmae.data.pixels.decode import PixelFormat, decode, read_file
from fcmae.data.pixels.instances import mask_of
from fcmae.data.pixels.maps import class_map, value_map
from fcmae.data.sources import FashionMNIST, ImageFolder
from fcmae.data.sources.array import ArrayImages
from fcmae.data.sources.coco import CocoObjects
from fcmae.evaluation.labels import read_accepted
from tests import damaged_files as damaged
from tests.bad_files import encoded, picture
from tests.coco_files import write_coco
from tests.fuzz.mutate import Files, mutated, read_folder
from tests.fuzz.target import Target
from tests.more_files import every_format
from tests.unit.test_damaged_arrays import write_arrays

PIXELS = PixelFormat(2, dtype="float32")


@functools.cache
def made(write: Callable[[Path], object]) -> Callable[[], Files]:
    """The files that ``write`` writes into a folder, once and in another process: a fork must not follow threads."""

    @functools.cache
    def files() -> Files:
        with tempfile.TemporaryDirectory() as folder:
            child = multiprocessing.get_context("fork").Process(target=write, args=(Path(folder),))
            child.start()
            child.join()
            assert child.exitcode == 0, f"{write.__name__} failed"
            return read_folder(Path(folder))

    return files


def array(name: str) -> Target:
    """A ``.zarr`` folder, ``.h5`` or ``.npy`` file."""

    def files() -> Files:
        return {path: content for path, content in ARRAYS().items() if path.split("/")[0] == name}

    def read(folder: Path) -> str:
        source = ArrayImages(str(folder / name), PIXELS)
        for index in range(min(len(source), 4)):
            decode(source[index].image, *PIXELS)
        return "array"

    return Target(files, read)


def parquet(folder: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = {"image": ["b.png", "c.png"] * 20, "label": ["x", "y"] * 20, "n": [0.5, None] * 20}
    pyarrow.parquet.write_table(pyarrow.table(rows), folder / "a.parquet")


def with_images(write: Callable[[Path], object]) -> Callable[[], Files]:
    def also(folder: Path) -> None:
        for name in ("b.png", "c.png"):
            (folder / name).write_bytes(encoded(picture(8, 8), "PNG"))
        write(folder)

    return made(also)


def read_parquet(folder: Path) -> str:
    for label in ("label", ["n"]):
        damaged.read_all(DataConfig(name="table", path=str(folder / "a.parquet"), image_size=16, label_column=label))
    return "table"


def read_coco(folder: Path) -> str:
    source = CocoObjects(folder / "objects.json", folder / "images", "data.annotations")
    for index in range(len(source)):
        objects = source.objects(index)
        for segment in filter(None, objects.segments):
            mask_of(segment, objects.size)
    return "objects"


def accepted(folder: Path) -> None:
    (folder / "a.json").write_text('{"b.png": ["x", "y"], "c.png": "y"}')


def read_labels(folder: Path) -> str:
    read_accepted(folder / "a.json", ImageFolder(folder), ["x", "y"])
    return "labels"


def saved(folder: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    rows = datasets.Dataset.from_dict({"image": [{"bytes": encoded(picture(8, 8), "PNG"), "path": None}] * 2})
    rows.cast_column("image", datasets.Image(decode=False)).save_to_disk(folder / "data")


def read_saved(folder: Path) -> str:
    from fcmae.data.sources.huggingface import HuggingFace

    source = HuggingFace(str(folder / "data"), "train", "image")
    for index in range(len(source)):
        decode(source[index].image, 3)
    return "rows"


def read_fashion(folder: Path) -> str:
    source = FashionMNIST(folder, train=True)
    decode(source[len(source) - 1].image, 1)
    return "images"


def fashion(folder: Path) -> None:
    numbers = np.random.default_rng(0).integers(0, 10, (4, 28, 28), dtype=np.uint8)
    for kind, header, values in (("images-idx3", 16, numbers), ("labels-idx1", 8, numbers[:, 0, 0])):
        with gzip.open(folder / f"train-{kind}-ubyte.gz", "wb") as file:
            file.write(bytes(header) + values.tobytes())


def class_maps(folder: Path) -> None:
    classes = (np.arange(24 * 32).reshape(24, 32) % 5).astype(np.uint8)
    Image.fromarray(classes).save(folder / "a.png")
    np.save(folder / "a.npy", classes.astype(np.int16))
    np.save(folder / "numbers.npy", classes.astype(np.float32)[None])


def read_maps(folder: Path) -> str:
    for name in ("a.png", "a.npy"):
        class_map(read_file(folder / name), name)
    value_map(read_file(folder / "numbers.npy"), "numbers", 1)
    return "maps"


def only(name: str) -> Callable[[Files, np.random.Generator], Files]:
    """A change of one file, beside which the others stay."""
    return lambda files, rng: {**files, **mutated({name: files[name]}, rng)}


def _targets() -> dict[str, Target]:
    found = {
        f"image.{ending}": Target(lambda e=ending: {f"a.{e}": every()[e]}, damaged.read_folder) for ending in every()
    }
    for kind, (content, name, read) in damaged.sources().items():
        beside = {"b.png": every()["png"], "c.png": every()["png"]} if kind == "csv" else {}
        found[kind] = Target(lambda n=name, c=content, b=beside: {n: c, **b}, read, change=only(name))
    for name in ("plain.npy", "plain.h5", "gzip.h5", "lzf.h5", "lz4.zarr", "zstd.zarr", "shards.zarr"):
        found[name] = array(name)
    found |= {
        "parquet": Target(with_images(parquet), read_parquet, change=only("a.parquet")),
        "coco": Target(made(write_coco), read_coco, change=only("objects.json")),
        "labels": Target(with_images(accepted), read_labels, change=only("a.json")),
        "saved": Target(made(saved), read_saved, memory=300),
        "fashion": Target(made(fashion), read_fashion),
        "maps": Target(made(class_maps), read_maps),
    }
    return found


every = functools.cache(every_format)
ARRAYS = made(write_arrays)
TARGETS = _targets()
