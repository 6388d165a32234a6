"""What the Triton kernels of GELU and GRN share: GELU and its slope, and the sum over the programs of an image."""

import triton
import triton.language as tl

ALPHA = tl.constexpr(0.8493218002880191)
"""sqrt(log2(e) / 2)"""


@triton.jit
def _erf_magnitude(u, gauss, EXACT: tl.constexpr):
    """erf(|x| / sqrt(2)) at u = ALPHA x, with gauss = exp(-x^2 / 2)."""
    if EXACT:
        return tl.erf(tl.abs(u) * 0.8325546111576977)
    r = tl.rsqrt(tl.abs(u) * 0.6475755124 + 1.0)
    # tails * r = 2 m(|x|) / sqrt(2 pi)
    tails = -1.682142756 * r + 4.614482
    tails = tails * r - 3.45367596
    tails = tails * r + 1.692081608
    tails = tails * r - 0.170706725
    return 1.0 - gauss * (tails * r)


@triton.jit
def scaled_gelu(u, EXACT: tl.constexpr):
    """2 ALPHA GELU(x) at u = ALPHA x."""
    return u + tl.abs(u) * _erf_magnitude(u, tl.exp2(-(u * u)), EXACT)


@triton.jit
def scaled_gelu_and_slope(u, EXACT: tl.constexpr):
    """2 ALPHA GELU(x) and 2 GELU'(x) at u = ALPHA x."""
    gauss = tl.exp2(-(u * u))
    erf = _erf_magnitude(u, gauss, EXACT)
    sign = u.to(tl.int32, bitcast=True) & -2147483648
    slope = (
        1.0 + (erf.to(tl.int32, bitcast=True) ^ sign).to(tl.float32, bitcast=True) + (0.9394372786996513 * u) * gauss
    )
    return u + tl.abs(u) * erf, slope


@triton.jit
def sum_over_image(value, mail, image, part, parts, PARTS: tl.constexpr):
    """Adds up one float32 of every program of an image.

    ``mail`` is int64 ``[N, parts]``, zero at first. A word carries a number in its low half and 1 in its high half, so
    that a number and the sign that it has arrived are one access, which needs no memory fence.
    """
    if PARTS == 1:
        return value
    mail += image * parts
    word = (value.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF) | (1 << 32)
    tl.atomic_xchg(mail + part, word, sem="relaxed")
    k = tl.arange(0, PARTS)
    # volatile: past the multiprocessor's own cache, which would not see what the others write.
    words = tl.load(mail + k, mask=k < parts, other=1 << 32, volatile=True)
    while tl.min(words >> 32, 0) == 0:
        words = tl.load(mail + k, mask=k < parts, other=1 << 32, volatile=True)
    return tl.sum(words.to(tl.int32).to(tl.float32, bitcast=True), 0)
