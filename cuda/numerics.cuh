// Loads of any type, sums without loss, decays, and the matrix unit: everything that the device does in its own way.
#pragma once
#include "call.cuh"

__device__ inline float from_bits(unsigned bits) {
#ifdef __CUDA_ARCH__
    return __uint_as_float(bits);
#else
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
#endif
}

__device__ inline unsigned to_bits(float value) {
#ifdef __CUDA_ARCH__
    return __float_as_uint(value);
#else
    unsigned bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    return bits;
#endif
}

__device__ inline float from_half(unsigned short bits) {
#ifdef __CUDA_ARCH__
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
#else
    const unsigned sign = (bits & 0x8000u) << 16, exponent = (bits >> 10) & 31, fraction = bits & 1023;
    if (exponent == 0) return from_bits(sign | 0x3f800000u) * (float)fraction * 0x1p-24f;
    if (exponent == 31) return from_bits(sign | 0x7f800000u | fraction << 13);
    return from_bits(sign | (exponent + 112) << 23 | fraction << 13);
#endif
}

// A line of a tensor along its positions, in bytes: where it begins, and how far its positions are apart. Offsets are 32
// bits wide (kernels.limits refuses longer lines): one multiplication where strides of 64 bits take several.
struct Row {
    const char* data;
    unsigned stride;
    int type;

    // FLOATS: the type is float32, so that nothing has to be asked
    template <bool FLOATS = false>
    __device__ float at(int place) const { return place < 0 ? 0.f : read<FLOATS>((unsigned)place * stride); }

    template <bool FLOATS = false>
    __device__ float read(unsigned offset) const {
        if (FLOATS || type == FLOAT32) return *(const float*)(data + offset);
        const unsigned short bits = *(const unsigned short*)(data + offset);
        return type == BFLOAT16 ? from_bits((unsigned)bits << 16) : from_half(bits);
    }
};

__device__ inline int size_of(int type) { return type == FLOAT32 ? 4 : 2; }

// `offset` counts elements
__device__ inline Row row_of(const Tensor& t, long long offset) {
    const int size = size_of(t.type);
    return {(const char*)t.data + offset * size, (unsigned)t.position * size, t.type};
}

__device__ inline void add_to(float* to, float value) {
#ifdef __CUDA_ARCH__
    asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(to), "f"(value) : "memory");  // nothing comes back
#else
    atomicAdd(to, value);
#endif
}

struct alignas(16) Four { float number[4]; };  // aligned: one load

// The same line of a result: zeros to which several writers add, or a place of one's own.
struct OutRow {
    char* data;
    unsigned stride;
    int add;

    __device__ void put(int place, float value) const {
        if (place < 0) return;
        float* to = (float*)(data + (unsigned)place * stride);
        if (add) add_to(to, value);
        else *to = value;
    }
};

__device__ inline void store(const Output& out, long long offset, float value) {
    if (out.add) add_to(out.data + offset, value);
    else out.data[offset] = value;
}

__device__ inline Sum plus(Sum a, Sum b) {
    const float total = a.high + b.high, part = total - a.high;
    const float error = (a.high - (total - part)) + (b.high - part) + (a.low + b.low);
    const float high = total + error;
    return {high, error - (high - total)};
}

__device__ inline Sum minus(Sum a, Sum b) { return plus(a, {-b.high, -b.low}); }

__device__ inline Sum shuffle_up(Sum a, int distance) {
    return {__shfl_up_sync(~0u, a.high, distance), __shfl_up_sync(~0u, a.low, distance)};
}

__device__ inline Sum shuffle(Sum a, int lane) {
    return {__shfl_sync(~0u, a.high, lane), __shfl_sync(~0u, a.low, lane)};
}

// inclusive sum over the lanes of a warp
__device__ inline Sum warp_sum(Sum own, int lane) {
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
        const Sum other = shuffle_up(own, distance);
        if (lane >= distance) own = plus(other, own);
    }
    return own;
}

constexpr float LOG2E = 1.44269504f, LOG2E_REST = 1.92596303e-8f;  // their sum is log2(e) to 48 bits

// A log2(e), so that a decay is one exp2
__device__ inline Sum rate_of(float A) {
    const float high = A * LOG2E;
    return {high, fmaf(A, LOG2E_REST, fmaf(A, LOG2E, -high))};
}

__device__ inline float exp2_of(float x) {
#ifdef __CUDA_ARCH__
    float value;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(x));
    return value;
#else
    return exp2f(x);
#endif
}

// exp(A distance): the product's rounding error, worth 80 x 2^-24 at e^-80, is carried beside it
__device__ inline float decay(Sum rate, float distance) {
    const float x = rate.high * distance, rest = fmaf(rate.low, distance, fmaf(rate.high, distance, -x));
    return exp2_of(x) * fmaf(rest, 0.693147181f, 1.f);
}

__device__ inline float decay(Sum rate, Sum distance) {
    const float x = rate.high * distance.high, lost = fmaf(rate.high, distance.high, -x);
    const float rest = fmaf(rate.low, distance.high, fmaf(rate.high, distance.low, lost));
    return exp2_of(x) * fmaf(rest, 0.693147181f, 1.f);
}

// the nearest number with TF32's 10 bits after the point
__device__ inline unsigned to_tf32(float value) {
#if __CUDA_ARCH__ >= 900
    unsigned bits;
    asm("cvt.rn.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));  // one instruction there; rounding away from zero takes three
    return bits;
#elif __CUDA_ARCH__ >= 800
    unsigned bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
    return bits;
#else
    const unsigned bits = to_bits(value);
    return (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000u) & ~0x1fffu;  // not finite: CUDA's NaN would wrap
#endif
}

// d += a b on the matrix unit, (16 x 8) += (16 x 8) (8 x 8) across a warp; lane = 4 g + t holds
// a: (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4); b: (t, g), (t + 4, g); d: (g, 2t), (g, 2t + 1), (g + 8, ...)
__device__ inline void multiply(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#if __CUDA_ARCH__ >= 800
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#ifdef __CUDA_ARCH__  // no such unit before sm_80
#pragma unroll
    for (int k = 0; k < 8; k++) {
        float left[2], right[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            left[half] = from_bits(__shfl_sync(~0u, a[k / 4 * 2 + half], g * 4 + k % 4));
            right[half] = from_bits(__shfl_sync(~0u, b[k / 4], (2 * t + half) * 4 + k % 4));
        }
#pragma unroll
        for (int i = 0; i < 4; i++) d[i] = fmaf(left[i / 2], right[i % 2], d[i]);
    }
#else
    const unsigned own[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
    const auto lanes = host::exchange(own);
    for (int i = 0; i < 4; i++)
        for (int k = 0; k < 8; k++)
            d[i] += from_bits(lanes[g * 4 + k % 4][i / 2 + k / 4 * 2]) * from_bits(lanes[(2 * t + i % 2) * 4 + k % 4][4 + k / 4]);
#endif
#endif
}

// a float32 as the sum of two TF32 numbers, to 2^-22
struct alignas(8) Split { unsigned high, low; };

__device__ inline Split split(float value) {
    const unsigned high = to_tf32(value);
    return {high, to_tf32(value - from_bits(high))};
}

// d += a b in float32: products of the halves (three of four; the fourth is below float32), or of the high halves
template <int PRODUCTS>
__device__ inline void multiply_exact(float (&d)[4], const Split (&a)[4], const Split (&b)[2]) {
    const unsigned a_high[4] = {a[0].high, a[1].high, a[2].high, a[3].high}, b_high[2] = {b[0].high, b[1].high};
    if (PRODUCTS == 3) {
        const unsigned a_low[4] = {a[0].low, a[1].low, a[2].low, a[3].low}, b_low[2] = {b[0].low, b[1].low};
        multiply(d, a_low, b_high);
        multiply(d, a_high, b_low);
    }
    multiply(d, a_high, b_high);
}
