"""The layers between blocks as operations with their derivative written down, for 16 bits on a GPU.

Products write the float32 gradients of weights, and nothing is compiled but the kernels.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fcmae.kernels import norm_triton
from fcmae.kernels.linear import Form, weight_grad
from fcmae.kernels.norm_triton import Move
from fcmae.kernels.patch_rows_triton import patch_rows
from fcmae.kernels.sums_triton import sum_many_rows, sum_rows


def stem(
    imgs: Tensor, conv: Tensor, conv_bias: Tensor | None, norm: Tensor, norm_bias: Tensor, eps: float,
    index: Tensor, side: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """A convolution whose kernel equals its stride, and a layer norm, at the sites of square tiles of images.

    Args:
        imgs: ``[N, C, H, W]``; gets no gradient.
        conv: ``[D, C, k, k]``; ``conv_bias``, ``norm`` and ``norm_bias`` are ``[D]``.
        index, side: as in :func:`.patch_rows`.

    Returns:
        ``[N, V, S, S, D]`` of ``dtype``.
    """
    return _Stem.apply(imgs, conv, conv_bias, norm, norm_bias, eps, index, side, dtype)


def downsample(
    x: Tensor, norm: Tensor, norm_bias: Tensor, eps: float, conv: Tensor, conv_bias: Tensor | None, move: Move
) -> Tensor:
    """A layer norm, and a convolution whose kernel equals its stride.

    Args:
        x: ``[..., C]``, the sites of maps in tiles, see :class:`.Move`.
        conv: ``[D, C, k, k]``.

    Returns:
        ``[sites, D]`` in the type of ``x``.
    """
    return _Downsample.apply(x, norm, norm_bias, eps, conv, conv_bias, move)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``torch.nn.functional.linear`` of ``[..., C]`` in the type of ``x``."""
    return _Linear.apply(x, weight, bias)


def with_tokens(x: Tensor, token: Tensor, places: Tensor, count: int) -> Tensor:
    """``[count, C]`` with the rows of ``x`` at ``places``, and the token elsewhere.

    Args:
        x: ``[R, C]``.
        token: ``[C]``.
        places: int64 ``[R]``, different from each other.
    """
    return _WithTokens.apply(x, token, places, count)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Of matrices ``[R, C]`` and ``[D, C]`` of one type."""
    return x @ weight.t() if bias is None else torch.addmm(bias.to(x.dtype), x, weight.t())


def _cast(conv: Tensor, dtype: torch.dtype) -> Tensor:
    """``[D, C, k, k]`` to ``[D, k * k * C]``, the order of a :class:`Move`."""
    return conv.permute(0, 2, 3, 1).to(dtype, memory_format=torch.contiguous_format).flatten(1)


def _form(tensor: Tensor | None) -> Form | None:
    return None if tensor is None else Form.of(tensor)


class _Stem(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, imgs: Tensor, conv: Tensor, conv_bias: Tensor | None, *args: Any) -> Tensor:
        norm, norm_bias, eps, index, side, dtype = args
        rows = patch_rows(imgs, index, side, conv.shape[-1], dtype)
        x = _product(rows, conv.to(dtype).flatten(1), conv_bias)
        out, means, scales = norm_triton.launch_forward(x, norm, norm_bias, eps)
        ctx.save_for_backward(rows, x, norm, means, scales)
        ctx.forms = [_form(t) for t in (conv, conv_bias, norm, norm_bias)]
        return out.view(*index.shape, side, side, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, x, norm, means, scales = ctx.saved_tensors
        _, wants, *others = ctx.needs_input_grad[:5]
        dx, partial = norm_triton.launch_moving_backward(grad, x, norm, means, scales, None, 3)
        of_norm, of_norm_bias, of_bias = sum_rows(partial).unbind(0)
        of_conv = ctx.forms[0].take(weight_grad(dx, rows, ctx.forms[0].dtype)) if wants else None
        sums = zip(ctx.forms[1:], (of_bias, of_norm, of_norm_bias), others, strict=True)
        return None, of_conv, *(form.take(total) if want else None for form, total, want in sums), *[None] * 4


class _Downsample(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: Tensor, norm_bias: Tensor, eps: float, conv: Tensor, bias: Tensor | None, move: Move
    ) -> Tensor:
        x = x.contiguous()
        rows, means, scales = norm_triton.launch_moving_forward(x, norm, norm_bias, eps, move)
        cast = _cast(conv, x.dtype)
        ctx.save_for_backward(x, norm, means, scales, rows, cast)
        ctx.forms, ctx.move = [_form(t) for t in (norm, norm_bias, conv, bias)], move
        return _product(rows, cast, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, norm, means, scales, rows, cast = ctx.saved_tensors
        for_norm, for_norm_bias, for_conv, for_bias = ctx.forms
        of_x, of_norm, of_norm_bias, _, of_conv, of_bias, _ = ctx.needs_input_grad
        grad = grad.contiguous()
        dx = d_norm = d_norm_bias = d_conv = d_bias = None
        if of_conv:
            size, channels, k, _ = for_conv.shape
            found = weight_grad(grad, rows, for_conv.dtype).view(size, k, k, channels)
            d_conv = for_conv.take(found.permute(0, 3, 1, 2))
        if of_bias:
            d_bias = for_bias.take(sum_many_rows(grad))
        if of_x or of_norm or of_norm_bias:
            dx, partial = norm_triton.launch_moving_backward(grad @ cast, x, norm, means, scales, ctx.move, 2)
            sums = sum_rows(partial)
            d_norm = for_norm.take(sums[0]) if of_norm else None
            d_norm_bias = for_norm_bias.take(sums[1]) if of_norm_bias else None
        return dx, d_norm, d_norm_bias, None, d_conv, d_bias, None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows, cast = x.reshape(-1, x.shape[-1]), weight.to(x.dtype)
        ctx.save_for_backward(rows, cast)
        ctx.shape, ctx.forms = x.shape, (_form(weight), _form(bias))
        return _product(rows, cast, bias).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, cast = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        grad = grad.reshape(-1, grad.shape[-1])
        return (
            (grad @ cast).view(ctx.shape) if of_x else None,
            ctx.forms[0].take(weight_grad(grad, rows, ctx.forms[0].dtype)) if of_weight else None,
            ctx.forms[1].take(sum_many_rows(grad)) if of_bias else None,
        )


class _WithTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, places: Tensor, count: int) -> Tensor:
        ctx.save_for_backward(places)
        ctx.form = Form.of(token)
        return token.to(x.dtype).repeat(count, 1).index_copy_(0, places, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (places,) = ctx.saved_tensors
        of_x, of_token = ctx.needs_input_grad[:2]
        dx = grad.index_select(0, places) if of_x else None
        d_token = None
        if of_token:
            tokens = torch.ones(len(grad), dtype=torch.bool, device=grad.device).index_fill_(0, places, False)
            d_token = ctx.form.take(sum_many_rows(grad, tokens))
        return dx, d_token, None, None
