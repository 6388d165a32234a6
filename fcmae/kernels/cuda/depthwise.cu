// Depthwise 7 x 7 convolution of packed patches of S x S sites, 16 bit: see depthwise_cuda.py.
// The host defines BF16, C, V, HEIGHT and WIDTH (of the table of slots), S, WARPS, BLOCKS and ALWAYS.
constexpr int K = 7, HALO = 3, TAPS = K * K;
constexpr int REACH = (HALO + S - 1) / S, SIDE = 2 * REACH + 1, NEAR = SIDE * SIDE, WORDS = (NEAR + 31) / 32;
constexpr int SITES = S * S, SLAB = 64, THREADS = 32 * WARPS;  // a slab is a block's channels, two per lane
constexpr int ROW_BYTES = SLAB * 2, PATCH_BYTES = SITES * ROW_BYTES, IMAGE_BYTES = V * PATCH_BYTES;
constexpr int PITCH = SIDE > 4 ? 8 : 4;  // of a row of neighbours
constexpr int BUFFER_BYTES = IMAGE_BYTES + PATCH_BYTES;  // with a patch of zeros
constexpr int CELLS = HEIGHT * WIDTH, TABLE_BYTES = (CELLS + V + 3) / 4 * 16;  // an image's slots and cells

DEVICE pair load(const char* from) { return split(*(const u32*)from); }

DEVICE void add(pair& sum, pair x) {
    sum.low += x.low;
    sum.high += x.high;
}

DEVICE void add_product(pair& sum, pair x, pair y) {
    sum.low += x.low * y.low;
    sum.high += x.high * y.high;
}

// Starts copying a slab of channels of an image's sites.
DEVICE void fetch(char* buffer, const char* x, i64 image, int slab) {
    constexpr int CHUNKS = IMAGE_BYTES / 16;
    const char* source = x + image * (i64)(V * SITES * C * 2) + slab * ROW_BYTES;
#pragma unroll
    for (int i = 0; i < (CHUNKS + THREADS - 1) / THREADS; ++i) {
        const int chunk = i * THREADS + threadIdx.x;
        if ((i + 1) * THREADS <= CHUNKS || chunk < CHUNKS) {
            const int row = chunk / (SLAB / 8), part = chunk % (SLAB / 8);
            const bool inside = C % SLAB == 0 || slab * SLAB + part * 8 < C;
            copy_16(buffer + chunk * 16, inside ? source + (i64)row * (C * 2) + part * 16 : x, inside);
        }
    }
}

// Starts copying an image's tables.
DEVICE void fetch_tables(int* table, const int* slots, const int* cells, int image) {
#pragma unroll
    for (int i = threadIdx.x; i < CELLS + V; i += THREADS)
        copy_4(table + i, i < CELLS ? slots + (i64)image * CELLS + i : cells + (i64)image * V + i - CELLS);
}

// Which neighbours are visible, a bit each; where in its image's slab each lies goes to `offsets`: one that is not is
// zeros.
struct Seen { u32 bits[WORDS]; };

DEVICE Seen look_up(const int* table, int image, int patch, int* offsets) {
    const int cell = table[CELLS + patch] - image * CELLS;
    Seen seen;
    sync_warp();
#pragma unroll
    for (int w = 0; w < WORDS; ++w) {
        const int n = w * 32 + threadIdx.x % 32, line = n / SIDE, k = n % SIDE;
        const int slot = n < NEAR ? table[cell + (line - REACH) * WIDTH + k - REACH] : -1;
        seen.bits[w] = ballot(slot >= 0);
        if (n < NEAR) offsets[line * PITCH + k] = (slot < 0 ? V : slot - image * V) * PATCH_BYTES;
    }
    sync_warp();
    return seen;
}

struct alignas(16) Offsets { int v[PITCH]; };

// How many pairs of positions are in reach: one in a line of a tile's sites, one in the patch `offset` patches away.
DEVICE constexpr int pairs(int offset) {
    int count = 0;
    for (int i = 0; i < S; ++i)
        for (int o = 0; o < S; ++o) count += offset * S + i - o >= -HALO && offset * S + i - o <= HALO;
    return count;
}

// Calls take(row, column, value) for every site of visible neighbours that the tile reads; rows count from the tile's.
// A branch costs as much as some twenty instructions: a neighbour with few products is read as zeros instead.
template <typename Take>
DEVICE void visit(Seen seen, const int* offsets, const char* slab, Take take) {
#pragma unroll
    for (int line = 0; line < SIDE; ++line) {
        const Offsets near = ((const Offsets*)offsets)[line];
#pragma unroll
        for (int k = 0; k < SIDE; ++k) {
            const int n = line * SIDE + k;
            const bool always = n == NEAR / 2 || pairs(line - REACH) * pairs(k - REACH) <= ALWAYS;
            if (always || seen.bits[n / 32] >> n % 32 & 1) {
                const char* source = slab + near.v[k];
#pragma unroll
                for (int i = 0; i < SITES; ++i) {
                    const int row = (line - REACH) * S + i / S, column = (k - REACH) * S + i % S;
                    if (row >= -HALO && row < S + HALO && column >= -HALO && column < S + HALO)
                        take(row, column, load(source + i * ROW_BYTES));
                }
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

// Adds the warps' numbers in their order and writes them, rows of C; number(t) is a thread's for row t.
template <int ROWS, typename Number>
DEVICE void add_warps(float* added, float* target, Number number) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, slab = blockIdx.x;
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
// prepare() runs when the first image, and what was fetched before, has arrived.
template <int ARRAYS, typename Prepare, typename Tile>
DEVICE void walk(char* shared, const char* x, const char* grad, const int* slots, const int* cells, int tiles,
                 int tiles_per_block, Prepare prepare, Tile tile) {
    const int warp = threadIdx.x / 32, slab = blockIdx.x;
    int* tables = (int*)(shared + 2 * ARRAYS * BUFFER_BYTES);
    int* offsets = tables + 2 * TABLE_BYTES / 4 + warp * SIDE * PITCH;
    const int start = blockIdx.y * tiles_per_block, stop = min(start + tiles_per_block, tiles);
    for (int i = threadIdx.x; i < PATCH_BYTES / 4; i += THREADS)
        for (int turn = 0; turn < 2; ++turn) ((u32*)(shared + turn * ARRAYS * BUFFER_BYTES + IMAGE_BYTES))[i] = 0;
    const auto start_copies = [&](int image, int turn) {
        char* buffer = shared + turn * ARRAYS * BUFFER_BYTES;
        fetch(buffer, x, image, slab);
        if (ARRAYS == 2) fetch(buffer + BUFFER_BYTES, grad, image, slab);
        fetch_tables(tables + turn * (TABLE_BYTES / 4), slots, cells, image);
    };
    int image = start / V, first = start % V, turn = 0;
    start_copies(image, turn);
    commit();
    bool prepared = false;
    for (; image * V < stop; ++image, first = 0, turn ^= 1) {
        wait_for_copies<0>();
        sync_block();
        if (!prepared) prepare();
        prepared = true;
        if ((image + 1) * V < stop) start_copies(image + 1, turn ^ 1);
        commit();
        const int last = min(stop - image * V, V);
        const char* own = shared + turn * ARRAYS * BUFFER_BYTES + threadIdx.x % 32 * 4;
        for (int patch = first + warp; patch < last; patch += WARPS) {
            const Seen seen = look_up(tables + turn * (TABLE_BYTES / 4), image, patch, offsets);
            tile(image * V + patch, patch, seen, offsets, own);
        }
    }
}

// The convolution; TURNED by 180 degrees, without bias, the gradient of its input. With a skip connection's gradient,
// which is added, also its sums over sites, a row per block.
template <bool TURNED, bool SKIP>
DEVICE void convolve(char* shared, const char* x, const float* weight, const float* bias, const char* skip, char* y,
                     float* sums, const int* slots, const int* cells, int tiles, int tiles_per_block) {
    constexpr int ARRAYS = SKIP ? 2 : 1;
    const int lane = threadIdx.x % 32, slab = blockIdx.x, channel = slab * SLAB + 2 * lane;
    const bool inside = C % SLAB == 0 || channel < C;
    float* staged = (float*)(shared + 2 * (ARRAYS * BUFFER_BYTES + TABLE_BYTES) + WARPS * SIDE * PITCH * 4);
#pragma unroll
    for (int chunk = threadIdx.x; chunk < SLAB * TAPS / 4; chunk += THREADS) {
        const i64 from = slab * (SLAB * TAPS) + chunk * 4;
        const bool exists = C % SLAB == 0 || from < C * TAPS;
        copy_16((char*)(staged + chunk * 4), (const char*)(exists ? weight + from : weight), exists);
    }
    pair taps[TAPS], shift = {0.0f, 0.0f}, total = shift;
    const auto prepare = [&]() {
#pragma unroll
        for (int t = 0; t < TAPS; ++t) {
            const float* tap = staged + 2 * lane * TAPS + (TURNED ? TAPS - 1 - t : t);
            taps[t] = {tap[0], tap[TAPS]};
        }
        if (!TURNED && bias && inside) shift = {bias[channel], bias[channel + 1]};
    };
    walk<ARRAYS>(shared, x, skip, slots, cells, tiles, tiles_per_block, prepare,
                 [&](int tile, int patch, Seen seen, const int* offsets, const char* own) {
        char* target = y + ((i64)tile * (SITES * C) + channel) * 2;
        pair values[SITES];
#pragma unroll
        for (int o = 0; o < SITES; ++o) values[o] = shift;
        visit(seen, offsets, own, [&](int row, int column, pair value) {
            reach(row, column, [&](int o, int tap) { add_product(values[o], value, taps[tap]); });
        });
#pragma unroll
        for (int o = 0; o < SITES; ++o) {
            if (SKIP) {
                const pair more = load(own + BUFFER_BYTES + patch * PATCH_BYTES + o * ROW_BYTES);
                add(values[o], more);
                add(total, more);
            }
            if (inside) *(u32*)(target + o * (C * 2)) = join(values[o]);
        }
    });
    if (SKIP) add_warps<1>((float*)shared, sums + (i64)blockIdx.y * C, [&](int) { return total; });
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
    walk<2>(shared, x, grad, slots, cells, tiles, tiles_per_block, []() {},
            [&](int tile, int patch, Seen seen, const int* offsets, const char* own) {
        pair grads[SITES];
#pragma unroll
        for (int o = 0; o < SITES; ++o) {
            grads[o] = load(own + BUFFER_BYTES + patch * PATCH_BYTES + o * ROW_BYTES);
            add(total, grads[o]);
        }
        visit(seen, offsets, own, [&](int row, int column, pair value) {
            reach(row, column, [&](int o, int tap) { add_product(sums[tap], value, grads[o]); });
        });
    });
    add_warps<TAPS + 1>((float*)shared, partial + (i64)blockIdx.y * ((TAPS + 1) * C),
                        [&](int t) { return t < TAPS ? sums[t] : total; });
}
