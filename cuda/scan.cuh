// One warp runs one channel of one route: 4 or 8 steps to a lane at a time, joined by a scan of (decay, input) pairs.
#pragma once
#include "numerics.cuh"

constexpr int STEPS = 4;            // of one lane in lines and gradients; a scan takes as many, or twice as many
constexpr int SPAN = 32 * STEPS;    // of a warp at a time
constexpr int LOT = 16;             // states of B and C that a block that scans holds at a time

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
    float factor = decays[0], state = inputs[0];
#pragma unroll
    for (int k = 1; k < COUNT; k++) {
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

// Steps of a warp's lanes at a time, and states at a time, for which a block holds B and C of a group: [state][step].
template <int COUNT>
struct Staged {
    static constexpr int REACH = 32 * COUNT;
    float *B, *C;
    int states;

    __device__ Staged(float* shared, int states)
        : B(shared), C(shared + min(states, LOT) * REACH), states(min(states, LOT)) {}

    __device__ float* behind() const { return C + states * REACH; }

    // zeros where a step has no place: what is in memory there would flow on
    __device__ void fill(const Channel& at, int start, int n0) const {
        const Call& call = *at.call;
        const long long B_next = call.B.axis * size_of(call.B.type), C_next = call.C.axis * size_of(call.C.type);
        for (int step = threadIdx.x; step < REACH; step += blockDim.x) {
            const int place = at.source(start + step);
            Row from_B = at.B(n0), from_C = at.C(n0);
            const unsigned of_B = (unsigned)max(place, 0) * from_B.stride, of_C = (unsigned)max(place, 0) * from_C.stride;
            float *to_B = B + step, *to_C = C + step;
            for (int n = n0; n < min(n0 + states, call.states); n++, to_B += REACH, to_C += REACH) {
                *to_B = place < 0 ? 0.f : from_B.read(of_B);
                *to_C = place < 0 ? 0.f : from_C.read(of_C);
                from_B.data += B_next, from_C.data += C_next;
            }
        }
    }

    __device__ static void load(const float* from, int lane, float (&to)[COUNT]) {
#pragma unroll
        for (int k = 0; k < COUNT; k += 4) {
            const Four four = *(const Four*)(from + lane * COUNT + k);
#pragma unroll
            for (int i = 0; i < 4; i++) to[k + i] = four.number[i];
        }
    }
};

// A lane's steps: what enters the states, and what comes out.
template <int COUNT>
struct Steps { float delta[COUNT], flow[COUNT], y[COUNT]; };

// One state. Its decays are exponentials of single steps: the rounding of such an exponent is worth less than a unit in
// the last place of what has just entered the state.
template <int COUNT>
__device__ inline void scan_state(float rate, const float* B, const float* C, Steps<COUNT>& steps, float* state, int lane) {
    float decays[COUNT], numbers[COUNT];
    Staged<COUNT>::load(B, lane, numbers);
#pragma unroll
    for (int k = 0; k < COUNT; k++) {
        decays[k] = exp2_of(rate * steps.delta[k]);
        numbers[k] *= steps.flow[k];
    }
    float carried = *state, h = enter(decays, numbers, carried, lane);
    __syncwarp();  // every lane has read the state
    if (lane == 0) *state = carried;
    float C_own[COUNT];
    Staged<COUNT>::load(C, lane, C_own);
#pragma unroll
    for (int k = 0; k < COUNT; k++) {
        h = fmaf(decays[k], h, numbers[k]);
        steps.y[k] = fmaf(C_own[k], h, steps.y[k]);
    }
}

// y of a warp's channel. COUNT: steps of a lane at a time; FLOATS: u and delta are float32; `active`: the warp has a channel.
template <bool FLOATS, int COUNT>
__device__ inline void scan_channel(const Channel& at, float* shared, bool active) {
    const Call& call = *at.call;
    const Staged<COUNT> staged(shared, call.states);
    float* state = staged.behind() + threadIdx.x / 32 * call.states;
    for (int n = at.lane; n < call.states; n += 32) state[n] = 0.f;
    const Row u_row = at.u(), delta_row = at.delta();
    const OutRow y_row = at.out_row(call.y, at.c, 0);
    const unsigned A_next = call.A.position * size_of(call.A.type);
    const float skip = at.D();
    for (int start = 0; start < call.length; start += 32 * COUNT) {
        const int first = start + at.lane * COUNT;
        Steps<COUNT> steps = {};
        if (active) {
#pragma unroll
            for (int k = 0; k < COUNT; k++) {
                const int place = at.source(first + k);
                steps.delta[k] = delta_row.at<FLOATS>(place);
                steps.flow[k] = steps.delta[k] * u_row.at<FLOATS>(place);
            }
        }
        Row A = at.A();
        for (int n0 = 0; n0 < call.states; n0 += LOT) {
            __syncthreads();
            staged.fill(at, start, n0);
            __syncthreads();
            const float *B = staged.B, *C = staged.C;
            for (int n = n0; active && n < min(n0 + LOT, call.states); n++) {
                scan_state(A.read(0) * LOG2E, B, C, steps, state + n, at.lane);
                A.data += A_next, B += 32 * COUNT, C += 32 * COUNT;
            }
        }
        if (!active) continue;
#pragma unroll
        for (int k = 0; k < COUNT; k++) {
            const int place = at.source(first + k);
            const float y = place < 0 ? 0.f : fmaf(skip, u_row.at<FLOATS>(place), steps.y[k]) * call.y_scale;
            y_row.put(at.place(first + k, call.y.frame), y);
        }
    }
}

// blocks of WARPS warps that scan: a warp a channel, the channels of a block in one group
template <int WARPS>
__device__ inline int scan_blocks(const Call& call) {
    return call.batch * call.routes * call.groups * ((call.per_group + WARPS - 1) / WARPS);
}

template <int WARPS>
__device__ inline void scan_block(const Call& call, int block, float* shared) {
    const int per_group = (call.per_group + WARPS - 1) / WARPS, part = block % per_group, rest = block / per_group;
    const int group = rest % call.groups, image_route = rest / call.groups, in_group = part * WARPS + threadIdx.x / 32;
    const int b = image_route / call.routes, r = image_route - b * call.routes;
    const bool active = in_group < call.per_group, floats = call.u.type == FLOAT32 && call.delta.type == FLOAT32;
    const Channel at(call, b, r, group * call.per_group + (active ? in_group : 0), threadIdx.x % 32);
    // 8 steps a lane cost 1.6 times what 4 do, half of them idle where the last span is short; 16 warps lack registers
    const bool many = WARPS < 16 && 8 * ((call.length + 255) / 256) <= 5 * ((call.length + 127) / 128);
    if (floats && many) scan_channel<true, 8>(at, shared, active);
    else if (floats) scan_channel<true, 4>(at, shared, active);
    else scan_channel<false, 4>(at, shared, active);
}
