// Selective scan, its backward, and hidden attention on a CPU. Equations: reference.py.
//
// Plain C++17 with the vector extensions of GCC and Clang; no library but the standard one. Compiled at first use for the
// machine at hand, or beforehand for three kinds of x86-64. What it includes is read with it: see build.py.

#include "vectors.hpp"
#include "buffer.hpp"
#include "threads.hpp"
#include "arguments.hpp"
#include "scans.hpp"
#include "attention.hpp"
#include "matrices.hpp"
#include "lines.hpp"

extern "C" {

// GOMP_parallel of the OpenMP that torch has loaded, or null for none
void use_threads(Parallel gomp_parallel) { parallel = gomp_parallel; }

void scan_forward(const Scan* s, float* y) {
    const int64_t blocks = s->channels / LANES;
    for_each(s->threads, s->batch * blocks, [&](int64_t task) {
        const int64_t b = task / blocks, c = task % blocks * LANES;
        switch (s->states) {
            case 1: forward_block<1>(*s, y, b, c); break;
            case 8: forward_block<8>(*s, y, b, c); break;
            case 16: forward_block<16>(*s, y, b, c); break;
            default: forward_block<0>(*s, y, b, c);
        }
    });
}

void scan_backward(const Scan* s, const float* gy, const Gradients* g) {
    for_each(s->threads, s->batch, [&](int64_t b) {
        switch (s->states) {
            case 1: backward_image<1>(*s, gy, *g, b); break;
            case 8: backward_image<8>(*s, gy, *g, b); break;
            case 16: backward_image<16>(*s, gy, *g, b); break;
            default: backward_image<0>(*s, gy, *g, b);
        }
    });
}

// Matrices of one scan: `count` is 1, or 2 whose folds are SIGNED, in one sweep over the states. Every entry is written.
// source: (routes, length) position read at each step, or null when sources are in scan order
void hidden_attention(const Attention* a, int64_t count, const int64_t* source) {
    const Places places(*a);
    for (int64_t m = 0; m < count; m++) ask_for_huge_pages(a[m].out, a->scan.batch * a[m].out_batch);
    if (count == 2) matrices<SIGNED, 2>(a, source, places);
    else if (a->fold == EACH) channel_matrices(a, source, places);
    else if (a->fold == POSITIVE) matrices<POSITIVE, 1>(a, source, places);
    else if (a->fold == ABSOLUTE) matrices<ABSOLUTE, 1>(a, source, places);
    else matrices<SIGNED, 1>(a, source, places);
}

// One route: row (what `step` reads) or column (where it is read) into out (batch, [channels,] length), in scan order.
void attention_line(const Attention* a, const int64_t* source, int64_t step, int32_t column) {
    const Scan& s = a->scan;
    const Line line{a, source, step, column != 0};
    const int64_t chunks = (s.length + LANES - 1) / LANES, own = step / LANES, first = column ? own : 0;
    std::vector<double> before(chunks * s.channels), through(s.channels);
    for (int64_t b = 0; b < s.batch; b++) {
        Tasks summing((s.channels + LANES - 1) / LANES), writing((column ? chunks : own + 1) - first);
        in_threads(s.threads, [&] {
            const FlushDenormals flush;
            summing.take([&](int64_t k) {
                for (int64_t c = k * LANES; c < std::min((k + 1) * LANES, s.channels); c++) line_sums(line, b, c, before, through);
            });
            summing.wait();
            writing.take([&](int64_t task) {
                const double* sums = &before[(first + task) * s.channels];
                if (a->fold == POSITIVE) line_chunk<POSITIVE>(line, b, first + task, sums, through.data());
                else if (a->fold == ABSOLUTE) line_chunk<ABSOLUTE>(line, b, first + task, sums, through.data());
                else line_chunk<SIGNED>(line, b, first + task, sums, through.data());
            });
        });
    }
}
}
