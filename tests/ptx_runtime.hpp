// What PTX instructions do, for tests/ptx.py; included by emulation.cpp in place of the source's own kernels.
#pragma once
#include <cstdint>
#include <cstdlib>

extern "C" {
double rough = 0;           // see tests/ptx.py
uint64_t counts[BLOCKS];    // threads that ran each basic block
}
#define COUNT(block) counts[block]++

// registers have a size, instructions have types
template <class To, class From> static inline To as(From value) {
    if constexpr (sizeof(To) == sizeof(From)) {
        To to;
        __builtin_memcpy(&to, &value, sizeof to);
        return to;
    } else {
        static_assert(std::is_integral_v<To> && std::is_integral_v<From>);
        return (To)value;
    }
}

template <class To, class From> static inline void put(To& to, From value) {
    if constexpr (std::is_same_v<To, bool>) to = value;
    else if constexpr (sizeof(To) == sizeof(From)) __builtin_memcpy(&to, &value, sizeof to);
    else {
        static_assert(std::is_integral_v<To> && std::is_integral_v<From>);
        to = (To)value;
    }
}

static inline uint64_t shared_at(int64_t offset) {
    if (offset < 0 || offset > (int64_t)(host::shared.size() * 4)) raise(SIGSEGV);
    return (uint64_t)host::shared.data() + offset;
}

static inline void aligned(uint64_t at, unsigned size) {
    if (at % size == 0) return;
    fprintf(stderr, "misaligned access\n");
    raise(SIGSEGV);
}

static float towards_zero(double x) {
    const float nearest = (float)x;
    return __builtin_fabs((double)nearest) > __builtin_fabs(x) ? as<float>(as<uint32_t>(nearest) - 1) : nearest;
}

static inline float ex2(float x) {
    if (__builtin_fabsf(x) < 0x1p-126f) x = 0.f;
    float y = exp2f(x);
    if (rough) {  // an error that looks random, from x alone
        uint32_t hash = as<uint32_t>(x) * 2654435761u;
        hash = (hash ^ hash >> 15) * 2246822519u;
        hash ^= hash >> 13;
        y = (float)((double)y * (1.0 + rough * ((double)hash / 2147483648.0 - 1.0) * 0x1p-22));
    }
    return y < 0x1p-126f ? 0.f : y;
}

static inline bool finite(uint32_t bits) { return (bits & 0x7f800000u) != 0x7f800000u; }

static inline uint32_t rna_tf32(float value) {  // 10 bits after the point, ties away from zero
    const uint32_t bits = as<uint32_t>(value);
    return finite(bits) ? (bits + 0x1000u) & ~0x1fffu : bits;
}

static inline uint32_t rn_tf32(float value) {  // ties to even
    const uint32_t bits = as<uint32_t>(value);
    return finite(bits) ? (bits + 0xfffu + (bits >> 13 & 1)) & ~0x1fffu : bits;
}

static inline float half_to_float(uint16_t bits) {
    _Float16 half;
    __builtin_memcpy(&half, &bits, 2);
    return (float)half;
}

// PTX ISA, "shfl.sync": c holds a clamp and the mask of a segment
struct Shuffled { uint32_t word; bool valid; };
enum Direction { UP, DOWN, BUTTERFLY, INDEX };

template <Direction direction>
static inline Shuffled shuffle(uint32_t a, uint32_t b, uint32_t c, uint32_t members) {
    const int lane = threadIdx.x % 32, distance = b & 31, clamp = c & 31, segment = c >> 8 & 31;
    const int most = (lane & segment) | (clamp & ~segment), least = lane & segment;
    if (members != ~0u) {
        fprintf(stderr, "a shuffle of some lanes\n");
        abort();
    }
    const int from = direction == UP ? lane - distance : direction == DOWN ? lane + distance
        : direction == BUTTERFLY ? lane ^ distance : least | (distance & ~segment);
    const bool valid = direction == UP ? from >= most : from <= most;
    const unsigned own[1] = {a};
    const auto lanes = host::exchange(own);
    return {lanes[valid ? from : lane][0], valid};
}

static inline Shuffled shuffle_up(uint32_t a, uint32_t b, uint32_t c, uint32_t m) { return shuffle<UP>(a, b, c, m); }
static inline Shuffled shuffle_down(uint32_t a, uint32_t b, uint32_t c, uint32_t m) { return shuffle<DOWN>(a, b, c, m); }
static inline Shuffled shuffle_bfly(uint32_t a, uint32_t b, uint32_t c, uint32_t m) { return shuffle<BUTTERFLY>(a, b, c, m); }
static inline Shuffled shuffle_idx(uint32_t a, uint32_t b, uint32_t c, uint32_t m) { return shuffle<INDEX>(a, b, c, m); }

// PTX ISA, "Matrix fragments for mma.m16n8k8", .tf32: whole matrices from the tables, then their product
static void mma_m16n8k8(const unsigned (&in)[6], const float (&old)[4], float (&out)[4]) {
    const auto lanes = host::exchange(in);
    float A[16][8], B[8][8];
    for (int lane = 0; lane < 32; lane++) {
        const int group = lane >> 2, in_group = lane % 4;
        for (int i = 0; i < 4; i++)  // the unit reads 19 of the 32 bits
            A[i % 2 ? group + 8 : group][i < 2 ? in_group : in_group + 4] = as<float>(lanes[lane][i] & ~0x1fffu);
        for (int i = 0; i < 2; i++) B[i ? in_group + 4 : in_group][group] = as<float>(lanes[lane][4 + i] & ~0x1fffu);
    }
    const int group = threadIdx.x % 32 >> 2, in_group = threadIdx.x % 4;
    for (int i = 0; i < 4; i++) {
        const int row = i < 2 ? group : group + 8, column = in_group * 2 + i % 2;
        double sum = old[i];
        for (int k = 0; k < 8; k++) {
            sum += (double)A[row][k] * B[k][column];
            if (rough && k % 4 == 3) sum = towards_zero(sum);
        }
        out[i] = (float)sum;
    }
}

#include PTX
