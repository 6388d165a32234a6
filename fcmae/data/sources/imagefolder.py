"""Image files below a folder."""

from pathlib import Path

from fcmae.data.pixels import EXTENSIONS, read_file
from fcmae.data.sources.base import Sample
from fcmae.errors import UsageError


def list_images(folder: Path) -> list[Path]:
    """Every image file below ``folder``, sorted. Raises UsageError if there is none."""
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder")
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file())
    if not paths:
        raise UsageError(f"{folder} has no images; looked for {' '.join(EXTENSIONS)}")
    return paths


class ImageFolder:
    """Image files below a folder; each subfolder is a class. A folder without subfolders has no labels."""

    def __init__(self, folder: str | Path) -> None:
        root = Path(folder)
        self.paths = list_images(root)
        names = [p.relative_to(root).parts for p in self.paths]
        self.classes: list[str] | None = None
        if all(len(parts) > 1 for parts in names):
            self.classes = sorted({parts[0] for parts in names})
            by_name = {name: i for i, name in enumerate(self.classes)}
            self.labels = [by_name[parts[0]] for parts in names]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        return Sample(read_file(self.paths[index]), self.label(index))

    def label(self, index: int) -> int | None:
        return self.labels[index] if self.classes is not None else None

    def describe(self, index: int) -> str:
        return str(self.paths[index])
