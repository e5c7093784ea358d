// The direct formulation: one exponential for every pair of steps, channel and state; any fold.
#pragma once
#include "tile.cuh"

constexpr int DIRECT_TILE = 64, DIRECT_THREADS = 128, DIRECT_ROWS = 16;  // rows of a warp; lanes are columns

// M[i, j] of one channel, for a column and the warp's rows
__device__ inline void channel_entries(const Call& call, const TileIndex& at, Stage<DIRECT_TILE>& stage, int c, int k,
                                       int row, int column, float (&entry)[DIRECT_ROWS]) {
    constexpr int SIDES = Stage<DIRECT_TILE>::SIDES;
    const int side = DIRECT_TILE + column;
    const Sum from = stage.distance(k, side);
    Sum distance[DIRECT_ROWS];
#pragma unroll
    for (int i = 0; i < DIRECT_ROWS; i++) {
        const bool above = at.I == at.J && row + i < column;
        distance[i] = above ? Sum{0.f, 0.f} : plus(stage.distance(k, row + i), from);
        entry[i] = 0.f;
    }
    for (int n0 = 0; n0 < call.states; n0 += STATES) {
        if (call.states > STATES) {  // they do not fit together
            __syncthreads();
            stage_states(call, at, stage, c, n0);
            if (threadIdx.x < STATES && n0 + threadIdx.x < call.states)
                stage.rate[k * STATES + threadIdx.x] = rate_of(Channel(call, at.b, at.r, c, 0).A().at(n0 + threadIdx.x));
            __syncthreads();
        }
        for (int n = 0; n < min(STATES, call.states - n0); n++) {
            const Sum rate = stage.rate[k * STATES + n];
            const float B = stage.BC[n * SIDES + side];
#pragma unroll
            for (int i = 0; i < DIRECT_ROWS; i++)
                entry[i] = fmaf(stage.BC[n * SIDES + row + i] * B, decay(rate, distance[i]), entry[i]);
        }
    }
    const float factor = stage.factor[k * Stage<DIRECT_TILE>::PITCH + side];
#pragma unroll
    for (int i = 0; i < DIRECT_ROWS; i++) entry[i] *= factor * stage.factor[k * Stage<DIRECT_TILE>::PITCH + row + i];
}

struct Direct {
    __device__ void operator()(const Call& call, const TileIndex& at, Stage<DIRECT_TILE>& stage) const {
        const int row = threadIdx.x / 32 * DIRECT_ROWS, lane = threadIdx.x % 32, per_group = call.per_group;
        float total[2][DIRECT_ROWS] = {};
        int staged = -1;  // the group whose B and C are staged
        for (int c0 = at.first; c0 < at.last; c0 += CHANNELS) {
            const int count = min(CHANNELS, at.last - c0);
            __syncthreads();
            stage_channels(call, at, stage, c0, count, 0);
            __syncthreads();
            stage_distances(call, at, stage, c0, count);
            __syncthreads();
            for (int k = 0; k < count; k++) {
                const int c = c0 + k;
                if (call.states <= STATES && staged != c / per_group) {
                    __syncthreads();
                    stage_states(call, at, stage, c, 0);
                    staged = c / per_group;
                    __syncthreads();
                }
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    float entry[DIRECT_ROWS];
                    const int column = lane + 32 * half;
                    channel_entries(call, at, stage, c, k, row, column, entry);
#pragma unroll
                    for (int i = 0; i < DIRECT_ROWS; i++) {
                        if (call.fold == EACH) write<DIRECT_TILE>(call, at, row + i, column, c, entry[i]);
                        else if (call.fold == POSITIVE) total[half][i] += fmaxf(entry[i], 0.f);
                        else if (call.fold == ABSOLUTE) total[half][i] += fabsf(entry[i]);
                        else total[half][i] += entry[i];
                    }
                }
            }
        }
        if (call.fold == EACH) return;
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int i = 0; i < DIRECT_ROWS; i++)
                write<DIRECT_TILE>(call, at, row + i, lane + 32 * half, 0, total[half][i]);
    }
};
