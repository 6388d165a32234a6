// The backward pass of a layer norm over C channels, 16 bit, a row per warp: see norm_cuda.py.
// The host defines BF16, C, WARPS and BLOCKS.
constexpr int THREADS = 32 * WARPS, PER = (C + 127) / 128;  // a lane has four channels of every 128

struct Row {
    Words x[PER], dy[PER];
    float mean, scale;
};

DEVICE bool inside(int k) { return C % 128 == 0 || k * 128 + threadIdx.x % 32 * 4 < C; }

DEVICE Row load_row(const char* dy, const char* x, const float* means, const float* scales, int row) {
    const i64 place = ((i64)row * C + threadIdx.x % 32 * 4) * 2;
    Row found;
#pragma unroll
    for (int k = 0; k < PER; ++k)
        if (inside(k)) {
            found.x[k] = *(const Words*)(x + place + k * 256);
            found.dy[k] = *(const Words*)(dy + place + k * 256);
        }
    found.mean = means[row];
    found.scale = scales[row];
    return found;
}

// dy, x, dx: [rows, C]. weight: float32 [C]. means, scales (inverse standard deviations): float32 [rows].
// partial: float32 [blocks, 2, C], sums for weight and bias.
KERNEL(THREADS, BLOCKS) layer_norm_backward(const char* dy, const char* x, const float* weight, const float* means,
                                            const float* scales, char* dx, float* partial, int rows) {
    SHARED_MEMORY(shared);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, step = gridDim.x * WARPS;
    float w[PER][4], of_weight[PER][4], of_bias[PER][4];
#pragma unroll
    for (int k = 0; k < PER; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            w[k][i] = inside(k) ? weight[k * 128 + lane * 4 + i] : 0.0f;
            of_weight[k][i] = of_bias[k][i] = 0.0f;
        }
    int row = blockIdx.x * WARPS + warp;
    Row next;
    if (row < rows) next = load_row(dy, x, means, scales, row);
    for (; row < rows; row += step) {
        const Row now = next;
        if (row + step < rows) next = load_row(dy, x, means, scales, row + step);
        float unit[PER][4], d[PER][4], sum = 0.0f, pull = 0.0f;
#pragma unroll
        for (int k = 0; k < PER; ++k) {
            if (!inside(k)) continue;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const pair of_x = split(now.x[k].v[i / 2]), of_dy = split(now.dy[k].v[i / 2]);
                const float grad = i % 2 ? of_dy.high : of_dy.low;
                unit[k][i] = ((i % 2 ? of_x.high : of_x.low) - now.mean) * now.scale;
                of_weight[k][i] += grad * unit[k][i];
                of_bias[k][i] += grad;
                d[k][i] = grad * w[k][i];
                sum += d[k][i];
                pull += d[k][i] * unit[k][i];
            }
        }
        sum = sum_over_warp(sum) * (1.0f / C);
        pull = sum_over_warp(pull) * (1.0f / C);
        char* target = dx + ((i64)row * C + lane * 4) * 2;
#pragma unroll
        for (int k = 0; k < PER; ++k) {
            if (!inside(k)) continue;
#pragma unroll
            for (int i = 0; i < 4; ++i) d[k][i] = (d[k][i] - sum - unit[k][i] * pull) * now.scale;
            *(Words*)(target + k * 256) = {join({d[k][0], d[k][1]}), join({d[k][2], d[k][3]})};
        }
    }
    // The warps' sums, in their order.
    float* added = (float*)shared;  // [2, PER * 128]
    for (int turn = 0; turn < WARPS; ++turn) {
        sync_block();
        if (warp == turn) {
#pragma unroll
            for (int k = 0; k < PER; ++k)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    float* place = added + k * 128 + lane * 4 + i;
                    place[0] = turn ? place[0] + of_weight[k][i] : of_weight[k][i];
                    place[PER * 128] = turn ? place[PER * 128] + of_bias[k][i] : of_bias[k][i];
                }
        }
    }
    sync_block();
    for (int c = threadIdx.x; c < C; c += THREADS) {
        partial[(i64)blockIdx.x * (2 * C) + c] = added[c];
        partial[(i64)blockIdx.x * (2 * C) + C + c] = added[PER * 128 + c];
    }
}
