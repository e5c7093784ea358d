// The kernels. M[i, j] = sum_n C[n, i] exp(A[n] (S[i] - S[j])) B[n, j] delta[j], j <= i, S = cumsum(delta); y = M u + D u
// (arXiv 2403.01590, eq. 11; arXiv 2312.00752, eq. 2). float32 arithmetic on float32, bfloat16 or float16 tensors.
#include "backward.cuh"
#include "direct.cuh"
#include "factored.cuh"
#include "heads.cuh"
#include "line.cuh"

#ifdef __CUDACC__
#define SHARED_MEMORY(type, name)              \
    extern __shared__ float4 shared_memory[]; \
    type& name = *reinterpret_cast<type*>(shared_memory)
#endif

extern "C" __global__ void __launch_bounds__(256, 2) selective_scan(const Call call) {
    SHARED_MEMORY(float, shared);
    scan_block<8>(call, blockIdx.x, &shared);
}

extern "C" __global__ void __launch_bounds__(256, 1) selective_scan_backward(const Backward job) {
    SHARED_MEMORY(float, shared);
    backward_block(job, &shared);
}

// the scan's output, when wanted, and the matrix of every channel, or any fold of them
extern "C" __global__ void __launch_bounds__(128, 3) attention_direct(const Call call) {
    SHARED_MEMORY(Stage<DIRECT_TILE>, stage);
    scan_or_tile<DIRECT_THREADS / 32>(call, stage, Direct());
}

// likewise, signed folds, on the matrix unit
extern "C" __global__ void __launch_bounds__(128, 3) attention_factored_64(const Call call) {
    SHARED_MEMORY(Factored<64>::Memory, memory);
    scan_or_tile<Factored<64>::WARPS>(call, memory.stage, Factored<64>{&memory});
}

extern "C" __global__ void __launch_bounds__(512, 1) attention_factored_128(const Call call) {
    SHARED_MEMORY(Factored<128>::Memory, memory);
    scan_or_tile<Factored<128>::WARPS>(call, memory.stage, Factored<128>{&memory});
}

// likewise, any fold, of heads whose channels share a matrix and whose states share a decay; or their y alone
extern "C" __global__ void __launch_bounds__(128, 3) attention_heads(const Call call) {
    SHARED_MEMORY(Heads::Memory, memory);
    const int tiles = gridDim.x - (call.y.data ? chunk_blocks(call) : 0), block = blockIdx.x;
    if (block >= tiles) {
        scan_head(call, block - tiles, reinterpret_cast<ChunkMemory&>(memory));
        return;
    }
    const TileIndex at = tile_index(call, block, CHUNK);
    stage_places(call, at, memory.stage);
    Heads()(call, at, memory);
}

extern "C" __global__ void __launch_bounds__(256) attention_line(const Line line) {
    SHARED_MEMORY(float, shared);
    line_block(line, &shared);
}
