// A tile of the attention matrix in scan order: rows of chunk I, columns of chunk J <= I, of one route; what both
// formulations stage in shared memory, and how results are written.
//
// Distances are sums of delta. A row's is from the chunk's start through the row; a column's is what is left from the
// column to the rows' chunk (below the diagonal), or minus the sum through the column (on it). Row + column is then
// S[i] - S[j], and below the diagonal both parts are >= 0: exponents are never positive.
#pragma once
#include "scan.cuh"

constexpr int CHANNELS = 16;  // staged at a time
constexpr int STATES = 16;    // staged at a time

template <int TILE>
struct Stage {
    static constexpr int SIDES = 2 * TILE;     // rows, then columns
    static constexpr int PITCH = SIDES + 2;    // of channels: consecutive channels lie 2 banks apart
    float high[CHANNELS * PITCH], low[CHANNELS * PITCH];  // distance; a block that scans has its own memory from here on
    float factor[CHANNELS * PITCH];            // row_weight of rows; delta * col_weight of columns
    float BC[STATES * SIDES];                  // C of rows, B of columns
    Sum rate[CHANNELS * STATES];
    int place[SIDES];                          // of each side in the sources, or -1

    __device__ Sum distance(int channel, int side) const { return {high[channel * PITCH + side], low[channel * PITCH + side]}; }
};

struct TileIndex { int b, r, I, J, first, last; };  // chunk pair, and the channels [first, last) of this block

// block -> image, route, chunk pair (row by row of the lower triangle) and part of the channels
__device__ inline TileIndex tile_index(const Call& call, int block, int tile) {
    const int chunks = (call.length + tile - 1) / tile, pairs = chunks * (chunks + 1) / 2;
    const int part = block % call.splits, pair = block / call.splits % pairs, image_route = block / call.splits / pairs;
    int I = (int)((sqrtf(8.f * pair + 1.f) - 1.f) / 2.f);
    while (I * (I + 1) / 2 > pair) I--;
    while ((I + 1) * (I + 2) / 2 <= pair) I++;
    const int blocks = (call.channels + CHANNELS - 1) / CHANNELS;
    const int first = (int)((long long)blocks * part / call.splits) * CHANNELS;
    const int last = (int)((long long)blocks * (part + 1) / call.splits) * CHANNELS;
    return {image_route / call.routes, image_route % call.routes, I, pair - I * (I + 1) / 2, first,
            last < call.channels ? last : call.channels};
}

// the step of a side: rows of chunk I, then columns of chunk J
template <int TILE>
__device__ inline int step_of(const TileIndex& at, int side) {
    return side < TILE ? at.I * TILE + side : at.J * TILE + side - TILE;
}

// C of rows and B of columns, STATES states or what is left
template <int TILE>
__device__ inline void stage_states(const Call& call, const TileIndex& at, Stage<TILE>& stage, int c, int n0) {
    constexpr int SIDES = Stage<TILE>::SIDES;
    const int count = min(STATES, call.states - n0);
    const Channel channel(call, at.b, at.r, c, 0);
    const Row B = channel.B(n0), C = channel.C(n0);
    const long long B_next = call.B.axis * size_of(call.B.type), C_next = call.C.axis * size_of(call.C.type);
    for (int i = threadIdx.x; i < count * SIDES; i += blockDim.x) {
        const int n = i / SIDES, side = i % SIDES;
        Row row = side < TILE ? C : B;
        row.data += n * (side < TILE ? C_next : B_next);
        stage.BC[i] = row.at(stage.place[side]);
    }
}

// delta and weights of `count` channels from c on, and their rates
template <int TILE>
__device__ inline void stage_channels(const Call& call, const TileIndex& at, Stage<TILE>& stage, int c, int count, int n0) {
    constexpr int SIDES = Stage<TILE>::SIDES, PITCH = Stage<TILE>::PITCH;
    const bool channels_last = call.delta.axis == 1;  // neighbouring threads read neighbouring memory
    const Row delta_row = row_of(call.delta, at.b * call.delta.batch + at.r * call.delta.route);
    const long long next = call.delta.axis * size_of(call.delta.type);
    for (int i = threadIdx.x; i < CHANNELS * SIDES; i += blockDim.x) {
        const int k = channels_last ? i % CHANNELS : i / SIDES, side = channels_last ? i / CHANNELS : i % SIDES;
        float delta = 0.f, weight = 0.f;
        if (k < count && stage.place[side] >= 0) {
            Row row = delta_row;
            row.data += (call.per_head == 1 ? c + k : (c + k) / call.per_head) * next;
            delta = row.at(stage.place[side]);
            const Tensor& weights = side < TILE ? call.row_weight : call.col_weight;
            weight = weights.data ? Channel(call, at.b, at.r, c + k, 0).weight(weights, step_of<TILE>(at, side)) : 1.f;
        }
        stage.high[k * PITCH + side] = delta;
        stage.factor[k * PITCH + side] = side < TILE ? weight : weight * delta;
    }
    for (int i = threadIdx.x; i < CHANNELS * STATES; i += blockDim.x) {
        const int k = i / STATES, n = i % STATES;
        const bool there = k < count && n0 + n < call.states;
        stage.rate[i] = there ? rate_of(Channel(call, at.b, at.r, c + k, 0).A().at(n0 + n)) : Sum{0.f, 0.f};
    }
}

template <int TILE>
__device__ inline void stage_places(const Call& call, const TileIndex& at, Stage<TILE>& stage) {
    const Channel channel(call, at.b, at.r, 0, 0);
    for (int side = threadIdx.x; side < Stage<TILE>::SIDES; side += blockDim.x)
        stage.place[side] = channel.source(step_of<TILE>(at, side));
}

// the sum of a channel's delta over the chunks between J and I, by a warp
template <int TILE>
__device__ inline Sum between(const Channel& channel, const TileIndex& at) {
    const Row delta = channel.delta();
    Sum own = {0.f, 0.f};
    for (int step = (at.J + 1) * TILE + channel.lane; step < at.I * TILE; step += 32)
        own = plus(own, {delta.at(channel.source(step)), 0.f});
    return shuffle(warp_sum(own, channel.lane), 31);
}

// turn the staged delta into distances: a warp a channel and side; on the diagonal both sides are the same steps
template <int TILE>
__device__ inline void stage_distances(const Call& call, const TileIndex& at, Stage<TILE>& stage, int c, int count) {
    constexpr int PITCH = Stage<TILE>::PITCH, OWN = TILE / 32;
    const int lane = threadIdx.x % 32, sides = at.J < at.I ? 2 : 1;
    for (int job = threadIdx.x / 32; job < sides * CHANNELS; job += blockDim.x / 32) {
        const int k = job / sides, columns = job % sides, start = k * PITCH + columns * TILE + lane * OWN;
        Sum own[OWN], total = {0.f, 0.f};
#pragma unroll
        for (int i = 0; i < OWN; i++) own[i] = total = plus(total, {stage.high[start + i], 0.f});
        const Sum through = warp_sum(total, lane);
        Sum before = shuffle_up(through, 1), base = shuffle(through, 31);
        if (lane == 0) before = {0.f, 0.f};
        if (columns && at.J + 1 < at.I && k < count) base = plus(base, between<TILE>(Channel(call, at.b, at.r, c + k, lane), at));
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            const Sum sum = plus(before, own[i]), distance = columns ? minus(base, sum) : sum;
            stage.high[start + i] = distance.high;
            stage.low[start + i] = distance.low;
            if (sides == 1) stage.high[start + TILE + i] = -sum.high, stage.low[start + TILE + i] = -sum.low;
        }
    }
}

// add one entry of the tile to the result; entries above the diagonal and outside the sequence are never written
template <int TILE>
__device__ inline void write(const Call& call, const TileIndex& at, int row, int column, int c, float value) {
    const int i = at.I * TILE + row, j = at.J * TILE + column;
    if (i >= call.length || j > i) return;
    const Output& out = call.attention;
    long long to = i, from = j;
    if (out.frame != STEP) {
        to = call.write[(long long)at.r * call.length + i];
        from = call.read[(long long)at.r * call.length + j];
        if (to < 0 || to >= call.tokens || from < 0 || from >= call.tokens) return;
    }
    const long long offset = at.b * out.batch + at.r * out.route + c * out.group + to * out.axis + from * out.position;
    store(out, offset, value * call.attention_scale);
}

// A block of an attention kernel: a tile, or behind all tiles, whose blocks take longer, one that scans. No block needs
// what another one finds.
template <int WARPS, int TILE, class Compute>
__device__ inline void scan_or_tile(const Call& call, Stage<TILE>& stage, Compute compute) {
    const int scanning = call.y.data ? scan_blocks<WARPS>(call) : 0;
    const int tiles = gridDim.x - scanning, block = blockIdx.x;
    if (block >= tiles) {
        scan_block<WARPS>(call, block - tiles, stage.high);
        return;
    }
    const TileIndex at = tile_index(call, block, TILE);
    stage_places(call, at, stage);  // a barrier follows before anything is staged
    compute(call, at, stage);
}
