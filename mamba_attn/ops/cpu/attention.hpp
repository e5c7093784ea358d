// Hidden attention: 16 positions a vector.
//
// Steps are cut into chunks of 16. Inside a chunk the columns' states are carried from row to row; between chunks
// M[i, j] = (C_i e^{A (S_i - S_start(I))}) e^{A (S_start(I) - S_end(J))} (e^{A (S_end(J) - S_j)} B_j delta_j): a product
// of factors <= 1 whose middle one is shared by the tile.

extern "C" {

struct Attention {
    Scan scan;
    Tensor row_weight, col_weight;  // data may be null
    const float* A2_low;            // what A2 lost to rounding; both have LANES numbers to spare at the end
    float* out;                     // (batch, [routes when write is null,] [channels when each,] side, side)
    int64_t side, out_batch, out_route, out_channel;
    int32_t fold;
};
}

namespace {

enum Fold { SIGNED, POSITIVE, ABSOLUTE, EACH };

template <int F>
inline vec folded(vec x) { return F == POSITIVE ? positive(x) : F == ABSOLUTE ? absolute(x) : x; }

// A block of channels of one (image, route), cut into chunks of steps. Q and K hold the weights of a matrix that is the
// only one; of several, rows and columns do, and the states' sum serves all of them. Where there is but one state, rows and
// columns are those of Q and K, times the weights.
struct Block {
    int64_t first, channels, chunks, states;
    Buffer<float> Q, K;           // (chunks, channels * states, 16)
    Buffer<float> rows, columns;  // (matrices, chunks, channels, 16)
    Buffer<float> own;            // (matrices, chunks, 16, 16): every chunk with itself
    Buffer<double> sums;          // (chunks, channels): of delta, chunk by chunk
    Buffer<float> S, S_low;       // (chunks + 1, channels padded to 16): cumulative delta, rounded, and what that lost

    void cut(const Scan& s, int64_t from, int64_t count, int matrices) {
        first = from, channels = count, chunks = (s.length + LANES - 1) / LANES, states = s.states;
        Q.fit(place(chunks)), K.fit(place(chunks)), own.fit(matrices * chunks * LANES * LANES);
        sums.fit(channels * chunks), S.fit(boundary(chunks + 1)), S_low.fit(boundary(chunks + 1));
        if (matrices > 1) rows.fit(weights(matrices, 0)), columns.fit(weights(matrices, 0));
    }
    int64_t place(int64_t chunk) const { return chunk * channels * states * LANES; }
    int64_t weights(int64_t matrix, int64_t chunk) const { return (matrix * chunks + chunk) * channels * LANES; }

    int64_t boundary(int64_t chunk) const { return chunk * ((channels + LANES - 1) / LANES * LANES); }

    // cumulative delta at chunk boundaries
    void accumulate() {
        std::memset(S.at(0), 0, boundary(chunks + 1) * sizeof(float));
        std::memset(S_low.at(0), 0, boundary(chunks + 1) * sizeof(float));
        for (int64_t i = 0; i < chunks; i++) {
            for (int64_t c = 0; c < channels; c++) {
                const double exact = i ? *sums.at(i * channels + c) += *sums.at((i - 1) * channels + c) : *sums.at(c);
                const float high = exact;
                *S.at(boundary(i + 1) + c) = high;
                *S_low.at(boundary(i + 1) + c) = exact - high;
            }
        }
    }
};

// What a thread needs besides.
struct Scratch {
    int64_t first, position[LANES];    // of a chunk's steps: where their delta lies
    int count;                         // of its steps; the others have zero B and C
    bool adjacent;                     // whether they are neighbours in memory
    Buffer<float> B, C;                // (states, 16)
    Buffer<float> decays, outputs;     // (channels * states, 16)
    Buffer<float> decay, rest, distance;  // of a tile
    Buffer<float> band[2];             // 16 rows of a matrix
};

void gather_steps(const Scan& s, const int64_t* source, int64_t b, int64_t r, int64_t chunk, Scratch& x) {
    x.first = chunk * LANES;
    x.count = s.length - x.first < LANES ? s.length - x.first : LANES;
    x.adjacent = x.count == LANES;
    float *B = x.B.fit(s.states * LANES), *C = x.C.fit(s.states * LANES);
    for (int i = 0; i < LANES; i++) {
        const int64_t p = at(source, r, s.length, x.first + (i < x.count ? i : 0));
        x.position[i] = p * s.delta.position;
        x.adjacent &= x.position[i] == x.position[0] + i;
        for (int64_t n = 0; n < s.states; n++) {
            B[n * LANES + i] = i < x.count ? row(s.B, b, r, p)[n * s.B.axis] : 0;
            C[n * LANES + i] = i < x.count ? row(s.C, b, r, p)[n * s.C.axis] : 0;
        }
    }
}

inline vec weights_of(const Tensor& w, int64_t b, int64_t r, const Scratch& x, int64_t c) {
    if (!w.data) return splat(1);
    const float* first = row(w, b, r, x.first) + c * w.axis;
    if (w.position == 1 && x.count == LANES) return load(first);
    float found[LANES] = {};
    for (int i = 0; i < x.count; i++) found[i] = first[i * w.position];
    return load(found);
}

// The factors of one channel at a chunk's steps; K holds the inputs until `own_tile` has carried them to the chunk's end.
template <int MATRICES>
void factors(const Attention* a, Scratch& x, Block& block, int64_t b, int64_t r, int64_t chunk, int64_t channel,
             float* decays, float* outputs) {
    const Scan& s = a->scan;
    const int64_t c = block.first + channel, states = s.states;
    const float* steps = s.delta.data + b * s.delta.batch + r * s.delta.route + c * s.delta.axis;
    float deltas[LANES];
    if (x.adjacent) std::memcpy(deltas, steps + x.position[0], sizeof deltas);
    else for (int i = 0; i < LANES; i++) deltas[i] = i < x.count ? steps[x.position[i]] : 0;
    Split sums;
    *block.sums.at(chunk * block.channels + channel) = running_sums(deltas, sums);
    const vec delta = load(deltas);
    vec rows[MATRICES], columns[MATRICES];
    for (int m = 0; m < MATRICES; m++) {
        rows[m] = weights_of(a[m].row_weight, b, r, x, c);
        columns[m] = weights_of(a[m].col_weight, b, r, x, c);
    }
    const vec gain = MATRICES == 1 ? delta * columns[0] : delta;
    float* Q = block.Q.at(block.place(chunk) + channel * states * LANES);
    float* K = block.K.at(block.place(chunk) + channel * states * LANES);
    for (int64_t n = 0; n < states; n++) {
        const int64_t which = (r * s.channels + c) * states + n;
        const Split A2{splat(s.A2[which]), splat(a->A2_low[which])};
        const vec out = MATRICES == 1 ? load(x.C.at(n * LANES)) * rows[0] : load(x.C.at(n * LANES));
        store(decays + n * LANES, exp2_product(A2, delta));
        store(outputs + n * LANES, out);
        store(K + n * LANES, load(x.B.at(n * LANES)) * gain);
        store(Q + n * LANES, out * exp2_product(A2, sums));
    }
    if (MATRICES == 1) return;
    for (int m = 0; m < MATRICES; m++) {
        const int64_t place = block.weights(m, chunk) + channel * LANES;
        store(block.rows.at(place), rows[m]);
        store(block.columns.at(place), columns[m]);
    }
}

// A chunk with itself, for some states: their sum in `part`; K is carried to the chunk's end. Above the diagonal stands what
// nobody reads.
inline void own_tile(float* K, const float* decays, const float* outputs, int64_t states, vec (&part)[LANES]) {
    for (int64_t n = 0; n < states * LANES; n += LANES) {
        vec state = load(K + n);
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) {
            scale_below(state, i, decays[n + i]);
            part[i] += state * outputs[n + i];
        }
        store(K + n, state);
    }
}

template <int F, int MATRICES>
void prepare_chunk(const Attention* a, const int64_t* source, Block& block, int64_t b, int64_t r, int64_t chunk, Scratch& x) {
    constexpr bool FOLDED = F == POSITIVE || F == ABSOLUTE || MATRICES > 1;  // channel by channel
    const int64_t states = block.states;
    const int64_t some = FOLDED ? 1 : states > 128 ? 1 : 128 / states;  // channels whose numbers fit the L1 cache
    float* decays = x.decays.fit(some * states * LANES);
    float* outputs = x.outputs.fit(some * states * LANES);
    vec total[MATRICES][LANES] = {};
    gather_steps(a->scan, source, b, r, chunk, x);
    for (int64_t from = 0; from < block.channels; from += some) {
        const int64_t to = from + some < block.channels ? from + some : block.channels;
        for (int64_t c = from; c < to; c++) {
            const int64_t place = (c - from) * states * LANES;
            factors<MATRICES>(a, x, block, b, r, chunk, c, decays + place, outputs + place);
        }
        float* K = block.K.at(block.place(chunk) + from * states * LANES);
        if (!FOLDED) {
            own_tile(K, decays, outputs, (to - from) * states, total[0]);
            continue;
        }
        vec part[LANES] = {};
        own_tile(K, decays, outputs, states, part);
        for (int m = 0; m < MATRICES; m++) {
            if (MATRICES == 1) {
                for (int i = 0; i < LANES; i++) total[m][i] += folded<F>(part[i]);
                continue;
            }
            const int64_t place = block.weights(m, chunk) + from * LANES;
            const vec columns = load(block.columns.at(place));
            const float* rows = block.rows.at(place);
            for (int i = 0; i < LANES; i++) total[m][i] += part[i] * columns * rows[i];
            if (states > 1) continue;
            const int64_t own = block.place(chunk) + from * LANES;
            store(block.rows.at(place), load(rows) * load(block.Q.at(own)));
            store(block.columns.at(place), columns * load(block.K.at(own)));
        }
    }
    for (int m = 0; m < MATRICES; m++)
        for (int i = 0; i < LANES; i++) store(block.own.at(((m * block.chunks + chunk) * LANES + i) * LANES), total[m][i]);
}

// from the end of chunk J to the start of chunk I, for every channel and state
void tile_decays(const Attention& a, const Block& block, int64_t r, int64_t I, int64_t J, Scratch& x) {
    const int64_t states = block.states, inner = block.channels * states;
    const int64_t offset = (r * a.scan.channels + block.first) * states, from = block.boundary(I), to = block.boundary(J + 1);
    const float *A2 = a.scan.A2 + offset, *A2_low = a.A2_low + offset;
    float *decay = x.decay.at(0), *rest = x.rest.at(0);
    float *high = states == 1 ? decay : x.distance.fit(block.boundary(2)), *low = states == 1 ? rest : high + block.boundary(1);
    for (int64_t c = 0; c < block.channels; c += LANES) {
        const vec start = load(block.S.at(from + c)), end = load(block.S.at(to + c)), distance = start - end;
        const vec kept = start - distance;  // end, but for a rounding
        store(high + c, distance);
        store(low + c, (kept - end) + (start - (distance + kept)) + (load(block.S_low.at(from + c)) - load(block.S_low.at(to + c))));
    }
    if (states % LANES == 0) {
        for (int64_t c = 0; c < block.channels; c++) {
            const Split both{splat(high[c]), splat(low[c])};
            for (int64_t k = c * states; k < (c + 1) * states; k += LANES)
                store(decay + k, exp2_product(Split{load(A2 + k), load(A2_low + k)}, both));
        }
        return;
    }
    for (int64_t c = 0; states > 1 && c < block.channels; c++)
        for (int64_t n = 0; n < states; n++) decay[c * states + n] = high[c], rest[c * states + n] = low[c];
    for (int64_t k = 0; k < inner; k += LANES)
        store(decay + k, exp2_product(Split{load(A2 + k), load(A2_low + k)}, Split{load(decay + k), load(rest + k)}));
}

// rows of a tile that a register file holds the sums of
constexpr int ROWS = PARTS == 1 ? 16 : PARTS == 2 ? 4 : 2;

// part[i] += sum over states of q[k, i] keys[k] decay[k], for ROWS rows
inline void add_product(const float* q, const float* keys, const float* decay, int64_t states, vec (&part)[ROWS]) {
    for (int64_t k = 0; k < states; k++) {
        const vec key = load(keys + k * LANES) * decay[k];
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; i++) part[i] += key * q[k * LANES + i];
    }
}

template <int F>
void tile_product(const Block& block, int64_t I, int64_t J, const float* decay, vec (&total)[1][LANES]) {
    const int64_t inner = block.channels * block.states, step = F == SIGNED ? inner : block.states;
    const float* keys = block.K.at(block.place(J));
    for (int h = 0; h < LANES; h += ROWS) {
        const float* q = block.Q.at(block.place(I) + h);
        for (int64_t k = 0; k < inner; k += step) {
            vec part[ROWS] = {};
            add_product(q + k * LANES, keys + k * LANES, decay + k, step, part);
            for (int i = 0; i < ROWS; i++) total[0][h + i] += folded<F>(part[i]);
        }
    }
}

// Several matrices of the same scan: the states' sum of each channel, once, then the weights of each matrix, of which the
// last may have none; few enough rows at a time that all sums stay in registers.
template <int MATRICES, bool PLAIN>
void tile_products(const Block& block, int64_t I, int64_t J, const float* decay, vec (&total)[MATRICES][LANES]) {
    constexpr int SOME = ROWS > 8 ? 8 : ROWS;
    const int64_t states = block.states;
    for (int h = 0; h < LANES; h += SOME) {
        const float *q = block.Q.at(block.place(I) + h), *keys = block.K.at(block.place(J));
        vec sums[MATRICES][SOME] = {};
        for (int64_t c = 0; c < block.channels; c++) {
            if (states == 1) {
                for (int m = 0; m < MATRICES; m++) {
                    const float* rows = block.rows.at(block.weights(m, I) + c * LANES + h);
                    const vec key = load(block.columns.at(block.weights(m, J) + c * LANES)) * decay[c];
#pragma GCC unroll 8
                    for (int i = 0; i < SOME; i++) sums[m][i] += key * rows[i];
                }
                continue;
            }
            vec part[SOME] = {};
            for (int64_t k = c * states; k < (c + 1) * states; k++) {
                const vec key = load(keys + k * LANES) * decay[k];
#pragma GCC unroll 8
                for (int i = 0; i < SOME; i++) part[i] += key * q[k * LANES + i];
            }
#pragma GCC unroll 4
            for (int m = MATRICES - 1; m >= 0; m--) {
                if (PLAIN && m == MATRICES - 1) {
                    for (int i = 0; i < SOME; i++) sums[m][i] += part[i];
                    continue;
                }
                const float* rows = block.rows.at(block.weights(m, I) + c * LANES + h);
                const vec columns = load(block.columns.at(block.weights(m, J) + c * LANES));
#pragma GCC unroll 8
                for (int i = 0; i < SOME; i++) sums[m][i] += part[i] * columns * rows[i];
            }
        }
        for (int m = 0; m < MATRICES; m++)
            for (int i = 0; i < SOME; i++) total[m][h + i] = sums[m][i];
    }
}

// Rows of chunk I, of every matrix, in scan order; 16 rows, `stride` floats apart. `more`: added to what is there.
template <int F, int MATRICES>
void band(const Attention* a, const Block& block, int64_t r, int64_t I, float* const* out, int64_t stride, bool more, Scratch& x) {
    const bool plain = !a[MATRICES - 1].row_weight.data && !a[MATRICES - 1].col_weight.data;
    const int64_t inner = block.channels * block.states;
    float* decay = x.decay.fit(inner + LANES);
    x.rest.fit(inner + LANES);
    for (int64_t J = 0; J <= I; J++) {
        vec total[MATRICES][LANES] = {};
        if (J == I) {
            for (int m = 0; m < MATRICES; m++)
                for (int i = 0; i < LANES; i++) total[m][i] = load(block.own.at(((m * block.chunks + I) * LANES + i) * LANES));
        } else {
            tile_decays(*a, block, r, I, J, x);
            if constexpr (MATRICES == 1) tile_product<F>(block, I, J, decay, total);
            else if (plain) tile_products<MATRICES, true>(block, I, J, decay, total);
            else tile_products<MATRICES, false>(block, I, J, decay, total);
        }
        for (int m = 0; m < MATRICES; m++) {
            for (int i = 0; i < LANES; i++) {
                float* to = out[m] + i * stride + J * LANES;
                store(to, more ? load(to) + total[m][i] : total[m][i]);
            }
        }
    }
}

}  // namespace
