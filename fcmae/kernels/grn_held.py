"""GELU and GRN of 16-bit values in one pass over memory: an image stays in registers until its norms are known.

Two neighbouring channels make one 32-bit word, in memory and in registers, where the compiler would give each 16-bit
value a register of its own. In between, the forward pass holds GELU(x) as float16 (11 bits, bfloat16 has 8), half a
register per element. The backward pass holds dy GELU'(x) with 11 bits and GELU(x) GELU'(x), which belongs to a
smaller term, with 8, together one register: enough for bfloat16 alone. Shapes must divide evenly; others go to
:mod:`fcmae.kernels.grn_triton`.
"""

# In kernels, tuples of registers grow while loops are unrolled: their type is another at every turn.
# mypy: disable-error-code="assignment"

import triton
import triton.language as tl

from fcmae.kernels.float8_triton import raise_to
from fcmae.kernels.gelu import ALPHA, scaled_gelu, scaled_gelu_and_slope, sum_over_image

HOLD = tl.constexpr(1 / 32)
"""Factor on what is held as float16: |x| up to 600,000 fits."""
CUT = tl.constexpr(1 + 0.72 * 2**-11)
MINOR_CUT = tl.constexpr(1 + 0.72 * 2**-8)


@triton.jit
def _split(word, BF16: tl.constexpr):
    """The two numbers of a word as float32."""
    if BF16:
        low = (word << 16).to(tl.float32, bitcast=True)
        high = (word & -65536).to(tl.float32, bitcast=True)
    else:
        low = word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        high = (word >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return low, high


@triton.jit
def _join(low, high, BF16: tl.constexpr, NVIDIA: tl.constexpr):
    """Two float32 as a word of 16-bit numbers, on NVIDIA's GPUs by one instruction."""
    if NVIDIA:
        convert: tl.constexpr = "cvt.rn.bf16x2.f32 $0, $1, $2;" if BF16 else "cvt.rn.f16x2.f32 $0, $1, $2;"
        word = tl.inline_asm_elementwise(convert, "=r,f,f", [high, low], dtype=tl.int32, is_pure=True, pack=1)
    else:
        dtype: tl.constexpr = tl.bfloat16 if BF16 else tl.float16
        word = low.to(dtype).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        word = word | (high.to(dtype).to(tl.int16, bitcast=True).to(tl.int32) << 16)
    return word


@triton.jit
def _hold(value, minor, NVIDIA: tl.constexpr):
    """A float32 with 10 bits after the leading one, and a smaller one, which float16 holds, with 7, as a word.

    Both are cut, not rounded, which keeps NaN; ``CUT`` and ``MINOR_CUT`` make up for the mean. The compiler must not
    see how a word is made: it would hold the two numbers instead.
    """
    if NVIDIA:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t; cvt.rn.f16x2.f32 t, 0f00000000, $2; shr.u32 t, t, 3; "
            "lop3.b32 $0, $1, 0xffffe000, t, 0xea; }",
            "=r,r,f",
            [value.to(tl.int32, bitcast=True), minor],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    bits = minor.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return (value.to(tl.int32, bitcast=True) & -8192) | (bits >> 3)


@triton.jit
def _release(word):
    minor = (word << 3).to(tl.int16).to(tl.float16, bitcast=True)
    return (word & -8192).to(tl.float32, bitcast=True), minor.to(tl.float32)


@triton.jit
def _load(x, i, tile, row, R, D, ROWS: tl.constexpr, TAIL: tl.constexpr, HELD: tl.constexpr):
    """A tile of words; where only the last one has rows beyond the image, they are 0."""
    source = x + i * ROWS * (D // 2) + tile
    return tl.load(source, mask=(i * ROWS + row < R)[:, None], other=0) if TAIL and i == HELD - 1 else tl.load(source)


@triton.jit
def _store(y, word, i, tile, row, R, D, ROWS: tl.constexpr, TAIL: tl.constexpr, HELD: tl.constexpr):
    if TAIL and i == HELD - 1:
        tl.store(y + i * ROWS * (D // 2) + tile, word, mask=(i * ROWS + row < R)[:, None])
    else:
        tl.store(y + i * ROWS * (D // 2) + tile, word)


@triton.jit
def _magnitude(word, i, row, R, ROWS: tl.constexpr, TAIL: tl.constexpr, HELD: tl.constexpr):
    """The larger magnitude of two bfloat16, by its bits; 0 outside the image."""
    found = tl.maximum(word & 0x7FFF, (word >> 16) & 0x7FFF)
    return tl.where((i * ROWS + row < R)[:, None], found, 0) if TAIL and i == HELD - 1 else found


@triton.jit
def _inside(value, i, row, R, ROWS: tl.constexpr, TAIL: tl.constexpr, HELD: tl.constexpr):
    return tl.where((i * ROWS + row < R)[:, None], value, 0.0) if TAIL and i == HELD - 1 else value


@triton.jit
def _pair(vector, c, HAS: tl.constexpr):
    """Even and odd channels of a vector, each ``[PAIRS]``."""
    if HAS:
        return tl.load(vector + c).to(tl.float32), tl.load(vector + c + 1).to(tl.float32)
    return 0.0 * c, 0.0 * c


@triton.jit
def forward_held(
    x, input_bias, weight, bias, y, norms, means, mail, largest, R, D, parts, eps,
    ROWS: tl.constexpr, PAIRS: tl.constexpr, PARTS: tl.constexpr, HELD: tl.constexpr, TAIL: tl.constexpr,
    HAS_INPUT_BIAS: tl.constexpr, BF16: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """As ``grn_triton._forward``; x, y: int32 ``[N, R, D / 2]``, a program has 2 * PAIRS channels; largest: BF16."""
    image = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    pair = part * PAIRS + tl.arange(0, PAIRS)
    c = 2 * pair
    row = tl.arange(0, ROWS)
    tile = row[:, None] * (D // 2) + pair[None, :]
    x += image * R * (D // 2)
    y += image * R * (D // 2)
    shift_low, shift_high = _pair(input_bias, c, HAS_INPUT_BIAS)
    shift_low, shift_high = ALPHA * shift_low[None, :], ALPHA * shift_high[None, :]

    words = ()
    for i in tl.static_range(HELD):
        words += (_load(x, i, tile, row, R, D, ROWS, TAIL, HELD),)
    squares_low = tl.zeros((ROWS, PAIRS), tl.float32)
    squares_high = tl.zeros((ROWS, PAIRS), tl.float32)
    held = ()
    for i in tl.static_range(HELD):
        low, high = _split(words[i], BF16)
        low = _inside(scaled_gelu(low * ALPHA + shift_low, False), i, row, R, ROWS, TAIL, HELD)
        high = _inside(scaled_gelu(high * ALPHA + shift_high, False), i, row, R, ROWS, TAIL, HELD)
        squares_low += low * low
        squares_high += high * high
        held += (_join(low * HOLD, high * HOLD, False, NVIDIA),)

    norm_low = tl.sqrt(tl.sum(squares_low, 0)) * (0.5 / ALPHA)
    norm_high = tl.sqrt(tl.sum(squares_high, 0)) * (0.5 / ALPHA)
    tl.store(norms + image * D + c, norm_low)
    tl.store(norms + image * D + c + 1, norm_high)
    mean = sum_over_image(tl.sum(norm_low + norm_high, 0), mail, image, part, parts, PARTS) / D
    if part == 0:
        tl.store(means + image, mean)
    inverse = 1.0 / (mean + eps)
    w_low, w_high = _pair(weight, c, True)
    b_low, b_high = _pair(bias, c, True)
    scale_low = ((1.0 + w_low * (norm_low * inverse)) * (0.5 / ALPHA / HOLD))[None, :]
    scale_high = ((1.0 + w_high * (norm_high * inverse)) * (0.5 / ALPHA / HOLD))[None, :]
    found = tl.zeros((ROWS, PAIRS), tl.int32)
    for i in tl.static_range(HELD):
        low, high = _split(held[i], False)
        word = _join(low * scale_low + b_low[None, :], high * scale_high + b_high[None, :], BF16, NVIDIA)
        _store(y, word, i, tile, row, R, D, ROWS, TAIL, HELD)
        if largest is not None:
            found = tl.maximum(found, _magnitude(word, i, row, R, ROWS, TAIL, HELD))
    if largest is not None:
        raise_to(largest, found << 16)


@triton.jit
def _pull(w, dot, norm, inverse, coupled):
    """``pull`` of ``grn_triton._backward``."""
    pull = (w * dot - coupled) * inverse / tl.where(norm > 0, norm, 1.0)
    return (tl.where(norm > 0, pull, 0.0) * (0.25 / ALPHA / HOLD * MINOR_CUT))[None, :]


@triton.jit
def backward_held(
    dy, x, input_bias, weight, norms, means, dx, sums, mail, largest, R, D, parts, eps,
    ROWS: tl.constexpr, PAIRS: tl.constexpr, PARTS: tl.constexpr, HELD: tl.constexpr, TAIL: tl.constexpr,
    HAS_INPUT_BIAS: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """As ``grn_triton._backward``; dy, x, dx: int32 ``[N, R, D / 2]``, pairs of bfloat16."""
    image = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    pair = part * PAIRS + tl.arange(0, PAIRS)
    c = 2 * pair
    row = tl.arange(0, ROWS)
    tile = row[:, None] * (D // 2) + pair[None, :]
    x += image * R * (D // 2)
    dy += image * R * (D // 2)
    dx += image * R * (D // 2)
    sums += image * 3 * D
    shift_low, shift_high = _pair(input_bias, c, HAS_INPUT_BIAS)
    shift_low, shift_high = ALPHA * shift_low[None, :], ALPHA * shift_high[None, :]

    words, grads = (), ()
    for i in tl.static_range(HELD):
        words += (_load(x, i, tile, row, R, D, ROWS, TAIL, HELD),)
        grads += (_load(dy, i, tile, row, R, D, ROWS, TAIL, HELD),)
    zeros = tl.zeros((ROWS, PAIRS), tl.float32)
    dot_low, dot_high, total_low, total_high = zeros, zeros, zeros, zeros
    held_low, held_high = (), ()
    for i in tl.static_range(HELD):
        low, high = _split(words[i], True)
        d_low, d_high = _split(grads[i], True)
        h, slope = scaled_gelu_and_slope(low * ALPHA + shift_low, False)
        dot_low += d_low * h
        total_low += d_low
        held_low += (_hold(d_low * slope, h * (slope * HOLD), NVIDIA),)
        h, slope = scaled_gelu_and_slope(high * ALPHA + shift_high, False)
        dot_high += d_high * h
        total_high += d_high
        held_high += (_hold(d_high * slope, h * (slope * HOLD), NVIDIA),)

    norm_low, norm_high = _pair(norms + image * D, c, True)
    w_low, w_high = _pair(weight, c, True)
    inverse = 1.0 / (tl.load(means + image) + eps)
    dots_low = tl.sum(dot_low, 0) * (0.5 / ALPHA)
    dots_high = tl.sum(dot_high, 0) * (0.5 / ALPHA)
    tl.store(sums + c, dots_low * norm_low * inverse)
    tl.store(sums + c + 1, dots_high * norm_high * inverse)
    tl.store(sums + D + c, tl.sum(total_low, 0))
    tl.store(sums + D + c + 1, tl.sum(total_high, 0))
    coupled = tl.sum(w_low * dots_low * norm_low + w_high * dots_high * norm_high, 0) * inverse
    coupled = sum_over_image(coupled, mail, image, part, parts, PARTS) / D
    pull_low = _pull(w_low, dots_low, norm_low, inverse, coupled)
    pull_high = _pull(w_high, dots_high, norm_high, inverse, coupled)
    scale_low = ((0.5 + 0.5 * w_low * norm_low * inverse) * CUT)[None, :]
    scale_high = ((0.5 + 0.5 * w_high * norm_high * inverse) * CUT)[None, :]

    dx_low, dx_high = zeros, zeros
    found = tl.zeros((ROWS, PAIRS), tl.int32)
    for i in tl.static_range(HELD):
        value, minor = _release(held_low[i])
        low = value * scale_low + minor * pull_low
        value, minor = _release(held_high[i])
        high = value * scale_high + minor * pull_high
        word = _join(low, high, True, NVIDIA)
        _store(dx, word, i, tile, row, R, D, ROWS, TAIL, HELD)
        if largest is not None:
            found = tl.maximum(found, _magnitude(word, i, row, R, ROWS, TAIL, HELD))
        dx_low += _inside(low, i, row, R, ROWS, TAIL, HELD)
        dx_high += _inside(high, i, row, R, ROWS, TAIL, HELD)
    tl.store(sums + 2 * D + c, tl.sum(dx_low, 0))
    tl.store(sums + 2 * D + c + 1, tl.sum(dx_high, 0))
    if largest is not None:
        raise_to(largest, found << 16)
