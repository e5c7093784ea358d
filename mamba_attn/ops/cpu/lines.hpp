// One row or column: exp(A |S_t - S_step|) for every t on its side of the step; 16 positions a vector.

namespace {

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
    std::vector<float> pairs(states * LANES);  // C B of the step and every position
    int64_t position[LANES];
    bool counts[LANES];
    for (int i = 0; i < LANES; i++) {
        const int64_t t = chunk * LANES + i;
        counts[i] = t < s.length && (line.column ? t >= line.step : t <= line.step);
        position[i] = at(line.source, 0, s.length, t < s.length ? t : line.step);
    }
    for (int64_t n = 0; n < states; n++)
        for (int i = 0; i < LANES; i++)
            pairs[n * LANES + i] = row(far, b, 0, position[i])[n * far.axis] * row(near, b, 0, own)[n * near.axis];
    for (int64_t c = 0; c < s.channels; c++) {
        float high[LANES], low[LANES], factor[LANES];
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
            M += exp2_product(A2, Split{load(high), load(low)}) * load(&pairs[n * LANES]);
        }
        const float fixed = line.column ? row(s.delta, b, 0, own)[c * s.delta.axis] * weight(a.col_weight, b, line.step, c)
                                        : weight(a.row_weight, b, line.step, c);
        M = folded<F>(M * load(factor) * fixed);
        float* out = a.out + b * a.out_batch + c * a.out_channel + chunk * LANES;
        for (int i = 0; i < LANES; i++)
            if (counts[i]) out[i] += M[i] * s.scale;
    }
}

}  // namespace
