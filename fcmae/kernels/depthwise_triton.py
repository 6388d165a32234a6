"""Triton kernels of the packed depthwise convolution; depthwise_launch.py plans and launches them.

Every thread holds two channels and, in float32 registers, all k*k taps of them (weight gradient: all k*k sums), while
its program walks over a range of output tiles. A tile is ``ROWS`` x S sites of one patch. Its neighbourhood is read in
groups, one for each row of neighbouring patches (one for each row of input sites where a tile is lower than its patch);
every input site is read once per tile, ``AHEAD`` groups before it is needed, and used for all the outputs it reaches.
Neighbours that are masked or outside the image are found in a table of slots and skipped by a branch that is uniform
in the program, which saves half the arithmetic at S = 2 and a mask ratio of 0.6.

There are no atomics: a program of the weight gradient writes its own partial sums, added afterwards in a fixed order.
Only ``tl`` operations, so that ROCm's Triton compiles them too, but for ``_prefetch``, which NVIDIA's GPUs alone have:
two or three warps per scheduler cannot hide the latency of memory without it. Offsets of sites are 64 bit.
"""

# In kernels, tuples of registers grow while loops are unrolled: their type is another at every turn.
# mypy: disable-error-code="assignment"

import triton
import triton.language as tl


@triton.constexpr_function
def _first(offset, side, halo):
    """First position, in a tile with its halo, that lies in the patch ``offset`` patches away."""
    return max(0, offset * side + halo)


@triton.constexpr_function
def _count(offset, side, halo):
    """How many positions of a patch-sized tile with its halo lie in the patch ``offset`` patches away."""
    return min(side + 2 * halo, (offset + 1) * side + halo) - max(0, offset * side + halo)


@triton.constexpr_function
def _inside(offset, side, halo):
    """Position within the patch ``offset`` patches away of the first one that the tile reads."""
    return max(0, offset * side + halo) - halo - offset * side


@triton.constexpr_function
def _reach(side, halo):
    """How many patches away a kernel reaches."""
    return (halo + side - 1) // side


@triton.constexpr_function
def _groups(rows, side, halo):
    """Groups of input rows of a tile: rows of patches where the tile is a whole patch, else rows of sites."""
    return 2 * ((halo + side - 1) // side) + 1 if rows == side else rows + 2 * halo


@triton.constexpr_function
def _group_first(group, rows, side, halo):
    """First row, in a tile with its halo, of a group."""
    return _first(group - _reach(side, halo), side, halo) if rows == side else group


@triton.constexpr_function
def _group_count(group, rows, side, halo):
    """Rows of a group."""
    return _count(group - _reach(side, halo), side, halo) if rows == side else 1


@triton.constexpr_function
def _overlap_start(start, window):
    """First position of a line of sites beginning at ``start`` that lies in a window beginning at ``window``."""
    return max(0, window - start)


@triton.constexpr_function
def _overlap_stop(start, window, sites, length):
    """One past the last position of a line of ``sites`` at ``start`` that lies in a window of ``length``."""
    return min(sites, window - start + length)


@triton.jit
def _load_slots(slots, cells, tile, S: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """Slots of the neighbouring patches, a tuple for each group; negative where none is visible."""
    REACH: tl.constexpr = _reach(S, K // 2)
    cell = tl.load(cells + tile // (S // ROWS))
    table = ()
    for group in tl.static_range(_groups(ROWS, S, K // 2)):
        if ROWS == S:
            line = slots + cell + (group - REACH) * WIDTH
        else:
            y = tile % (S // ROWS) * ROWS + (group - K // 2 + REACH * S)
            line = slots + cell + (y // S - REACH) * WIDTH
        found = ()
        for offset in tl.static_range(-REACH, REACH + 1):
            found += (tl.load(line + offset),)
        table += (found,)
    return table


@triton.jit
def _load_group(
    x, table, tile, valid, GROUP: tl.constexpr, C: tl.constexpr, S: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr,
    TAIL: tl.constexpr,
):  # fmt: skip
    """Input sites of a group, a flat tuple for each neighbouring patch. Where there is none, any patch is read."""
    REACH: tl.constexpr = _reach(S, K // 2)
    if ROWS == S:
        y = _inside(GROUP - REACH, S, K // 2)
    else:
        y = (tile % (S // ROWS) * ROWS + (GROUP - K // 2 + REACH * S)) % S
    sites = ()
    for offset in tl.static_range(-REACH, REACH + 1):
        slot = tl.maximum(table[GROUP][offset + REACH], 0)
        source = x + slot.to(tl.int64) * (S * S * C) + (y * S + _inside(offset, S, K // 2)) * C
        values = ()
        for row in tl.static_range(_group_count(GROUP, ROWS, S, K // 2)):
            for column in tl.static_range(_count(offset, S, K // 2)):
                if TAIL:
                    values += (tl.load(source + (row * S + column) * C, mask=valid, other=0.0),)
                else:
                    values += (tl.load(source + (row * S + column) * C),)
        sites += (values,)
    return sites


@triton.jit
def _prefetch(x, tile, tiles, C: tl.constexpr, SITES: tl.constexpr, CHANNELS: tl.constexpr):
    """Brings a later tile into the second-level cache, which takes no registers; a thread names one of its channels."""
    lane = tl.program_id(0) * CHANNELS + 2 * tl.arange(0, CHANNELS // 2)
    source = x + tl.minimum(tile, tiles - 1) * (SITES * C) + tl.minimum(lane, C - 1)
    for i in tl.static_range(SITES):
        tl.inline_asm_elementwise(
            "{ prefetch.global.L2 [$1]; mov.u32 $0, 0; }",
            "=r,l",
            [(source + i * C).to(tl.int64)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def _convolve(
    sums, taps, values, TOP: tl.constexpr, LEFT: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    S: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Adds to the ROWS x S output sums what HEIGHT x WIDTH input sites at (TOP, LEFT) of the tile contribute."""
    inputs = ()
    for i in tl.static_range(HEIGHT * WIDTH):
        inputs += (values[i].to(tl.float32),)
    result = ()
    for y in tl.static_range(ROWS):
        for x in tl.static_range(S):
            total = sums[y * S + x]
            for row in tl.static_range(_overlap_start(TOP, y), _overlap_stop(TOP, y, HEIGHT, K)):
                for column in tl.static_range(_overlap_start(LEFT, x), _overlap_stop(LEFT, x, WIDTH, K)):
                    total += inputs[row * WIDTH + column] * taps[(TOP + row - y) * K + LEFT + column - x]
            result += (total,)
    return result


@triton.jit
def _correlate(
    sums, grads, values, TOP: tl.constexpr, LEFT: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    S: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Adds to the K rows of K weight sums what HEIGHT x WIDTH input sites at (TOP, LEFT) of the tile contribute."""
    inputs = ()
    for i in tl.static_range(HEIGHT * WIDTH):
        inputs += (values[i].to(tl.float32),)
    result = ()
    for ky in tl.static_range(K):
        if ky - TOP >= HEIGHT or ky - TOP + ROWS <= 0:
            result += (sums[ky],)
        else:
            line = ()
            for kx in tl.static_range(K):
                total = sums[ky][kx]
                if kx - LEFT < WIDTH and kx - LEFT + S > 0:
                    for row in tl.static_range(_overlap_start(TOP, ky), _overlap_stop(TOP, ky, HEIGHT, ROWS)):
                        for column in tl.static_range(_overlap_start(LEFT, kx), _overlap_stop(LEFT, kx, WIDTH, S)):
                            total += inputs[row * WIDTH + column] * grads[(TOP + row - ky) * S + LEFT + column - kx]
                line += (total,)
            result += (line,)
    return result


@triton.jit
def _accumulate(
    sums, factors, sites, table, GROUP: tl.constexpr, S: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr,
    WEIGHT_GRAD: tl.constexpr,
):  # fmt: skip
    """Adds one group, skipping neighbours that are not visible."""
    REACH: tl.constexpr = _reach(S, K // 2)
    for offset in tl.static_range(-REACH, REACH + 1):
        if table[GROUP][offset + REACH] >= 0:
            if WEIGHT_GRAD:
                sums = _correlate(
                    sums, factors, sites[offset + REACH], _group_first(GROUP, ROWS, S, K // 2),
                    _first(offset, S, K // 2), _group_count(GROUP, ROWS, S, K // 2), _count(offset, S, K // 2), S, K,
                    ROWS,
                )  # fmt: skip
            else:
                sums = _convolve(
                    sums, factors, sites[offset + REACH], _group_first(GROUP, ROWS, S, K // 2),
                    _first(offset, S, K // 2), _group_count(GROUP, ROWS, S, K // 2), _count(offset, S, K // 2), S, K,
                    ROWS,
                )  # fmt: skip
    return sums


@triton.jit
def _add_tile(
    sums, factors, x, slots, cells, tile, valid, C: tl.constexpr, S: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, AHEAD: tl.constexpr, TAIL: tl.constexpr, WEIGHT_GRAD: tl.constexpr,
):  # fmt: skip
    """Adds the whole neighbourhood of a tile to the sums."""
    GROUPS: tl.constexpr = _groups(ROWS, S, K // 2)
    table = _load_slots(slots, cells, tile, S, K, WIDTH, ROWS)
    queue = ()
    for step in tl.static_range(GROUPS + AHEAD):
        if step < GROUPS:
            queue += (_load_group(x, table, tile, valid, step, C, S, K, ROWS, TAIL),)
        if step >= AHEAD:
            sums = _accumulate(sums, factors, queue[step - AHEAD], table, step - AHEAD, S, K, ROWS, WEIGHT_GRAD)
    return sums


@triton.jit(do_not_specialize=["turned"])
def taps_kernel(weight, bias, taps, turned, C: tl.constexpr, TAPS: tl.constexpr, CHANNELS: tl.constexpr):
    """Weights ``[C, TAPS]``, perhaps ``turned`` by 180 degrees, as float32 ``[TAPS + 1, C]``; bias or zero comes last.

    bias: ``[C]``, or None.
    """
    lane = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    tap = tl.program_id(1)
    source = tap + turned * (TAPS - 1 - 2 * tap)
    value = tl.load(weight + lane * TAPS + source, mask=(lane < C) & (tap < TAPS), other=0.0).to(tl.float32)
    if bias is not None:
        value += tl.load(bias + lane, mask=(lane < C) & (tap == TAPS), other=0.0).to(tl.float32)
    tl.store(taps + tap * C + lane, value, mask=lane < C)


@triton.jit(do_not_specialize=["tiles", "tiles_per_program", "tiles_ahead"])
def forward_kernel(
    x, taps, y, slots, cells, tiles, tiles_per_program, tiles_ahead, C: tl.constexpr, S: tl.constexpr, K: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, AHEAD: tl.constexpr, PREFETCH: tl.constexpr,
):  # fmt: skip
    """The convolution; with the taps turned by 180 degrees, its input gradient.

    x, y: ``[N*V, S, S, C]``. taps: float32 ``[K*K + 1, C]``, the last row is the bias.
    slots, cells: the tables of ``Neighbors``, WIDTH: columns of slots.
    """
    TAIL: tl.constexpr = C % CHANNELS != 0
    lane = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    valid = lane < C
    weights = ()
    for t in tl.static_range(K * K):
        weights += (tl.load(taps + t * C + lane, mask=valid, other=0.0),)
    bias = tl.load(taps + K * K * C + lane, mask=valid, other=0.0)
    channels = x + lane
    start = tl.program_id(1).to(tl.int64) * tiles_per_program
    for tile in range(start, tl.minimum(start + tiles_per_program, tiles)):
        if PREFETCH:
            _prefetch(x, tile + tiles_ahead, tiles, C, ROWS * S, CHANNELS)
        sums = ()
        for _ in tl.static_range(ROWS * S):
            sums += (bias,)
        sums = _add_tile(sums, weights, channels, slots, cells, tile, valid, C, S, K, WIDTH, ROWS, AHEAD, TAIL, False)
        target = y + tile * (ROWS * S * C) + lane
        for i in tl.static_range(ROWS * S):
            if TAIL:
                tl.store(target + i * C, sums[i].to(y.dtype.element_ty), mask=valid)
            else:
                tl.store(target + i * C, sums[i].to(y.dtype.element_ty))


@triton.jit(do_not_specialize=["tiles", "tiles_per_program", "tiles_ahead", "grads_ahead"])
def weight_grad_kernel(
    x, grad, partial, slots, cells, tiles, tiles_per_program, tiles_ahead, grads_ahead, C: tl.constexpr,
    S: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
    AHEAD: tl.constexpr, PREFETCH: tl.constexpr,
):  # fmt: skip
    """Sums of ``grad * x`` for every tap over the tiles of a program, and of ``grad`` (the bias gradient).

    x, grad: ``[N*V, S, S, C]``. partial: float32 ``[programs, K*K + 1, C]``, the last row is the bias gradient.
    slots, cells: the tables of ``Neighbors``, WIDTH: columns of slots.
    """
    TAIL: tl.constexpr = C % CHANNELS != 0
    lane = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    valid = lane < C
    sums = ()
    for _ in tl.static_range(K):
        line = ()
        for _ in tl.static_range(K):
            line += (tl.zeros((CHANNELS,), tl.float32),)
        sums += (line,)
    bias_sum = tl.zeros((CHANNELS,), tl.float32)
    channels = x + lane
    start = tl.program_id(1).to(tl.int64) * tiles_per_program
    for tile in range(start, tl.minimum(start + tiles_per_program, tiles)):
        source = grad + tile * (ROWS * S * C) + lane
        if PREFETCH:
            _prefetch(x, tile + tiles_ahead, tiles, C, ROWS * S, CHANNELS)
            _prefetch(grad, tile + grads_ahead, tiles, C, ROWS * S, CHANNELS)
        grads = ()
        for i in tl.static_range(ROWS * S):
            grads += (tl.load(source + i * C, mask=valid, other=0.0).to(tl.float32),)
            bias_sum += grads[i]
        sums = _add_tile(sums, grads, channels, slots, cells, tile, valid, C, S, K, WIDTH, ROWS, AHEAD, TAIL, True)
    target = partial + tl.program_id(1).to(tl.int64) * ((K * K + 1) * C) + lane
    for ky in tl.static_range(K):
        for kx in tl.static_range(K):
            tl.store(target + (ky * K + kx) * C, sums[ky][kx], mask=valid)
    tl.store(target + K * K * C, bias_sum, mask=valid)
