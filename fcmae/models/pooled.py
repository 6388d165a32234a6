"""A row of features per image, from the maps of a backbone's stages.

``layer`` is ``pooled``: the mean over the last map, then the head's norm; ``mean``: without the norm; ``stages``: the
means of several stages one after another; or ``stages_std``: their means, then their standard deviations.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fcmae.errors import ConfigError


def chosen_stages(count: int, layer: str, stages: Sequence[int] | None) -> list[int]:
    """The stages, from 1, that a layer of a network of ``count`` stages reads. Raises ConfigError for one it lacks."""
    if layer not in ("stages", "stages_std"):
        return [count]
    if stages is not None and max(stages) > count:
        raise ConfigError(f"stages must be from 1 to {count}, the stages of the network; got {list(stages)}")
    return list(stages or range(1, count + 1))


def row_width(dims: Sequence[int], layer: str, stages: Sequence[int] | None = None) -> int:
    """D of a row, from the widths of the network's stages."""
    total = sum(dims[number - 1] for number in chosen_stages(len(dims), layer, stages))
    return 2 * total if layer == "stages_std" else total


def pool_maps(maps: Sequence[Tensor], layer: str, stages: Sequence[int] | None = None) -> Tensor:
    """Rows ``[N, D]`` of ``mean``, ``stages`` or ``stages_std`` from the maps ``[N, D, h, w]`` of all stages."""
    chosen = [maps[number - 1].float().flatten(2) for number in chosen_stages(len(maps), layer, stages)]
    rows = [each.mean(2) for each in chosen]
    if layer == "stages_std":
        rows += [each.var(2, correction=0).add(1e-12).sqrt() for each in chosen]  # its gradient is finite at 0
    return torch.cat(rows, dim=1)


class RowHead(nn.Module):
    """A linear classifier on rows of features: the maps of all stages to logits ``[N, classes]``.

    Args:
        widths: channels of each stage.
    """

    def __init__(self, widths: Sequence[int], classes: int, layer: str) -> None:
        super().__init__()
        self.layer = layer
        self.fc = nn.Linear(row_width(widths, layer), classes)
        nn.init.trunc_normal_(self.fc.weight, std=0.02)
        nn.init.zeros_(self.fc.bias)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        return self.fc(pool_maps(maps, self.layer))
