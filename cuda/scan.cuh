// One warp runs one channel of one route: 128 steps at a time, 4 to a lane, joined by a scan of (decay, input) pairs.
#pragma once
#include "numerics.cuh"

constexpr int STEPS = 4;            // of one lane
constexpr int SPAN = 32 * STEPS;    // of a warp at a time

// where the tensors of one channel begin, and the tokens of its steps
struct Channel {
    const Call* call;
    int b, r, c, head, group, lane;

    __device__ Channel(const Call& call, int b, int r, int c, int lane)
        : call(&call), b(b), r(r), c(c), head(c / (call.channels / call.heads)),
          group(c / (call.channels / call.groups)), lane(lane) {}

    // where a step is in a frame; -1 behind the sequence's ends, or where an order points outside
    __device__ int place(int step, int frame) const {
        if (step < 0 || step >= call->length) return -1;
        if (frame == STEP) return step;
        const long long token = (frame == WRITE ? call->write : call->read)[(long long)r * call->length + step];
        return token >= 0 && token < call->tokens ? (int)token : -1;
    }

    __device__ int source(int step) const { return place(step, call->delta.frame); }  // of u, delta, B and C

    __device__ float value(const Tensor& t, int axis, int group, int place) const {
        const long long offset = b * t.batch + r * t.route + group * t.group + axis * t.axis + place * t.position;
        return place < 0 ? 0.f : load(t, offset);
    }

    __device__ void result(const Output& out, int axis, int group, int place, float value) const {
        if (place < 0) return;
        store(out, b * out.batch + r * out.route + group * out.group + axis * out.axis + place * out.position, value);
    }

    __device__ float u(int place) const { return value(call->u, c, 0, place); }
    __device__ float delta(int place) const { return value(call->delta, head, 0, place); }
    __device__ float B(int n, int place) const { return value(call->B, n, group, place); }
    __device__ float C(int n, int place) const { return value(call->C, n, group, place); }
    __device__ Sum rate(int n) const { return rate_of(load(call->A, r * call->A.route + head * call->A.group + n * call->A.position)); }
    __device__ float D() const { return call->D.data ? load(call->D, r * call->D.route + c * call->D.axis) : 0.f; }
};

// The state before a lane's first step, from the state before the warp's; that one becomes the state after the warp's.
__device__ inline float enter(const float (&decays)[STEPS], const float (&inputs)[STEPS], float& carried, int lane) {
    float factor = 1.f, state = 0.f;
#pragma unroll
    for (int k = 0; k < STEPS; k++) {
        factor *= decays[k];
        state = fmaf(decays[k], state, inputs[k]);
    }
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
        const float before = __shfl_up_sync(~0u, state, distance), shrink = __shfl_up_sync(~0u, factor, distance);
        if (lane >= distance) {
            state = fmaf(factor, before, state);
            factor *= shrink;
        }
    }
    state = fmaf(factor, carried, state);
    const float before = __shfl_up_sync(~0u, state, 1), entering = lane ? before : carried;
    carried = __shfl_sync(~0u, state, 31);
    return entering;
}

// Sums of delta before every chunk of `chunk` steps (a divisor of SPAN, or SPAN), of one head.
__device__ inline Sum chunk_sums(const Channel& at, const float (&delta)[STEPS], int first, int chunk, Sum total) {
    Sum own = {0.f, 0.f};
#pragma unroll
    for (int k = 0; k < STEPS; k++) own = plus(own, {delta[k], 0.f});
    const Sum through = warp_sum(own, at.lane);
    Sum before = shuffle_up(through, 1);
    if (at.lane == 0) before = {0.f, 0.f};
    const Call& call = *at.call;
    const int chunks = (call.length + chunk - 1) / chunk;
    if (first < call.length && first % chunk == 0) {
        const long long row = ((long long)at.b * call.routes + at.r) * call.heads + at.head;
        call.before[row * chunks + first / chunk] = plus(total, before);
    }
    return plus(total, shuffle(through, 31));
}

// y and the sums of one channel; `state` holds the warp's running states.
__device__ inline void scan_channel(const Call& call, int b, int r, int c, int lane, float* state, int chunk) {
    const Channel at(call, b, r, c, lane);
    const bool sums = call.want_attention && c % (call.channels / call.heads) == 0;
    if (!call.want_y && !sums) return;
    const int states = call.want_y ? call.states : 0;
    for (int n = lane; n < states; n += 32) state[n] = 0.f;
    __syncwarp();
    Sum total = {0.f, 0.f};
    const float skip = at.D();
    for (int start = 0; start < call.length; start += SPAN) {
        const int first = start + lane * STEPS;
        int place[STEPS];
        float delta[STEPS], u[STEPS] = {}, y[STEPS] = {};
#pragma unroll
        for (int k = 0; k < STEPS; k++) {
            place[k] = at.source(first + k);
            delta[k] = at.delta(place[k]);
            if (call.want_y) u[k] = at.u(place[k]);
        }
        if (sums) total = chunk_sums(at, delta, first, chunk, total);
        for (int n = 0; n < states; n++) {
            const Sum rate = at.rate(n);
            float decays[STEPS], inputs[STEPS];
#pragma unroll
            for (int k = 0; k < STEPS; k++) {
                decays[k] = decay(rate, {delta[k], 0.f});
                inputs[k] = delta[k] * u[k] * at.B(n, place[k]);
            }
            float carried = state[n];
            float h = enter(decays, inputs, carried, lane);
            __syncwarp();  // every lane has read state[n]
            if (lane == 0) state[n] = carried;
#pragma unroll
            for (int k = 0; k < STEPS; k++) {
                h = fmaf(decays[k], h, inputs[k]);
                y[k] = fmaf(at.C(n, place[k]), h, y[k]);
            }
        }
        __syncwarp();
        if (!call.want_y) continue;
#pragma unroll
        for (int k = 0; k < STEPS; k++)
            at.result(call.y, c, 0, at.place(first + k, call.y.frame), fmaf(skip, u[k], y[k]) * call.y_scale);
    }
}

// The part of a kernel's block that scans: a warp a channel. Returns the (image, route) that it worked on.
__device__ inline int scan_block(const Call& call, int block, float* shared, int chunk) {
    const int warps = blockDim.x / 32, warp = threadIdx.x / 32, per_route = (call.channels + warps - 1) / warps;
    const int image_route = block / per_route, c = block % per_route * warps + warp;
    if (c < call.channels)
        scan_channel(call, image_route / call.routes, image_route % call.routes, c, threadIdx.x % 32,
                     shared + warp * call.states, chunk);
    return image_route;
}
