"""Image files like ImageNet's for benchmarks: 500 x 375 pixels on average, JPEG of quality 90, no two alike."""

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from fcmae.data.pixels.decode import explained, read_file
from fcmae.data.pixels.formats import EXTENSIONS, MAX_PIXELS, open_picture
from fcmae.errors import UsageError

SIZES = ((500, 375),) * 6 + ((375, 500),) * 2 + ((500, 333), (640, 480), (400, 300))
"""Widths and heights in ImageNet's proportions; the mean is 489 x 385."""
QUALITY = 90
CLASSES = 10
SMALLEST = 300
"""Pixels per side below which a photograph is left out."""


def photographs(folder: str | None) -> tuple[list[Image.Image], str]:
    """Photographs in ``folder``, else scikit-image's, else clouds of noise; and what to call them."""
    if folder is not None:
        found, name = _load(image_files(Path(folder))), folder
        if not found:
            raise UsageError(f"photos is {folder}; it has no RGB or grey images of {SMALLEST} pixels per side or more")
        return found, name
    try:
        import skimage.data
    except ImportError:
        return [_clouds(index) for index in range(16)], "noise with the spectrum of photographs"
    files = [path for path in sorted(Path(skimage.data.__file__).parent.iterdir()) if path.suffix in (".png", ".jpg")]
    return _load([path for path in files if path.stem != "phantom"]), "scikit-image's photographs"


def image_files(folder: Path) -> list[Path]:
    """The image files below a folder, sorted."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS)


def _load(files: list[Path]) -> list[Image.Image]:
    photos = []
    for file in files:
        with explained(str(file)), open_picture(read_file(file).data, MAX_PIXELS) as image:
            if image.mode in ("RGB", "L") and min(image.size) >= SMALLEST:
                photos.append(image.convert("RGB"))
    return photos


def _clouds(seed: int, height: int = 480, width: int = 640) -> Image.Image:
    """Colour noise whose power falls with the square of the frequency, as in photographs."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    noise = np.fft.fft2(rng.standard_normal((3, height, width))) / np.maximum(frequency, 1 / width)
    values = np.fft.ifft2(noise).real
    values = 128 + 55 * values / values.std()
    return Image.fromarray(values.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


def variations(photos: list[Image.Image], count: int) -> Iterator[Image.Image]:
    """``count`` crops of photographs, mirrored or not, resized to ImageNet's sizes."""
    rng = random.Random(0)
    for index in range(count):
        photo = photos[index % len(photos)]
        width, height = rng.choice(SIZES)
        share = rng.uniform(0.6, 1.0)
        box_width = share * min(photo.width, photo.height * width / height)
        box_height = box_width * height / width
        left, top = rng.uniform(0, photo.width - box_width), rng.uniform(0, photo.height - box_height)
        box = (left, top, left + box_width, top + box_height)
        image = photo.resize((width, height), Image.Resampling.BICUBIC, box)
        yield image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image


def write_folder(folder: Path, images: Iterator[Image.Image]) -> None:
    """JPEG files in a folder for each class."""
    for index, image in enumerate(images):
        path = folder / f"class{index % CLASSES}" / f"{index:06}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, quality=QUALITY)
