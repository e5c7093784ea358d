// The CUDA source, or with PTX what NVRTC made of it (tests/ptx.py), on the host: every CUDA thread of a block is a fiber, switched at barriers and shuffles.
//
// Finds wrong indices, missing or diverging barriers (a deadlock is reported; results must not depend on the schedule),
// uninitialised shared memory (filled with NaN), shared memory overrun (guarded) and pages that may not be touched. Says nothing about speed. The inner
// instruction of the matrix unit is the one thing that is replaced and not run.
#include <algorithm>
#include <cmath>
#include <csetjmp>
#include <csignal>
#include <cstddef>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <ucontext.h>
#include <vector>

struct Index { unsigned x = 0; };
static Index threadIdx, blockIdx, blockDim, gridDim;

namespace host {
constexpr size_t STACK = 128 * 1024, GUARD = 1024;
struct Warp { unsigned arrived = 0, generation = 0; unsigned words[2][32][8]; };
struct Fiber { jmp_buf point; ucontext_t context; std::unique_ptr<char[]> stack; bool started = false, done = false; unsigned exchanges = 0; };

static std::vector<Fiber> fibers;
static std::vector<Warp> warps;
static std::vector<float> shared;
static jmp_buf back, outside;
static unsigned arrived, generation, live, progress;
static void (*body)(const void*);
static const void* arguments;

[[gnu::noinline]] static void yield() {
    const unsigned me = threadIdx.x;
    if (!_setjmp(fibers[me].point)) _longjmp(back, 1);
    threadIdx.x = me;
}

static void block_barrier() {
    progress++;
    if (++arrived == live) arrived = 0, generation++;
    else for (const unsigned seen = generation; seen == generation;) yield();
}

static void warp_barrier() {
    Warp& warp = warps[threadIdx.x / 32];
    progress++;
    if (++warp.arrived == 32) warp.arrived = 0, warp.generation++;
    else for (const unsigned seen = warp.generation; seen == warp.generation;) yield();
}

// every lane's words, once all lanes have given theirs; two tables in turn, so that one barrier is enough
template <int COUNT>
static unsigned (*exchange(const unsigned (&own)[COUNT]))[8] {
    Warp& warp = warps[threadIdx.x / 32];
    auto& table = warp.words[fibers[threadIdx.x].exchanges++ % 2];
    for (int i = 0; i < COUNT; i++) table[threadIdx.x % 32][i] = own[i];
    warp_barrier();
    return table;
}

static float exchange_one(float value, int lane) {
    unsigned own[1];
    memcpy(own, &value, 4);
    auto table = exchange(own);
    float other;
    memcpy(&other, table[lane < 0 || lane > 31 ? threadIdx.x % 32 : lane], 4);
    return other;
}

static void run_fiber() {
    body(arguments);
    fibers[threadIdx.x].done = true;
    live--;
    progress++;
    if (live && arrived == live) arrived = 0, generation++;
    _longjmp(back, 1);
}

static void on_fault(int) { _longjmp(outside, 1); }

static void step(unsigned thread) {
    Fiber& fiber = fibers[thread];
    if (fiber.done) return;
    threadIdx.x = thread;
    if (_setjmp(back)) return;
    if (fiber.started) _longjmp(fiber.point, 1);
    fiber.started = true;
    getcontext(&fiber.context);
    fiber.context.uc_stack = {fiber.stack.get(), 0, STACK};
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, run_fiber, 0);
    setcontext(&fiber.context);
}

// `together` threads take turns until none of them gets further, then the next ones
static const char* run_block(const std::vector<unsigned>& order, unsigned together) {
    for (Warp& warp : warps) warp = Warp();
    for (Fiber& fiber : fibers) fiber.started = fiber.done = false, fiber.exchanges = 0;
    arrived = generation = 0;
    live = fibers.size();
    while (live) {
        progress = 0;
        for (unsigned first = 0; first < order.size(); first += together)
            for (unsigned before = progress - 1; before != progress;) {
                before = progress;
                for (unsigned i = first; i < std::min<size_t>(first + together, order.size()); i++) step(order[i]);
                if (together == order.size()) break;
            }
        if (!progress) return "threads of a block wait for each other for ever";
    }
    return nullptr;
}
}  // namespace host

#define __global__
#define __device__
#define __launch_bounds__(...)
#define __syncthreads host::block_barrier
#define __syncwarp host::warp_barrier
#define __threadfence()
#define SHARED_MEMORY(type, name) type& name = *reinterpret_cast<type*>(host::shared.data())

using std::max;
using std::min;
static float __shfl_sync(unsigned, float value, int lane) { return host::exchange_one(value, lane); }
static float __shfl_up_sync(unsigned, float value, int distance) { return host::exchange_one(value, (int)(threadIdx.x % 32) - distance); }
static float __shfl_down_sync(unsigned, float value, int distance) { return host::exchange_one(value, threadIdx.x % 32 + distance); }
static float __shfl_xor_sync(unsigned, float value, int mask) { return host::exchange_one(value, threadIdx.x % 32 ^ mask); }
static float atomicAdd(float* to, float value) { const float before = *to; *to += value; return before; }

#include "hidden_attention.cu"

#ifdef PTX
#include "ptx_runtime.hpp"

static const struct { const char* name; void (*body)(const void*); } KERNELS[] = {{NAME, kernel}};
#else
template <class Arguments, void (*kernel)(const Arguments)>
static void call(const void* arguments) { kernel(*static_cast<const Arguments*>(arguments)); }

static const struct { const char* name; void (*body)(const void*); } KERNELS[] = {
    {"selective_scan", call<Call, selective_scan>},
    {"selective_scan_backward", call<Backward, selective_scan_backward>},
    {"attention_direct", call<Call, attention_direct>},
    {"attention_factored_64", call<Call, attention_factored_64>},
    {"attention_factored_128", call<Call, attention_factored_128>},
    {"attention_heads", call<Call, attention_heads>},
    {"attention_line", call<Line, attention_line>},
};
#endif

extern "C" {
// sizes of the structures, to be compared with the caller's
int size_of(const char* name) {
    const std::string which = name;
    return which == "Call" ? sizeof(Call) : which == "Backward" ? sizeof(Backward) : which == "Line" ? sizeof(Line)
        : which == "attention_direct" ? sizeof(Stage<DIRECT_TILE>) : which == "attention_factored_64" ? sizeof(Factored<64>::Memory)
        : which == "attention_factored_128" ? sizeof(Factored<128>::Memory) : which == "attention_heads" ? sizeof(Heads::Memory)
        : which == "ChunkMemory" ? offsetof(ChunkMemory, state) : -1;
}

// where tile `pair` of the lower triangle lies: row * 2^32 + column
long long tile_of(int length, int pair) {
    Call call = {};
    call.length = length, call.splits = call.routes = call.channels = 1;
    const TileIndex at = tile_index(call, pair, 64);
    return ((long long)at.I << 32) + at.J;
}

// Run a grid, block after block. schedule: 0 threads in order, 1 backwards, 2 and 3 likewise
// but every warp as far as it gets, else shuffled by it. Returns what went wrong.
const char* launch(const char* name, const void* arguments, int grid, int block, int shared_bytes, unsigned schedule) {
    for (const auto& kernel : KERNELS) {
        if (std::string(kernel.name) != name) continue;
        host::body = kernel.body;
        host::arguments = arguments;
        while ((int)host::fibers.size() < block) {
            host::fibers.emplace_back();
            host::fibers.back().stack.reset(new char[host::STACK]);
        }
        host::fibers.resize(block);
        host::warps.assign((block + 31) / 32, host::Warp());
        const size_t words = (shared_bytes + 3) / 4;
        std::vector<unsigned> order(block);
        for (int i = 0; i < block; i++) order[i] = schedule % 2 && schedule < 4 ? block - 1 - i : i;
        const unsigned together = schedule == 2 || schedule == 3 ? 32 : block;
        blockDim.x = block, gridDim.x = grid;
        struct sigaction fault = {}, before;
        fault.sa_handler = host::on_fault;
        fault.sa_flags = SA_NODEFER;
        struct Restore { struct sigaction& old; ~Restore() { sigaction(SIGSEGV, &old, nullptr); } } restore = {before};
        sigaction(SIGSEGV, &fault, &before);
        if (_setjmp(host::outside)) return "a block touched memory outside its tensors";
        for (int b = 0; b < grid; b++) {
            for (int i = block - 1; schedule > 3 && i > 0; i--)
                std::swap(order[i], order[(schedule = schedule * 1664525u + 1013904223u) / 65536u % (i + 1)]);
            host::shared.assign(words + host::GUARD, NAN);
            blockIdx.x = b;
            if (const char* problem = host::run_block(order, together)) return problem;
            for (size_t i = words; i < words + host::GUARD; i++)
                if (!std::isnan(host::shared[i])) return "a block wrote behind its shared memory";
        }
        return nullptr;
    }
    return "no such kernel";
}
}
