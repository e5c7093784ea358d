// Mamba-2: the channels of a head share one matrix, and its states one decay (arXiv 2405.21060, section 6), so that
//
//     M[i, j] = G[i, j] E[i, j],   G[i, j] = C[i] . B[j] of the head's group,   E[i, j] = exp(A (S[i] - S[j])) delta[j],
//
// one product of a group on the matrix unit and one number per head and pair. Here a call's channels are heads of `width`
// channels each; `axis` strides of u, D, y and the weights lead to the next head, their `group` strides to the next
// channel of a head. An infinity in u, B or C spoils its whole chunk of 64 steps, as in every product of matrices.
#pragma once
#include "factored.cuh"

using Tiles = Factored<64>;
constexpr int CHUNK = 64, HEAD_THREADS = Tiles::THREADS;  // steps of a tile or of a scan's chunk; a thread is a side of it
constexpr int SLICE = 64;                                 // channels of a head that a block scans

// a warp's 32 x 32 entries of 64 x 64, and a thread's of these: [16 rows][8 columns][see multiply]
struct Quadrant {
    int row, column, lane;

    __device__ Quadrant() : row(threadIdx.x / 64 * 32), column(threadIdx.x / 32 % 2 * 32), lane(threadIdx.x % 32) {}
    __device__ int row_at(int m, int i) const { return row + m * 16 + lane / 4 + i / 2 * 8; }
    __device__ int column_at(int n, int i) const { return column + n * 8 + lane % 4 * 2 + i % 2; }
};

typedef float Entries[2][4][4];

template <class Use>
__device__ inline void for_entries(Use use) {
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int n = 0; n < 4; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) use(m, n, i);
}

template <class Use>
__device__ inline void for_rows(Use use) {
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) use(m, half);
}

template <class Use>
__device__ inline void for_columns(Use use) {
#pragma unroll
    for (int n = 0; n < 4; n++)
#pragma unroll
        for (int odd = 0; odd < 2; odd++) use(n, odd);
}

// always three products of halves: TF32 may be used where it is allowed, and here it would not save much
__device__ inline void multiply_entries(const Split* slab, const Quadrant& own, int rows, Entries& total) {
    Tiles::multiply_slab<3>(slab, own.row, CHUNK + own.column, rows - own.row, total);
}

// total += sum_x value(x, row) value(x, CHUNK + column) over `inner` indices x. A warp for which `rows` is 0 helps with
// the values alone, and so it does with rows from `rows` on.
template <class Value>
__device__ inline void product(Split* slab, int inner, const Quadrant& own, int rows, Entries& total, Value value) {
    const int side = threadIdx.x;
    for (int first = 0; first < inner; first += INNER) {
        __syncthreads();
#pragma unroll 4
        for (int x = 0; x < INNER; x++) slab[x * Tiles::PITCH + side] = split(first + x < inner ? value(first + x, side) : 0.f);
        __syncthreads();
        multiply_entries(slab, own, rows, total);
    }
}

// C . B of a head's group, between the places of rows and of columns
__device__ inline void group_product(const Call& call, const Channel& head, const int* place, Split* slab, const Quadrant& own,
                                     int rows, Entries& total) {
    const bool is_row = threadIdx.x < CHUNK;
    const Tensor& source = is_row ? call.C : call.B;
    const Row first = is_row ? head.C(0) : head.B(0);
    const long long next = source.axis * size_of(source.type);
    product(slab, call.states, own, rows, total, [&](int n, int side) {
        Row row = first;
        row.data += n * next;
        return row.at(place[side]);
    });
}

// ---- a tile of the matrix ---------------------------------------------------------------------------------------------

struct Heads {
    using Staged = Stage<CHUNK>;

    struct Memory : Tiles::Memory {  // the stage's BC holds, on the diagonal, the factors of its halves
        TileIndex at;                // in shared memory, like `last`: held in registers, what follows from it would spill
        int to[2 * CHUNK];           // where each side is in the result, or -1
        int last[CHUNK];             // column of each row
    };

    enum Part { WHOLE, SIZE, PLUS, MINUS };  // of a number

    __device__ static float part_of(int part, float x) {
        return part == WHOLE ? x : part == SIZE ? fabsf(x) : fmaxf(part == PLUS ? x : -x, 0.f);
    }

    // the sum of a part of a head's weights at a step
    __device__ static float weight_at(const Channel& head, const Tensor& weights, int step, int part) {
        if (!weights.data) return 1.f;
        const int place = head.place(step, weights.frame);
        float sum = 0.f;
        for (int w = 0; w < head.call->width; w++) sum += part_of(part, head.row(weights, head.c, w).at(place));
        return sum;
    }

    // factors, rates and distances of `count` heads from c on; PAIRED: rows and columns have weights, which come later
    __device__ static void stage_heads(const Call& call, const TileIndex& at, Memory& memory, int c, int count, bool paired, int part) {
        Staged& stage = memory.stage;
        const int side = threadIdx.x;
        __syncthreads();
        for (int k = 0; k < CHANNELS; k++) {
            float delta = 0.f, weight = 0.f;
            if (k < count && stage.place[side] >= 0) {
                const Channel head(call, at.b, at.r, c + k, 0);
                delta = head.delta().at(stage.place[side]);
                const Tensor& weights = side < CHUNK ? call.row_weight : call.col_weight;
                weight = paired ? 1.f : weight_at(head, weights, step_of<CHUNK>(at, side), part);
            }
            stage.high[k * Staged::PITCH + side] = delta;
            stage.factor[k * Staged::PITCH + side] = side < CHUNK ? weight : weight * delta;
        }
        if (side < CHANNELS) stage.rate[side] = side < count ? rate_of(Channel(call, at.b, at.r, c + side, 0).A().at(0)) : Sum{0.f, 0.f};
        __syncthreads();
        stage_distances(call, at, stage, c, count);
        __syncthreads();
        if (at.J < at.I) {  // both sides meet at the start of the rows' chunk
            for (int k = 0; k < count; k++) stage.factor[k * Staged::PITCH + side] *= decay(stage.rate[k], stage.distance(k, side));
        } else {  // halves of 32 steps meet each other at the step between them, and so do their halves
            const int level = side / CHUNK, step = side % CHUNK, half = 32 >> level;
            const bool is_row = step & half;
            const int middle = (step | (2 * half - 1)) - half, own = is_row ? step : CHUNK + step;
            for (int k = 0; k < count; k++) {
                const Sum to = stage.distance(k, middle), from = stage.distance(k, own);
                const Sum distance = is_row ? minus(from, to) : plus(to, from);
                halves(memory, k, level)[step] = stage.factor[k * Staged::PITCH + own] * decay(stage.rate[k], distance);
            }
        }
        __syncthreads();
    }

    __device__ static float* halves(Memory& memory, int k, int level) { return memory.stage.BC + (level * CHANNELS + k) * CHUNK; }

    // use(m, n, i, a, b) for every entry that is not zero: a b is E of head k, times weights that are staged. It is used in
    // every branch, not where they meet again: there it would take 32 registers.
    template <class Use>
    __device__ static void decays(const TileIndex& at, Memory& memory, const Quadrant& own, int k, Use use) {
        const Staged& stage = memory.stage;
        const float* factors = stage.factor + k * Staged::PITCH;
        if (at.I > at.J || own.row > own.column) {
            const float *rows = at.I > at.J ? factors : halves(memory, k, 0), *columns = at.I > at.J ? factors + CHUNK : rows;
            for_entries([&](int m, int n, int i) { use(m, n, i, rows[own.row_at(m, i)], columns[own.column_at(n, i)]); });
        } else if (own.row == own.column) {
            const float* halved = halves(memory, k, 1);
            const Sum rate = stage.rate[k];
            for_entries([&](int m, int n, int i) {
                const int row = own.row_at(m, i), column = own.column_at(n, i);
                if (m == 1 && n < 2) {
                    use(m, n, i, halved[row], halved[column]);
                } else if (m == n / 2) {  // the only ones that meet the diagonal
                    const Sum distance = plus(stage.distance(k, row), stage.distance(k, CHUNK + column));
                    const float factor = row < column ? 0.f : factors[row] * factors[CHUNK + column];
                    use(m, n, i, factor, row < column ? 0.f : decay(rate, distance));
                }
            });
        }
    }

    // sum_w r_w[i] k_w[j] over a head's channels, or of its positive parts (part MINUS: of its negative ones)
    __device__ static void weight_product(const Call& call, const Channel& head, const TileIndex& at, Memory& memory, const Quadrant& own,
                                          int rows, int part, Entries& total) {
        const bool is_row = threadIdx.x < CHUNK, halved = part == PLUS || part == MINUS;
        const Tensor& weights = is_row ? call.row_weight : call.col_weight;
        const int place = head.place(step_of<CHUNK>(at, threadIdx.x), weights.frame);
        product(memory.slab, halved ? 2 * call.width : call.width, own, rows, total, [&](int x, int) {
            const bool second = x >= call.width;
            const float value = head.row(weights, head.c, second ? x - call.width : x).at(place);
            return part_of(!halved ? part : second == (part == MINUS && !is_row) ? PLUS : MINUS, value);
        });
    }

    // where rows and columns of the tile are in the result
    __device__ static void place_results(const Call& call, const TileIndex& at, Memory& memory) {
        const int side = threadIdx.x, frame = call.attention.frame == STEP ? STEP : side < CHUNK ? WRITE : READ;
        memory.to[side] = Channel(call, at.b, at.r, 0, 0).place(step_of<CHUNK>(at, side), frame);
        if (side < CHUNK) memory.last[side] = at.J < at.I ? CHUNK - 1 : side;
    }

    // channel c of the result, or with `add` more of it; entries above the diagonal and outside the sequence stay as they are
    template <class Value>
    __device__ static void keep(const Call& call, const TileIndex& at, const Memory& memory, const Quadrant& own, int c, bool add,
                                Value value) {
        const Output& out = call.attention;
        float* first = out.data + at.b * out.batch + at.r * out.route + c * out.group;
        for_rows([&](int m, int half) {
            const int row = own.row_at(m, 2 * half), to = memory.to[row], last = memory.last[row] - own.column_at(0, 0);
            if (to < 0) return;
            const OutRow line = {(char*)(first + to * out.axis), (unsigned)out.position * 4, add};
            for_columns([&](int n, int odd) {
                if (n * 8 + odd > last) return;
                line.put(memory.to[CHUNK + own.column_at(n, odd)], value(m, n, 2 * half + odd) * call.attention_scale);
            });
        });
    }

    // the matrix of every channel of head c: M, times the channel's weights
    __device__ static void keep_each(const Call& call, const TileIndex& at, Memory& memory, const Quadrant& own, int c,
                                     const Entries& M) {
        const int side = threadIdx.x;
        const Channel head(call, at.b, at.r, c, 0);
        const Tensor& weights = side < CHUNK ? call.row_weight : call.col_weight;
        const int place = weights.data ? head.place(step_of<CHUNK>(at, side), weights.frame) : -1;
        float* slab = reinterpret_cast<float*>(memory.slab);
        for (int w = 0; w < call.width; w++) {
            const float *rows = slab + w % INNER * Tiles::PITCH, *columns = rows + CHUNK;
            if (w % INNER == 0) {
                __syncthreads();
                for (int x = 0; x < min(INNER, call.width - w); x++)
                    slab[x * Tiles::PITCH + side] = weights.data ? head.row(weights, c, w + x).at(place) : 1.f;
                __syncthreads();
            }
            keep(call, at, memory, own, c * call.width + w, call.attention.add,
                 [&](int m, int n, int i) { return M[m][n][i] * rows[own.row_at(m, i)] * columns[own.column_at(n, i)]; });
        }
    }

    __device__ void operator()(const Call& call, const TileIndex& tile, Memory& memory) const {
        if (threadIdx.x == 0) memory.at = tile;
        place_results(call, tile, memory);
        __syncthreads();
        const TileIndex& at = memory.at;
        const Quadrant own;
        const bool paired = call.row_weight.data && call.col_weight.data, each = call.fold == EACH;
        const int rows = at.I == at.J && own.row < own.column ? 0 : call.length - at.I * CHUNK;
        const int passes = call.fold == POSITIVE && (call.row_weight.data || call.col_weight.data) ? 2 : 1;
        bool add = call.attention.add;
        for (int first = at.first, end; first < at.last; first = end) {  // the heads of a group
            end = min(at.last, (first / call.per_group + 1) * call.per_group);
            for (int pass = 0; pass < passes; pass++, add = true) {  // what follows is added to the result: a total here would spill
                const int part = call.fold == ABSOLUTE ? SIZE : call.fold != POSITIVE ? WHOLE : pass ? MINUS : PLUS;
                Entries sum = {};  // of the heads' E, or G itself with EACH: registers hold two such arrays, not three
                if (each) group_product(call, Channel(call, at.b, at.r, first, 0), memory.stage.place, memory.slab, own, rows, sum);
                for (int c = first; c < end; c += CHANNELS) {
                    const int count = min(CHANNELS, end - c);
                    stage_heads(call, at, memory, c, count, paired || each, part);
                    for (int k = 0; k < count; k++) {
                        if (each) {
                            Entries M = {};
                            decays(at, memory, own, k, [&](int m, int n, int i, float a, float b) {
                                M[m][n][i] = sum[m][n][i] * (a * b);
                            });
                            keep_each(call, at, memory, own, c + k, M);
                        } else if (paired) {
                            Entries W = {};
                            weight_product(call, Channel(call, at.b, at.r, c + k, 0), at, memory, own, rows, part, W);
                            decays(at, memory, own, k, [&](int m, int n, int i, float a, float b) {
                                sum[m][n][i] = fmaf(a * b, W[m][n][i], sum[m][n][i]);
                            });
                        } else {
                            decays(at, memory, own, k, [&](int m, int n, int i, float a, float b) {
                                sum[m][n][i] = fmaf(a, b, sum[m][n][i]);
                            });
                        }
                    }
                }
                if (each) continue;
                Entries G = {};
                group_product(call, Channel(call, at.b, at.r, first, 0), memory.stage.place, memory.slab, own, rows, G);
                if (part == WHOLE) for_entries([&](int m, int n, int i) { sum[m][n][i] *= G[m][n][i]; });
                else if (part == SIZE) for_entries([&](int m, int n, int i) { sum[m][n][i] *= fabsf(G[m][n][i]); });
                else for_entries([&](int m, int n, int i) { sum[m][n][i] *= fmaxf(part == PLUS ? G[m][n][i] : -G[m][n][i], 0.f); });
                keep(call, at, memory, own, 0, add, [&](int m, int n, int i) { return sum[m][n][i]; });
            }
        }
    }
};

// ---- y: a block walks along one head, chunk by chunk (arXiv 2405.21060, section 6) ------------------------------------

struct ChunkMemory {
    Split slab[INNER * Tiles::PITCH];
    float high[CHUNK], low[CHUNK];  // sum of delta from the chunk's start through each step
    float delta[CHUNK], left[CHUNK];  // delta, and delta times the decay from the step to the chunk's end
    int place[2 * CHUNK], to[CHUNK];  // where steps are read, for rows and again for columns, and written
    int b, r, c, slice;  // whose y; held in registers, the addresses that follow from it would spill
    float state[1];  // [states][SLICE]

    __device__ Sum distance(int step) const { return {high[step], low[step]}; }
};

__device__ inline int chunk_blocks(const Call& call) { return call.batch * call.routes * call.channels * ((call.width + SLICE - 1) / SLICE); }

// a chunk's places, deltas and their sums
__device__ inline void stage_chunk(const Call& call, const Channel& head, ChunkMemory& memory, int start, Sum rate) {
    const int side = threadIdx.x, step = side % CHUNK;
    __syncthreads();
    memory.place[side] = head.source(start + step);
    if (side < CHUNK) memory.delta[step] = head.delta().at(memory.place[side]);
    else memory.to[step] = head.place(start + step, call.y.frame);
    __syncthreads();
    if (side < 32) {
        const Sum first = {memory.delta[2 * side], 0.f}, both = plus(first, {memory.delta[2 * side + 1], 0.f});
        Sum before = shuffle_up(warp_sum(both, side), 1);
        if (side == 0) before = {0.f, 0.f};
        const Sum one = plus(before, first), two = plus(before, both);
        memory.high[2 * side] = one.high, memory.low[2 * side] = one.low;
        memory.high[2 * side + 1] = two.high, memory.low[2 * side + 1] = two.low;
    }
    __syncthreads();
    if (side < CHUNK) memory.left[step] = memory.delta[step] * decay(rate, minus(memory.distance(CHUNK - 1), memory.distance(step)));
    __syncthreads();
}

// y += P u: the warps that hold P of 16 steps lay it out as rows
__device__ inline void multiply_inputs(const Call& call, const Channel& head, ChunkMemory& memory, const Quadrant& own, int slice,
                                       const Entries& P, Entries& y) {
    const int p = threadIdx.x % SLICE, half = threadIdx.x / SLICE * (INNER / 2);
    const bool there = slice + p < call.width;
    const Row u = head.row(call.u, head.c, there ? slice + p : 0);
    for (int first = 0; first < CHUNK; first += INNER) {
        __syncthreads();
        if (own.column == first / 32 * 32) {
#pragma unroll
            for (int m = 0; m < 2; m++)
#pragma unroll
                for (int n = 0; n < 2; n++)
#pragma unroll
                    for (int i = 0; i < 4; i++)
                        memory.slab[(own.column_at(n, i) - own.column) * Tiles::PITCH + own.row_at(m, i)] =
                            split(first % 32 ? P[m][n + 2][i] : P[m][n][i]);
        }
#pragma unroll 4
        for (int x = half; x < half + INNER / 2; x++)
            memory.slab[x * Tiles::PITCH + CHUNK + p] = split(there ? u.at(memory.place[first + x]) : 0.f);
        __syncthreads();
        multiply_entries(memory.slab, own, own.row + 32 > first ? CHUNK : 0, y);  // earlier rows take nothing from these steps
    }
}

__device__ inline void scan_head(const Call& call, int block, ChunkMemory& memory) {
    const Quadrant own;
    if (threadIdx.x == 0) {
        const int slices = (call.width + SLICE - 1) / SLICE, rest = block / slices, image_route = rest / call.channels;
        memory.b = image_route / call.routes, memory.r = image_route % call.routes;
        memory.c = rest % call.channels, memory.slice = block % slices * SLICE;
    }
    for (int i = threadIdx.x; i < call.states * SLICE; i += HEAD_THREADS) memory.state[i] = 0.f;
    __syncthreads();
    for (int start = 0; start < call.length; start += CHUNK) {
        const Channel head(call, memory.b, memory.r, memory.c, threadIdx.x % 32);
        const int slice = memory.slice;
        const Sum rate = rate_of(head.A().at(0));
        stage_chunk(call, head, memory, start, rate);
        const int rows = call.length - start;
        Entries y = {}, P = {};
        if (start > 0) {
            const Row C = head.C(0);
            const long long C_next = call.C.axis * size_of(call.C.type);
            product(memory.slab, call.states, own, rows, y, [&](int n, int side) {
                if (side >= CHUNK) return memory.state[n * SLICE + side - CHUNK];
                Row row = C;
                row.data += n * C_next;
                return row.at(memory.place[side]);
            });
            for_entries([&](int m, int n, int i) { y[m][n][i] *= decay(rate, memory.distance(own.row_at(m, i))); });
        }
        group_product(call, head, memory.place, memory.slab, own, own.row < own.column ? 0 : rows, P);
        if (own.row >= own.column) for_entries([&](int m, int n, int i) {
            const int row = own.row_at(m, i), column = own.column_at(n, i);
            const float E = memory.delta[column] * decay(rate, minus(memory.distance(row), memory.distance(column)));
            P[m][n][i] = row < column ? 0.f : P[m][n][i] * E;
        });
        multiply_inputs(call, head, memory, own, slice, P, y);
        for_columns([&](int n, int odd) {
            const int p = slice + own.column_at(n, odd);
            if (p >= call.width) return;
            const float skip = call.D.data ? row_of(call.D, head.r * call.D.route + head.c * call.D.axis + p * call.D.group).at(0) : 0.f;
            const Row u = head.row(call.u, head.c, p);
            const OutRow out = head.out_row(call.y, head.c, p);
            for_rows([&](int m, int half) {
                const int row = own.row_at(m, 2 * half), place = memory.place[row];
                const float value = place < 0 ? 0.f : fmaf(skip, u.at(place), y[m][n][2 * half + odd]);
                if (row < rows) out.put(memory.to[row], value * call.y_scale);
            });
        });
        if (rows <= CHUNK) break;
        const float shrink = decay(rate, memory.distance(CHUNK - 1));
        for (int n0 = 0; n0 < call.states; n0 += CHUNK) {
            const int n = n0 + threadIdx.x, p = slice + threadIdx.x - CHUNK;
            const bool is_row = threadIdx.x < CHUNK, there = is_row ? n < call.states : p < call.width;
            const Row source = is_row ? head.B(there ? n : 0) : head.row(call.u, head.c, there ? p : 0);
            Entries gained = {};
            product(memory.slab, CHUNK, own, call.states - n0, gained, [&](int step, int) {
                return there ? source.at(memory.place[step]) * (is_row ? memory.left[step] : 1.f) : 0.f;
            });
            for_entries([&](int m, int n, int i) {
                const int at = n0 + own.row_at(m, i);
                if (at >= call.states) return;
                float& state = memory.state[at * SLICE + own.column_at(n, i)];
                state = fmaf(shrink, state, gained[m][n][i]);
            });
        }
    }
}
