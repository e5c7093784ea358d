// The scan and its backward: 16 channels a vector, one step after the other.

namespace {

constexpr int64_t KEPT = 4096;  // states (of 16 channels) that the backward keeps at once: 256 KiB

// Rows are a stride of all channels apart, which hardware prefetchers miss: ask for the row AHEAD steps later.
constexpr int64_t AHEAD = 8;

// where step t of (b, r) lies in y and its gradient
inline int64_t out_row(const Scan& s, int64_t b, int64_t r, int64_t t) {
    return s.write ? b * s.tokens + s.write[r * s.length + t] : (b * s.routes + r) * s.length + t;
}

// what the input is multiplied by; d is delta there
inline vec gain_at(const Scan& s, int64_t b, int64_t r, int64_t p, int64_t c, vec d) {
    return s.gain.data ? load(row(s.gain, b, r, p) + c) : d;
}

inline void prefetch_inputs(const Scan& s, int64_t b, int64_t r, int64_t step, int64_t c) {
    const int64_t p = at(s.read, r, s.length, step + AHEAD < s.length ? step + AHEAD : step);
    __builtin_prefetch(row(s.delta, b, r, p) + c);
    __builtin_prefetch(row(s.u, b, r, p) + c);
}

template <int N>
void forward_block(const Scan& s, float* y, int64_t b, int64_t c) {
    const FlushDenormals flush;
    const int states = N ? N : s.states;
    Buffer<vec> heap;
    vec fixed[N ? N : 1];
    vec* h = N ? fixed : heap.fit(states);
    for (int64_t r = 0; r < s.routes; r++) {
        const float* A2 = s.A2 + r * states * s.channels + c;
        const vec D = s.D ? load(s.D + r * s.channels + c) : vec{};
        for (int n = 0; n < states; n++) h[n] = vec{};
        for (int64_t t = 0; t < s.length; t++) {
            const int64_t p = at(s.read, r, s.length, t);
            const vec d = load(row(s.delta, b, r, p) + c), u = load(row(s.u, b, r, p) + c);
            const vec x = gain_at(s, b, r, p, c, d) * u;
            const float *B = row(s.B, b, r, p), *C = row(s.C, b, r, p);
            vec sum = D * u;
            prefetch_inputs(s, b, r, t, c);
            __builtin_prefetch(y + out_row(s, b, r, t + AHEAD < s.length ? t + AHEAD : t) * s.channels + c, 1);
            for (int n = 0; n < states; n++) {
                h[n] = exp2v(d * load(A2 + n * s.channels)) * h[n] + x * B[n * s.B.axis];
                sum += h[n] * C[n * s.C.axis];
            }
            float* out = y + out_row(s, b, r, t) * s.channels + c;
            store(out, load(out) + sum * s.scale);
        }
    }
}

// Everything the backward of one image needs in addition to its inputs.
struct Workspace {
    int64_t steps;                   // of a segment: recomputed and kept at once
    Buffer<vec> start;          // (segments, blocks, states): state before each segment
    Buffer<vec> before, decay;  // (steps, states): state before each step, and its decay
    Buffer<vec> carry;          // (blocks, states): gradient that later steps send back
    Buffer<vec> dB, dC;         // (steps, states): summed over channel blocks, lanes still apart
};

struct Gradients { float *u, *delta, *A, *B, *C, *D, *gain; int64_t u_routes, delta_routes, bc_routes, gain_routes; };

void segment_starts(const Scan& s, Workspace& w, int64_t b, int64_t r) {
    const int64_t blocks = s.channels / LANES, states = s.states;
    Buffer<vec> buffer;
    vec* h = buffer.fit(states);
    for (int64_t k = 0; k < blocks; k++) {
        const float* A2 = s.A2 + r * states * s.channels + k * LANES;
        for (int n = 0; n < states; n++) h[n] = vec{};
        for (int64_t t = 0; t < s.length; t++) {
            if (t % w.steps == 0) std::memcpy(&w.start[(t / w.steps * blocks + k) * states], h, states * sizeof(vec));
            const int64_t p = at(s.read, r, s.length, t);
            const vec d = load(row(s.delta, b, r, p) + k * LANES);
            const vec x = gain_at(s, b, r, p, k * LANES, d) * load(row(s.u, b, r, p) + k * LANES);
            const float* B = row(s.B, b, r, p);
            for (int n = 0; n < states; n++) h[n] = exp2v(d * load(A2 + n * s.channels)) * h[n] + x * B[n * s.B.axis];
        }
    }
}

template <int N>
void backward_segment(const Scan& s, Workspace& w, const float* gy, const Gradients& g, int64_t b, int64_t r,
                      int64_t segment, int64_t k) {
    const int64_t blocks = s.channels / LANES, c = k * LANES, positions = s.positions;
    const int states = N ? N : s.states, first = segment * w.steps;
    const int count = s.length - first < w.steps ? s.length - first : w.steps;
    const float* A2 = s.A2 + r * states * s.channels + c;
    const vec D = s.D ? load(s.D + r * s.channels + c) : vec{};
    vec* h = &w.start[(segment * blocks + k) * states];
    vec* carry = &w.carry[k * states];
    for (int i = 0; i < count; i++) {
        const int64_t p = at(s.read, r, s.length, first + i);
        const vec d = load(row(s.delta, b, r, p) + c);
        const vec x = gain_at(s, b, r, p, c, d) * load(row(s.u, b, r, p) + c);
        const float* B = row(s.B, b, r, p);
        prefetch_inputs(s, b, r, first + i, c);
        for (int n = 0; n < states; n++) {
            w.before[i * states + n] = h[n];
            w.decay[i * states + n] = exp2v(d * load(A2 + n * s.channels));
            h[n] = w.decay[i * states + n] * h[n] + x * B[n * s.B.axis];
        }
    }
    vec dD = {};
    for (int i = count - 1; i >= 0; i--) {
        const int64_t p = at(s.read, r, s.length, first + i);
        const vec d = load(row(s.delta, b, r, p) + c), u = load(row(s.u, b, r, p) + c);
        const vec gain = gain_at(s, b, r, p, c, d), x = gain * u;
        const float *B = row(s.B, b, r, p), *C = row(s.C, b, r, p);
        const vec dy = load(gy + out_row(s, b, r, first + i) * s.channels + c) * s.scale;
        vec through_B = {}, through_decay = {};
        const int64_t soon = first + (i < AHEAD ? i : i - AHEAD), q = at(s.read, r, s.length, soon);
        __builtin_prefetch(gy + out_row(s, b, r, soon) * s.channels + c);
        __builtin_prefetch(g.u + ((b * g.u_routes + (g.u_routes > 1 ? r : 0)) * positions + q) * s.channels + c, 1);
        __builtin_prefetch(g.delta + ((b * g.delta_routes + (g.delta_routes > 1 ? r : 0)) * positions + q) * s.channels + c, 1);
        for (int n = 0; n < states; n++) {
            const vec a = w.decay[i * states + n], kept = a * w.before[i * states + n];
            const vec dh = carry[n] + dy * C[n * s.C.axis];
            w.dC[i * states + n] += dy * (kept + x * B[n * s.B.axis]);
            w.dB[i * states + n] += dh * x;
            through_B += dh * B[n * s.B.axis];
            const vec dlog = dh * kept;  // gradient of delta * A
            through_decay += dlog * load(A2 + n * s.channels);
            float* dA = g.A + ((b * s.routes + r) * states + n) * s.channels + c;
            store(dA, load(dA) + dlog * d);
            carry[n] = dh * a;
        }
        float* du = g.u + ((b * g.u_routes + (g.u_routes > 1 ? r : 0)) * positions + p) * s.channels + c;
        float* dd = g.delta + ((b * g.delta_routes + (g.delta_routes > 1 ? r : 0)) * positions + p) * s.channels + c;
        const vec to_u = gain * through_B + D * dy, to_gain = u * through_B, decayed = through_decay * 0.6931471806f;
        const vec to_delta = s.gain.data ? decayed : to_gain + decayed;
        store(du, g.u_routes == s.routes ? to_u : load(du) + to_u);  // shared by the routes: summed
        store(dd, g.delta_routes == s.routes ? to_delta : load(dd) + to_delta);
        if (s.gain.data) {
            float* dg = g.gain + ((b * g.gain_routes + (g.gain_routes > 1 ? r : 0)) * positions + p) * s.channels + c;
            store(dg, g.gain_routes == s.routes ? to_gain : load(dg) + to_gain);
        }
        dD += dy * u;
    }
    float* out = g.D + (b * s.routes + r) * s.channels + c;
    store(out, load(out) + dD);
}

template <int N>
void backward_image(const Scan& s, const float* gy, const Gradients& g, int64_t b) {
    const int64_t blocks = s.channels / LANES, states = s.states;
    const FlushDenormals flush;
    Workspace w;
    w.steps = KEPT / states < 16 ? 16 : KEPT / states < s.length ? KEPT / states : s.length;
    const int64_t segments = (s.length + w.steps - 1) / w.steps;
    w.start.fit(segments * blocks * states);
    w.carry.fit(blocks * states);
    w.before.fit(w.steps * states), w.decay.fit(w.steps * states);
    w.dB.fit(w.steps * states), w.dC.fit(w.steps * states);
    for (int64_t r = 0; r < s.routes; r++) {
        if (segments > 1) segment_starts(s, w, b, r);
        else w.start.clear();
        w.carry.clear();
        for (int64_t segment = segments - 1; segment >= 0; segment--) {
            w.dB.clear();
            w.dC.clear();
            for (int64_t k = 0; k < blocks; k++) backward_segment<N>(s, w, gy, g, b, r, segment, k);
            const int64_t left = s.length - segment * w.steps, count = left < w.steps ? left : w.steps;
            for (int64_t i = 0; i < count; i++) {
                const int64_t p = at(s.read, r, s.length, segment * w.steps + i);
                const int64_t to = ((b * g.bc_routes + (g.bc_routes > 1 ? r : 0)) * s.positions + p) * states;
                for (int n = 0; n < states; n++) g.B[to + n] += sum(w.dB[i * states + n]);
                for (int n = 0; n < states; n++) g.C[to + n] += sum(w.dC[i * states + n]);
            }
        }
    }
}

}  // namespace
