// A scan as its caller describes it. Tensors come as pointers and strides in elements; routes are index tables, so
// permutations and merges copy nothing.

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

}  // namespace
