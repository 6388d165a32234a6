// Depthwise 7 x 7 convolution of packed patches of S x S sites, 16 bit: see depthwise_cuda.py.
// The host defines BF16, C, V, WIDTH, S, WARPS and BLOCKS.
constexpr int K = 7, HALO = 3, TAPS = K * K;
constexpr int REACH = (HALO + S - 1) / S, SIDE = 2 * REACH + 1, NEAR = SIDE * SIDE, WORDS = (NEAR + 31) / 32;
constexpr int SITES = S * S, SLAB = 64, THREADS = 32 * WARPS;
constexpr int ROW_BYTES = SLAB * 2, PATCH_BYTES = SITES * ROW_BYTES, IMAGE_BYTES = V * PATCH_BYTES;
constexpr int PLACES = WARPS * WORDS * 32 * 4;

// Starts copying a slab of 64 channels of an image's sites.
DEVICE void fetch(char* buffer, const char* x, i64 image, int slab) {
    constexpr int CHUNKS = IMAGE_BYTES / 16;
    const char* source = x + image * (i64)(V * SITES * C * 2) + slab * ROW_BYTES;
#pragma unroll
    for (int i = 0; i < (CHUNKS + THREADS - 1) / THREADS; ++i) {
        const int chunk = i * THREADS + threadIdx.x;
        if ((i + 1) * THREADS <= CHUNKS || chunk < CHUNKS) {
            const int row = chunk / 8, part = chunk % 8;
            const bool inside = C % SLAB == 0 || slab * SLAB + part * 8 < C;
            copy_16(buffer + chunk * 16, inside ? source + (i64)row * (C * 2) + part * 16 : x, inside);
        }
    }
}

// The slots of a tile's neighbouring patches, each in a lane, -1 where none is visible.
struct Near { int slot[WORDS]; };

DEVICE Near look_up(const int* slots, const int* cells, int tile, int stop) {
    const int lane = threadIdx.x % 32, cell = tile < stop ? cells[tile] : -1;
    Near near;
#pragma unroll
    for (int w = 0; w < WORDS; ++w) {
        const int n = w * 32 + lane;
        near.slot[w] = cell >= 0 && n < NEAR ? slots[cell + (n / SIDE - REACH) * WIDTH + n % SIDE - REACH] : -1;
    }
    return near;
}

// Which neighbours are visible, a bit each; where in its image's slab each lies goes to `offsets`.
struct Seen { u32 bits[WORDS]; };

DEVICE Seen place(Near near, int image, int* offsets) {
    Seen seen;
    sync_warp();
#pragma unroll
    for (int w = 0; w < WORDS; ++w) {
        seen.bits[w] = ballot(near.slot[w] >= 0);
        offsets[w * 32 + threadIdx.x % 32] = (near.slot[w] - image * V) * PATCH_BYTES;
    }
    sync_warp();
    return seen;
}

// Calls add(row, column, value) for every site of visible neighbours that the tile reads; rows count from the tile's.
template <typename Add>
DEVICE void visit(Seen seen, const int* offsets, const char* slab, Add add) {
#pragma unroll
    for (int n = 0; n < NEAR; ++n) {
        if (seen.bits[n / 32] >> n % 32 & 1) {
            const char* source = slab + offsets[n];
#pragma unroll
            for (int i = 0; i < SITES; ++i) {
                const int row = (n / SIDE - REACH) * S + i / S, column = (n % SIDE - REACH) * S + i % S;
                if (row >= -HALO && row < S + HALO && column >= -HALO && column < S + HALO)
                    add(row, column, split(*(const u32*)(source + i * ROW_BYTES)));
            }
        }
    }
}

// Calls meet(o, tap) for every output site o of the tile that an input site at (row, column) reaches.
template <typename Meet>
DEVICE void reach(int row, int column, Meet meet) {
#pragma unroll
    for (int o = 0; o < SITES; ++o) {
        const int ky = row - o / S + HALO, kx = column - o % S + HALO;
        if (ky >= 0 && ky < K && kx >= 0 && kx < K) meet(o, ky * K + kx);
    }
}

// Adds the warps' numbers in their order and writes them, rows of C; number(t) is a thread's pair for row t.
template <int ROWS, typename Number>
DEVICE void add_warps(char* shared, float* target, Number number) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, slab = blockIdx.x;
    float* added = (float*)shared;
    for (int turn = 0; turn < WARPS; ++turn) {
        sync_block();
        if (warp == turn) {
#pragma unroll
            for (int t = 0; t < ROWS; ++t) {
                const pair value = number(t);
                float* sum = added + t * SLAB + 2 * lane;
                sum[0] = turn ? sum[0] + value.low : value.low;
                sum[1] = turn ? sum[1] + value.high : value.high;
            }
        }
    }
    sync_block();
    for (int i = threadIdx.x; i < ROWS * SLAB; i += THREADS) {
        const int channel = slab * SLAB + i % SLAB;
        if (C % SLAB == 0 || channel < C) target[(i64)(i / SLAB) * C + channel] = added[i];
    }
}

// Calls tile(number of the tile, patch in its image, what it sees, slabs of its image) for a warp's tiles.
// While a block computes an image, the next one is on its way.
template <int ARRAYS, typename Tile>
DEVICE void walk(char* shared, const char* x, const char* grad, const int* slots, const int* cells, int tiles,
                 int tiles_per_block, Tile tile) {
    const int warp = threadIdx.x / 32, slab = blockIdx.x;
    int* offsets = (int*)(shared + 2 * ARRAYS * IMAGE_BYTES) + warp * WORDS * 32;
    const int start = blockIdx.y * tiles_per_block, stop = min(start + tiles_per_block, tiles);
    int image = start / V, first = start % V;
    char *buffer = shared, *other = shared + ARRAYS * IMAGE_BYTES;
    fetch(buffer, x, image, slab);
    if (ARRAYS == 2) fetch(buffer + IMAGE_BYTES, grad, image, slab);
    commit();
    Near near = look_up(slots, cells, first + warp < V ? start + warp : (image + 1) * V + warp, stop);
    for (; image * V < stop; ++image, first = 0) {
        wait_for_copies<0>();
        sync_block();
        if ((image + 1) * V < stop) {
            fetch(other, x, image + 1, slab);
            if (ARRAYS == 2) fetch(other + IMAGE_BYTES, grad, image + 1, slab);
        }
        commit();
        const int last = min(stop - image * V, V);
        for (int patch = first + warp; patch < last; patch += WARPS) {
            const int number = image * V + patch;
            const Seen seen = place(near, image, offsets);
            near = look_up(slots, cells, patch + WARPS < V ? number + WARPS : (image + 1) * V + warp, stop);
            tile(number, patch, seen, offsets, buffer + threadIdx.x % 32 * 4);
        }
        char* swap = buffer;
        buffer = other;
        other = swap;
    }
}

// The convolution; TURNED by 180 degrees, without bias, the gradient of its input. With a skip connection's gradient,
// which is added, also its sums over sites, a row per block.
template <bool TURNED, bool SKIP>
DEVICE void convolve(char* shared, const char* x, const float* weight, const float* bias, const char* skip, char* y,
                     float* sums, const int* slots, const int* cells, int tiles, int tiles_per_block) {
    const int lane = threadIdx.x % 32, slab = blockIdx.x, channel = slab * SLAB + 2 * lane;
    const bool inside = C % SLAB == 0 || channel < C;
    float* staged = (float*)shared;
    for (int i = threadIdx.x; i < SLAB * TAPS; i += THREADS)
        staged[i] = C % SLAB == 0 || slab * SLAB + i / TAPS < C ? weight[slab * SLAB * TAPS + i] : 0.0f;
    sync_block();
    pair taps[TAPS], shift = {0.0f, 0.0f}, total = {0.0f, 0.0f};
#pragma unroll
    for (int t = 0; t < TAPS; ++t) {
        const int tap = TURNED ? TAPS - 1 - t : t;
        taps[t] = {staged[2 * lane * TAPS + tap], staged[(2 * lane + 1) * TAPS + tap]};
    }
    if (!TURNED && bias && inside) shift = {bias[channel], bias[channel + 1]};
    sync_block();
    walk<1>(shared, x, nullptr, slots, cells, tiles, tiles_per_block,
            [&](int tile, int patch, Seen seen, const int* offsets, const char* own) {
        const i64 place = ((i64)tile * (SITES * C) + channel) / 2;
        u32 skipped[SITES];
        pair values[SITES];
#pragma unroll
        for (int o = 0; o < SITES; ++o) {
            if (SKIP) skipped[o] = inside ? ((const u32*)skip)[place + o * (C / 2)] : 0u;
            values[o] = shift;
        }
        visit(seen, offsets, own, [&](int row, int column, pair value) {
            reach(row, column, [&](int o, int tap) {
                values[o].low += value.low * taps[tap].low;
                values[o].high += value.high * taps[tap].high;
            });
        });
#pragma unroll
        for (int o = 0; o < SITES; ++o) {
            if (SKIP) {
                const pair more = split(skipped[o]);
                values[o].low += more.low;
                values[o].high += more.high;
                total.low += more.low;
                total.high += more.high;
            }
            if (inside) ((u32*)y)[place + o * (C / 2)] = join(values[o]);
        }
    });
    if (SKIP) add_warps<1>(shared, sums + (i64)blockIdx.y * C, [&](int) { return total; });
}

// x, y: [N * V, S, S, C]. weight: float32 [C, 49]. bias: float32 [C] or null. slots, cells: the tables of `Neighbors`.
KERNEL(THREADS, BLOCKS) packed_forward(const char* x, const float* weight, const float* bias, char* y, const int* slots,
                                       const int* cells, int tiles, int tiles_per_block) {
    SHARED_MEMORY(shared);
    convolve<false, false>(shared, x, weight, bias, nullptr, y, nullptr, slots, cells, tiles, tiles_per_block);
}

KERNEL(THREADS, BLOCKS) packed_input_grad(const char* grad, const float* weight, char* dx, const int* slots,
                                          const int* cells, int tiles, int tiles_per_block) {
    SHARED_MEMORY(shared);
    convolve<true, false>(shared, grad, weight, nullptr, nullptr, dx, nullptr, slots, cells, tiles, tiles_per_block);
}

// sums: float32 [blocks, C].
KERNEL(THREADS, BLOCKS) packed_input_grad_and_skip(const char* grad, const float* weight, const char* skip, char* dx,
                                                   float* sums, const int* slots, const int* cells, int tiles,
                                                   int tiles_per_block) {
    SHARED_MEMORY(shared);
    convolve<true, true>(shared, grad, weight, nullptr, skip, dx, sums, slots, cells, tiles, tiles_per_block);
}

// partial: float32 [blocks, 50, C], sums of grad * x for every tap, and of grad, over the tiles of a block.
KERNEL(THREADS, BLOCKS) packed_weight_grad(const char* x, const char* grad, float* partial, const int* slots,
                                           const int* cells, int tiles, int tiles_per_block) {
    SHARED_MEMORY(shared);
    pair sums[TAPS], total = {0.0f, 0.0f};
#pragma unroll
    for (int t = 0; t < TAPS; ++t) sums[t] = {0.0f, 0.0f};
    walk<2>(shared, x, grad, slots, cells, tiles, tiles_per_block,
            [&](int tile, int patch, Seen seen, const int* offsets, const char* own) {
        pair grads[SITES];
#pragma unroll
        for (int o = 0; o < SITES; ++o) {
            grads[o] = split(*(const u32*)(own + IMAGE_BYTES + patch * PATCH_BYTES + o * ROW_BYTES));
            total.low += grads[o].low;
            total.high += grads[o].high;
        }
        visit(seen, offsets, own, [&](int row, int column, pair value) {
            reach(row, column, [&](int o, int tap) {
                sums[tap].low += value.low * grads[o].low;
                sums[tap].high += value.high * grads[o].high;
            });
        });
    });
    add_warps<TAPS + 1>(shared, partial + (i64)blockIdx.y * ((TAPS + 1) * C),
                        [&](int t) { return t < TAPS ? sums[t] : total; });
}
