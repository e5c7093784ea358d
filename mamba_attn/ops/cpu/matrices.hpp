// Which thread computes what of a matrix, and where its rows go. The sums have the same order whatever the threads.

#include <algorithm>
#include <iterator>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace {

constexpr int64_t L1 = 1 << 8;         // channels x states of a block: a chunk of it takes 16 KiB of a cache
constexpr int64_t L2 = 1 << 18;        // floats: the keys of a block of channels stay in a 1 MiB cache
constexpr int64_t SHORT = 512;         // steps up to which a task makes a matrix of its own
constexpr int64_t TASKS = 16;          // of a call, so that up to so many threads are busy
constexpr int64_t WORTH = 256;         // channels x states that pay for a matrix of a task's own
constexpr int64_t TOGETHER = 1 << 24;  // floats of all matrices of tasks at a time

// Where the steps of every route lie in a matrix.
struct Places {
    int64_t length, chunks, side;
    std::vector<int32_t> column;  // (routes, length)
    std::vector<int8_t> run;      // (routes, chunks): 1 or -1 where the columns of 16 steps are neighbours
    std::vector<int8_t> along;    // (routes): whether most are
    std::vector<int32_t> writes;  // (routes, side): the step that writes a row, or -1
    std::vector<int32_t> reads;   // (routes, side): the step that reads a column, or one behind the last

    explicit Places(const Attention& a) : length(a.scan.length), chunks((a.scan.length + LANES - 1) / LANES), side(a.side) {
        const Scan& s = a.scan;
        column.resize(s.routes * length), run.resize(s.routes * chunks), along.resize(s.routes);
        writes.assign(s.routes * side, -1), reads.assign(s.routes * side, chunks * LANES);
        for (int64_t r = 0; r < s.routes; r++) {
            for (int64_t t = 0; t < length; t++) {
                const int64_t read = s.write ? s.read[r * length + t] : t;
                column[r * length + t] = read;
                reads[r * side + read] = t;
                writes[r * side + at(s.write, r, length, t)] = t;
            }
            int64_t runs = 0;
            for (int64_t J = 0; J < length / LANES; J++) {
                const int32_t *c = &column[r * length + J * LANES], stride = c[1] - c[0];
                bool neighbours = stride == 1 || stride == -1;
                for (int j = 1; neighbours && j < LANES; j++) neighbours = c[j] == c[0] + j * stride;
                run[r * chunks + J] = neighbours ? stride : 0;
                runs += neighbours;
            }
            along[r] = 2 * runs >= length / LANES;
        }
    }

    int64_t stride() const { return (chunks + 1) * LANES; }  // of rows in scan order: 16 numbers to spare

    // Adds what step i of a route reads to a row of a matrix; `next` is the row that follows. Numbers behind step i are lost.
    void add(int64_t r, int64_t i, float* values, float scale, float* line, const float* next) const {
        if (!along[r]) {
            std::memset(values + i + 1, 0, (stride() - i - 1) * sizeof(float));
            const int32_t* from = &reads[r * side];
            int64_t t = 0;
            for (; t + LANES <= side; t += LANES) {
                if (next) __builtin_prefetch(next + t, 1);
                store(line + t, load(line + t) + gather(values, from + t) * scale);
            }
            for (; t < side; t++) line[t] += values[from[t]] * scale;
            return;
        }
        for (int64_t J = 0; J * LANES <= i; J++) {
            const int64_t count = i + 1 - J * LANES < LANES ? i + 1 - J * LANES : LANES;
            const int32_t* c = &column[r * length + J * LANES];
            const float* from = values + J * LANES;
            const int turn = count == LANES ? run[r * chunks + J] : 0;
            if (next) __builtin_prefetch(next + J * LANES, 1);
            if (turn > 0) store(line + c[0], load(line + c[0]) + load(from) * scale);
            else if (turn < 0) store(line + c[LANES - 1], load(line + c[LANES - 1]) + reversed(load(from) * scale));
            else for (int64_t j = 0; j < count; j++) line[c[j]] += from[j] * scale;
        }
    }
};

inline float* matrix(const Attention& a, int64_t b, int64_t r, int64_t c) {
    return a.out + b * a.out_batch + (a.scan.write ? 0 : r * a.out_route) + c * a.out_channel;
}

inline void clear(float* line, int64_t count) { std::memset(line, 0, count * sizeof(float)); }

// A large matrix is touched for the first time here; pages of 2 MiB make that cheap.
void ask_for_huge_pages(float* data, int64_t count) {
#if defined(__linux__)
    constexpr uintptr_t PAGE = 1 << 21;
    const uintptr_t first = ((uintptr_t)data + PAGE - 1) / PAGE * PAGE, end = (uintptr_t)(data + count) / PAGE * PAGE;
    if (first < end) madvise((void*)first, end - first, MADV_HUGEPAGE);
#endif
}

// channels of a block whose keys, of all steps, fit a cache
inline int64_t fitting(const Scan& s) { return L2 / ((s.length + LANES - 1) / LANES * LANES * s.states); }

// ---- short sequences: a task makes the matrix of some channels in scan order; then the rows of all tasks are added --------

template <int F, int MATRICES>
void short_matrices(const Attention* a, const int64_t* source, const Places& places) {
    const Scan& s = a->scan;
    const int64_t stride = places.stride(), size = places.chunks * LANES * stride, pairs = s.batch * s.routes;
    const int64_t most = std::clamp<int64_t>(std::min(TASKS / pairs, s.channels * s.states / WORTH), 1, s.channels);
    const int64_t span = (s.channels + most - 1) / most, spans = (s.channels + span - 1) / span;
    const int64_t channels = std::clamp<int64_t>(std::min(L1 / s.states, fitting(s)), 1, span);
    const int64_t images = std::clamp<int64_t>(TOGETHER / (s.routes * spans * MATRICES * size), 1, s.batch);
    Buffer<float> all;
    all.fit(images * s.routes * spans * MATRICES * size);
    for (int64_t start = 0; start < s.batch; start += images) {
        const int64_t count = std::min(images, s.batch - start);
        auto place = [&](int64_t b, int64_t r, int64_t k, int m) { return all.at((((b * s.routes + r) * spans + k) * MATRICES + m) * size); };
        Tasks making(count * s.routes * spans), adding(count * places.chunks);
        auto make = [&](int64_t task, Block& block, Scratch& x) {
            const int64_t k = task % spans, r = task / spans % s.routes, b = task / spans / s.routes;
            const int64_t end = std::min((k + 1) * span, s.channels);
            for (int64_t c = k * span; c < end; c += channels) {
                block.cut(s, c, std::min(channels, end - c), MATRICES);
                for (int64_t I = 0; I < block.chunks; I++)
                    prepare_chunk<F, MATRICES>(a, source, block, start + b, r, I, x);
                block.accumulate();
                for (int64_t I = 0; I < block.chunks; I++) {
                    float* out[MATRICES];
                    for (int m = 0; m < MATRICES; m++) out[m] = place(b, r, k, m) + I * LANES * stride;
                    band<F, MATRICES>(a, block, r, I, out, stride, c > k * span, x);
                }
            }
        };
        // the rows that some tokens, or some steps where routes stay apart, have
        auto add = [&](int64_t task, Scratch& x) {
            const int64_t b = task / places.chunks, part = task % places.chunks, kept = s.write ? 1 : s.routes;
            const int64_t first = a->side * part / places.chunks, end = a->side * (part + 1) / places.chunks;
            float* total = x.band[0].fit(stride);
            for (int m = 0; m < MATRICES; m++) {
                for (int64_t line = first; line < end; line++) {
                    for (int64_t r = 0; r < kept; r++) clear(matrix(a[m], start + b, r, 0) + line * a[m].side, a[m].side);
                    for (int64_t r = 0; r < s.routes; r++) {
                        const int64_t i = places.writes[r * a->side + line];
                        if (i < 0) continue;
                        float* values = place(b, r, 0, m) + i * stride;
                        for (int64_t k = 1; k < spans; k++) {
                            const float* more = place(b, r, k, m) + i * stride;
                            for (int64_t j = 0; j <= i; j += LANES) store(total + j, load(values + j) + load(more + j));
                            values = total;
                        }
                        places.add(r, i, values, a[m].scan.scale, matrix(a[m], start + b, r, 0) + line * a[m].side, nullptr);
                    }
                }
            }
        };
        in_threads(std::min<int64_t>(s.threads, making.count), [&] {
            const FlushDenormals flush;
            Block block;
            Scratch x;
            making.take([&](int64_t task) { make(task, block, x); });
            making.wait();
            adding.take([&](int64_t task) { add(task, x); });
        });
    }
}

// ---- long sequences: the routes of an image after each other, each in bands of 16 rows ----------------------------------

// For every route the later one that writes the same rows backwards, in the same bands, or -1: each row is fetched once.
std::vector<int64_t> backwards(const Scan& s) {
    std::vector<int64_t> found(s.routes, -1);
    std::vector<bool> taken(s.routes);
    for (int64_t r = 0; s.write && s.length % LANES == 0 && r < s.routes; r++) {
        for (int64_t other = r + 1; !taken[r] && other < s.routes && found[r] < 0; other++) {
            const int64_t *here = s.write + r * s.length, *there = s.write + other * s.length;
            if (taken[other] || !std::equal(here, here + s.length, std::make_reverse_iterator(there + s.length))) continue;
            found[r] = other, taken[other] = true;
        }
        if (found[r] >= 0) taken[r] = true;
    }
    return found;
}

template <int F, int MATRICES>
void long_matrices(const Attention* a, const int64_t* source, const Places& places) {
    const Scan& s = a->scan;
    const int64_t stride = places.stride(), chunks = places.chunks;
    const int64_t channels = std::clamp<int64_t>(fitting(s), 1, s.channels);
    const bool fresh = !s.write || s.length == a->side;  // the first sweep writes whole rows, all of them
    const std::vector<int64_t> other = backwards(s);
    std::vector<bool> second(s.routes);
    for (int64_t r : other) if (r >= 0) second[r] = true;
    std::vector<Block> blocks(s.routes);
    for (int64_t b = 0; b < s.batch; b++) {
        for (int64_t c = 0; c < s.channels; c += channels) {
            for (auto& block : blocks) block.cut(s, c, std::min(channels, s.channels - c), MATRICES);
            Tasks clearing(fresh || c ? 0 : chunks), preparing(s.routes * chunks), summing(s.routes);
            std::vector<Tasks> rows(s.routes);
            for (auto& its : rows) its.count = chunks;
            in_threads(s.threads, [&] {
                const FlushDenormals flush;
                Scratch x;
                clearing.take([&](int64_t part) {
                    const int64_t first = a->side * part / chunks, end = a->side * (part + 1) / chunks;
                    for (int m = 0; m < MATRICES; m++)
                        clear(matrix(a[m], b, 0, 0) + first * a->side, (end - first) * a->side);
                });
                preparing.take([&](int64_t task) {
                    prepare_chunk<F, MATRICES>(a, source, blocks[task / chunks], b, task / chunks, task % chunks, x);
                });
                clearing.wait(), preparing.wait();
                summing.take([&](int64_t r) { blocks[r].accumulate(); });
                summing.wait();
                for (int64_t r = 0; r < s.routes; r++) {
                    if (second[r]) continue;
                    const bool whole = fresh && c == 0 && (r == 0 || !s.write);
                    rows[r].take([&](int64_t task) {
                        const int64_t I = chunks - 1 - task, count = std::min<int64_t>(LANES, s.length - I * LANES);
                        float *out[MATRICES], *back[MATRICES];
                        for (int m = 0; m < MATRICES; m++) {
                            out[m] = x.band[m].fit(2 * LANES * stride), back[m] = out[m] + LANES * stride;
                        }
                        band<F, MATRICES>(a, blocks[r], r, I, out, stride, false, x);
                        if (other[r] >= 0) band<F, MATRICES>(a, blocks[other[r]], other[r], task, back, stride, false, x);
                        for (int m = 0; m < MATRICES; m++) {
                            float* first = matrix(a[m], b, r, 0);
                            auto line = [&](int64_t i) { return first + at(s.write, r, s.length, I * LANES + i) * a->side; };
                            for (int64_t i = 0; i < count; i++) {
                                if (whole) clear(line(i), a->side);
                                const float* next = !whole && i + 1 < count ? line(i + 1) : nullptr;
                                places.add(r, I * LANES + i, out[m] + i * stride, a[m].scan.scale, line(i), next);
                                if (other[r] < 0) continue;
                                const int64_t j = LANES - 1 - i;
                                places.add(other[r], task * LANES + j, back[m] + j * stride, a[m].scan.scale, line(i), nullptr);
                            }
                        }
                    });
                    if (s.write) rows[r].wait();  // the routes add to the same rows
                }
            });
        }
    }
}

// ---- channels kept apart: a task is all routes of one ---------------------------------------------------------------------

void channel_matrices(const Attention* a, const int64_t* source, const Places& places) {
    const Scan& s = a->scan;
    const int64_t stride = places.stride();
    Tasks channels(s.batch * s.channels);
    in_threads(std::min<int64_t>(s.threads, channels.count), [&] {
        const FlushDenormals flush;
        Block block;
        Scratch x;
        channels.take([&](int64_t task) {
            const int64_t b = task / s.channels, c = task % s.channels;
            float* out[1] = {x.band[0].fit(LANES * stride)};
            for (int64_t r = 0; r < s.routes; r++) {
                float* first = matrix(*a, b, r, c);
                if (r == 0 || !s.write) clear(first, a->side * a->side);
                block.cut(s, c, 1, 1);
                for (int64_t I = 0; I < block.chunks; I++) prepare_chunk<EACH, 1>(a, source, block, b, r, I, x);
                block.accumulate();
                for (int64_t I = 0; I < block.chunks; I++) {
                    band<EACH, 1>(a, block, r, I, out, stride, false, x);
                    for (int64_t t = I * LANES; t < std::min((I + 1) * LANES, s.length); t++)
                        places.add(r, t, out[0] + (t - I * LANES) * stride, s.scale, first + at(s.write, r, s.length, t) * a->side, nullptr);
                }
            }
        });
    });
}

template <int F, int MATRICES>
void matrices(const Attention* a, const int64_t* source, const Places& places) {
    if (a->scan.length <= SHORT) short_matrices<F, MATRICES>(a, source, places);
    else long_matrices<F, MATRICES>(a, source, places);
}

}  // namespace
