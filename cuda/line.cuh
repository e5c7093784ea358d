// One row or column of the attention matrix in linear time: from its step, every step on its side is a distance away.
#pragma once
#include "scan.cuh"

constexpr int LINE_WARPS = 8, LINE_CHANNELS = 64;  // of a block

// the step of a route at which the line's token is written (a row's) or read (a column's), or -1
__device__ inline int find_step(const Line& line, int r, int* found) {
    if (!line.token) return line.index;
    if (threadIdx.x == 0) *found = -1;
    __syncthreads();
    const long long* order = (line.column ? line.call.read : line.call.write) + (long long)r * line.call.length;
    for (int step = threadIdx.x; step < line.call.length; step += blockDim.x)
        if (order[step] == line.index) *found = step;
    __syncthreads();
    return *found;
}

// M of a channel between the line's step and the lane's steps, and the running distance
__device__ inline void line_entries(const Line& line, const Channel& at, int own, int walked, Sum& total, float (&entry)[STEPS]) {
    const Call& call = line.call;
    const int sign = line.column ? 1 : -1, origin = at.source(own);
    const Row delta_row = at.delta(), A = at.A();
    int place[STEPS];
    float delta[STEPS], factor[STEPS];
    Sum distance[STEPS], sum = {0.f, 0.f};
#pragma unroll
    for (int k = 0; k < STEPS; k++) {
        const int step = own + sign * (walked + k);
        place[k] = at.source(step);
        delta[k] = delta_row.at(place[k]);
        const bool counts = !line.column || walked + k > 0;  // from a column on, its own delta is not decayed
        const Sum next = plus(sum, {counts ? delta[k] : 0.f, 0.f});
        distance[k] = line.column ? next : sum;
        sum = next;
        const Tensor& weights = line.column ? call.row_weight : call.col_weight;
        const float weight = at.weight(weights, step);
        factor[k] = place[k] < 0 ? 0.f : line.column ? weight : weight * delta[k];
        entry[k] = 0.f;
    }
    const Sum through = warp_sum(sum, at.lane);
    Sum before = shuffle_up(through, 1);
    if (at.lane == 0) before = {0.f, 0.f};
    before = plus(total, before);
    total = plus(total, shuffle(through, 31));
    for (int n = 0; n < call.states; n++) {
        const Sum rate = rate_of(A.at(n));
        const Tensor &own_side = line.column ? call.B : call.C, &other_side = line.column ? call.C : call.B;
        const Row others = at.row(other_side, n, at.group);
        const float fixed = at.row(own_side, n, at.group).at(origin);
#pragma unroll
        for (int k = 0; k < STEPS; k++) {
            entry[k] = fmaf(fixed * others.at(place[k]), decay(rate, plus(before, distance[k])), entry[k]);
        }
    }
    const Tensor& weights = line.column ? call.col_weight : call.row_weight;
    const float weight = at.weight(weights, own), fixed = line.column ? weight * delta_row.at(origin) : weight;
#pragma unroll
    for (int k = 0; k < STEPS; k++) entry[k] *= factor[k] * fixed;
}

__device__ inline void line_block(const Line& line, float* shared) {
    const Call& call = line.call;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, sign = line.column ? 1 : -1;
    const int per_route = gridDim.x / (call.batch * call.routes), image_route = blockIdx.x / per_route;
    const int b = image_route / call.routes, r = image_route % call.routes;
    const int begin = line.first + blockIdx.x % per_route * LINE_CHANNELS, end = min(begin + LINE_CHANNELS, call.channels);
    Sum* running = (Sum*)shared;                              // of each channel
    float* part = shared + 2 * LINE_CHANNELS;                 // of each warp
    int* found = (int*)(part + LINE_WARPS * SPAN);
    const int own = find_step(line, r, found);
    if (own < 0) return;
    for (int i = threadIdx.x; i < LINE_CHANNELS; i += blockDim.x) running[i] = {0.f, 0.f};
    __syncthreads();
    const int reach = line.column ? call.length - own : own + 1;
    for (int start = 0; start < reach; start += SPAN) {
        const int walked = start + lane * STEPS;
        float total[STEPS] = {};
        for (int c = begin + warp; c < end; c += LINE_WARPS) {
            const Channel at(call, b, r, c, lane);
            Sum sum = running[c - begin];
            float entry[STEPS];
            line_entries(line, at, own, walked, sum, entry);
            __syncwarp();
            if (lane == 0) running[c - begin] = sum;
            __syncwarp();  // the next span reads it
#pragma unroll
            for (int k = 0; k < STEPS; k++) {
                const float value = entry[k];
                if (call.fold == EACH && walked + k < reach)
                    at.result(call.attention, 0, c, at.place(own + sign * (walked + k), call.attention.frame),
                              value * call.attention_scale);
                total[k] += call.fold == POSITIVE ? fmaxf(value, 0.f) : call.fold == ABSOLUTE ? fabsf(value) : value;
            }
        }
        if (call.fold == EACH) continue;
#pragma unroll
        for (int k = 0; k < STEPS; k++) part[warp * SPAN + lane * STEPS + k] = total[k];
        __syncthreads();
        for (int i = threadIdx.x; i < SPAN && start + i < reach; i += blockDim.x) {
            float sum = 0.f;
            for (int w = 0; w < LINE_WARPS; w++) sum += part[w * SPAN + i];
            const Channel at(call, b, r, begin, lane);
            at.result(call.attention, 0, 0, at.place(own + sign * (start + i), call.attention.frame), sum * call.attention_scale);
        }
        __syncthreads();
    }
}
