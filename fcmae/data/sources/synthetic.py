"""Random pixels, for trying things out and measuring speed without files."""

import torch

from fcmae.data.sources.base import Sample
from fcmae.randomness import Stream, generator


class Synthetic:
    """Random pixels and labels in 10 classes, functions of the index."""

    def __init__(self, length: int, in_chans: int, size: tuple[int, int]) -> None:
        self.classes: list[str] | None = [str(i) for i in range(10)]
        self.length = length
        self.shape = (in_chans, *size)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        rng = generator(0, Stream.INIT, index)
        return Sample(torch.randint(0, 256, self.shape, generator=rng, dtype=torch.uint8), self.label(index))

    def label(self, index: int) -> int | None:
        return index % 10

    def describe(self, index: int) -> str:
        return f"synthetic[{index}]"
