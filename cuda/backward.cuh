// Gradients of y. With g[t] = C[t] dy[t] + exp(delta[t + 1] A) g[t + 1], a scan from the end,
//
//     du = delta B g + D dy         ddelta = u B g + A exp(delta A) h[t - 1] g      dA = sum_t delta exp(delta A) h[t - 1] g
//     dB = delta u g                dC = dy h                                       dD = sum_t dy u
//
// summed over states, or over channels for B and C. States are computed again from what entered each span of steps.
#pragma once
#include "scan.cuh"

constexpr int BACKWARD_WARPS = 8;  // a block: as many channels of one group

struct Span { int place[STEPS]; float delta[STEPS], u[STEPS], gradient[STEPS]; };

__device__ inline Span load_span(const Backward& job, const Channel& at, int first, bool active) {
    Span span;
    const Row delta = at.delta(), u = at.u(), gradient = at.row(job.gradient, at.c, 0);
#pragma unroll
    for (int k = 0; k < STEPS; k++) {
        span.place[k] = active ? at.source(first + k) : -1;
        span.delta[k] = delta.at(span.place[k]);
        span.u[k] = u.at(span.place[k]);
        span.gradient[k] = gradient.at(active ? at.place(first + k, job.gradient.frame) : -1) * job.call.y_scale;
    }
    return span;
}

struct Loaded { float decay[STEPS], input[STEPS], B[STEPS]; };

__device__ inline Loaded load_steps(const Channel& at, const Span& span, int n, Sum rate) {
    Loaded steps;
    const Row B = at.B(n);
#pragma unroll
    for (int k = 0; k < STEPS; k++) {
        steps.B[k] = B.at(span.place[k]);
        steps.decay[k] = decay(rate, span.delta[k]);
        steps.input[k] = span.delta[k] * span.u[k] * steps.B[k];
    }
    return steps;
}

// What flows into a lane's last step from later ones; `carried` becomes what flows out of the warp's first step.
__device__ inline float enter_backward(const float (&decays)[STEPS], const float (&inputs)[STEPS], float& carried, int lane) {
    float factor = 1.f, flow = 0.f;
#pragma unroll
    for (int k = STEPS - 1; k >= 0; k--) {
        factor *= decays[k];
        flow = decays[k] * (inputs[k] + flow);
    }
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
        const float after = __shfl_down_sync(~0u, flow, distance), shrink = __shfl_down_sync(~0u, factor, distance);
        if (lane + distance < 32) {
            flow = fmaf(factor, after, flow);
            factor *= shrink;
        }
    }
    flow = fmaf(factor, carried, flow);
    const float after = __shfl_down_sync(~0u, flow, 1), entering = lane < 31 ? after : carried;
    carried = __shfl_sync(~0u, flow, 0);
    return entering;
}

__device__ inline float warp_total(float value) {
#pragma unroll
    for (int distance = 16; distance; distance /= 2) value += __shfl_xor_sync(~0u, value, distance);
    return value;
}

// forward once: the state before every span
__device__ inline void keep_entering(const Backward& job, const Channel& at, float* entering, float* state) {
    const Call& call = job.call;
    const Row A = at.A();
    for (int n = at.lane; n < call.states; n += 32) state[n] = 0.f;
    __syncwarp();
    for (int start = 0, span_index = 0; start < call.length; start += SPAN, span_index++) {
        const int first = start + at.lane * STEPS;
        const Span span = load_span(job, at, first, true);
        for (int n = 0; n < call.states; n++) {
            const Loaded steps = load_steps(at, span, n, rate_of(A.at(n)));
            float carried = state[n];
            __syncwarp();
            if (at.lane == 0) entering[(long long)span_index * call.states + n] = carried;
            enter(steps.decay, steps.input, carried, at.lane);
            if (at.lane == 0) state[n] = carried;
        }
        __syncwarp();
    }
}

// one span and state: adds to du and ddelta, returns the terms of dA, dB and dC
struct Terms { float A, B[STEPS], C[STEPS]; };

__device__ inline Terms span_gradients(const Channel& at, const Span& span, int n, bool active, float entering,
                                       float& flow, float (&du)[STEPS], float (&ddelta)[STEPS]) {
    const float A = active ? at.A().at(n) : 0.f;
    const Sum rate = rate_of(A);
    const Row C = at.C(n);
    const Loaded steps = load_steps(at, span, n, rate);
    float before[STEPS], inputs[STEPS], carried = entering;
    Terms terms = {};
    before[0] = enter(steps.decay, steps.input, carried, at.lane);
#pragma unroll
    for (int k = 0; k < STEPS; k++) {
        const float h = fmaf(steps.decay[k], before[k], steps.input[k]);
        if (k + 1 < STEPS) before[k + 1] = h;
        terms.C[k] = span.gradient[k] * h;
        inputs[k] = C.at(span.place[k]) * span.gradient[k];
    }
    float later = enter_backward(steps.decay, inputs, flow, at.lane);
#pragma unroll
    for (int k = STEPS - 1; k >= 0; k--) {
        const float g = inputs[k] + later, past = steps.decay[k] * before[k] * g;
        du[k] = fmaf(span.delta[k] * steps.B[k], g, du[k]);
        ddelta[k] = fmaf(span.u[k] * steps.B[k], g, fmaf(A, past, ddelta[k]));
        terms.A = fmaf(span.delta[k], past, terms.A);
        terms.B[k] = span.delta[k] * span.u[k] * g;
        later = steps.decay[k] * g;
    }
    return terms;
}

// the warps' terms of dB and dC, summed over the block's channels, go out once
__device__ inline void reduce_channels(const Backward& job, const Channel& at, const Terms& terms, int n, int start, float* part) {
    const int warp = threadIdx.x / 32;
    float *B = part + warp * SPAN, *C = B + BACKWARD_WARPS * SPAN;
#pragma unroll
    for (int k = 0; k < STEPS; k++) {
        B[at.lane * STEPS + k] = terms.B[k];
        C[at.lane * STEPS + k] = terms.C[k];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < 2 * SPAN; i += blockDim.x) {
        const int step = start + i % SPAN;
        if (step >= job.call.length) continue;
        float total = 0.f;
        for (int w = 0; w < BACKWARD_WARPS; w++) total += part[(i / SPAN * BACKWARD_WARPS + w) * SPAN + i % SPAN];
        at.result(i < SPAN ? job.B : job.C, n, at.group, at.source(step), total);
    }
    __syncthreads();
}

__device__ inline void backward_block(const Backward& job, float* shared) {
    const Call& call = job.call;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, per_group = call.per_group;
    const int per_route = (per_group + BACKWARD_WARPS - 1) / BACKWARD_WARPS * call.groups, image_route = blockIdx.x / per_route;
    const int b = image_route / call.routes, r = image_route % call.routes;
    const int group = blockIdx.x % per_route / (per_route / call.groups);
    const int own = blockIdx.x % per_route % (per_route / call.groups) * BACKWARD_WARPS + warp;
    const bool active = own < per_group;
    const int c = group * per_group + (active ? own : 0);  // an idle warp only takes part in the barriers
    const Channel at(call, b, r, c, lane);
    const int spans = (call.length + SPAN - 1) / SPAN;
    float *part = shared, *flow = shared + 2 * BACKWARD_WARPS * SPAN + 2 * warp * call.states, *dA = flow + call.states;
    float* entering = job.entering + (((long long)image_route * call.channels) + c) * spans * call.states;
    if (active) keep_entering(job, at, entering, flow);
    __syncwarp();
    for (int n = lane; n < call.states; n += 32) flow[n] = dA[n] = 0.f;
    __syncwarp();
    const float skip = at.D();
    float dD = 0.f;
    for (int index = spans - 1; index >= 0; index--) {
        const int first = index * SPAN + lane * STEPS;
        const Span span = load_span(job, at, first, active);
        float du[STEPS], ddelta[STEPS] = {};
#pragma unroll
        for (int k = 0; k < STEPS; k++) {
            du[k] = skip * span.gradient[k];
            dD = fmaf(span.gradient[k], span.u[k], dD);
        }
        for (int n = 0; n < call.states; n++) {
            float flowing = flow[n];
            const float state = active ? entering[(long long)index * call.states + n] : 0.f;
            const Terms terms = span_gradients(at, span, n, active, state, flowing, du, ddelta);
            const float term = warp_total(terms.A);
            __syncwarp();
            if (lane == 0) {
                flow[n] = flowing;
                dA[n] += term;
            }
            reduce_channels(job, at, terms, n, index * SPAN, part);
        }
#pragma unroll
        for (int k = 0; k < STEPS; k++) {  // an idle warp has no places
            at.result(job.u, c, 0, span.place[k], du[k]);
            at.result(job.delta, at.head, 0, span.place[k], ddelta[k]);
        }
    }
    dD = warp_total(dD);
    __syncwarp();
    if (!active) return;
    for (int n = lane; n < call.states; n += 32)
        store(job.A, r * job.A.route + at.head * job.A.group + n * job.A.position, dA[n]);
    if (lane == 0 && job.D.data) store(job.D, r * job.D.route + c * job.D.axis, dD);
}
