// GELU and GRN of 16-bit sites, an image per cluster of blocks: see grn_cuda.py.
// The host defines BF16, R (sites of an image), D (channels), CH (channels of a block), THREADS, BLOCKS, EPS.
constexpr int CLUSTER = D / CH, COLUMNS = CH / 4, GROUPS = THREADS / COLUMNS, WARPS = THREADS / 32;
constexpr int ARRAY_BYTES = R * CH * 2;
constexpr float ALPHA = 0.8493218002880191f, HOLD = 1.0f / 32, CUT = 1 + 0.72f / 2048, MINOR_CUT = 1 + 0.72f / 256;

struct quad { float v[4]; };
struct alignas(8) Words { u32 v[2]; };  // four neighbouring channels

DEVICE quad load_quad(const float* from) { return {from[0], from[1], from[2], from[3]}; }

DEVICE void fetch(char* buffer, const char* x, i64 image) {
    constexpr int CHUNKS = ARRAY_BYTES / 16, PER_ROW = CH / 8;
    const char* source = x + image * (i64)(R * D * 2) + blockIdx.x * (CH * 2);
    for (int chunk = threadIdx.x; chunk < CHUNKS; chunk += THREADS)
        copy_16(buffer + chunk * 16, source + (i64)(chunk / PER_ROW) * (D * 2) + chunk % PER_ROW * 16, true);
}

// erf(|x| / sqrt(2)) at u = ALPHA x, with gauss = exp(-x^2 / 2): see grn_triton.py.
DEVICE float erf_magnitude(float u, float gauss) {
    const float r = rsqrt_fast(fabsf(u) * 0.6475755124f + 1.0f);
    float tails = -1.682142756f * r + 4.614482f;
    tails = tails * r - 3.45367596f;
    tails = tails * r + 1.692081608f;
    tails = tails * r - 0.170706725f;
    return 1.0f - gauss * (tails * r);
}

// Adds up one number of every block of the cluster, in their order.
struct Mail {
    float *warp_sums, *box;  // [WARPS]; [2, CLUSTER], which images use in turn
    i64* barriers;           // [2]
    int image = 0;

    // `memory`: 8-byte aligned, BYTES.
    static constexpr int BYTES = 16 + (2 * CLUSTER + WARPS) * 4;
    DEVICE_MEMBER Mail(char* memory) {
        barriers = (i64*)memory;
        box = (float*)(memory + 16);
        warp_sums = box + 2 * CLUSTER;
        if (threadIdx.x == 0) {
            open_mail(barriers);
            open_mail(barriers + 1);
        }
        sync_cluster();
    }
    DEVICE_MEMBER float sum(float value) {
        const int turn = image % 2;
        value = sum_over_warp(value);
        if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = value;
        if (threadIdx.x == 0) expect_mail(barriers + turn, CLUSTER * 4);
        sync_block();
        float* place = box + turn * CLUSTER;
        if (threadIdx.x < CLUSTER) {
            float total = 0.0f;
            for (int w = 0; w < WARPS; ++w) total += warp_sums[w];
            post(place + blockIdx.x, threadIdx.x, total, barriers + turn);
        }
        wait_for_mail(barriers + turn, image / 2, CLUSTER * 4);
        ++image;
        float total = 0.0f;
#pragma unroll
        for (int i = 0; i < CLUSTER; ++i) total += place[i];
        return total;
    }
};

// x, y: [N, R, D]. input_bias, weight, bias: float32 [D]. norms: [N, D], means: [N].
CLUSTER_KERNEL(CLUSTER, THREADS, BLOCKS) gelu_grn_forward(
    const char* x, const float* input_bias, const float* weight, const float* bias, char* y, float* norms, float* means,
    int images) {
    SHARED_MEMORY(shared);
    char *buffer = shared, *other = shared + ARRAY_BYTES;
    float* partial = (float*)(shared + 2 * ARRAY_BYTES);  // [GROUPS, CH]
    float* own_norms = partial + GROUPS * CH;             // [CH]
    Mail mail((char*)(own_norms + CH));
    const int column = threadIdx.x % COLUMNS * 4, group = threadIdx.x / COLUMNS, first = blockIdx.x * CH;
    quad shift = load_quad(input_bias + first + column);
    const quad w = load_quad(weight + first + column), b = load_quad(bias + first + column);
#pragma unroll
    for (int k = 0; k < 4; ++k) shift.v[k] *= ALPHA;
    if (blockIdx.y < images) fetch(buffer, x, blockIdx.y);
    commit();
    for (int image = blockIdx.y; image < images; image += gridDim.y) {
        wait_for_copies<0>();
        sync_block();
        if (image + (int)gridDim.y < images) fetch(other, x, image + gridDim.y);
        commit();
        quad squares = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 4
        for (int r = group; r < R; r += GROUPS) {
            Words* place = (Words*)(buffer + r * (CH * 2) + column * 2);
            Words words = *place;
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                const pair value = split(words.v[k]);
                const float ul = value.low * ALPHA + shift.v[2 * k], uh = value.high * ALPHA + shift.v[2 * k + 1];
                const float low = ul + fabsf(ul) * erf_magnitude(ul, exp2_fast(-(ul * ul)));
                const float high = uh + fabsf(uh) * erf_magnitude(uh, exp2_fast(-(uh * uh)));
                squares.v[2 * k] += low * low;
                squares.v[2 * k + 1] += high * high;
                words.v[k] = join_halves(low * HOLD, high * HOLD);
            }
            *place = words;
        }
#pragma unroll
        for (int k = 0; k < 4; ++k) partial[group * CH + column + k] = squares.v[k];
        sync_block();
        float sum = 0.0f;
        for (int c = threadIdx.x; c < CH; c += THREADS) {
            float square = 0.0f;
#pragma unroll
            for (int g = 0; g < GROUPS; ++g) square += partial[g * CH + c];
            const float norm = sqrtf(square) * (0.5f / ALPHA);
            norms[(i64)image * D + first + c] = own_norms[c] = norm;
            sum += norm;
        }
        const float mean = mail.sum(sum) * (1.0f / D);
        if (blockIdx.x == 0 && threadIdx.x == 0) means[image] = mean;
        const float inverse = 1.0f / (mean + EPS);
        quad scale;
#pragma unroll
        for (int k = 0; k < 4; ++k)
            scale.v[k] = (1.0f + w.v[k] * (own_norms[column + k] * inverse)) * (0.5f / ALPHA / HOLD);
        char* target = y + ((i64)image * R * D + first + column) * 2;
#pragma unroll 4
        for (int r = group; r < R; r += GROUPS) {
            const Words words = *(const Words*)(buffer + r * (CH * 2) + column * 2);
            const pair one = split_halves(words.v[0]), two = split_halves(words.v[1]);
            *(Words*)(target + (i64)r * (D * 2)) = {
                join({one.low * scale.v[0] + b.v[0], one.high * scale.v[1] + b.v[1]}),
                join({two.low * scale.v[2] + b.v[2], two.high * scale.v[3] + b.v[3]})};
        }
        char* swap = buffer;
        buffer = other;
        other = swap;
    }
}

// A float32 with 10 bits after the leading one, and a smaller one, which float16 holds, with 7, as a word: cut, not
// rounded; CUT and MINOR_CUT make up for the mean.
DEVICE u32 hold(float value, float minor) {
    return (bits_of(value) & 0xffffe000u) | join_halves(minor, 0.0f) >> 3;
}

// dy, x, dx: [N, R, D]. sums: float32 [N, 3, D], an image's parts of the gradients of weight, bias and input bias.
CLUSTER_KERNEL(CLUSTER, THREADS, BLOCKS) gelu_grn_backward(
    const char* dy, const char* x, const float* input_bias, const float* weight, const float* norms, const float* means,
    char* dx, float* sums, int images) {
    SHARED_MEMORY(shared);
    char *buffer = shared, *other = shared + 2 * ARRAY_BYTES;
    float* partial = (float*)(shared + 4 * ARRAY_BYTES);  // [GROUPS, 2, CH]
    float* dots = partial + 2 * GROUPS * CH;              // [CH]
    float* own_norms = dots + CH;                         // [CH]
    Mail mail((char*)(own_norms + CH));
    const int column = threadIdx.x % COLUMNS * 4, group = threadIdx.x / COLUMNS, first = blockIdx.x * CH;
    quad shift = load_quad(input_bias + first + column);
    const quad w = load_quad(weight + first + column);
#pragma unroll
    for (int k = 0; k < 4; ++k) shift.v[k] *= ALPHA;
    if (blockIdx.y < images) {
        fetch(buffer, x, blockIdx.y);
        fetch(buffer + ARRAY_BYTES, dy, blockIdx.y);
    }
    commit();
    for (int image = blockIdx.y; image < images; image += gridDim.y) {
        wait_for_copies<0>();
        sync_block();
        if (image + (int)gridDim.y < images) {
            fetch(other, x, image + gridDim.y);
            fetch(other + ARRAY_BYTES, dy, image + gridDim.y);
        }
        commit();
        const float inverse = 1.0f / (means[image] + EPS);
        for (int c = threadIdx.x; c < CH; c += THREADS) own_norms[c] = norms[(i64)image * D + first + c];
        quad dot = {0.0f, 0.0f, 0.0f, 0.0f}, total = dot;
#pragma unroll 2
        for (int r = group; r < R; r += GROUPS) {
            Words* place = (Words*)(buffer + r * (CH * 2) + column * 2);
            Words* grad_place = (Words*)(buffer + ARRAY_BYTES + r * (CH * 2) + column * 2);
            const Words words = *place, grads = *grad_place;
            Words held[2];
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const pair both = split(words.v[k / 2]), grad = split(grads.v[k / 2]);
                const float d = k % 2 ? grad.high : grad.low;
                const float u = (k % 2 ? both.high : both.low) * ALPHA + shift.v[k];
                const float gauss = exp2_fast(-(u * u)), erf = erf_magnitude(u, gauss);
                const float signed_erf = float_of(bits_of(erf) ^ (bits_of(u) & 0x80000000u));
                const float h = u + fabsf(u) * erf, slope = 1.0f + signed_erf + (0.9394372786996513f * u) * gauss;
                dot.v[k] += d * h;
                total.v[k] += d;
                held[k % 2].v[k / 2] = hold(d * slope, h * (slope * HOLD));
            }
            *place = held[0];
            *grad_place = held[1];
        }
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            partial[(group * 2) * CH + column + k] = dot.v[k];
            partial[(group * 2 + 1) * CH + column + k] = total.v[k];
        }
        sync_block();
        float* into = sums + (i64)image * (3 * D) + first;
        float coupled = 0.0f;
        for (int c = threadIdx.x; c < CH; c += THREADS) {
            float one = 0.0f, two = 0.0f;
#pragma unroll
            for (int g = 0; g < GROUPS; ++g) {
                one += partial[g * 2 * CH + c];
                two += partial[(g * 2 + 1) * CH + c];
            }
            one *= 0.5f / ALPHA;
            dots[c] = one;
            into[c] = one * own_norms[c] * inverse;
            into[D + c] = two;
            coupled += weight[first + c] * one * own_norms[c];
        }
        coupled = mail.sum(coupled) * (inverse / D);
        quad scale, pull, dx_total = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const float norm = own_norms[column + k];
            const float pulled = norm > 0.0f ? (w.v[k] * dots[column + k] - coupled) * inverse / norm : 0.0f;
            pull.v[k] = pulled * (0.25f / ALPHA / HOLD * MINOR_CUT);
            scale.v[k] = (0.5f + 0.5f * w.v[k] * norm * inverse) * CUT;
        }
        char* target = dx + ((i64)image * R * D + first + column) * 2;
#pragma unroll 2
        for (int r = group; r < R; r += GROUPS) {
            const Words held[2] = {*(const Words*)(buffer + r * (CH * 2) + column * 2),
                                   *(const Words*)(buffer + ARRAY_BYTES + r * (CH * 2) + column * 2)};
            float result[4];
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const u32 word = held[k % 2].v[k / 2];
                result[k] = float_of(word & 0xffffe000u) * scale.v[k] + split_halves(word << 3).low * pull.v[k];
                dx_total.v[k] += result[k];
            }
            *(Words*)(target + (i64)r * (D * 2)) = {join({result[0], result[1]}), join({result[2], result[3]})};
        }
#pragma unroll
        for (int k = 0; k < 4; ++k) partial[group * 2 * CH + column + k] = dx_total.v[k];
        sync_block();
        for (int c = threadIdx.x; c < CH; c += THREADS) {
            float all = 0.0f;
#pragma unroll
            for (int g = 0; g < GROUPS; ++g) all += partial[g * 2 * CH + c];
            into[2 * D + c] = all;
        }
        char* swap = buffer;
        buffer = other;
        other = swap;
    }
}
