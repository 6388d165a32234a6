// What the kernels use of the GPU beside C++. tests/unit/cuda_on_cpu.hpp has the same for a CPU.
typedef unsigned int u32;
typedef long long i64;

#define KERNEL(threads, blocks) extern "C" __global__ void __launch_bounds__(threads, blocks)
#define SHARED_MEMORY(name) extern __shared__ __align__(16) char name[]
#define DEVICE __device__ __forceinline__

struct pair { float low, high; };
struct alignas(8) Words { u32 v[2]; };  // four neighbouring 16-bit numbers

// Two neighbouring 16-bit numbers, bfloat16 or float16, as float32.
DEVICE pair split(u32 word) {
#if BF16
    return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
#else
    pair p;
    asm("{ .reg .b16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b; }"
        : "=f"(p.low), "=f"(p.high) : "r"(word));
    return p;
#endif
}

DEVICE u32 join(pair p) {
    u32 word;
#if BF16
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(p.high), "f"(p.low));
#else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(p.high), "f"(p.low));
#endif
    return word;
}

// Starts copying 16 bytes to shared memory, or zeros.
DEVICE void copy_16(char* to, const char* from, bool inside) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"((u32)__cvta_generic_to_shared(to)), "l"(from), "r"(inside ? 16 : 0) : "memory");
}

// Starts copying 4 bytes.
DEVICE void copy_4(int* to, const int* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;"
                 :: "r"((u32)__cvta_generic_to_shared(to)), "l"(from) : "memory");
}

// Ends a group of copies.
DEVICE void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for this thread's groups, but for the last LEFT.
template <int LEFT>
DEVICE void wait_for_copies() { asm volatile("cp.async.wait_group %0;" :: "n"(LEFT) : "memory"); }

DEVICE u32 ballot(bool value) { return __ballot_sync(~0u, value); }
DEVICE void sync_warp() { __syncwarp(); }
DEVICE void sync_block() { __syncthreads(); }

DEVICE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEVICE float rsqrt_fast(float x) {
    float y;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEVICE u32 bits_of(float x) { return __float_as_uint(x); }

// Two float32 as float16.
DEVICE u32 join_halves(float low, float high) {
    u32 word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}
DEVICE pair split_halves(u32 word) {
    pair p;
    asm("{ .reg .b16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b; }"
        : "=f"(p.low), "=f"(p.high) : "r"(word));
    return p;
}

DEVICE float sum_over_warp(float value) {
#pragma unroll
    for (int lane = 16; lane; lane /= 2) value += __shfl_xor_sync(~0u, value, lane);
    return value;
}

// The larger of the low halves, and of the high halves.
DEVICE u32 larger_halves(u32 a, u32 b) { return __vmaxu2(a, b); }
// Raises a number to the largest that a thread of the warp has.
DEVICE void raise_to(u32* number, u32 found) {
    u32 largest;
    asm volatile("redux.sync.max.u32 %0, %1, 0xffffffff;" : "=r"(largest) : "r"(found));
    if (threadIdx.x % 32 == 0) atomicMax(number, largest);
}

// Mail between the blocks of a cluster: a barrier in shared memory counts the bytes that have arrived.
DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

DEVICE void open_mail(i64* barrier) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" :: "r"(shared_address(barrier)) : "memory");
}
DEVICE void expect_mail(i64* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
                 :: "r"(shared_address(barrier)), "r"(bytes) : "memory");
}
// Writes to the same place in another block's shared memory.
DEVICE void post(float* own, int rank, float value, i64* barrier) {
    u32 to, counter;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(to) : "r"(shared_address(own)), "r"(rank));
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(counter) : "r"(shared_address(barrier)), "r"(rank));
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];"
                 :: "r"(to), "r"(bits_of(value)), "r"(counter) : "memory");
}
// Waits for the mail that was expected.
DEVICE void wait_for_mail(i64* barrier, int bytes) {
    u32 done = 0;
    while (!done)
        asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], 0; "
                     "selp.u32 %0, 1, 0, p; }" : "=r"(done) : "r"(shared_address(barrier)) : "memory");
}
DEVICE void sync_cluster() {
    asm volatile("fence.mbarrier_init.release.cluster;\nbarrier.cluster.arrive.release.aligned;\n"
                 "barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
#define CLUSTER_KERNEL(blocks_per_cluster, threads, blocks) \
    extern "C" __global__ void __cluster_dims__(blocks_per_cluster, 1, 1) __launch_bounds__(threads, blocks)
