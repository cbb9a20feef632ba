// Vectors of floats for the instruction set that the including file is compiled for, and the functions of the gates.
//
// Everything here is in an unnamed namespace inside UNROLLED_ISA: each isa_*.cc has its own copy, compiled with its
// own flags, and none may be merged with another's by the linker.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace unrolled::UNROLLED_ISA {
namespace {

#if UNROLLED_LANES == 16
constexpr int L = 16;
#elif UNROLLED_LANES == 8
constexpr int L = 8;
#else
constexpr int L = 4;
#endif

typedef float vf __attribute__((vector_size(4 * L)));
typedef int32_t vi __attribute__((vector_size(4 * L)));
typedef float vf_unaligned __attribute__((vector_size(4 * L), aligned(4)));
typedef uint16_t vh __attribute__((vector_size(2 * L), aligned(2)));

#define UNROLLED_INLINE inline __attribute__((always_inline))
#define UNROLLED_LAMBDA_INLINE __attribute__((always_inline))

UNROLLED_INLINE vf splat(float x) {
#if UNROLLED_LANES == 16
    return vf(_mm512_set1_ps(x));
#elif UNROLLED_LANES == 8
    return vf(_mm256_set1_ps(x));
#else
    return vf{x, x, x, x};
#endif
}
UNROLLED_INLINE vf load(const float* p) { return *reinterpret_cast<const vf_unaligned*>(p); }
UNROLLED_INLINE void store(float* p, vf x) { *reinterpret_cast<vf_unaligned*>(p) = x; }

// The first n of L lanes, 0 < n <= L; the others read as zero and are not written.
UNROLLED_INLINE vf load(const float* p, int n) {
    if (n == L) return load(p);
#if UNROLLED_LANES == 16
    return vf(_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p));
#else
    vf x = splat(0);
    for (int i = 0; i < n; ++i) x[i] = p[i];
    return x;
#endif
}
UNROLLED_INLINE void store(float* p, vf x, int n) {
    if (n == L) return store(p, x);
#if UNROLLED_LANES == 16
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), __m512(x));
#else
    for (int i = 0; i < n; ++i) p[i] = x[i];
#endif
}

UNROLLED_INLINE vf select(vi mask, vf yes, vf no) { return vf((vi(yes) & mask) | (vi(no) & ~mask)); }

// NaN stays NaN: a comparison with it is false, and of two numbers of which one is NaN the instructions take the second.
UNROLLED_INLINE vf at_least(vf x, float low) {
#if UNROLLED_LANES == 16
    return vf(_mm512_max_ps(__m512(splat(low)), __m512(x)));
#elif UNROLLED_LANES == 8
    return vf(_mm256_max_ps(__m256(splat(low)), __m256(x)));
#else
    return select(x < splat(low), splat(low), x);
#endif
}
UNROLLED_INLINE vf at_most(vf x, float high) {
#if UNROLLED_LANES == 16
    return vf(_mm512_min_ps(__m512(splat(high)), __m512(x)));
#elif UNROLLED_LANES == 8
    return vf(_mm256_min_ps(__m256(splat(high)), __m256(x)));
#else
    return select(x > splat(high), splat(high), x);
#endif
}

// --- bfloat16: the upper half of a float32, rounded to nearest, ties to even

UNROLLED_INLINE float round_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) bits |= 0x400000;  // NaN stays NaN
    else bits += 0x7fff + ((bits >> 16) & 1);
    bits &= 0xffff0000;
    std::memcpy(&x, &bits, 4);
    return x;
}
UNROLLED_INLINE uint16_t to_bf16(float x) {
    x = round_bf16(x);
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return static_cast<uint16_t>(bits >> 16);
}
UNROLLED_INLINE float from_bf16(uint16_t x) {
    uint32_t bits = static_cast<uint32_t>(x) << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}
UNROLLED_INLINE vf round_bf16(vf x) {
    vi bits = vi(x);
    vi rounded = (bits + 0x7fff + ((bits >> 16) & 1)) & static_cast<int32_t>(0xffff0000);
    vi nan = x != x;
    return vf((rounded & ~nan) | ((bits | 0x400000) & nan & static_cast<int32_t>(0xffff0000)));
}

// --- exp, sigmoid, tanh: within a few units in the last place over the whole range
//
// exp(x) = 2^n exp(r), n = round(x / ln 2), |r| <= ln(2) / 2; exp(r) - 1 by its Taylor series, whose first left-out
// term r^8 / 8! is 5e-9 at most. The series is summed in pairs (Estrin's scheme): by Horner's rule each term waits for the
// one before, and a step of the recurrence for all of them.

struct Reduced {
    vf scale;  // 2^n
    vf small;  // exp(r) - 1
};

UNROLLED_INLINE Reduced reduce(vf x) {
    const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
    vf shifted = x * splat(1.44269504088896341f) + magic;
    vf n = shifted - magic;
    vf r = x - n * splat(0.693359375f);  // ln 2 in two parts, the first exact in n * part
    r = r - n * splat(-2.12194440e-4f);
    const vf square = r * r;
    const vf first = splat(1.0f / 6) * r + splat(0.5f);
    const vf second = splat(1.0f / 120) * r + splat(1.0f / 24);
    const vf third = splat(1.0f / 5040) * r + splat(1.0f / 720);
    const vf small = ((third * square + second) * square + first) * square + r;
    vf scale = vf((vi(shifted) << 23) + vi(splat(1.0f)));
    return {scale, small};
}

// exp for -87 <= x <= 88; beyond, the value at the bound. NaN stays NaN.
UNROLLED_INLINE vf exp(vf x) {
    x = at_most(at_least(x, -87.0f), 88.0f);
    Reduced e = reduce(x);
    return e.scale * e.small + e.scale;
}

UNROLLED_INLINE vf sigmoid(vf x) { return splat(1.0f) / (splat(1.0f) + exp(-x)); }

// From expm1, so that small values keep their relative precision: tanh|x| = -m / (2 + m), m = exp(-2|x|) - 1.
UNROLLED_INLINE vf tanh(vf x) {
    const vi sign = vi(x) & static_cast<int32_t>(0x80000000);
    vf a = vf(vi(x) ^ sign);
    Reduced e = reduce(at_least(a * splat(-2.0f), -40.0f));
    vf m = e.scale * e.small + (e.scale - splat(1.0f));
    return vf(vi(-m / (splat(2.0f) + m)) | sign);
}

// --- the transpose of an L x L block held in L vectors

template <int S, std::size_t... J>
UNROLLED_INLINE void exchange(vf& a, vf& b, std::index_sequence<J...>) {
    constexpr vi low = {((J & S) ? static_cast<int>(J) - S + L : static_cast<int>(J))...};
    constexpr vi high = {((J & S) ? static_cast<int>(J) + L : static_cast<int>(J) + S)...};
    vf x = __builtin_shuffle(a, b, low);
    b = __builtin_shuffle(a, b, high);
    a = x;
}
template <int S>
UNROLLED_INLINE void transpose_stage(vf (&v)[L]) {
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i)
        if ((i & S) == 0) exchange<S>(v[i], v[i + S], std::make_index_sequence<L>{});
}
UNROLLED_INLINE void transpose(vf (&v)[L]) {
    if constexpr (L > 8) transpose_stage<8>(v);
    if constexpr (L > 4) transpose_stage<4>(v);
    transpose_stage<2>(v);
    transpose_stage<1>(v);
}

#if UNROLLED_LANES == 16
// block[i] = element i of each of the 8 rows `from + j * stride`.
UNROLLED_INLINE void load_transposed_8(const float* from, int64_t stride, __m256 (&block)[8]) {
    // Every fourth row side by side; then four by four.
#pragma GCC unroll 2
    for (int q = 0; q < 2; ++q) {
        __m256 v[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            const float* p = from + i * stride + 4 * q;
            v[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), _mm_loadu_ps(p + 4 * stride), 1);
        }
        const __m256 a = _mm256_unpacklo_ps(v[0], v[1]), b = _mm256_unpackhi_ps(v[0], v[1]);
        const __m256 c = _mm256_unpacklo_ps(v[2], v[3]), d = _mm256_unpackhi_ps(v[2], v[3]);
        block[4 * q] = _mm256_shuffle_ps(a, c, 0x44);
        block[4 * q + 1] = _mm256_shuffle_ps(a, c, 0xee);
        block[4 * q + 2] = _mm256_shuffle_ps(b, d, 0x44);
        block[4 * q + 3] = _mm256_shuffle_ps(b, d, 0xee);
    }
}
#endif

// block[i] = element i of each of the L rows `from + j * stride`.
UNROLLED_INLINE void load_transposed(const float* from, int64_t stride, vf (&block)[L]) {
#if UNROLLED_LANES == 16
    // Four elements of every fourth row side by side; then four by four within these.
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
        __m512 v[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            const float* p = from + i * stride + 4 * q;
            v[i] = _mm512_broadcast_f32x4(_mm_loadu_ps(p));
            v[i] = _mm512_mask_broadcast_f32x4(v[i], 0x00f0, _mm_loadu_ps(p + 4 * stride));
            v[i] = _mm512_mask_broadcast_f32x4(v[i], 0x0f00, _mm_loadu_ps(p + 8 * stride));
            v[i] = _mm512_mask_broadcast_f32x4(v[i], 0xf000, _mm_loadu_ps(p + 12 * stride));
        }
        const __m512 a = _mm512_unpacklo_ps(v[0], v[1]), b = _mm512_unpackhi_ps(v[0], v[1]);
        const __m512 c = _mm512_unpacklo_ps(v[2], v[3]), d = _mm512_unpackhi_ps(v[2], v[3]);
        block[4 * q] = vf(_mm512_shuffle_ps(a, c, 0x44));
        block[4 * q + 1] = vf(_mm512_shuffle_ps(a, c, 0xee));
        block[4 * q + 2] = vf(_mm512_shuffle_ps(b, d, 0x44));
        block[4 * q + 3] = vf(_mm512_shuffle_ps(b, d, 0xee));
    }
#else
    for (int i = 0; i < L; ++i) block[i] = load(from + i * stride);
    transpose(block);
#endif
}

}  // namespace
}  // namespace unrolled::UNROLLED_ISA
