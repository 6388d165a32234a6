// What fcmae/kernels/cuda/device.cuh gives the kernels, on a CPU: a thread for every thread, a row of blocks at a time.
#include <algorithm>
#include <atomic>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

typedef unsigned int u32;
typedef long long i64;
using std::min;

struct Index { int x, y, z; };
thread_local Index threadIdx, blockIdx;
Index gridDim;

struct Warp {
    std::barrier<> barrier{32};
    float values[32];
};

struct Block {
    std::vector<char> bytes;
    char* memory;
    std::barrier<> barrier;
    std::vector<std::unique_ptr<Warp>> warps;
    Block(int threads, int shared) : bytes(shared + 16, (char)0xff), barrier(threads) {
        memory = (char*)(((uintptr_t)bytes.data() + 15) / 16 * 16);
        for (int i = 0; i < threads / 32; ++i) warps.push_back(std::make_unique<Warp>());
    }
};
static std::vector<std::unique_ptr<Block>> cluster;  // those that run at the same time
static std::unique_ptr<std::barrier<>> cluster_barrier;
thread_local Block* block;
thread_local Warp* warp_of_thread;

#define KERNEL(threads, blocks) extern "C" void
#define CLUSTER_KERNEL(size, threads, blocks) extern "C" void
#define SHARED_MEMORY(name) char* name = block->memory
#define DEVICE static inline

struct pair { float low, high; };
struct alignas(8) Words { u32 v[2]; };

static float widen(u32 bits) {
#if BF16
    bits <<= 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
#else
    _Float16 value;
    memcpy(&value, &bits, 2);
    return (float)value;
#endif
}
static u32 narrow(float value) {
#if BF16
    u32 bits;
    memcpy(&bits, &value, 4);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
#else
    _Float16 half = (_Float16)value;
    u32 bits = 0;
    memcpy(&bits, &half, 2);
    return bits;
#endif
}

DEVICE pair split(u32 word) { return {widen(word & 0xffff), widen(word >> 16)}; }
DEVICE u32 join(pair p) { return narrow(p.low) | narrow(p.high) << 16; }

// Copies arrive as late as they may: when their group is waited for.
struct Copy { char* to; const char* from; int size; bool inside; };
thread_local std::vector<std::vector<Copy>> groups(1);
DEVICE void copy(Copy c) {
    if ((uintptr_t)c.to % c.size || (uintptr_t)c.from % c.size) abort();  // a GPU refuses it
    groups.back().push_back(c);
}
DEVICE void copy_16(char* to, const char* from, bool inside) { copy({to, from, 16, inside}); }
DEVICE void copy_4(int* to, const int* from) { copy({(char*)to, (const char*)from, 4, true}); }
DEVICE void commit() { groups.emplace_back(); }
template <int LEFT> DEVICE void wait_for_copies() {
    for (; groups.size() > LEFT + 1; groups.erase(groups.begin()))
        for (Copy c : groups.front())
            if (c.inside) memcpy(c.to, c.from, c.size); else memset(c.to, 0, c.size);
}

DEVICE void sync_warp() { warp_of_thread->barrier.arrive_and_wait(); }
DEVICE void sync_block() { block->barrier.arrive_and_wait(); }
DEVICE u32 ballot(bool value) {
    warp_of_thread->values[threadIdx.x % 32] = value;
    sync_warp();
    u32 bits = 0;
    for (int i = 0; i < 32; ++i) bits |= (u32)(warp_of_thread->values[i] != 0) << i;
    sync_warp();
    return bits;
}
DEVICE float sum_over_warp(float value) {
    for (int lane = 16; lane; lane /= 2) {
        warp_of_thread->values[threadIdx.x % 32] = value;
        sync_warp();
        value += warp_of_thread->values[threadIdx.x % 32 ^ lane];
        sync_warp();
    }
    return value;
}
DEVICE u32 larger_halves(u32 a, u32 b) {
    return std::max(a & 0xffff, b & 0xffff) | std::max(a & 0xffff0000u, b & 0xffff0000u);
}
DEVICE void raise_to(u32* number, u32 found) {
    std::atomic_ref<u32> largest(*number);
    for (u32 before = largest; before < found && !largest.compare_exchange_weak(before, found);) {}
}
DEVICE float exp2_fast(float x) { return exp2f(x); }
DEVICE float rsqrt_fast(float x) { return 1 / sqrtf(x); }
DEVICE u32 bits_of(float x) { u32 bits; memcpy(&bits, &x, 4); return bits; }
DEVICE u32 half_bits(float x) { _Float16 h = (_Float16)x; u32 bits = 0; memcpy(&bits, &h, 2); return bits; }
DEVICE float half_value(u32 bits) { _Float16 h; memcpy(&h, &bits, 2); return (float)h; }
DEVICE u32 join_halves(float low, float high) { return half_bits(low) | half_bits(high) << 16; }
DEVICE pair split_halves(u32 word) { return {half_value(word & 0xffff), half_value(word >> 16)}; }
DEVICE void open_mail(i64* barrier) { *barrier = 0; }
DEVICE void expect_mail(i64* barrier, int bytes) {}
DEVICE void post(float* own, int rank, float value, i64* barrier) {
    Block& other = *cluster[rank];
    *(float*)(other.memory + ((char*)own - block->memory)) = value;
    std::atomic_ref<i64>(*(i64*)(other.memory + ((char*)barrier - block->memory))) += 4;
}
DEVICE void wait_for_mail(i64* barrier, int bytes) {
    while (std::atomic_ref<i64>(*barrier) < bytes) std::this_thread::yield();
}
DEVICE void sync_cluster() { cluster_barrier->arrive_and_wait(); }

// Runs a kernel whose arguments are pointers and integers, each in a register or a place on the stack of its own.
// The blocks of a row run at the same time.
extern "C" void launch(void* kernel, int columns, int rows, int threads, int shared, const i64* a) {
    typedef void (*Kernel)(i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64);
    gridDim = {columns, rows, 1};
    for (int row = 0; row < rows; ++row) {
        cluster.clear();
        for (int column = 0; column < columns; ++column) cluster.push_back(std::make_unique<Block>(threads, shared));
        cluster_barrier = std::make_unique<std::barrier<>>(columns * threads);
        std::vector<std::thread> running;
        for (int i = 0; i < columns * threads; ++i)
            running.emplace_back([=] {
                block = cluster[i / threads].get();
                threadIdx = {i % threads, 0, 0};
                blockIdx = {i / threads, row, 0};
                warp_of_thread = block->warps[threadIdx.x / 32].get();
                ((Kernel)kernel)(
                    a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], a[12], a[13]);
            });
        for (auto& thread : running) thread.join();
    }
}
