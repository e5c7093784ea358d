// Sixteen floats at once, in as many registers as the machine needs: one of AVX-512, two of AVX, four of SSE or NEON.

#include <cstdint>
#include <cstring>
#if defined(__AVX__)
#include <immintrin.h>
#elif defined(__SSE__)
#include <xmmintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

constexpr int LANES = 16;
#if defined(__AVX512F__)
constexpr int WIDE = 16;  // floats of a register
#elif defined(__AVX__)
constexpr int WIDE = 8;
#else
constexpr int WIDE = 4;
#endif
constexpr int PARTS = LANES / WIDE;
typedef float part __attribute__((vector_size(4 * WIDE)));
typedef int32_t ipart __attribute__((vector_size(4 * WIDE)));

inline part splat_part(float x) { return x - part{}; }  // x + 0 would be an addition: it changes -0

// a * b + c; where rounded once, FUSED is true
#if defined(__AVX512F__)
constexpr bool FUSED = true;
inline part fma_part(part a, part b, part c) { return _mm512_fmadd_ps(a, b, c); }
#elif defined(__FMA__)
constexpr bool FUSED = true;
inline part fma_part(part a, part b, part c) { return _mm256_fmadd_ps(a, b, c); }
#elif defined(__aarch64__)
constexpr bool FUSED = true;
inline part fma_part(part a, part b, part c) { return (part)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
#else
constexpr bool FUSED = false;
inline part fma_part(part a, part b, part c) { return a * b + c; }
#endif

// 2^(x + rest) for x <= 0 and a small rest, relative error 1e-7; zero below the smallest normal number.
// Coefficients: minimax on [-1/2, 1/2].
inline part exp2_part(part x, part rest) {
    // rest grows with x, and so would the polynomial; lanes that are not kept may hold infinities
#if defined(__AVX512F__)
    const part n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    rest = (x < -127.f) ? part{} : rest;
    x = (x < -127.f) ? splat_part(-127.f) : x;  // whose power of two below is the bit pattern of zero
    const ipart whole = __builtin_convertvector(x - 0.5f, ipart);
    const part n = __builtin_convertvector(whole, part);
#endif
    const part f = (x - n) + rest;
    part p = fma_part(splat_part(1.535336188e-4f), f, splat_part(1.339887440e-3f));
    p = fma_part(p, f, splat_part(9.618437358e-3f));
    p = fma_part(p, f, splat_part(5.550332471e-2f));
    p = fma_part(p, f, splat_part(2.402264791e-1f));
    p = fma_part(p, f, splat_part(6.931472029e-1f));
    p = fma_part(p, f, splat_part(1.f));
#if defined(__AVX512F__)
    return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, splat_part(-127.f), _CMP_GE_OQ), p, n);
#else
    const ipart power = (whole + 127) << 23;
    part scale;
    std::memcpy(&scale, &power, sizeof scale);
    return p * scale;
#endif
}

inline part upper_half(part x) {
    ipart bits;
    std::memcpy(&bits, &x, sizeof bits);
    bits &= ~0xfff;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

// 2^((a + a_low) (x + x_low)) without the rounding of the product, which would put e^-80 off by 80 x 2^-24: what it loses is
// read from a fused multiply-add, or the product is one of halves and exact.
template <bool LOW>
inline part exp2_product_part(part a, part a_low, part x, part x_low) {
    if (FUSED) {
        const part product = a * x;
        part rest = fma_part(a, x, -product);
        rest = fma_part(a_low, x, rest);
        return exp2_part(product, LOW ? fma_part(a, x_low, rest) : rest);
    }
    const part a_upper = upper_half(a), x_upper = upper_half(x);
    const part a_lower = (a - a_upper) + a_low, x_lower = LOW ? (x - x_upper) + x_low : x - x_upper;
    return exp2_part(a_upper * x_upper, a_upper * x_lower + a_lower * (x_upper + x_lower));
}

struct vec {
    part p[PARTS];
    float operator[](int i) const { return p[i / WIDE][i % WIDE]; }
};

#define EACH_PART for (int i = 0; i < PARTS; i++)
inline vec load(const float* x) { vec v; std::memcpy(&v, x, sizeof v); return v; }
inline void store(float* x, vec v) { std::memcpy(x, &v, sizeof v); }
inline vec splat(float x) { vec v; EACH_PART v.p[i] = splat_part(x); return v; }
inline vec operator+(vec a, vec b) { EACH_PART a.p[i] += b.p[i]; return a; }
inline vec operator-(vec a, vec b) { EACH_PART a.p[i] -= b.p[i]; return a; }
inline vec operator*(vec a, vec b) { EACH_PART a.p[i] *= b.p[i]; return a; }
inline vec operator*(vec a, float b) { EACH_PART a.p[i] *= b; return a; }
inline vec& operator+=(vec& a, vec b) { EACH_PART a.p[i] += b.p[i]; return a; }
inline vec& operator*=(vec& a, vec b) { EACH_PART a.p[i] *= b.p[i]; return a; }
inline vec positive(vec x) { EACH_PART x.p[i] = (x.p[i] > 0.f) ? x.p[i] : part{}; return x; }
inline vec absolute(vec x) { EACH_PART x.p[i] = (x.p[i] > 0.f) ? x.p[i] : -x.p[i]; return x; }
inline vec exp2v(vec x) { EACH_PART x.p[i] = exp2_part(x.p[i], part{}); return x; }
inline float sum(vec v) { float s = 0; for (int i = 0; i < LANES; i++) s += v[i]; return s; }

struct Split { vec high, low; };
inline vec exp2_product(Split a, Split x) {
    vec y;
    EACH_PART y.p[i] = exp2_product_part<true>(a.high.p[i], a.low.p[i], x.high.p[i], x.low.p[i]);
    return y;
}
inline vec exp2_product(Split a, vec x) {
    vec y;
    EACH_PART y.p[i] = exp2_product_part<false>(a.high.p[i], a.low.p[i], x.p[i], part{});
    return y;
}

inline vec reversed(vec x) {
    float from[LANES], to[LANES];
    store(from, x);
    for (int i = 0; i < LANES; i++) to[i] = from[LANES - 1 - i];
    return load(to);
}

inline vec gather(const float* from, const int32_t* places) {
    vec v;
#if defined(__AVX512F__)
    v.p[0] = _mm512_i32gather_ps(_mm512_loadu_si512(places), from, 4);
#elif defined(__AVX2__)
    EACH_PART v.p[i] = _mm256_i32gather_ps(from, _mm256_loadu_si256((const __m256i*)(places + i * WIDE)), 4);
#else
    float found[LANES];
    for (int i = 0; i < LANES; i++) found[i] = from[places[i]];
    v = load(found);
#endif
    return v;
}

// Lanes below `lane` times `factor`; the others stay. `lane` is known where a loop around it is unrolled.
inline void scale_below(vec& x, int lane, float factor) {
#if defined(__AVX512F__)
    x.p[0] = _mm512_mask_mul_ps(x.p[0], (1 << lane) - 1, x.p[0], splat_part(factor));
#else
    for (int i = 0; i < PARTS; i++) {
        const int below = lane - i * WIDE;
        if (below >= WIDE) x.p[i] *= factor;
        else if (below > 0) {
            part factors = splat_part(1);
            for (int k = 0; k < WIDE; k++) factors[k] = k < below ? factor : 1.f;
            x.p[i] *= factors;
        }
    }
#endif
}

// Running sums of x, in double precision: rounded, and what the rounding lost. Returns the last.
inline double running_sums(const float* x, Split& sums) {
    float high[LANES], low[LANES];
#if defined(__AVX512F__)
    const __m512i zero = _mm512_setzero_si512();
    __m512d half[2];
    for (int k = 0; k < 2; k++) {
        __m512d s = _mm512_cvtps_pd(_mm256_loadu_ps(x + 8 * k));
        s = _mm512_add_pd(s, _mm512_castsi512_pd(_mm512_alignr_epi64(_mm512_castpd_si512(s), zero, 7)));
        s = _mm512_add_pd(s, _mm512_castsi512_pd(_mm512_alignr_epi64(_mm512_castpd_si512(s), zero, 6)));
        half[k] = _mm512_add_pd(s, _mm512_castsi512_pd(_mm512_alignr_epi64(_mm512_castpd_si512(s), zero, 4)));
    }
    const __m512i last = _mm512_set1_epi64(7);
    half[1] = _mm512_add_pd(half[1], _mm512_permutexvar_pd(last, half[0]));
    for (int k = 0; k < 2; k++) {
        const __m256 rounded = _mm512_cvtpd_ps(half[k]);
        _mm256_storeu_ps(high + 8 * k, rounded);
        _mm256_storeu_ps(low + 8 * k, _mm512_cvtpd_ps(_mm512_sub_pd(half[k], _mm512_cvtps_pd(rounded))));
    }
    const double total = _mm512_cvtsd_f64(_mm512_permutexvar_pd(last, half[1]));
#else
    double total = 0;
    for (int i = 0; i < LANES; i++) {
        total += x[i];
        high[i] = total;
        low[i] = total - high[i];
    }
#endif
    sums = {load(high), load(low)};
    return total;
}

// Decayed states reach denormal numbers, which cost far more than ordinary products: below 1e-38 they count as zero.
struct FlushDenormals {
#if defined(__SSE__)
    unsigned before = _mm_getcsr();
    FlushDenormals() { _mm_setcsr(before | 0x8040); }
    ~FlushDenormals() { _mm_setcsr(before); }
#endif
};

}  // namespace
