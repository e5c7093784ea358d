// Selective scan, its backward, and hidden attention on a CPU. Equations: reference.py.
//
// Plain C++17 with the vector extensions of GCC and Clang, compiled at first use; the compiler maps 16 lanes to whatever
// the machine has. Scans run 16 channels a vector, one step after the other; attention runs 16 positions a vector.
// Tensors come as pointers and strides in elements; routes are index tables, so permutations and merges copy nothing.

#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int LANES = 16;
constexpr int64_t KEPT = 4096;  // states (of 16 channels) that the backward keeps at once: 256 KiB
typedef float vec __attribute__((vector_size(64)));
typedef int32_t ivec __attribute__((vector_size(64)));

inline vec load(const float* p) { vec v; std::memcpy(&v, p, sizeof v); return v; }
inline void store(float* p, vec v) { std::memcpy(p, &v, sizeof v); }
inline vec splat(float x) { return vec{} + x; }
inline float sum(vec v) { float s = 0; for (int i = 0; i < LANES; i++) s += v[i]; return s; }

// 2^(x + rest) for x <= 0 and a small rest, relative error 1e-7; zero below the smallest normal number.
// Coefficients: minimax on [-1/2, 1/2].
inline vec exp2v(vec x, vec rest = vec{}) {
    rest = (x < -127.f) ? vec{} : rest;    // it grows with x: its sixth power would be infinite, and 0 * inf is NaN
    x = (x < -127.f) ? splat(-127.f) : x;  // whose power of two below is the bit pattern of zero
    const ivec n = __builtin_convertvector(x - 0.5f, ivec);
    const vec f = (x - __builtin_convertvector(n, vec)) + rest;
    vec p = 1.535336188e-4f * f + 1.339887440e-3f;
    p = p * f + 9.618437358e-3f;
    p = p * f + 5.550332471e-2f;
    p = p * f + 2.402264791e-1f;
    p = p * f + 6.931472029e-1f;
    p = p * f + 1.f;
    const ivec power = (n + 127) << 23;
    vec scale;
    std::memcpy(&scale, &power, sizeof scale);
    return p * scale;
}

// 2^(a x) without the rounding of the product, which would put e^-80 off by 80 x 2^-24: the halves' product is exact.
struct Split { vec high, low; };
inline vec upper_half(vec x) {
    ivec bits;
    std::memcpy(&bits, &x, sizeof bits);
    bits &= ~0xfff;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}
inline vec exp2_product(Split a, Split x) {
    const vec a_upper = upper_half(a.high), x_upper = upper_half(x.high);
    const vec a_lower = (a.high - a_upper) + a.low, x_lower = (x.high - x_upper) + x.low;
    return exp2v(a_upper * x_upper, a_upper * x_lower + a_lower * (x_upper + x_lower));
}

// Decayed states reach denormal numbers, which cost far more than ordinary products: below 1e-38 they count as zero.
struct FlushDenormals {
#if defined(__SSE__)
    unsigned before = __builtin_ia32_stmxcsr();
    FlushDenormals() { __builtin_ia32_ldmxcsr(before | 0x8040); }
    ~FlushDenormals() { __builtin_ia32_ldmxcsr(before); }
#endif
};

}  // namespace

extern "C" {

struct Tensor { float* data; int64_t batch, route, axis, position; };  // axis: channels or states

// Shared by all entries. Channels are a multiple of 16 and have stride 1 in the scans (not in attention).
// A2 is A * log2(e): (routes, states, channels) in the scans, (routes, channels, states) in attention.
struct Scan {
    int64_t batch, routes, channels, states, length, tokens, positions;  // positions: of the sources
    Tensor u, delta, B, C;
    const float *A2, *D;
    const int64_t *read, *write;  // (routes, length); read is null when sources are in scan order, write when y is
    float scale;
    int32_t threads;
    Tensor gain;  // data is null where the gain is delta; in attention it always is
};
}

namespace {

inline int64_t at(const int64_t* order, int64_t route, int64_t length, int64_t step) {
    return order ? order[route * length + step] : step;
}

inline const float* row(const Tensor& x, int64_t b, int64_t r, int64_t position) {
    return x.data + b * x.batch + r * x.route + position * x.position;
}

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
    std::vector<vec> heap(N ? 0 : states);
    vec fixed[N ? N : 1];
    vec* h = N ? fixed : heap.data();
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
    std::vector<vec> start;          // (segments, blocks, states): state before each segment
    std::vector<vec> before, decay;  // (steps, states): state before each step, and its decay
    std::vector<vec> carry;          // (blocks, states): gradient that later steps send back
    std::vector<vec> dB, dC;         // (steps, states): summed over channel blocks, lanes still apart
};

struct Gradients { float *u, *delta, *A, *B, *C, *D, *gain; int64_t u_routes, delta_routes, bc_routes, gain_routes; };

void segment_starts(const Scan& s, Workspace& w, int64_t b, int64_t r) {
    const int64_t blocks = s.channels / LANES, states = s.states;
    std::vector<vec> h(states);
    for (int64_t k = 0; k < blocks; k++) {
        const float* A2 = s.A2 + r * states * s.channels + k * LANES;
        for (auto& v : h) v = vec{};
        for (int64_t t = 0; t < s.length; t++) {
            if (t % w.steps == 0) std::memcpy(&w.start[(t / w.steps * blocks + k) * states], h.data(), states * sizeof(vec));
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
        const vec to_u = gain * through_B + D * dy, to_gain = u * through_B, decayed = 0.6931471806f * through_decay;
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
    w.start.resize(segments * blocks * states);
    w.carry.resize(blocks * states);
    w.before.resize(w.steps * states), w.decay.resize(w.steps * states);
    w.dB.resize(w.steps * states), w.dC.resize(w.steps * states);
    for (int64_t r = 0; r < s.routes; r++) {
        if (segments > 1) segment_starts(s, w, b, r);
        else for (auto& v : w.start) v = vec{};
        for (auto& v : w.carry) v = vec{};
        for (int64_t segment = segments - 1; segment >= 0; segment--) {
            for (auto& v : w.dB) v = vec{};
            for (auto& v : w.dC) v = vec{};
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

// ---- hidden attention ------------------------------------------------------------------------------------------------
// Steps are cut into chunks of 16. Inside a chunk the columns' states are carried from row to row; between chunks
// M[i, j] = (C_i e^{A (S_i - S_start(I))}) e^{A (S_start(I) - S_end(J))} (e^{A (S_end(J) - S_j)} B_j delta_j): a product
// of factors <= 1 whose middle one is shared by the tile.

enum Fold { SIGNED, POSITIVE, ABSOLUTE, EACH };

struct Attention {
    Scan scan;
    Tensor row_weight, col_weight;  // data may be null
    const float* A2_low;            // what A2 lost to rounding; both have LANES numbers to spare at the end
    float* out;                     // (batch, [routes when write is null,] [channels when each,] side, side)
    int64_t side, out_batch, out_route, out_channel;
    int32_t fold;
};

// Steps of a chunk, as all channels see them: where their delta lies, and their B and C, zero behind the last one.
struct Steps {
    int64_t first, position[LANES];
    int count;
    std::vector<float> B, C;  // (states, 16)
};

// A block of channels of one (image, route), cut into chunks of steps. Q and K hold the weights of a matrix that is the
// only one; of several, rows and columns do, and the states' sum serves all of them. Where there is but one state, rows and
// columns are those of Q and K, times the weights.
struct Block {
    int64_t first, channels, chunks, states;
    std::vector<float> Q, K;           // (chunks, channels * states, 16)
    std::vector<float> rows, columns;  // (matrices, chunks, channels, 16)
    std::vector<double> S;             // (chunks + 1, channels): cumulative delta at chunk boundaries
    int64_t at(int64_t chunk) const { return chunk * channels * states * LANES; }
    int64_t weights(int64_t matrix, int64_t chunk) const { return (matrix * chunks + chunk) * channels * LANES; }
};

template <int F>
inline void fold_into(vec (&total)[LANES], vec (&part)[LANES]) {
    for (int i = 0; i < LANES; i++) {
        const vec x = part[i];
        total[i] += F == SIGNED ? x : F == POSITIVE ? ((x > 0.f) ? x : vec{}) : ((x > 0.f) ? x : -x);
        if (F != SIGNED) part[i] = vec{};
    }
}

inline void add_reversed(float* line, vec x) {
    vec turned;
    for (int j = 0; j < LANES; j++) turned[j] = x[LANES - 1 - j];
    store(line, load(line) + turned);
}

void write_tile(const Attention& a, int64_t b, int64_t r, int64_t c, int64_t I, int64_t J, const vec* tile) {
    const Scan& s = a.scan;
    float* out = a.out + b * a.out_batch + r * a.out_route + c * a.out_channel;
    const int64_t rows = s.length - I * LANES < LANES ? s.length - I * LANES : LANES;
    const int64_t* read = s.write ? a.scan.read + r * s.length + J * LANES : nullptr;
    const int64_t start = read ? read[0] : J * LANES, stride = read && I != J ? read[1] - read[0] : 1;
    bool along = I != J && (stride == 1 || stride == -1);  // then a row of the tile is 16 neighbours of the matrix
    for (int j = 0; along && read && j < LANES; j++) along = read[j] == start + j * stride;
    for (int64_t i = 0; i < rows; i++) {
        float* line = out + at(s.write, r, s.length, I * LANES + i) * a.side;
        const int64_t columns = I == J ? i + 1 : LANES;
        if (along && stride == 1) store(line + start, load(line + start) + tile[i] * s.scale);
        else if (along) add_reversed(line + start - (LANES - 1), tile[i] * s.scale);
        else for (int64_t j = 0; j < columns; j++) line[read ? read[j] : start + j] += tile[i][j] * s.scale;
    }
}

void gather_steps(const Scan& s, const int64_t* source, int64_t b, int64_t r, int64_t chunk, Steps& x) {
    x.first = chunk * LANES;
    x.count = s.length - x.first < LANES ? s.length - x.first : LANES;
    for (int i = 0; i < LANES; i++) {
        const int64_t p = at(source, r, s.length, x.first + (i < x.count ? i : 0));
        x.position[i] = p * s.delta.position;
        for (int64_t n = 0; n < s.states; n++) {
            x.B[n * LANES + i] = i < x.count ? row(s.B, b, r, p)[n * s.B.axis] : 0;
            x.C[n * LANES + i] = i < x.count ? row(s.C, b, r, p)[n * s.C.axis] : 0;
        }
    }
}

inline vec weights_of(const Tensor& w, int64_t b, int64_t r, const Steps& x, int64_t c) {
    if (!w.data) return splat(1);
    const float* first = row(w, b, r, x.first) + c * w.axis;
    if (w.position == 1 && x.count == LANES) return load(first);
    vec found = {};
    for (int i = 0; i < x.count; i++) found[i] = first[i * w.position];
    return found;
}

// the chunk's own triangle, and its factors, for one channel
template <int F, int MATRICES>
void prepare_channel(const Attention* a, const Steps& x, Block& block, int64_t b, int64_t r, int64_t chunk,
                     int64_t channel, vec (&total)[MATRICES][LANES], vec (&part)[LANES]) {
    const Scan& s = a->scan;
    const int64_t c = block.first + channel, states = s.states;
    const float* steps = s.delta.data + b * s.delta.batch + r * s.delta.route + c * s.delta.axis;
    float deltas[LANES], all[LANES], left[LANES];
    double exact = 0;
    for (int i = 0; i < LANES; i++) {
        deltas[i] = i < x.count ? steps[x.position[i]] : 0;
        exact += deltas[i];
        all[i] = exact;
        left[i] = exact - all[i];
    }
    double* S = &block.S[chunk * block.channels + channel];
    S[block.channels] = S[0] + exact;
    const Split delta{load(deltas), vec{}}, sums{load(all), load(left)};
    vec rows[MATRICES], columns[MATRICES];
    for (int m = 0; m < MATRICES; m++) {
        rows[m] = weights_of(a[m].row_weight, b, r, x, c);
        columns[m] = weights_of(a[m].col_weight, b, r, x, c);
    }
    const vec gain = MATRICES == 1 ? delta.high * columns[0] : delta.high;
    for (int64_t n = 0; n < states; n++) {
        const int64_t which = (r * s.channels + c) * states + n;
        const Split A2{splat(s.A2[which]), splat(a->A2_low[which])};
        float decays[LANES], inputs[LANES], outputs[LANES];
        store(decays, exp2_product(A2, delta));
        store(inputs, load(&x.B[n * LANES]) * gain);
        const vec out = MATRICES == 1 ? load(&x.C[n * LANES]) * rows[0] : load(&x.C[n * LANES]);
        store(outputs, out);
        const int64_t place = block.at(chunk) + (channel * states + n) * LANES;
        store(&block.Q[place], out * exp2_product(A2, sums));
        vec columns_state = {};
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) {
            columns_state *= decays[i];
            columns_state[i] = inputs[i];
            part[i] += columns_state * outputs[i];
        }
        store(&block.K[place], columns_state);
    }
    if (MATRICES == 1) {
        if (F != SIGNED) fold_into<F>(total[0], part);
        return;
    }
    for (int m = 0; m < MATRICES; m++) {
        const int64_t place = block.weights(m, chunk) + channel * LANES;
        const int64_t own = block.at(chunk) + channel * LANES;
        store(&block.rows[place], states == 1 ? rows[m] * load(&block.Q[own]) : rows[m]);
        store(&block.columns[place], states == 1 ? columns[m] * load(&block.K[own]) : columns[m]);
        for (int i = 0; i < LANES; i++) total[m][i] += part[i] * columns[m] * rows[m][i];
    }
    for (int i = 0; i < LANES; i++) part[i] = vec{};
}

// from the end of chunk J to the start of chunk I, for every channel and state
void tile_decays(const Attention& a, const Block& block, int64_t r, int64_t I, int64_t J, float* decay, float* rest) {
    const int64_t states = block.states, inner = block.channels * states;
    const int64_t offset = (r * a.scan.channels + block.first) * states;
    const double *start = &block.S[I * block.channels], *end = &block.S[(J + 1) * block.channels];
    for (int64_t c = 0; c < block.channels; c++) {
        const double distance = start[c] - end[c];
        const float high = distance, low = distance - high;
        for (int64_t n = 0; n < states; n++) decay[c * states + n] = high, rest[c * states + n] = low;
    }
    for (int64_t k = 0; k < inner; k += LANES) {
        const Split A2{load(a.scan.A2 + offset + k), load(a.A2_low + offset + k)};
        store(decay + k, exp2_product(A2, {load(decay + k), load(rest + k)}));
    }
}

template <int F>
void tile_product(const Block& block, int64_t I, int64_t J, const float* decay, vec (&total)[LANES]) {
    const int64_t inner = block.channels * block.states;
    const float *q = &block.Q[block.at(I)], *keys = &block.K[block.at(J)];
    vec part[LANES] = {};
    const int64_t step = F == SIGNED ? inner : block.states;
    for (int64_t k0 = 0; k0 < inner; k0 += step) {
        for (int64_t k = k0; k < k0 + step; k++) {
            const vec key = load(keys + k * LANES) * decay[k];
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++) part[i] += key * q[k * LANES + i];
        }
        fold_into<F>(total, part);
    }
}

// several matrices of the same scan: the states' sum of each channel, once, then the weights of each matrix, of which the
// last may have none; half of the rows at a time, so that all sums stay in registers
template <int MATRICES, bool PLAIN>
void tile_products(const Block& block, int64_t I, int64_t J, const float* decay, vec (&total)[MATRICES][LANES]) {
    constexpr int HALF = LANES / 2;
    const int64_t states = block.states;
    for (int h = 0; h < LANES; h += HALF) {
        const float *q = &block.Q[block.at(I)] + h, *keys = &block.K[block.at(J)];
        vec sums[MATRICES][HALF] = {};
        for (int64_t c = 0; c < block.channels; c++) {
            if (states == 1) {
                for (int m = 0; m < MATRICES; m++) {
                    const float* rows = &block.rows[block.weights(m, I) + c * LANES] + h;
                    const vec key = load(&block.columns[block.weights(m, J) + c * LANES]) * decay[c];
#pragma GCC unroll 8
                    for (int i = 0; i < HALF; i++) sums[m][i] += key * rows[i];
                }
                continue;
            }
            vec part[HALF] = {};
            for (int64_t k = c * states; k < (c + 1) * states; k++) {
                const vec key = load(keys + k * LANES) * decay[k];
#pragma GCC unroll 8
                for (int i = 0; i < HALF; i++) part[i] += key * q[k * LANES + i];
            }
#pragma GCC unroll 4
            for (int m = MATRICES - 1; m >= 0; m--) {
                if (PLAIN && m == MATRICES - 1) {
                    for (int i = 0; i < HALF; i++) sums[m][i] += part[i];
                    continue;
                }
                const float* rows = &block.rows[block.weights(m, I) + c * LANES] + h;
                const vec columns = load(&block.columns[block.weights(m, J) + c * LANES]);
#pragma GCC unroll 8
                for (int i = 0; i < HALF; i++) sums[m][i] += part[i] * columns * rows[i];
            }
        }
        for (int m = 0; m < MATRICES; m++)
            for (int i = 0; i < HALF; i++) total[m][h + i] = sums[m][i];
    }
}

// F is SIGNED where there are several matrices
template <int F, int MATRICES>
void attention_block(const Attention* a, const int64_t* source, int64_t b, int64_t r, int64_t first, int64_t channels) {
    const FlushDenormals flush;
    const Scan& s = a->scan;
    Block block{first, channels, (s.length + LANES - 1) / LANES, s.states, {}, {}, {}, {}, {}};
    const bool plain = !a[MATRICES - 1].row_weight.data && !a[MATRICES - 1].col_weight.data;
    block.Q.resize(block.at(block.chunks));
    block.K.resize(block.Q.size());
    block.rows.resize(MATRICES == 1 ? 0 : block.weights(MATRICES, 0));
    block.columns.resize(block.rows.size());
    block.S.assign(channels * (block.chunks + 1), 0.0);
    Steps x{0, {}, 0, std::vector<float>(s.states * LANES), std::vector<float>(s.states * LANES)};
    for (int64_t chunk = 0; chunk < block.chunks; chunk++) {  // in order: S is cumulative
        vec total[MATRICES][LANES] = {}, part[LANES] = {};
        gather_steps(s, source, b, r, chunk, x);
        for (int64_t c = 0; c < channels; c++) prepare_channel<F, MATRICES>(a, x, block, b, r, chunk, c, total, part);
        if (F == SIGNED && MATRICES == 1) fold_into<F>(total[0], part);
        for (int m = 0; m < MATRICES; m++) write_tile(a[m], b, r, first, chunk, chunk, total[m]);
    }
#pragma omp parallel num_threads(s.threads)
    {
        const FlushDenormals flush;
        std::vector<float> decay(channels * s.states + LANES), rest(decay.size());
        std::vector<vec> later((MATRICES - 1) * block.chunks * LANES);  // rows of two matrices at once overrun the L1 cache
#pragma omp for schedule(dynamic)
        for (int64_t I = block.chunks - 1; I > 0; I--) {
            for (int64_t J = 0; J < I; J++) {
                vec total[MATRICES][LANES] = {};
                tile_decays(*a, block, r, I, J, decay.data(), rest.data());
                if (MATRICES == 1) tile_product<F>(block, I, J, decay.data(), total[0]);
                else if (plain) tile_products<MATRICES, true>(block, I, J, decay.data(), total);
                else tile_products<MATRICES, false>(block, I, J, decay.data(), total);
                write_tile(*a, b, r, first, I, J, total[0]);
                for (int m = 1; m < MATRICES; m++)
                    std::memcpy(&later[((m - 1) * block.chunks + J) * LANES], total[m], sizeof total[m]);
            }
            for (int m = 1; m < MATRICES; m++)
                for (int64_t J = 0; J < I; J++)
                    write_tile(a[m], b, r, first, I, J, &later[((m - 1) * block.chunks + J) * LANES]);
        }
    }
}

// ---- one row or column: exp(A |S_t - S_step|) for every t on its side of the step ------------------------------------

struct Line { const Attention* call; const int64_t* source; int64_t step; bool column; };

inline float weight(const Tensor& w, int64_t b, int64_t step, int64_t c) {
    return w.data ? row(w, b, 0, step)[c * w.axis] : 1.f;
}

// cumulative delta before every chunk, and through the step; chunk by chunk, channels innermost
void line_sums(const Line& line, int64_t b, int64_t c, std::vector<double>& before, std::vector<double>& through) {
    const Scan& s = line.call->scan;
    double sum = 0;
    for (int64_t t = 0; t < s.length; t++) {
        if (t % LANES == 0) before[t / LANES * s.channels + c] = sum;
        sum += row(s.delta, b, 0, at(line.source, 0, s.length, t))[c * s.delta.axis];
        if (t == line.step) through[c] = sum;
    }
}

template <int F>
void line_chunk(const Line& line, int64_t b, int64_t chunk, const double* before, const double* through) {
    const Attention& a = *line.call;
    const Scan& s = a.scan;
    const int64_t own = at(line.source, 0, s.length, line.step), states = s.states;
    const Tensor &near = line.column ? s.B : s.C, &far = line.column ? s.C : s.B;
    std::vector<vec> pairs(states);  // C B of the step and every position
    int64_t position[LANES];
    bool counts[LANES];
    for (int i = 0; i < LANES; i++) {
        const int64_t t = chunk * LANES + i;
        counts[i] = t < s.length && (line.column ? t >= line.step : t <= line.step);
        position[i] = at(line.source, 0, s.length, t < s.length ? t : line.step);
    }
    for (int64_t n = 0; n < states; n++)
        for (int i = 0; i < LANES; i++)
            pairs[n][i] = row(far, b, 0, position[i])[n * far.axis] * row(near, b, 0, own)[n * near.axis];
    for (int64_t c = 0; c < s.channels; c++) {
        vec high, low, factor;
        double sum = before[c];
        for (int i = 0; i < LANES; i++) {
            const int64_t t = chunk * LANES + i;
            const float delta = row(s.delta, b, 0, position[i])[c * s.delta.axis];
            sum += delta;
            const double distance = counts[i] ? (line.column ? sum - through[c] : through[c] - sum) : 0;
            high[i] = distance;
            low[i] = distance - high[i];
            factor[i] = !counts[i] ? 0 : line.column ? weight(a.row_weight, b, t, c)
                                                     : delta * weight(a.col_weight, b, t, c);
        }
        vec M = {};
        for (int64_t n = 0; n < states; n++) {
            const Split A2{splat(s.A2[c * states + n]), splat(a.A2_low[c * states + n])};
            M += exp2_product(A2, {high, low}) * pairs[n];
        }
        const float fixed = line.column ? row(s.delta, b, 0, own)[c * s.delta.axis] * weight(a.col_weight, b, line.step, c)
                                        : weight(a.row_weight, b, line.step, c);
        M *= factor * fixed;
        if (F != SIGNED) M = (M > 0.f) ? M : F == POSITIVE ? vec{} : -M;
        float* out = a.out + b * a.out_batch + c * a.out_channel + chunk * LANES;
        for (int i = 0; i < LANES; i++)
            if (counts[i]) out[i] += M[i] * s.scale;
    }
}

}  // namespace

extern "C" {

void scan_forward(const Scan* s, float* y) {
    const int64_t blocks = s->channels / LANES;
#pragma omp parallel for collapse(2) num_threads(s->threads)
    for (int64_t b = 0; b < s->batch; b++) {
        for (int64_t k = 0; k < blocks; k++) {
            switch (s->states) {
                case 1: forward_block<1>(*s, y, b, k * LANES); break;
                case 8: forward_block<8>(*s, y, b, k * LANES); break;
                case 16: forward_block<16>(*s, y, b, k * LANES); break;
                default: forward_block<0>(*s, y, b, k * LANES);
            }
        }
    }
}

void scan_backward(const Scan* s, const float* gy, const Gradients* g) {
#pragma omp parallel for num_threads(s->threads)
    for (int64_t b = 0; b < s->batch; b++) {
        switch (s->states) {
            case 1: backward_image<1>(*s, gy, *g, b); break;
            case 8: backward_image<8>(*s, gy, *g, b); break;
            case 16: backward_image<16>(*s, gy, *g, b); break;
            default: backward_image<0>(*s, gy, *g, b);
        }
    }
}

// Matrices of one scan: `count` is 1, or 2 whose folds are SIGNED, in one sweep over the states.
// source: (routes, length) position read at each step, or null when sources are in scan order
void hidden_attention(const Attention* a, int64_t count, const int64_t* source) {
    const Scan& s = a->scan;
    const int64_t length = (s.length + LANES - 1) / LANES * LANES;
    int64_t block = (1 << 20) / (sizeof(float) * length * s.states);  // K of a block stays in a 1 MiB cache
    block = block < 1 || a->fold == EACH ? 1 : block > s.channels ? s.channels : block;
    for (int64_t b = 0; b < s.batch; b++) {
        for (int64_t r = 0; r < s.routes; r++) {
            for (int64_t c = 0; c < s.channels; c += block) {
                const int64_t some = s.channels - c < block ? s.channels - c : block;
                if (count == 2) attention_block<SIGNED, 2>(a, source, b, r, c, some);
                else if (a->fold == POSITIVE) attention_block<POSITIVE, 1>(a, source, b, r, c, some);
                else if (a->fold == ABSOLUTE) attention_block<ABSOLUTE, 1>(a, source, b, r, c, some);
                else attention_block<SIGNED, 1>(a, source, b, r, c, some);
            }
        }
    }
}

// One route: row (what `step` reads) or column (where it is read) into out (batch, [channels,] length), in scan order.
void attention_line(const Attention* a, const int64_t* source, int64_t step, int32_t column) {
    const Scan& s = a->scan;
    const Line line{a, source, step, column != 0};
    const int64_t chunks = (s.length + LANES - 1) / LANES, own = step / LANES;
    std::vector<double> before(chunks * s.channels), through(s.channels);
    for (int64_t b = 0; b < s.batch; b++) {
#pragma omp parallel num_threads(s.threads)
        {
            const FlushDenormals flush;
#pragma omp for
            for (int64_t c = 0; c < s.channels; c++) line_sums(line, b, c, before, through);
#pragma omp for
            for (int64_t chunk = column ? own : 0; chunk < (column ? chunks : own + 1); chunk++) {
                const double* sums = &before[chunk * s.channels];
                if (a->fold == POSITIVE) line_chunk<POSITIVE>(line, b, chunk, sums, through.data());
                else if (a->fold == ABSOLUTE) line_chunk<ABSOLUTE>(line, b, chunk, sums, through.data());
                else line_chunk<SIGNED>(line, b, chunk, sums, through.data());
            }
        }
    }
}
}
