// GELU and GRN of 16-bit sites, an image per cluster of blocks: see grn_cuda.py.
// The host defines BF16, R (sites of an image), D (channels), CH (channels of a block), THREADS, BLOCKS, EPS.
constexpr int CLUSTER = D / CH, COLUMNS = CH / 4, GROUPS = THREADS / COLUMNS, WARPS = THREADS / 32;
constexpr int ARRAY_BYTES = R * CH * 2;
constexpr float ALPHA = 0.8493218002880191f, HOLD = 1.0f / 32;

struct quad { float v[4]; };

DEVICE quad load_quad(const float* from) { return {from[0], from[1], from[2], from[3]}; }

// erf(|x| / sqrt(2)) at u = ALPHA x, with gauss = exp(-x^2 / 2): see grn_triton.py.
DEVICE float erf_magnitude(float u, float gauss) {
    const float r = rsqrt_fast(fabsf(u) * 0.6475755124f + 1.0f);
    float tails = -1.682142756f * r + 4.614482f;
    tails = tails * r - 3.45367596f;
    tails = tails * r + 1.692081608f;
    tails = tails * r - 0.170706725f;
    return 1.0f - gauss * (tails * r);
}

// Before the numbers of the cluster's blocks are added up. memory: 8 + (CLUSTER + WARPS) * 4 bytes, 8-byte aligned.
DEVICE void open_box(char* memory) {
    if (threadIdx.x == 0) {
        open_mail((i64*)memory);
        expect_mail((i64*)memory, CLUSTER * 4);
    }
    sync_cluster();
}

// Adds up one number of every block, in their order.
DEVICE float sum_over_cluster(float value, char* memory) {
    float *box = (float*)(memory + 8), *warp_sums = box + CLUSTER;
    value = sum_over_warp(value);
    if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = value;
    sync_block();
    if (threadIdx.x < CLUSTER) {
        float total = 0.0f;
        for (int w = 0; w < WARPS; ++w) total += warp_sums[w];
        post(box + blockIdx.x, threadIdx.x, total, (i64*)memory);
    }
    wait_for_mail((i64*)memory, CLUSTER * 4);
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < CLUSTER; ++i) total += box[i];
    return total;
}

// x, y: [N, R, D]. input_bias: float32 [D] or null. weight, bias: float32 [D]. norms: [N, D], means: [N].
// A block has CH channels of the image blockIdx.y; it holds GELU(x) as float16, which is exact enough for bfloat16, in
// shared memory until the norms are known. largest: null, or, with BF16, raised to
// the bits of the largest |y| as float32.
CLUSTER_KERNEL(CLUSTER, THREADS, BLOCKS) gelu_grn_forward(
    const char* x, const float* input_bias, const float* weight, const float* bias, char* y, float* norms,
    float* means, u32* largest) {
    SHARED_MEMORY(shared);
    float* partial = (float*)(shared + ARRAY_BYTES);  // [GROUPS, CH]
    float* own_norms = partial + GROUPS * CH;         // [CH]
    char* mail = (char*)(own_norms + CH);
    const int column = threadIdx.x % COLUMNS * 4, group = threadIdx.x / COLUMNS, first = blockIdx.x * CH;
    const i64 image = blockIdx.y, corner = (image * R * D + first) * 2;
    for (int chunk = threadIdx.x; chunk < ARRAY_BYTES / 16; chunk += THREADS)
        copy_16(shared + chunk * 16, x + corner + (i64)(chunk / (CH / 8)) * (D * 2) + chunk % (CH / 8) * 16, true);
    commit();
    open_box(mail);
    quad shift = {0.0f, 0.0f, 0.0f, 0.0f}, squares = shift;
    if (input_bias) shift = load_quad(input_bias + first + column);
    const quad w = load_quad(weight + first + column), b = load_quad(bias + first + column);
#pragma unroll
    for (int k = 0; k < 4; ++k) shift.v[k] *= ALPHA;
    wait_for_copies<0>();
    sync_block();
#pragma unroll 4
    for (int r = group; r < R; r += GROUPS) {
        Words* place = (Words*)(shared + r * (CH * 2) + column * 2);
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
        norms[image * D + first + c] = own_norms[c] = norm;
        sum += norm;
    }
    const float mean = sum_over_cluster(sum, mail) * (1.0f / D), inverse = 1.0f / (mean + EPS);
    if (blockIdx.x == 0 && threadIdx.x == 0) means[image] = mean;
    quad scale;
#pragma unroll
    for (int k = 0; k < 4; ++k)
        scale.v[k] = (1.0f + w.v[k] * (own_norms[column + k] * inverse)) * (0.5f / ALPHA / HOLD);
    char* target = y + corner + column * 2;
    u32 found = 0;
#pragma unroll 4
    for (int r = group; r < R; r += GROUPS) {
        const Words words = *(const Words*)(shared + r * (CH * 2) + column * 2);
        const pair one = split_halves(words.v[0]), two = split_halves(words.v[1]);
        const Words out = {
            join({one.low * scale.v[0] + b.v[0], one.high * scale.v[1] + b.v[1]}),
            join({two.low * scale.v[2] + b.v[2], two.high * scale.v[3] + b.v[3]})};
        *(Words*)(target + (i64)r * (D * 2)) = out;
        if (largest) found = larger_halves(found, larger_halves(out.v[0] & 0x7fff7fff, out.v[1] & 0x7fff7fff));
    }
    if (largest) raise_to(largest, larger_halves(found, found << 16) & 0xffff0000u);
}
