// One warp runs one channel of one route: 4 or 8 steps to a lane at a time, joined by a scan of (decay, input) pairs.
#pragma once
#include "numerics.cuh"

constexpr int STEPS = 4;            // of one lane in lines and gradients; a scan takes as many, or twice as many
constexpr int SPAN = 32 * STEPS;    // of a warp at a time

// where the tensors of one channel begin, and the tokens of its steps
struct Channel {
    const Call* call;
    int b, r, c, head, group, lane;

    __device__ Channel(const Call& call, int b, int r, int c, int lane)
        : call(&call), b(b), r(r), c(c), head(call.per_head == 1 ? c : c / call.per_head),
          group(call.groups == 1 ? 0 : c / call.per_group), lane(lane) {}

    // where a step is in a frame; -1 behind the sequence's ends, or where an order points outside
    __device__ int place(int step, int frame) const {
        if (step < 0 || step >= call->length) return -1;
        if (frame == STEP) return step;
        const long long token = (frame == WRITE ? call->write : call->read)[(long long)r * call->length + step];
        return token >= 0 && token < call->tokens ? (int)token : -1;
    }

    __device__ int source(int step) const { return place(step, call->delta.frame); }  // of u, delta, B and C

    __device__ Row row(const Tensor& t, int axis, int group) const {
        return row_of(t, b * t.batch + r * t.route + group * t.group + axis * t.axis);
    }

    __device__ Row u() const { return row(call->u, c, 0); }
    __device__ Row delta() const { return row(call->delta, head, 0); }
    __device__ Row B(int n) const { return row(call->B, n, group); }
    __device__ Row C(int n) const { return row(call->C, n, group); }
    __device__ Row A() const { return row_of(call->A, r * call->A.route + head * call->A.group); }  // of the states
    __device__ float D() const { return call->D.data ? row_of(call->D, r * call->D.route + c * call->D.axis).at(0) : 0.f; }

    // the weight of a step, where there are weights
    __device__ float weight(const Tensor& weights, int step) const {
        return weights.data ? row(weights, c, 0).at(place(step, weights.frame)) : 1.f;
    }

    __device__ OutRow out_row(const Output& out, int axis, int group) const {
        float* to = out.data + b * out.batch + r * out.route + group * out.group + axis * out.axis;
        return {(char*)to, (unsigned)out.position * 4, out.add};
    }

    __device__ void result(const Output& out, int axis, int group, int place, float value) const {
        if (place < 0) return;
        store(out, b * out.batch + r * out.route + group * out.group + axis * out.axis + place * out.position, value);
    }
};

// The state before a lane's first step, from the state before the warp's; that one becomes the state after the warp's.
template <int COUNT>
__device__ inline float enter(const float (&decays)[COUNT], const float (&inputs)[COUNT], float& carried, int lane) {
    float factor = 1.f, state = 0.f;
#pragma unroll
    for (int k = 0; k < COUNT; k++) {
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

// Sums of delta before every chunk of `chunk` steps (a multiple of COUNT), of one head.
template <int COUNT>
__device__ inline Sum chunk_sums(const Channel& at, const float (&delta)[COUNT], int first, int chunk, Sum total) {
    Sum own = {0.f, 0.f};
#pragma unroll
    for (int k = 0; k < COUNT; k++) own = plus(own, {delta[k], 0.f});
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

// A lane's steps at a time: what enters the states, the offsets of B and C, what comes out, a bit where there is a step.
template <int COUNT>
struct Steps {
    float delta[COUNT], flow[COUNT], y[COUNT];
    unsigned of_B[COUNT], of_C[COUNT], there;
};

// All states of one span. GAPS: some steps have no place. Those behind the end of the sequence need no care, since nothing
// comes after them; in the middle, what is read in their stead must not flow on if it is not finite.
template <bool FLOATS, bool GAPS, int COUNT>
__device__ inline void scan_states(const Channel& at, int states, Steps<COUNT>& steps, float* state) {
    const Call& call = *at.call;
    const long long B_next = call.B.axis * size_of(call.B.type), C_next = call.C.axis * size_of(call.C.type);
    const unsigned A_next = call.A.position * size_of(call.A.type);
    Row A = at.A(), B = at.B(0), C = at.C(0);
    for (int n = 0; n < states; n++) {
        const Sum rate = rate_of(A.read(0));
        float decays[COUNT], inputs[COUNT];
#pragma unroll
        for (int k = 0; k < COUNT; k++) {
            decays[k] = decay(rate, steps.delta[k]);
            const float in = steps.flow[k] * B.read<FLOATS>(steps.of_B[k]);
            inputs[k] = !GAPS || steps.there >> k & 1 ? in : 0.f;
        }
        float carried = state[n];
        float h = enter(decays, inputs, carried, at.lane);
        __syncwarp();  // every lane has read state[n]
        if (at.lane == 0) state[n] = carried;
#pragma unroll
        for (int k = 0; k < COUNT; k++) {
            h = fmaf(decays[k], h, inputs[k]);
            steps.y[k] = fmaf(C.read<FLOATS>(steps.of_C[k]), h, steps.y[k]);
        }
        A.data += A_next, B.data += B_next, C.data += C_next;
    }
}

// y and the sums of one channel; `state` holds the warp's running states. FLOATS: all of u, delta, B and C are float32.
// COUNT: steps of a lane at a time.
template <bool FLOATS, int COUNT>
__device__ inline void scan_channel(const Channel& at, float* state, int chunk) {
    const Call& call = *at.call;
    const bool sums = call.want_attention && at.c == at.head * call.per_head;
    if (!call.want_y && !sums) return;
    const int states = call.want_y ? call.states : 0;
    for (int n = at.lane; n < states; n += 32) state[n] = 0.f;
    __syncwarp();
    const Row u_row = at.u(), delta_row = at.delta();
    const OutRow y_row = at.out_row(call.y, at.c, 0);
    const unsigned B_stride = at.B(0).stride, C_stride = at.C(0).stride;
    const float skip = at.D();
    Sum total = {0.f, 0.f};
    for (int start = 0; start < call.length; start += 32 * COUNT) {
        const int first = start + at.lane * COUNT, in_sequence = min(COUNT, max(call.length - first, 0));
        Steps<COUNT> steps;
        steps.there = 0;
#pragma unroll
        for (int k = 0; k < COUNT; k++) {
            const int place = at.source(first + k), some = max(place, 0);  // where there is none, one that can be read
            steps.delta[k] = delta_row.at<FLOATS>(place);
            steps.flow[k] = call.want_y ? steps.delta[k] * u_row.at<FLOATS>(place) : 0.f;
            steps.y[k] = 0.f;
            steps.of_B[k] = kept((unsigned)some * B_stride);
            steps.of_C[k] = kept((unsigned)some * C_stride);
            steps.there |= (unsigned)(place >= 0) << k;
        }
        if (sums) total = chunk_sums(at, steps.delta, first, chunk, total);
        if (!call.want_y) continue;
        if (!FLOATS || __any_sync(~0u, steps.there != (1u << in_sequence) - 1)) scan_states<FLOATS, true>(at, states, steps, state);
        else scan_states<FLOATS, false>(at, states, steps, state);
        __syncwarp();
#pragma unroll
        for (int k = 0; k < COUNT; k++) {
            const int place = at.source(first + k);
            const float y = place < 0 ? 0.f : fmaf(skip, u_row.at<FLOATS>(place), steps.y[k]) * call.y_scale;
            y_row.put(at.place(first + k, call.y.frame), y);
        }
    }
}

// The part of a kernel's block of WARPS warps that scans: a warp a channel. Returns the (image, route) that it worked on.
template <int WARPS>
__device__ inline int scan_block(const Call& call, int block, float* shared, int chunk) {
    const int warp = threadIdx.x / 32, per_route = (call.channels + WARPS - 1) / WARPS;
    const int image_route = block / per_route, c = (block - image_route * per_route) * WARPS + warp;
    const int b = image_route / call.routes, r = image_route - b * call.routes;
    if (c >= call.channels) return image_route;
    const Channel at(call, b, r, c, threadIdx.x % 32);
    float* state = shared + warp * call.states;
    const bool floats = call.u.type == FLOAT32 && call.delta.type == FLOAT32 && call.B.type == FLOAT32 && call.C.type == FLOAT32;
    // 8 steps a lane cost 1.6 times what 4 do, half of them idle where the last span is short; 16 warps lack registers
    const bool many = WARPS < 16 && 8 * ((call.length + 255) / 256) <= 5 * ((call.length + 127) / 128);
    if (floats && many) scan_channel<true, 8>(at, state, chunk);
    else if (floats) scan_channel<true, 4>(at, state, chunk);
    else scan_channel<false, 4>(at, state, chunk);
    return image_route;
}
