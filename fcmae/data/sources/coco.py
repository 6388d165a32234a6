"""Images that a COCO JSON file lists, and their objects: boxes, and instance masks where it has them."""

import json
import math
import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fcmae.data.pixels.decode import read_file
from fcmae.data.pixels.instances import is_outside, problem_of
from fcmae.data.pixels.maps import stored_size
from fcmae.data.sources.base import Sample, relative_names, shuffled
from fcmae.data.sources.heads import head_of, unreadable
from fcmae.data.sources.images import Files
from fcmae.errors import ConfigError, counted, first_of, reason_of, shown
from fcmae.messages import print_once_rank0
from fcmae.opening import is_inside, read_regular

MAX_BYTES = 2**31
"""Of a JSON file."""
SIZES = 20_000
"""Images, of a fixed random order, whose headers are compared with the file."""
RUNS = 1_000
"""Masks whose compressed run lengths are checked before training, the first ones."""
OUTSIDE = 1.0
"""Pixels that a box may reach out of its image: coordinates are rounded. What lies outside is cut off."""


class Objects(NamedTuple):
    """The objects of an image.

    ``boxes``: float32 ``[n, 4]``, left, top, right, bottom in pixels. ``classes``: int64 ``[n]``, from 0. ``crowd``:
    bool ``[n]``, a group that no single box stands for. ``areas``: float32 ``[n]``. ``segments``: polygons or run
    lengths as the JSON has them, None without a mask. ``size``: height and width of the image.
    """

    boxes: Tensor
    classes: Tensor
    crowd: Tensor
    areas: Tensor
    segments: list[Any]
    size: tuple[int, int]


class CocoImages(Files):
    """The images of a COCO JSON file, in its order, without labels. :class:`CocoObjects` has their objects.

    Args:
        file: the JSON file.
        folder: where the images are; their names may not leave it.
        key: the key of the config that names the file, for messages.

    Raises ConfigError with a line for each kind of mistake, naming the first offenders.
    """

    unlabelled = "a COCO file has classes of objects, not of images"

    def __init__(self, file: str | Path, folder: str | Path, key: str) -> None:
        self.file, self.key = str(file), key
        content = _parsed(self.file, key)
        self.ids_of_names = _ids_of_names(content.get("categories"))
        """The id of each category that the file names."""
        self._read(content, Path(folder))
        told = unreadable(len(self), lambda index: head_of(self.paths[index]), self.describe)
        if told:
            print_once_rank0(f"{self.file}: {counted(len(self), 'image')}{told}")

    def _read(self, content: dict[str, Any], folder: Path) -> None:
        mistakes = Mistakes(f"{self.key}: {self.file}")
        self._list(content["images"], folder, mistakes)
        mistakes.check()

    def _list(self, images: list[Any], folder: Path, mistakes: "Mistakes") -> None:
        self.paths: list[str] = []
        self.ids: list[int] = []
        sizes: list[tuple[int, int]] = []
        top, seen = os.path.realpath(folder), set()
        self.folder = top
        for number, image in enumerate(images):
            given = image if isinstance(image, dict) else {}
            name, identity, size = given.get("file_name"), given.get("id"), (given.get("height"), given.get("width"))
            numbers = all(type(x) is int and 0 < x < 2**31 for x in size)
            if not isinstance(name, str) or not name or type(identity) is not int or not numbers:
                mistakes.add("images without file_name, id, height or width", f"number {number + 1}")
                continue
            path = os.path.join(top, name)
            real = os.path.realpath(path) if _is_path(path) else top
            if identity in seen:
                mistakes.add("images have the id of another", f"{shown(name)} ({identity})")
            elif not is_inside(real, top):
                mistakes.add(f"images lie outside of {folder}", shown(name))
            elif not os.path.isfile(real):
                mistakes.add(f"images are not in {folder}", shown(name))
            seen.add(identity)
            self.paths.append(path)
            self.ids.append(identity)
            sizes.append(size)  # type: ignore[arg-type]  # checked
        self.sizes = torch.tensor(sizes, dtype=torch.int64).view(-1, 2)
        if not images:
            mistakes.say("its list images is empty")

    def listing_parts(self) -> Iterator[bytes | np.ndarray]:
        yield relative_names(self.paths, self.folder)

    def size(self, index: int) -> tuple[int, int]:
        """Height and width of an image, as the file says."""
        height, width = self.sizes[index].tolist()
        return height, width


def _is_path(text: str) -> bool:
    """Whether a file can have this name; not with half a character of UTF-16, which JSON may hold."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


class CocoObjects(CocoImages):
    """The images of a COCO JSON file with their objects, which are checked; so are the sizes of images.

    Args:
        skip: leave wrong boxes, and those whose mask is empty or elsewhere, out instead of raising ConfigError.
    """

    def __init__(self, file: str | Path, folder: str | Path, key: str, skip: bool = False) -> None:
        self.skip = skip
        self.notes: list[str] = []
        """What the user should know, a line each."""
        self.runs = 0
        super().__init__(file, folder, key)

    def _read(self, content: dict[str, Any], folder: Path) -> None:
        mistakes = Mistakes(f"{self.key}: {self.file}")
        self._list(content["images"], folder, mistakes)
        numbers = self._name(content.get("categories"), mistakes)
        self._gather(content.get("annotations"), numbers, mistakes)
        if not mistakes:
            self._compare_sizes(mistakes)
        mistakes.check()

    def _name(self, categories: Any, mistakes: "Mistakes") -> dict[int, int]:
        """Sets the names of classes, in the order of their ids. Returns the number of each id."""
        names: dict[int, str] = {}
        taken: set[str] = set()
        for number, category in enumerate(categories if isinstance(categories, list) else []):
            given = category if isinstance(category, dict) else {}
            identity, name = given.get("id"), given.get("name")
            if type(identity) is not int or not isinstance(name, str) or not name:
                mistakes.add("categories without id or name", f"number {number + 1}")
            elif identity in names or name in taken:
                mistakes.add("categories have the id or name of another", f"{shown(name)} ({identity})")
            else:
                names[identity] = name
                taken.add(name)
        if not names:
            mistakes.say("it has no list categories, or an empty one")
        self.category_ids = sorted(names)
        self.class_names = [names[identity] for identity in self.category_ids]
        return {identity: number for number, identity in enumerate(self.category_ids)}

    def _gather(self, annotations: Any, numbers: dict[int, int], mistakes: "Mistakes") -> None:
        """Checks the objects, and keeps them."""
        if not isinstance(annotations, list):
            mistakes.say("it has no list annotations")
            annotations = []
        places = {identity: place for place, identity in enumerate(self.ids)}
        wrong = Mistakes(mistakes.where)
        rows: list[_Row] = []
        seen: set[int] = set()
        for number, given in enumerate(annotations):
            annotation = given if isinstance(given, dict) else {}
            identity, image, category = (_integer(annotation.get(name)) for name in ("id", "image_id", "category_id"))
            name = f"annotation {number + 1 if identity is None else identity}"
            if identity is None or identity in seen:
                mistakes.add("annotations have no id, or that of another", name)
            elif image not in places:
                mistakes.add("annotations are of an image that is not listed", f"{name} (image_id {image})")
            elif category not in numbers:
                mistakes.add("annotations are of a category that is not listed", f"{name} (category_id {category})")
            else:
                row = self._row(annotation, places[image], numbers[category], mistakes, wrong)
                rows += [] if row is None else [row]
            seen.add(-1 if identity is None else identity)
        if wrong and self.skip:
            self.notes += [f"warning: {line}; left out (loader.on_error=skip)" for line in wrong.lines()]
        else:
            mistakes.join(wrong)
        self._pack(rows)

    def _row(
        self, annotation: dict[str, Any], place: int, kind: int, mistakes: "Mistakes", wrong: "Mistakes"
    ) -> "_Row | None":
        """An object of the image at ``place``; None if its box or mask is ``wrong``."""
        size, segment = self.size(place), annotation.get("segmentation") or None
        name = f"annotation {annotation['id']} of {shown(os.path.basename(self.paths[place]))}"
        box = _box(annotation.get("bbox"), size)
        if box is None:
            wrong.add("boxes have no area in their image, or reach out of it", name)
            return None
        text = b""
        if segment is not None:
            self.runs += isinstance(segment, dict)
            problem = problem_of(segment, size, self.runs <= RUNS)
            if problem:
                mistakes.add("masks are wrong", f"{name}: {problem}")
            elif (self.runs <= RUNS or not isinstance(segment, dict)) and is_outside(segment, size, box, OUTSIDE):
                wrong.add("masks are empty or outside of their box", name)
                return None
            text = json.dumps(segment, separators=(",", ":")).encode()
        crowd, given = (annotation.get(part) for part in ("iscrowd", "area"))
        if crowd not in (None, 0, 1):
            mistakes.add("annotations have an iscrowd that is not 0 or 1", f"{name} ({shown(repr(crowd))})")
        area = (box[2] - box[0]) * (box[3] - box[1]) if given is None else _number(given)
        if area is None or not 0 <= area < math.inf:
            mistakes.add("annotations have an area that is no number from 0 on", f"{name} ({shown(repr(given))})")
            return None
        return _Row(place, kind, bool(crowd), area, box, text)

    def _pack(self, rows: "list[_Row]") -> None:
        """Sets compact arrays, image by image: Python's objects would be copied into every worker."""
        rows.sort(key=lambda row: row.place)
        self.boxes = torch.tensor([row.box for row in rows], dtype=torch.float32).view(-1, 4)
        self.kinds = torch.tensor([row.kind for row in rows], dtype=torch.int64)
        self.crowd = torch.tensor([row.crowd for row in rows], dtype=torch.bool)
        self.areas = torch.tensor([row.area for row in rows], dtype=torch.float32)
        places = np.asarray([row.place for row in rows], dtype=np.int64)
        counts = np.bincount(places, minlength=len(self.paths))
        self.ends = np.concatenate([[0], counts.cumsum()])
        self.text = b"".join(row.text for row in rows)
        self.text_ends = np.concatenate([[0], np.cumsum([len(row.text) for row in rows])]).astype(np.int64)
        without = int((counts == 0).sum())
        if without and len(self.paths):
            self.notes.append(f"{self.key}: {without} of {len(self.paths)} images have no boxes")

    def _compare_sizes(self, mistakes: "Mistakes") -> None:
        for index in sorted(shuffled(self)[:SIZES]):
            found = stored_size(self.paths[index])
            if found is not None and found != self.size(index):
                height, width = self.size(index)
                name = shown(os.path.basename(self.paths[index]))
                mistakes.add(
                    "images have another size than it says", f"{name} is {found[1]}x{found[0]}, not {width}x{height}"
                )

    def __getitem__(self, index: int) -> Sample:
        return Sample(read_file(self.paths[index]), self.objects(index))

    def listing_parts(self) -> Iterator[bytes | np.ndarray]:
        yield from super().listing_parts()
        yield "\0".join(self.class_names).encode(errors="surrogatepass")
        yield from (self.ends, self.text_ends, self.text)
        yield from (each.numpy() for each in (self.kinds, self.boxes, self.crowd, self.areas))

    def objects(self, index: int) -> Objects:
        """The objects of an image, without reading it."""
        first, last = self.ends[index], self.ends[index + 1]
        texts = (self.text[self.text_ends[i] : self.text_ends[i + 1]] for i in range(first, last))
        segments = [json.loads(text) if text else None for text in texts]
        part = slice(first, last)
        return Objects(
            self.boxes[part], self.kinds[part], self.crowd[part], self.areas[part], segments, self.size(index)
        )

    def without_mask(self) -> list[str]:
        """Names of images with an object, no crowd, that has no mask."""
        lacking = (np.diff(self.text_ends) == 0) & ~self.crowd.numpy()
        images = np.searchsorted(self.ends, np.flatnonzero(lacking), side="right") - 1
        return [shown(os.path.basename(self.paths[index])) for index in dict.fromkeys(images.tolist())]

    def take_classes(self, expected: list[str], whose: str) -> list[str]:
        """Numbers the classes as ``expected`` does. Returns a note if some are missing. Raises ConfigError for others.

        Args:
            whose: names what has the expected classes.
        """
        numbers = {name: number for number, name in enumerate(expected)}
        unknown = [name for name in self.class_names if name not in numbers]
        if unknown:
            named = first_of(unknown)
            raise ConfigError(f"{self.key}: {self.file}: {len(unknown)} classes are not in {whose}: {named}")
        present = set(self.class_names)
        missing = [name for name in expected if name not in present]
        self.kinds = torch.tensor([numbers[name] for name in self.class_names])[self.kinds]
        self.class_names = expected
        return [f"{self.key} lacks {len(missing)} of the classes of {whose}: {first_of(missing)}"] if missing else []

    @property
    def most(self) -> int:
        """Most objects, no crowds, of an image."""
        single = torch.nn.functional.pad((~self.crowd).long().cumsum(0), (1, 0))[torch.from_numpy(self.ends)]
        return int(single.diff().max()) if len(self) else 0


class _Row(NamedTuple):
    """An object, with the JSON text of its mask."""

    place: int
    kind: int
    crowd: bool
    area: float
    box: list[float]
    text: bytes


class Mistakes:
    """Mistakes by their kind, each with the names of the offenders.

    Args:
        where: names the file.
    """

    def __init__(self, where: str) -> None:
        self.where = where
        self.found: dict[str, list[str]] = defaultdict(list)
        self.said: list[str] = []

    def say(self, line: str) -> None:
        """A mistake without offenders."""
        self.said.append(line)

    def add(self, kind: str, name: str) -> None:
        self.found[kind].append(name)

    def join(self, other: "Mistakes") -> None:
        for kind, names in other.found.items():
            self.found[kind] += names

    def lines(self) -> list[str]:
        found = (f"{len(names)} {kind}: {first_of(names)}" for kind, names in self.found.items())
        return [f"{self.where}: {line}" for line in (*self.said, *found)]

    def __bool__(self) -> bool:
        return bool(self.found or self.said)

    def check(self) -> None:
        """Raises ConfigError if there are any."""
        if self:
            raise ConfigError("\n".join(self.lines()))


def _parsed(file: str, key: str) -> dict[str, Any]:
    """The content of a COCO JSON file. Raises ConfigError for another file."""
    try:
        content = json.loads(read_regular(file, MAX_BYTES))
    except OSError as error:
        raise ConfigError(f"{key}: {file} cannot be read: {reason_of(error)}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{key}: {file} is not JSON: {reason_of(error)}") from error
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        kind = f"a {type(content).__name__}" if not isinstance(content, dict) else "no list `images`"
        raise ConfigError(
            f"{key}: {file} must be a COCO file, with the lists images, annotations, categories; got {kind}"
        )
    return content


def _ids_of_names(categories: Any) -> dict[str, int]:
    """Of a list of categories, which may be wrong: only what predicts needs it."""
    listed = [each for each in categories if isinstance(each, dict)] if isinstance(categories, list) else []
    pairs = [(each.get("name"), each.get("id")) for each in listed]
    return {name: identity for name, identity in pairs if isinstance(name, str) and type(identity) is int}


def _integer(value: Any) -> int | None:
    return value if type(value) is int else None


def _number(value: Any) -> float | None:
    try:
        return float(value) if type(value) in (int, float) else None
    except OverflowError:
        return None


def _box(given: Any, size: tuple[int, int]) -> list[float] | None:
    """Left, top, right and bottom of ``[x, y, width, height]``, inside the image; None if it is no such box."""
    numbers = [_number(value) for value in given] if isinstance(given, list) else []
    if len(numbers) != 4 or None in numbers:
        return None
    left, top, width, height = (value for value in numbers if value is not None)
    ends = ((left, left + width, size[1]), (top, top + height, size[0]))
    if not all(-OUTSIDE <= first < last <= side + OUTSIDE for first, last, side in ends):  # NaN is refused, too
        return None
    (left, right), (top, bottom) = ((max(first, 0.0), min(last, float(side))) for first, last, side in ends)
    return [left, top, right, bottom] if left < right and top < bottom else None
