"""A ConvNeXt V2 block on packed sites as one operation with its derivative written down, for 16 bits on a GPU.

Of the passes over memory that autograd and a compiler would make, these fall away: residual and bias are one sum, the
gradient of a bias falls out of the pass that writes or reads what it is a sum of, and the products write the weights'
gradients in float32. Nothing is compiled but the kernels.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from fcmae.kernels import depthwise_launch, grn_triton, norm_triton
from fcmae.kernels import float8_triton as float8
from fcmae.kernels.depthwise import Neighbors
from fcmae.kernels.float8_triton import Float8
from fcmae.kernels.linear import Form, weight_grad
from fcmae.kernels.residual_triton import residual, scale_and_sum
from fcmae.kernels.sums_triton import add_up


class Parameters(NamedTuple):
    """Of a block of C channels and D in its MLP, as the network keeps them."""

    conv: Tensor
    """``[C, 1, k, k]``, depthwise."""
    conv_bias: Tensor | None
    norm: Tensor
    """``[C]``."""
    norm_bias: Tensor
    fc1: Tensor
    """``[D, C]``, or ``[D, C, 1, 1]``."""
    fc1_bias: Tensor
    grn: Tensor
    """``[D]``."""
    grn_bias: Tensor
    fc2: Tensor
    """``[C, D]``, or ``[C, D, 1, 1]``."""
    fc2_bias: Tensor


class Constants(NamedTuple):
    """What has no gradient."""

    fc1: Tensor | Float8
    """``[D, C]``: the weight in the type of the activations, or in float8."""
    fc2: Tensor | Float8
    """``[C, D]``."""
    norm_eps: float
    grn_eps: float
    grn_scope: str
    """GRN's norm over the sites of an ``image`` or of the whole ``batch``."""


def convnext_block(
    x: Tensor, parameters: Parameters, constants: Constants, where: Neighbors, factor: Tensor | None = None
) -> Tensor:
    """Depthwise convolution, norm, MLP with exact GELU and GRN, and residual sum.

    Args:
        x: ``[N, V, S, S, C]``.
        where: the tables of :func:`fcmae.kernels.neighbors`.
        factor: ``[N]``, what each image's block is multiplied by before the sum (drop path); None = 1.

    Returns:
        ``[N, V, S, S, C]`` in the type of ``x``. The parameters' gradients have the parameters' types.
    """
    if torch.is_grad_enabled() and any(t is not None and _is_differentiated(t) for t in (x, *parameters)):
        return _Block.apply(x, *parameters, constants, where, factor)
    return _forward(x, parameters, constants, where, factor, None)


def _is_differentiated(tensor: Tensor) -> bool:
    """Backward, or forward, for which there is no derivative: torch refuses it where the operation is recorded."""
    return tensor.requires_grad or forward_ad.unpack_dual(tensor).tangent is not None


def _forward(
    x: Tensor,
    parameters: Parameters,
    constants: Constants,
    where: Neighbors,
    factor: Tensor | None,
    kept: list[Tensor | None] | None,
) -> Tensor:
    """The output; adds what the backward pass needs to ``kept``. Else nothing lives longer than its use."""

    def keep(*tensors: Tensor | None) -> None:
        if kept is not None:
            kept.extend(tensors)

    def linear(h: Tensor, weight: Tensor | Float8, known: bool = False) -> Tensor:
        """Keeps what the weight's gradient needs. ``known``: for float8 the input's largest value has been found."""
        h = h.view(-1, h.shape[-1])
        if isinstance(weight, Float8):
            h, *inputs = weight.product(h, known)
            keep(*inputs)
            return h
        keep(h, None)
        return h @ weight.t()

    p, c = parameters, constants
    h = depthwise_launch.forward(x, p.conv, p.conv_bias, where.slots, where.cells)
    keep(h)
    h, *stats = norm_triton.launch_forward(h, p.norm, p.norm_bias, c.norm_eps)
    keep(*stats)
    h = linear(h, c.fc1)
    keep(h)
    h, *stats = grn_triton.launch_forward(
        _images(h, x, c.grn_scope), p.fc1_bias, p.grn, p.grn_bias, c.grn_eps,
        c.fc2.largest_of_input if isinstance(c.fc2, Float8) else None,
    )  # fmt: skip
    keep(*stats)
    h = linear(h, c.fc2, known=True)
    return residual(x, h, p.fc2_bias, factor)


def _saved(weight: Tensor | Float8) -> tuple[Tensor | None, ...]:
    """What the backward pass needs of a weight."""
    return (weight.transposed, weight.factor, weight.largest) if isinstance(weight, Float8) else (weight, None, None)


def _restored(weight: Tensor, factor: Tensor | None, largest: Tensor | None) -> Tensor | Float8:
    """The weight, of what :func:`_saved` gave."""
    if factor is None or largest is None:
        return weight
    return Float8(None, weight, factor, largest)


class _Gradients:
    """Of a linear layer, by the gradient ``[R, D]`` of its output and its weight.

    ``known``: for float8 that gradient's largest value has been found.
    """

    def __init__(self, grad: Tensor, weight: Tensor | Float8, known: bool = False) -> None:
        self.weight = weight
        self.grad = weight.scale_grad(grad, known) if isinstance(weight, Float8) else grad
        self.dtype = grad.dtype

    def of_weight(self, x: Tensor, factor: Tensor | None, dtype: torch.dtype) -> Tensor:
        """In a type at least as exact as ``dtype``; of what was kept of the input."""
        if isinstance(self.grad, Tensor):
            return weight_grad(self.grad, x, dtype)
        assert factor is not None
        return float8.weight_grad(self.grad, x, factor)

    def of_input(self) -> Tensor:
        """``[R, C]``."""
        if isinstance(self.grad, Tensor):
            assert isinstance(self.weight, Tensor)
            return self.grad @ self.weight
        assert isinstance(self.weight, Float8)
        return self.weight.input_grad(self.grad, self.dtype)


def _images(h: Tensor, x: Tensor, grn_scope: str) -> Tensor:
    """Rows of sites ``[R, D]`` as the images that GRN takes its norm over, ``[N, R / N, D]``."""
    return h.view(len(x) if grn_scope == "image" else 1, -1, h.shape[-1])


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *args: Any) -> Tensor:
        parameters, (constants, where, factor) = Parameters(*args[:-3]), args[-3:]
        kept: list[Tensor | None] = []
        out = _forward(x, parameters, constants, where, factor, kept)
        p, c = parameters, constants
        weights = *_saved(c.fc1), *_saved(c.fc2)
        # Nothing that recomputation would make again may be held elsewhere.
        ctx.save_for_backward(x, *kept, p.conv, p.norm, p.fc1_bias, p.grn, *weights, where.slots, where.cells, factor)
        ctx.like = {name: Form.of(t) for name, t in parameters._asdict().items() if t is not None}
        ctx.grn = c.grn_eps, c.grn_scope
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (
            x, h, means, scales, y, y_factor, a, norms, grn_means, g, g_factor,
            conv, norm, fc1_bias, grn, *weights, slots, cells, factor,
        ) = ctx.saved_tensors  # fmt: skip
        of_x, *wanted = ctx.needs_input_grad[: 1 + len(Parameters._fields)]
        wants = Parameters(*wanted)
        found: dict[str, Tensor] = {}
        partial: dict[tuple[str, ...], Tensor] = {}  # by the parameters, [P, C] or [P, parameters, C]
        dx = taps = None
        dz = grad = grad.contiguous()
        if factor is not None:
            dz, partial["fc2_bias",] = scale_and_sum(grad, factor)
        dz = dz.view(-1, dz.shape[-1])
        fc2 = _Gradients(dz, _restored(*weights[3:]))
        if wants.fc2:
            found["fc2"] = fc2.of_weight(g, g_factor, ctx.like["fc2"].dtype)
        if of_x or any(wants[:8]):
            eps, grn_scope = ctx.grn
            dg, weight = _images(fc2.of_input(), x, grn_scope), _restored(*weights[:3])
            da, partial["grn", "grn_bias", "fc1_bias"] = grn_triton.launch_backward(
                dg, _images(a, x, grn_scope), fc1_bias, grn, norms, grn_means, eps,
                weight.largest_of_grad if isinstance(weight, Float8) else None,
            )  # fmt: skip
            del dg  # as large as da, and not needed any more
            fc1 = _Gradients(da.view(-1, da.shape[-1]), weight, known=True)
            del da  # which fc1 may have in float8 instead
            if wants.fc1:
                found["fc1"] = fc1.of_weight(y, y_factor, ctx.like["fc1"].dtype)
        if of_x or any(wants[:4]):
            dh, partial["norm", "norm_bias"] = norm_triton.launch_backward(
                fc1.of_input().view(h.shape), h, norm, means, scales
            )
            if wants.conv or wants.conv_bias:
                taps = depthwise_launch.partial_weight_grad(x, dh, conv.shape[-1], slots, cells)
            if of_x:
                dx, sums = depthwise_launch.input_grad_and_skip(dh, conv, slots, cells, grad)
                partial.setdefault(("fc2_bias",), sums)
        if wants.fc2_bias and ("fc2_bias",) not in partial:
            found["fc2_bias"] = dz.sum(0, dtype=torch.float32)
        found.update(_sums(partial, taps, conv.shape[-1]))
        grads = (ctx.like[name].take(found[name]) if want else None for name, want in wants._asdict().items())
        return dx, *grads, None, None, None


def _sums(partial: dict[tuple[str, ...], Tensor], taps: Tensor | None, kernel: int) -> dict[str, Tensor]:
    """The sums of all parts, by parameter; by one launch, because each alone would take longer to start than to run."""
    if not partial and taps is None:
        return {}
    most_first = sorted(partial, key=lambda names: -len(partial[names]))
    sums, gradients = add_up([partial[names] for names in most_first], taps, kernel)
    found = dict(zip(("conv", "conv_bias"), gradients or (), strict=False))
    for names, total in zip(most_first, sums, strict=True):
        found.update(zip(names, total.view(len(names), -1), strict=True))
    return found
