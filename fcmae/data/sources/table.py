"""Images that a table lists: a text file of paths, or CSV, TSV or Parquet with columns of labels or numbers."""

import csv
import io
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fcmae.data.pixels.decode import read_file
from fcmae.data.sources.base import Sample, relative_names
from fcmae.data.sources.heads import head_of, unreadable
from fcmae.errors import ConfigError, UsageError, first_of, reason_of, shown
from fcmae.imports import needed
from fcmae.messages import print_once_rank0
from fcmae.opening import is_inside, open_regular

IMAGE_COLUMNS = ("image", "path", "file", "filename", "file_name", "image_path")
"""Names of the column of paths, if it is not given."""
ENDINGS = (".txt", ".csv", ".tsv", ".parquet")
"""Of tables."""
SPLIT_COLUMN = "split"
MAX_BYTES = 2**30
"""Of a table."""
LENGTH = 80
"""Characters of a value that a message shows."""
BATCH = 1024
"""Rows of a Parquet file that are decoded at a time."""

Table = dict[str, list[Any]]


class TableImages:
    """The images of a table's rows, in its order.

    Args:
        path: ``.txt`` with a path per line, ``.csv``, ``.tsv`` or ``.parquet``.
        root: the folder to which paths are relative and which they may not leave; None = the table's own.
        image_column: None = the first column called image, path, file or filename.
        label_column: a column of classes; a list of columns of numbers, of which any may be empty; None = no labels.
        split: rows whose column ``split`` (in any case) has this value; None = all rows. All rows, too, of a table
            without the column (``is_split`` is False), and of a table ``alone`` whose rows all have the same value.
        alone: whether the other rows of a data set are in another table.
        target_column: a column of files with target maps; None = ``targets`` is None.

    Raises UsageError naming the column, or the first rows that are wrong or whose image is missing.
    """

    def __init__(
        self,
        path: str | Path,
        root: str | None = None,
        image_column: str | None = None,
        label_column: str | Sequence[str] | None = None,
        split: str | None = None,
        target_column: str | None = None,
        alone: bool = False,
    ) -> None:
        self.table = Path(path)
        table = read_table(self.table)
        column = _image_column(self.table, table, image_column)
        rows = list(range(len(table[column])))
        if not rows:
            raise UsageError(f"{path} has no rows")
        splits = next((table[name] for name in table if name.strip().lower() == SPLIT_COLUMN), None)
        self.is_split = splits is not None
        if split is not None and splits is not None:
            found = sorted({str(value) for value in splits})
            if not (alone and len(found) == 1):
                rows = [row for row in rows if str(splits[row]) == split]
            if not rows:
                has = first_of(found)
                raise UsageError(f"{path} has no row whose column {SPLIT_COLUMN} is {split!r}; it has {has}")
        self.rows = rows
        folder = Path(root or self.table.parent)
        self.folder = os.path.realpath(folder)
        self.paths = _inside(self.table, [table[column][row] for row in rows], rows, folder)
        _tell_problems(self.table, self.paths)
        self.targets: list[str] | None = None
        if target_column is not None:
            files = _get(self.table, table, target_column, "data.target_column")
            self.targets = _inside(self.table, [files[row] for row in rows], rows, folder)
        self.classes: list[str] | None = None
        self.unlabelled = f"data.label_column is not set; {path} has the columns {', '.join(table)}"
        self.columns: list[str] = []
        self.values: Tensor | None = None
        if isinstance(label_column, str):
            labels = _get(self.table, table, label_column)
            values = ["" if labels[row] is None or labels[row] != labels[row] else str(labels[row]) for row in rows]
            if "" in values:
                self.unlabelled = f"the column {label_column} of {path} is empty in row {rows[values.index('')] + 1}"
                return
            self.classes = sorted(set(values))
            if len({name.strip() for name in self.classes}) < len(self.classes):
                alike = [repr(name) for name in self.classes if name != name.strip()]
                raise UsageError(
                    f"data.label_column: column {label_column} of {path} has classes that differ in spaces only: "
                    f"{first_of(alike)}; remove the spaces"
                )
            number = {name: index for index, name in enumerate(self.classes)}
            self.numbers = [number[value] for value in values]
        elif label_column is not None:
            self.columns = list(label_column)
            self.unlabelled = f"data.label_column is a list, {self.columns}; give a column of classes by its name"
            columns = [_numbers(self.table, table, name, rows) for name in self.columns]
            self.values = torch.tensor(columns, dtype=torch.float32).T.contiguous()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        image = read_file(self.paths[index])
        return Sample(image, self.label(index) if self.values is None else self.values[index])

    def label(self, index: int) -> int | None:
        return None if self.classes is None else self.numbers[index]

    def describe(self, index: int) -> str:
        return self.paths[index]

    def listing_parts(self) -> Iterator[bytes | np.ndarray]:
        return self._parts(_plain)

    def earlier_listing_parts(self) -> Iterator[bytes | np.ndarray]:
        """Of runs of earlier versions, which took ``./a.png`` for another file than ``a.png``."""
        return self._parts(str)

    def _parts(self, named: Callable[[str], str]) -> Iterator[bytes | np.ndarray]:
        yield relative_names(map(named, self.paths), self.folder)
        if self.targets is not None:
            yield relative_names(map(named, self.targets), self.folder)
        if self.classes is not None:
            yield np.asarray(self.numbers)
        elif self.values is not None:
            yield self.values.numpy()


def _plain(path: str) -> str:
    """A full path without the parts that name no folder: ``/a//./b`` is ``/a/b``. ``..`` may lead out of a link."""
    if "//" not in path and "/./" not in path:
        return path
    return "/" + "/".join(part for part in path.split("/") if part not in ("", "."))


def _tell_problems(table: Path, paths: Sequence[str]) -> None:
    """A line if several rows name the same file, or files that cannot be read."""
    seen = set[str]()
    twice = [path for path in paths if path in seen or seen.add(path)]  # type: ignore[func-returns-value]  # None
    told = f"; {len(twice):,} rows name the file of an earlier row, such as {shown(twice[0])}" if twice else ""
    told += unreadable(len(paths), lambda index: head_of(paths[index]), paths.__getitem__)
    if told:
        print_once_rank0(f"{table}: {len(paths):,} images{told}")


def read_table(path: Path) -> Table:
    """The columns of a table by name. Raises UsageError naming the file."""
    try:
        ending = path.suffix.lower()
        if ending == ".parquet":
            return _parquet(path)
        with open_regular(path) as file:
            if os.fstat(file.fileno()).st_size > MAX_BYTES:
                raise UsageError(f"{path} has more than {MAX_BYTES} bytes; write it as Parquet")
            text = file.read().decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {reason_of(error)}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not text in UTF-8: {error.reason} at byte {error.start}") from error
    if ending == ".txt":
        return {"path": [line.strip() for line in io.StringIO(text, newline=None) if line.strip()]}
    reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if ending == ".tsv" else ",")
    try:
        numbered = [(reader.line_num, line) for line in reader if line]
    except csv.Error as error:
        raise UsageError(f"{path} is no table: {error} (line {reader.line_num})") from error
    if not numbered:
        raise UsageError(f"{path} is no table: it is empty")
    header, *lines = [line for _, line in numbered]
    wrong = [number for number, line in numbered if len(line) != len(header)]
    if wrong:
        raise UsageError(f"{path} has {len(header)} columns, but not in line {first_of(wrong)}")
    if len(set(header)) < len(header):
        raise UsageError(f"{path} has two columns of one name: {', '.join(header)}")
    return {name: [line[number] for line in lines] for number, name in enumerate(header)}


def _parquet(path: Path) -> Table:
    with needed(f"{path} needs pyarrow: pip install pyarrow, or write the table as CSV"):
        import pyarrow
        import pyarrow.parquet
    with open_regular(path) as file:
        try:
            parquet = pyarrow.parquet.ParquetFile(file)
            table: Table = {name: [] for name in parquet.schema_arrow.names}
            if len(table) < len(parquet.schema_arrow.names):
                raise UsageError(f"{path} has two columns of one name: {', '.join(parquet.schema_arrow.names)}")
            size = 0
            for batch in parquet.iter_batches(BATCH):  # a small file may unpack to any size
                columns = [c.dictionary_decode() if hasattr(c, "dictionary_decode") else c for c in batch.columns]
                size += sum(column.nbytes for column in columns)
                if size > MAX_BYTES:
                    raise UsageError(f"{path} unpacks to more than {MAX_BYTES} bytes")
                for values, column in zip(table.values(), columns, strict=True):
                    values += column.to_pylist()
            return table
        except (pyarrow.ArrowException, OSError) as error:
            raise UsageError(f"{path} cannot be read: {reason_of(error)}") from error


def _image_column(path: Path, table: Table, name: str | None) -> str:
    if name is not None:
        _get(path, table, name, "data.image_column")
        return name
    known = [column for column in table if column.lower() in IMAGE_COLUMNS]
    if not known:
        header = ",".join(table)
        if len(table) == 1 and ";" in header:
            raise UsageError(f"{path} has one column, {header[:LENGTH]!r}; write it with commas instead of semicolons")
        raise ConfigError(f"data.image_column is not set; {path} has the columns {', '.join(table)}")
    return known[0]


def _get(path: Path, table: Table, name: str, key: str = "data.label_column") -> list[Any]:
    if name not in table:
        raise ConfigError(f"{key} is {name!r}; {path} has the columns {', '.join(table)}")
    return table[name]


def _numbers(path: Path, table: Table, name: str, rows: list[int]) -> list[float]:
    """A column's numbers; NaN where it is empty. Raises UsageError naming the first rows that have something else."""
    values, wrong = [], []
    column = _get(path, table, name)
    for row in rows:
        value = column[row]
        try:
            number = math.nan if value is None or value == "" else float(value)
        except (TypeError, ValueError):
            number = math.inf
        if abs(number) > torch.finfo(torch.float32).max:
            wrong.append(f"{row + 1} ({value!r:.40})")
        values.append(number)
    if wrong:
        named = first_of(wrong)
        raise UsageError(f"data.label_column: column {name} of {path} must have numbers, but not in row {named}")
    return values


def _inside(path: Path, names: list[Any], rows: list[int], root: Path) -> list[str]:
    """The full paths of images. Raises UsageError naming the first that are missing or outside of ``root``."""
    top = os.path.realpath(root)
    paths = [os.path.join(top, str(name)) for name in names]
    outside, missing = [], []
    for row, name, full in zip(rows, names, paths, strict=True):
        real = top if "\0" in full else os.path.realpath(full)
        if not is_inside(real, top):
            outside.append(f"{row + 1} ({shown(str(name)[:LENGTH])})")
        elif not os.path.isfile(real):
            missing.append(f"{row + 1} ({shown(str(name)[:LENGTH])})")
    for those, what in ((outside, "outside of"), (missing, "that are not in")):
        if those:
            raise UsageError(f"{path} names files {what} {root}: row {first_of(those)}; data.root=FOLDER sets the root")
    return paths
