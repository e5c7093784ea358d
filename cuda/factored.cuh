// The factored formulation, signed folds: rows and columns on either side of a step m factor,
//
//     sum_n C[i] exp(A (S[i] - S[j])) B[j] delta[j] = sum_n (C[i] exp(A (S[i] - S[m]))) (exp(A (S[m] - S[j])) B[j] delta[j]),
//
// a matrix product over channels and states, for the matrix unit. Below the diagonal m is the start of the rows' chunk.
// On the diagonal the chunk is halved down to leaves of 8 steps, which are computed pair by pair.
#pragma once
#include "tile.cuh"

constexpr int INNER = 16;  // channels x states of one slab
constexpr int LEAF = 8;
constexpr int LEAF_PAIRS = LEAF * (LEAF - 1) / 2;

template <int TILE>
struct Factored {
    static constexpr int THREADS = TILE == 64 ? 128 : 512, WARPS = THREADS / 32, WARP_TILES = TILE / 32;
    static constexpr int PITCH = 2 * TILE + 4;  // half a fragment's 4 x 8 values lie in 32 banks
    static constexpr int PAIRS = TILE / LEAF * LEAF_PAIRS, LEAF_SLOTS = (PAIRS + THREADS - 1) / THREADS;

    struct Memory {
        Stage<TILE> stage;
        Split slab[INNER * PITCH];  // [channel and state][side]: a row's factor or a column's, split once for all warps
    };

    // ---- below the diagonal: 32 x 32 entries a warp -----------------------------------------------------------------

    // the channel and state of a thread's first value of a slab, and how far apart those of two slabs are
    struct Place {
        int k, n, channels, rest;

        __device__ Place(int first, int states) : k(first / states), n(first % states), channels(INNER / states), rest(INNER % states) {}

        __device__ void next_slab(int states) {
            k += channels;
            n += rest;
            if (n >= states) n -= states, k++;
        }
    };

    // A side's INNER values, its PHASES threads taking OWN each, from its factors and distances by channel. Straight-line
    // code, so that several exponentials are under way at once. KNOWN: the stage's states where they are 1 or INNER,
    // whose indices need no arithmetic, else 0. Channels behind the last one are staged with factor 0.
    template <int KNOWN, int PHASES, class Distance>
    __device__ static void fill(Memory& memory, int to, int side, int phase, const Place& place, int states, Distance distance_of) {
        constexpr int OWN = INNER / PHASES;
        const Stage<TILE>& stage = memory.stage;
        int k = place.k, n = KNOWN == 1 ? 0 : place.n;
        const float *BC = stage.BC + n * 2 * TILE + side, *factors = stage.factor + k * Stage<TILE>::PITCH + side;
        const Sum* rate = stage.rate + k * STATES + n;
        Split* slab = memory.slab + phase * OWN * PITCH + to;
        float factor = 0.f;
        Sum distance = {0.f, 0.f};
#pragma unroll 4
        for (int i = 0; i < OWN; i++, slab += PITCH) {
            if (KNOWN != INNER || i == 0) {
                factor = *factors;
                distance = distance_of(k);
            }
            *slab = split(factor * *BC * decay(*rate, distance));
            if (KNOWN == 1 || (KNOWN == 0 && ++n == states)) {
                if (KNOWN == 0) n = 0, BC = stage.BC + side;
                k++, rate = stage.rate + k * STATES, factors += Stage<TILE>::PITCH;
            } else {
                BC += 2 * TILE, rate++;
            }
        }
    }

    static constexpr int SLAB_PHASES = THREADS / (2 * TILE), HALF_PHASES = THREADS / TILE;  // threads of a side, of a step

    // `valid` steps of the chunk are in the sequence; what lies behind is never written out
    __device__ static void fill_slab(Memory& memory, const Place& place, int states, int valid) {
        const int side = threadIdx.x % (2 * TILE), phase = threadIdx.x / (2 * TILE);
        if (side >= valid && side < TILE) return;
        const auto distance = [&](int k) { return memory.stage.distance(k, side); };
        if (states == INNER) fill<INNER, SLAB_PHASES>(memory, side, side, phase, place, states, distance);
        else if (states == 1) fill<1, SLAB_PHASES>(memory, side, side, phase, place, states, distance);
        else fill<0, SLAB_PHASES>(memory, side, side, phase, place, states, distance);
    }

    __device__ static void load_rows(const Split* slab, int k, int row, int lane, Split (&a)[4]) {
        const Split* at = slab + (k + lane % 4) * PITCH + row + lane / 4;
        a[0] = at[0], a[1] = at[8], a[2] = at[4 * PITCH], a[3] = at[4 * PITCH + 8];
    }

    __device__ static void load_columns(const Split* slab, int k, int column, int lane, Split (&b)[2]) {
        const Split* at = slab + (k + lane % 4) * PITCH + column + lane / 4;
        b[0] = at[0], b[1] = at[4 * PITCH];
    }

    template <int PRODUCTS>
    __device__ static void multiply_slab(const Split* slab, int row, int column, int rows, float (&total)[2][4][4]) {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int m = 0; m < 2; m++) {
            if (m * 16 >= rows) break;  // the sequence ends before
            float part[4][4] = {};  // the unit's own additions round towards zero: only a slab's worth of them
#pragma unroll 1  // registers
            for (int k = 0; k < INNER; k += 8) {
                Split a[4];
                load_rows(slab, k, row + m * 16, lane, a);
#pragma unroll
                for (int n = 0; n < 4; n++) {
                    Split b[2];
                    load_columns(slab, k, column + n * 8, lane, b);
                    multiply_exact<PRODUCTS>(part[n], a, b);
                }
            }
#pragma unroll
            for (int n = 0; n < 4; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) total[m][n][i] += part[n][i];
        }
    }

    __device__ static void below(const Call& call, const TileIndex& at, Memory& memory) {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        const int row = warp / WARP_TILES * 32, column = warp % WARP_TILES * 32, rows = call.length - at.I * TILE - row;
        float total[2][4][4] = {};
        each_stage(call, at, memory, [&](int count, int states) {
            Place place(threadIdx.x / (2 * TILE) * (INNER / SLAB_PHASES), states);
            for (int k0 = 0; k0 < count * states; k0 += INNER, place.next_slab(states)) {
                __syncthreads();
                fill_slab(memory, place, states, call.length - at.I * TILE);
                __syncthreads();
                if (call.products == 3) multiply_slab<3>(memory.slab, row, TILE + column, rows, total);
                else multiply_slab<1>(memory.slab, row, TILE + column, rows, total);
            }
        });
#pragma unroll
        for (int m = 0; m < 2; m++)
#pragma unroll
            for (int n = 0; n < 4; n++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    write<TILE>(call, at, row + m * 16 + lane / 4 + i / 2 * 8, column + n * 8 + lane % 4 * 2 + i % 2, 0,
                                total[m][n][i]);
    }

    // ---- on the diagonal: every half meets its other half, four 16 x 8 products a warp ------------------------------

    struct Product { int half, row, column; };

    // the warp's products are numbers `slot * WARPS + warp` of a list: halves of TILE / 2 first, then of TILE / 4, ... down to LEAF
    __device__ static Product product_of(int slot) {
        int half = TILE / 2, number = slot * WARPS + threadIdx.x / 32;
        for (; half > LEAF; half /= 2) {
            const int products = TILE / (2 * half) * (half / 16) * (half / 8);
            if (number < products) break;
            number -= products;
        }
        const int down = half < 16 ? 1 : half / 16, across = half / 8, node = number / (down * across) * 2 * half;
        const int row = half < 16 ? node : node + half + number / across % down * 16;
        return {half, row, node + number % across * 8};
    }

    __device__ static void fill_half(Memory& memory, int half, const Place& place, int states, int valid) {
        const Stage<TILE>& stage = memory.stage;
        const int step = threadIdx.x % TILE, phase = threadIdx.x / TILE;
        if (step >= valid) return;
        const bool is_row = step & half;
        const int middle = (step | (2 * half - 1)) - half, side = is_row ? step : TILE + step;
        if (middle + 1 >= valid) return;  // no row meets this column
        const auto distance = [&](int k) {
            const Sum to = stage.distance(k, middle), own = stage.distance(k, side);
            return is_row ? minus(own, to) : plus(to, own);
        };
        if (states == INNER) fill<INNER, HALF_PHASES>(memory, step, side, phase, place, states, distance);
        else if (states == 1) fill<1, HALF_PHASES>(memory, step, side, phase, place, states, distance);
        else fill<0, HALF_PHASES>(memory, step, side, phase, place, states, distance);
    }

    template <int PRODUCTS>
    __device__ static void multiply_half(const Split* slab, const Product& p, float (&total)[4]) {
        const int lane = threadIdx.x % 32;
        float part[4] = {};
#pragma unroll
        for (int k = 0; k < INNER; k += 8) {
            Split a[4], b[2];
            load_rows(slab, k, p.row, lane, a);
            load_columns(slab, k, p.column, lane, b);
            if (p.half == LEAF) a[0] = a[2] = Split{0, 0};  // the first 8 of the 16 rows are columns here
            multiply_exact<PRODUCTS>(part, a, b);
        }
#pragma unroll
        for (int i = 0; i < 4; i++) total[i] += part[i];
    }

    // the pair (row, column) number `pair` of all leaves, row > column
    __device__ static void leaf_pair(int pair, int& row, int& column) {
        int i = 1, rest = pair % LEAF_PAIRS;
        while (rest >= i) rest -= i++;
        row = pair / LEAF_PAIRS * LEAF + i;
        column = pair / LEAF_PAIRS * LEAF + rest;
    }

    // SAME: row and column are one step, which does not decay
    template <bool SAME>
    __device__ static float entry(const Stage<TILE>& stage, int row, int column, int k, int states) {
        const Sum distance = plus(stage.distance(k, row), stage.distance(k, TILE + column));
        const float *C = stage.BC + row, *B = stage.BC + TILE + column;
        const Sum* rate = stage.rate + k * STATES;
        float value = 0.f;
#pragma unroll 4
        for (int n = 0; n < states; n++, rate++, B += 2 * TILE, C += 2 * TILE)
            value = fmaf(*C * *B, SAME ? 1.f : decay(*rate, distance), value);
        constexpr int PITCH = Stage<TILE>::PITCH;
        return value * stage.factor[k * PITCH + row] * stage.factor[k * PITCH + TILE + column];
    }

    __device__ static void diagonal(const Call& call, const TileIndex& at, Memory& memory) {
        const int lane = threadIdx.x % 32, valid = min(TILE, call.length - at.I * TILE);
        float total[4][4] = {}, leaf[LEAF_SLOTS] = {}, own = 0.f;
        int row[LEAF_SLOTS], column[LEAF_SLOTS];
#pragma unroll
        for (int slot = 0; slot < LEAF_SLOTS; slot++) leaf_pair(slot * THREADS + threadIdx.x, row[slot], column[slot]);
        Product products[4];
#pragma unroll
        for (int slot = 0; slot < 4; slot++) products[slot] = product_of(slot);
        each_stage(call, at, memory, [&](int count, int states) {
            for (int k = 0; k < count; k++) {
#pragma unroll
                for (int slot = 0; slot < LEAF_SLOTS; slot++)
                    if (slot * THREADS + threadIdx.x < PAIRS && row[slot] < valid)
                        leaf[slot] += entry<false>(memory.stage, row[slot], column[slot], k, states);
                if (threadIdx.x < valid) own += entry<true>(memory.stage, threadIdx.x, threadIdx.x, k, states);
            }
            Place place(threadIdx.x / TILE * (INNER / HALF_PHASES), states);
            for (int k0 = 0; k0 < count * states; k0 += INNER, place.next_slab(states))
                for (int half = TILE / 2; half >= LEAF; half /= 2) {
                    if (half >= valid) continue;  // no step is a row of it
                    __syncthreads();
                    fill_half(memory, half, place, states, valid);
                    __syncthreads();
#pragma unroll
                    for (int slot = 0; slot < 4; slot++) {
                        const Product product = products[slot];
                        if (product.half != half || product.row + (half == LEAF ? LEAF : 0) >= valid) continue;
                        if (call.products == 3) multiply_half<3>(memory.slab, product, total[slot]);
                        else multiply_half<1>(memory.slab, product, total[slot]);
                    }
                }
        });
#pragma unroll
        for (int slot = 0; slot < LEAF_SLOTS; slot++)
            if (slot * THREADS + threadIdx.x < PAIRS) write<TILE>(call, at, row[slot], column[slot], 0, leaf[slot]);
        if (threadIdx.x < TILE) write<TILE>(call, at, threadIdx.x, threadIdx.x, 0, own);
#pragma unroll
        for (int slot = 0; slot < 4; slot++) {
            const Product product = products[slot];
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (product.half > LEAF || i >= 2)
                    write<TILE>(call, at, product.row + lane / 4 + i / 2 * 8, product.column + lane % 4 * 2 + i % 2, 0,
                                total[slot][i]);
        }
    }

    // stage by stage: up to CHANNELS channels of one group and STATES states
    template <class Use>
    __device__ static void each_stage(const Call& call, const TileIndex& at, Memory& memory, Use use) {
        const int per_group = call.per_group;
        for (int n0 = 0; n0 < call.states; n0 += STATES) {
            int staged = -1;
            for (int c = at.first, count; c < at.last; c += count) {
                const int group = call.groups == 1 ? 0 : c / per_group;
                count = min(min(CHANNELS, at.last - c), (group + 1) * per_group - c);
                __syncthreads();
                if (staged != group) stage_states(call, at, memory.stage, c, n0);
                staged = group;
                stage_channels(call, at, memory.stage, c, count, n0);
                __syncthreads();
                stage_distances(call, at, memory.stage, c, count);
                __syncthreads();
                use(count, min(STATES, call.states - n0));
            }
        }
    }

    Memory* memory;

    __device__ void operator()(const Call& call, const TileIndex& at, Stage<TILE>&) const {
        if (at.I == at.J) diagonal(call, at, *memory);
        else below(call, at, *memory);
    }
};
