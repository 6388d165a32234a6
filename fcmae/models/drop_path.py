"""Stochastic depth (arXiv 1603.09382) and dropout whose draws belong to the sample, not to a generator's state."""

import torch
from timm.layers import DropPath
from timm.models.convnext import ConvNeXtBlock
from torch import Tensor, nn

from fcmae.randomness import uniform

CHANNELS = 2**16
"""Counters of a dropout; those of drop paths are below."""


class SampleKeys:
    """The keys of the samples in the batch that a model is about to see, see :func:`fcmae.randomness.sample_keys`.

    Args:
        layers: how many draws drop paths need of each sample.
    """

    def __init__(self, layers: int = 0) -> None:
        self.layers = layers
        self.draws: Tensor | None = None
        """float32 ``[layers, N]``, made together: there are dozens of operations, whatever the shape."""
        self._values: Tensor | None = None

    @property
    def values(self) -> Tensor | None:
        """int64 ``[N]``, on the model's device."""
        return self._values

    @values.setter
    def values(self, values: Tensor) -> None:
        self._values = values
        if self.layers:
            self.draws = uniform(values, torch.arange(self.layers, device=values.device)[:, None])


class SampleDropPath(DropPath):
    """timm's ``DropPath`` where each sample's draw is a function of its key and of ``layer``.

    So it is the same for any division into micro-batches and ranks. Integer arithmetic on the device: a CUDA graph
    replays it with other keys.
    """

    def __init__(self, drop_prob: float, layer: int, keys: SampleKeys) -> None:
        super().__init__(drop_prob)
        self.layer = layer
        self.keys = keys

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        assert self.keys.draws is not None, "the keys of the batch are not set"
        kept = self.keys.draws[self.layer] >= self.drop_prob
        return x * (kept / (1 - self.drop_prob)).to(x.dtype).view(-1, *[1] * (x.dim() - 1))


class SampleDropout2d(nn.Dropout2d):
    """``torch.nn.Dropout2d``: each draw is a function of the sample's key, of ``layer`` and the channel."""

    def __init__(self, p: float, layer: int, keys: SampleKeys) -> None:
        super().__init__(p)
        self.layer = layer
        self.keys = keys

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        assert self.keys.values is not None, "the keys of the batch are not set"
        counters = torch.arange(x.shape[1], device=x.device) + (self.layer + 1) * CHANNELS
        kept = uniform(self.keys.values[:, None], counters) >= self.p
        return x * (kept / (1 - self.p)).to(x.dtype)[..., None, None]


def draw_paths_by_sample(model: nn.Module) -> SampleKeys:
    """Replaces the drop path of every block, and every ``Dropout2d``, in place; names of parameters stay.

    Returns:
        Where to put the keys of the samples before each training step's forward pass.
    """
    blocks = [module for module in model.modules() if isinstance(module, ConvNeXtBlock)]
    keys = SampleKeys(len(blocks) if any(isinstance(block.drop_path, DropPath) for block in blocks) else 0)
    for layer, block in enumerate(blocks):
        if isinstance(block.drop_path, DropPath):
            block.drop_path = SampleDropPath(block.drop_path.drop_prob, layer, keys)
    dropouts = [
        (module, name)
        for module in model.modules()
        for name, child in module.named_children()
        if type(child) is nn.Dropout2d
    ]
    for layer, (module, name) in enumerate(dropouts):
        setattr(module, name, SampleDropout2d(getattr(module, name).p, layer, keys))
    return keys
