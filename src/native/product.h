// Matrix products with one packed operand.
//
// The packed operand's columns are cut into panels of NV vectors; within a panel the summed dimension k runs slowest:
//
//     packed [panels][K / Number::step][NV][L][Number::step]
//
// so that one pass over a panel streams through memory. The other operand is read where it lies, row by row, through
// row pointers. A tile is R rows x one panel, its sums held in registers while k runs from 0 to K in order: a row's
// bits depend on nothing but that row and the packed operand.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "memory.h"
#include "threads.h"
#include "vector.h"

namespace unrolled::UNROLLED_ISA {
namespace {

// Memory for this instruction set's own vectors. A std::vector of a plain type would be the same type in every isa_*.cc,
// and the linker would keep one of its functions for all of them, compiled for whichever set it found first.
template <class T>
struct Local : std::allocator<T> {
    template <class U>
    struct rebind {
        using other = Local<U>;
    };
    Local() = default;
    template <class U>
    Local(const Local<U>&) {}
};
template <class T>
using Vector = std::vector<T, Local<T>>;

// --- the operands' numbers

struct Float32 {
    using Element = float;
    static constexpr int step = 1;  // elements that one multiply-add takes of k
    static UNROLLED_INLINE float put(float x) { return x; }
    static UNROLLED_INLINE vf put(vf x) { return x; }
    static UNROLLED_INLINE void store_lanes(float* to, vf x, int n) { store(to, x, n); }
    static UNROLLED_INLINE void store_row(float* to, const float* from, int64_t n) {
        std::memcpy(to, from, static_cast<size_t>(n) * 4);
    }
    static UNROLLED_INLINE vf multiply_add(const float* a, vf b, vf sum) { return splat(*a) * b + sum; }
};

#if UNROLLED_BF16
// Pairs of bfloat16: one instruction multiplies both and adds both products to a float32.
struct BFloat16 {
    using Element = uint16_t;
    static constexpr int step = 2;
    static UNROLLED_INLINE uint16_t put(float x) { return to_bf16(x); }
    static UNROLLED_INLINE __m256i halves(vf x) { return (__m256i)_mm512_cvtneps_pbh(__m512(x)); }
    static UNROLLED_INLINE __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1); }
    static UNROLLED_INLINE void store_lanes(uint16_t* to, vf x, int n) {
        _mm256_mask_storeu_epi16(to, first(n), halves(x));
    }
    static UNROLLED_INLINE void store_row(uint16_t* to, const float* from, int64_t n) {
        int64_t i = 0;
        for (; i + L <= n; i += L) _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), halves(load(from + i)));
        for (; i < n; ++i) to[i] = to_bf16(from[i]);
    }
    static UNROLLED_INLINE vf multiply_add(const uint16_t* a, vf b, vf sum) {
        int32_t pair;
        std::memcpy(&pair, a, 4);
        return vf(_mm512_dpbf16_ps(__m512(sum), (__m512bh)_mm512_set1_epi32(pair), (__m512bh)__m512(b)));
    }
};
#else
// Where there are no bfloat16 instructions: the same rounded operands, kept as float32.
struct BFloat16 {
    using Element = float;
    static constexpr int step = 1;
    static UNROLLED_INLINE float put(float x) { return round_bf16(x); }
    static UNROLLED_INLINE vf put(vf x) { return round_bf16(x); }
    static UNROLLED_INLINE void store_lanes(float* to, vf x, int n) { store(to, round_bf16(x), n); }
    static UNROLLED_INLINE void store_row(float* to, const float* from, int64_t n) {
        int64_t i = 0;
        for (; i + L <= n; i += L) store(to + i, round_bf16(load(from + i)));
        for (; i < n; ++i) to[i] = round_bf16(from[i]);
    }
    static UNROLLED_INLINE vf multiply_add(const float* a, vf b, vf sum) { return splat(*a) * b + sum; }
};
#endif

template <class Number>
using ElementOf = typename Number::Element;

// Whether a number is rounded when it becomes an operand.
template <class Number>
constexpr bool rounds = !std::is_same_v<Number, Float32>;

// Elements of a row of n as an operand: padded (with zeros) to whole multiply-adds.
template <class Number>
constexpr int64_t padded(int64_t n) {
    return (n + Number::step - 1) / Number::step * Number::step;
}

// How many rows a tile of NV vectors may have, such that all sums stay in registers.
#if UNROLLED_LANES == 16
constexpr int max_rows(int nv) { return nv == 4 ? 6 : 8; }  // 32 registers
#elif UNROLLED_LANES == 8
constexpr int max_rows(int) { return 3; }  // 16 registers
#else
constexpr int max_rows(int) { return 2; }
#endif

// --- panels

// Columns in order, NV vectors a panel.
struct Plain {
    static constexpr int NV = 4;
    int64_t columns;
    int64_t panels() const { return (columns + NV * L - 1) / (NV * L); }
    int64_t column(int64_t panel, int v) const { return (panel * NV + v) * L; }
    // Columns of this vector that exist.
    int valid(int64_t panel, int v) const {
        return static_cast<int>(std::clamp<int64_t>(columns - column(panel, v), 0, L));
    }
};

// The G gates of the same L hidden units side by side, so that a tile holds all that a unit's next state needs.
template <int G>
struct Gated {
    static constexpr int NV = G;
    int64_t hidden;
    int64_t panels() const { return (hidden + L - 1) / L; }
    int64_t column(int64_t panel, int v) const { return v * hidden + panel * L; }
    int valid(int64_t panel, int) const { return static_cast<int>(std::min<int64_t>(hidden - panel * L, L)); }
};

template <class Number, class Panels>
int64_t panel_elements(int64_t K) {
    return padded<Number>(K) * Panels::NV * L;
}
template <class Number, class Panels>
size_t packed_bytes(const Panels& panels, int64_t K) {
    const size_t bytes = static_cast<size_t>(panels.panels() * panel_elements<Number, Panels>(K)) * sizeof(ElementOf<Number>);
    return (bytes + 63) / 64 * 64;
}

// Packs elements [k0, k1) of one panel of the operand whose column j is the row `from + j * stride` (a weight as torch
// keeps it, used as x W^T). k0 must be a multiple of Number::step. `to` is where k0 begins.
template <class Number, class Panels>
__attribute__((noinline)) void pack_rows(const Panels& panels, int64_t panel, const float* from, int64_t stride, int64_t k0, int64_t k1,
               ElementOf<Number>* to) {
    constexpr int NV = Panels::NV;
    for (int v = 0; v < NV; ++v) {
        const int n = panels.valid(panel, v);
        const float* rows = from + panels.column(panel, v) * stride;
        // What is packed next; asked for beforehand, since that many rows at once are more streams than a processor follows
        // by itself.
        const float* next = from + (v + 1 < NV ? panels.column(panel, v + 1) : panels.column(panel + 1, 0)) * stride;
        ElementOf<Number>* out = to + v * L * Number::step;
        int64_t k = k0;
        for (; k + L * Number::step <= k1; k += L * Number::step) {
            // In the order of memory: all of these rows, as far as all columns of this vector are packed.
#pragma GCC unroll 32
            for (int i = 0; i < L * Number::step; ++i) __builtin_prefetch(next + L * (k + i), 0, 2);
            vf block[L];
            if constexpr (std::is_same_v<Number, Float32>) {
                if (n == L) {
                    load_transposed(rows + k, stride, block);
#pragma GCC unroll 16
                    for (int i = 0; i < L; ++i) store(out + (k - k0 + i) * NV * L, block[i]);
                    continue;
                }
            }
#pragma GCC unroll 16
            for (int i = 0; i < L; ++i) {
                if (i >= n) {
                    block[i] = splat(0);
                    continue;
                }
                const float* row = rows + i * stride + k;
#if UNROLLED_BF16
                if constexpr (Number::step == 2)
                    block[i] = vf(_mm512_inserti64x4(_mm512_castsi256_si512(BFloat16::halves(load(row))),
                                                     BFloat16::halves(load(row + L)), 1));
                else
                    block[i] = load(row);
#else
                block[i] = Number::put(load(row));
#endif
            }
            transpose(block);
#pragma GCC unroll 16
            for (int i = 0; i < L; ++i)
                std::memcpy(out + (k - k0 + i * Number::step) * NV * L, &block[i], sizeof(vf));
        }
        for (; k < k1; k += Number::step)
            for (int i = 0; i < L; ++i)
                for (int s = 0; s < Number::step; ++s)
                    out[(k - k0) * NV * L + i * Number::step + s] =
                        i < n && k + s < k1 ? Number::put(rows[i * stride + k + s]) : ElementOf<Number>{};
    }
}

// Packs one panel of the operand whose row k is `row(k)`, a pointer to its columns (a weight as torch keeps it, used
// as x W; or the steps of a sequence).
template <class Number, class Panels, class Row>
void pack_columns(const Panels& panels, int64_t panel, int64_t K, Row row, ElementOf<Number>* to) {
    constexpr int NV = Panels::NV;
    for (int64_t k = 0; k < K; k += Number::step) {
        for (int v = 0; v < NV; ++v) {
            const int n = panels.valid(panel, v);
            const int64_t column = panels.column(panel, v);
            ElementOf<Number>* out = to + k * NV * L + v * L * Number::step;
            const vf first = n > 0 ? load(row(k) + column, n) : splat(0);
#if UNROLLED_BF16
            if constexpr (Number::step == 2) {
                const vf second = n > 0 && k + 1 < K ? load(row(k + 1) + column, n) : splat(0);
                const __m512i low = _mm512_cvtepu16_epi32(BFloat16::halves(first));
                const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(BFloat16::halves(second)), 16);
                _mm512_storeu_si512(out, _mm512_or_si512(low, high));
            } else {
                store(out, first);
            }
#else
            store(out, Number::put(first));
#endif
        }
    }
}

// --- tiles

template <int R, int NV>
struct Sums {
    vf of[R][NV];
};

// Of `multiply`: nothing to ask for.
struct Nothing {
    UNROLLED_INLINE void operator()(int) const {}
};

// sums += a x panel over K elements (a multiple of Number::step); element k of row r at a(k, r). `ask(r)` is called once for
// every row on the way, evenly spread: what a tile needs afterwards is prefetched there. Asked for all at once, it would
// keep the panel waiting.
template <class Number, int R, int NV, class Left, class Ask>
UNROLLED_INLINE void multiply_add_tile(Sums<R, NV>& sums, Left a, const ElementOf<Number>* panel, int64_t K, Ask ask) {
    Sums<R, NV> s = sums;
    constexpr int parts = std::is_same_v<Ask, Nothing> ? 1 : R;
    const int64_t part = (K / parts + Number::step) / Number::step * Number::step;
    int64_t k = 0;
    for (int turn = 0; turn < parts; ++turn) {
        ask(turn);
        for (const int64_t end = std::min(K, k + part); k < end; k += Number::step) {
            vf b[NV];
#pragma GCC unroll 8
            for (int v = 0; v < NV; ++v) std::memcpy(&b[v], panel + k * NV * L + v * L * Number::step, sizeof(vf));
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
                for (int v = 0; v < NV; ++v) s.of[r][v] = Number::multiply_add(a(k, r), b[v], s.of[r][v]);
        }
    }
    sums = s;
}

// The same with rows that lie anywhere.
template <class Number, int R, int NV, class Ask = Nothing>
UNROLLED_INLINE void multiply(Sums<R, NV>& sums, const ElementOf<Number>* const* rows, int64_t offset,
                              const ElementOf<Number>* panel, int64_t K, Ask ask = {}) {
    const ElementOf<Number>* row[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) row[r] = rows[r] + offset;
    multiply_add_tile<Number>(sums, [&](int64_t k, int r) UNROLLED_LAMBDA_INLINE { return row[r] + k; }, panel, K, ask);
}

// A tile's sums begin with the bias of their columns, or null: with zero.
template <int R, class Panels>
UNROLLED_INLINE void start(Sums<R, Panels::NV>& sums, const Panels& panels, int64_t panel, const float* bias) {
#pragma GCC unroll 8
    for (int v = 0; v < Panels::NV; ++v) {
        const int valid = panels.valid(panel, v);
        const vf first = bias == nullptr || valid == 0 ? splat(0) : load(bias + panels.column(panel, v), valid);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) sums.of[r][v] = first;
    }
}

// Where a tile's panel comes from: packed before, or packed piece by piece on the way (few rows, once).
template <class Number>
struct Operand {
    const ElementOf<Number>* packed;  // or null
    const float* rows;                // then column j of the operand is `rows + j * stride`
    int64_t stride;
    int64_t K;
    int64_t first = 0;                // the panel that `packed` begins with
};

#if UNROLLED_LANES == 16
// sums[..][v] += rows x the operand whose sixteen columns are the rows `from + j * stride`, over K elements (a multiple of
// 16). Turned eight by eight in halves of vectors: twice as many chains of sums that do not wait for one another, two
// loads and two shuffles at a time on processors that split whole vectors, and no more than sixteen streams, which is how
// many lines of the first cache there are for strides of 2 KB. `next` is what comes after these sixteen rows; it is asked
// for in the order of memory, since sixteen streams are more than a processor follows by itself.
template <int R, int NV>
__attribute__((noinline)) void multiply_turned(Sums<R, NV>& sums, int v, const float* const* rows, const float* from,
                                               const float* next, int64_t stride, int64_t K) {
    __m256 sum[R][2];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) std::memcpy(sum[r], &sums.of[r][v], sizeof(vf));
    for (int64_t k = 0; k < K; k += 16) {
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) __builtin_prefetch(next + 16 * (k + i), 0, 2);
#pragma GCC unroll 2
        for (int64_t at = k; at < k + 16; at += 8)
#pragma GCC unroll 2
            for (int half = 0; half < 2; ++half) {
                __m256 block[8];
                load_transposed_8(from + 8 * half * stride + at, stride, block);
#pragma GCC unroll 8
                for (int i = 0; i < 8; ++i)
#pragma GCC unroll 4
                    for (int r = 0; r < R; ++r)
                        // As everywhere: whether the two are fused must not differ between one way and another.
                        sum[r][half] = _mm256_broadcast_ss(rows[r] + at + i) * block[i] + sum[r][half];
            }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) std::memcpy(&sums.of[r][v], sum[r], sizeof(vf));
}
#endif

constexpr int64_t rows_packed_on_the_way = 4;  // at most; with more it pays to pack everything before
constexpr int64_t piece = 64;                  // elements of k packed at once on the way

template <class Number, int R, class Panels, class Ask = Nothing>
UNROLLED_INLINE void multiply_panel(Sums<R, Panels::NV>& sums, const Panels& panels, int64_t panel,
                                    const Operand<Number>& operand, const ElementOf<Number>* const* rows, Ask ask = {}) {
    const int64_t K = padded<Number>(operand.K);
    if (R > rows_packed_on_the_way || operand.packed != nullptr) {
        multiply<Number, R, Panels::NV>(sums, rows, 0, operand.packed + (panel - operand.first) * panel_elements<Number, Panels>(operand.K), K, ask);
        return;
    }
    int64_t k = 0;
#if UNROLLED_LANES == 16
    // Float32, whole vectors: turned in registers and used at once.
    if constexpr (std::is_same_v<Number, Float32> && R <= rows_packed_on_the_way) {
        bool whole = true;
        for (int v = 0; v < Panels::NV; ++v) whole = whole && panels.valid(panel, v) == L;
        if (whole) {
            k = operand.K / L * L;
#pragma GCC unroll 8
            for (int v = 0; v < Panels::NV; ++v) {
                const float* from = operand.rows + panels.column(panel, v) * operand.stride;
                const float* next = operand.rows + panels.column(v + 1 < Panels::NV ? panel : panel + 1,
                                                                 v + 1 < Panels::NV ? v + 1 : 0) * operand.stride;
                multiply_turned<R, Panels::NV>(sums, v, rows, from, next, operand.stride, k);
            }
        }
    }
#endif
    alignas(64) ElementOf<Number> buffer[piece * Panels::NV * L];
    for (; k < operand.K; k += piece) {
        const int64_t end = std::min(k + piece, operand.K);
        pack_rows<Number>(panels, panel, operand.rows, operand.stride, k, end, buffer);
        multiply<Number, R, Panels::NV>(sums, rows, k, buffer, padded<Number>(end - k));
    }
}

// Calls tile(std::integral_constant<int, R>, first) for tiles of at most Most rows that cover [0, n), as even as they
// come: 32 rows in tiles of 6 are 6 6 5 5 5 5, not 6 6 6 6 6 2.
template <int Most, class Tile>
UNROLLED_INLINE void each_tile(int64_t n, Tile tile) {
    const int64_t tiles = (n + Most - 1) / Most;
    for (int64_t i = 0; i < tiles; ++i) {
        const int64_t first = n * i / tiles;
        switch (n * (i + 1) / tiles - first) {
            case 1: tile(std::integral_constant<int, 1>{}, first); break;
            case 2: if constexpr (Most >= 2) tile(std::integral_constant<int, 2>{}, first); break;
            case 3: if constexpr (Most >= 3) tile(std::integral_constant<int, 3>{}, first); break;
            case 4: if constexpr (Most >= 4) tile(std::integral_constant<int, 4>{}, first); break;
            case 5: if constexpr (Most >= 5) tile(std::integral_constant<int, 5>{}, first); break;
            case 6: if constexpr (Most >= 6) tile(std::integral_constant<int, 6>{}, first); break;
            case 7: if constexpr (Most >= 7) tile(std::integral_constant<int, 7>{}, first); break;
            case 8: if constexpr (Most >= 8) tile(std::integral_constant<int, 8>{}, first); break;
        }
    }
}

// to[i][columns] (+)= rows[i] x operand + bias, for n rows and the panels of `range`. Rows of `to` may lie anywhere.
template <class Number, class Panels>
void product(const Panels& panels, Range range, const Operand<Number>& operand, const float* bias,
             const ElementOf<Number>* const* rows, float* const* to, int64_t n, bool add = false) {
    for (int64_t p = range.first; p < range.last; ++p) {
        each_tile<max_rows(Panels::NV)>(n, [&](auto count, int64_t first) UNROLLED_LAMBDA_INLINE {
            constexpr int R = decltype(count)::value;
            constexpr int NV = Panels::NV;
            Sums<R, NV> sums;
            start<R>(sums, panels, p, bias);
            multiply_panel<Number, R>(sums, panels, p, operand, rows + first);
#pragma GCC unroll 8
            for (int v = 0; v < NV; ++v) {
                const int valid = panels.valid(p, v);
                if (valid == 0) continue;
                for (int r = 0; r < R; ++r) {
                    float* out = to[first + r] + panels.column(p, v);
                    store(out, add ? load(out, valid) + sums.of[r][v] : sums.of[r][v], valid);
                }
            }
        });
    }
}

// The same with an operand that is not packed yet: each panel is packed and used at once while it is near. `into` is where
// the first panel of `range` goes, and the others after it if they are kept, in its place if not.
template <class Number, class Panels>
void product_packing(const Panels& panels, Range range, Operand<Number> operand, const float* bias,
                     const ElementOf<Number>* const* rows, float* const* to, int64_t n, ElementOf<Number>* into, bool keep) {
    for (operand.first = range.first; operand.first < range.last; ++operand.first) {
        operand.packed = into;
        pack_rows<Number>(panels, operand.first, operand.rows, operand.stride, 0, operand.K, into);
        product<Number>(panels, {operand.first, operand.first + 1}, operand, bias, rows, to, n);
        if (keep) into += panel_elements<Number, Panels>(operand.K);
    }
}

// --- products summed over the steps of a sequence: into[m][n] += sum over k of left[k][m] * right[k][n]

// k's per pass; sums beyond are added up pass by pass. As many as make a panel of 64 KB, of either kind of numbers.
template <class Number>
constexpr int64_t summed_at_once = 256 * Number::step;
constexpr int64_t left_columns = 96;     // m's packed at once

// Rows of steps lie far apart, a few lines of each are wanted, and a processor does not foresee that: they are asked for so
// many rows before.
constexpr int64_t rows_before = 8;
template <class Number>
constexpr int64_t line = 64 / sizeof(ElementOf<Number>);  // elements that come at once

// Packs columns [m0, m0 + count) of rows [0, K) of the left operand as [K / step][count][step].
template <class Number>
void pack_left(const ElementOf<Number>* const* rows, int64_t K, int64_t m0, int64_t count, ElementOf<Number>* to) {
    const auto ask = [&](int64_t k) UNROLLED_LAMBDA_INLINE {
        for (int64_t i = 0; i < count; i += line<Number>) __builtin_prefetch(rows[k] + m0 + i, 0, 3);
    };
    if constexpr (Number::step == 1) {
        for (int64_t k = 0; k < K; ++k) {
            if (k + rows_before < K) ask(k + rows_before);
            std::memcpy(to + k * count, rows[k] + m0, static_cast<size_t>(count) * sizeof(*to));
        }
    } else {
        for (int64_t k = 0; k < K; k += 2) {
            const ElementOf<Number>* first = rows[k] + m0;
            const ElementOf<Number>* second = k + 1 < K ? rows[k + 1] + m0 : nullptr;
            ElementOf<Number>* out = to + k * count;
            for (int64_t j = k + rows_before; j < std::min(k + rows_before + 2, K); ++j) ask(j);
            int64_t i = 0;
#if UNROLLED_BF16
            for (; i + L <= count; i += L) {
                const auto part = [i](const uint16_t* p) {
                    return p == nullptr ? _mm512_setzero_si512()
                                        : _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + i)));
                };
                _mm512_storeu_si512(out + 2 * i, _mm512_or_si512(part(first), _mm512_slli_epi32(part(second), 16)));
            }
#endif
            for (; i < count; ++i) {
                out[2 * i] = first[i];
                out[2 * i + 1] = second == nullptr ? ElementOf<Number>{} : second[i];
            }
        }
    }
}

// into rows m of [m0, m1) += left^T x right. `left` [K] row pointers; `right` packed panels per pass of k:
// right + pass * right_stride. `into` [.. N], row m of the left operand goes to row m + shift.
template <class Number>
void product_over_steps(const ElementOf<Number>* const* left, int64_t K, int64_t m0, int64_t m1,
                        const ElementOf<Number>* right, int64_t right_stride, int64_t N, float* into, int64_t shift,
                        ElementOf<Number>* buffer) {
    using Element = ElementOf<Number>;
    const Plain panels{N};
    for (int64_t pass = 0; pass * summed_at_once<Number> < K; ++pass) {
        const int64_t k0 = pass * summed_at_once<Number>, count_k = std::min(summed_at_once<Number>, K - k0);
        const ElementOf<Number>* packed = right + pass * right_stride;
        const int64_t panel_size = panel_elements<Number, Plain>(count_k);
        for (int64_t m = m0; m < m1; m += left_columns) {
            const int64_t count = std::min(left_columns, m1 - m);
            pack_left<Number>(left + k0, count_k, m, count, buffer);
            for (int64_t p = 0; p < panels.panels(); ++p) {
                each_tile<max_rows(Plain::NV)>(count, [&](auto rows, int64_t first) UNROLLED_LAMBDA_INLINE {
                    constexpr int R = decltype(rows)::value;
                    float* const corner = into + (m + first + shift) * N + panels.column(p, 0);
                    Sums<R, Plain::NV> sums;
                    start<R>(sums, panels, p, nullptr);
                    const Element* const columns = buffer + first * Number::step;
                    multiply_add_tile<Number>(
                        sums, [&](int64_t k, int r) UNROLLED_LAMBDA_INLINE { return columns + k * count + r * Number::step; },
                        packed + p * panel_size, padded<Number>(count_k), [&](int r) UNROLLED_LAMBDA_INLINE {
                            // Megabytes of sums, which are far away again by now.
                            for (int v = 0; v < Plain::NV; ++v) __builtin_prefetch(corner + r * N + v * L, 1, 3);
                        });
#pragma GCC unroll 8
                    for (int v = 0; v < Plain::NV; ++v) {
                        const int valid = panels.valid(p, v);
                        if (valid == 0) continue;
                        for (int r = 0; r < R; ++r) {
                            float* out = corner + r * N + v * L;
                            store(out, load(out, valid) + sums.of[r][v], valid);
                        }
                    }
                });
            }
        }
    }
}

// Packs the right operand of `product_over_steps`, of which row k is `row(k)`: share `index` of `count` of its panels.
template <class Number, class Row>
void pack_right(int64_t N, int64_t K, Row row, ElementOf<Number>* to, int64_t stride, int index, int count) {
    const Plain panels{N};
    const Range range = share(panels.panels(), index, count);
    const int64_t first = panels.column(range.first, 0), last = std::min(panels.column(range.last, 0), N);
    Vector<const float*> rows(static_cast<size_t>(K));
    for (int64_t k = 0; k < K; ++k) rows[k] = row(k);
    for (int64_t pass = 0; pass * summed_at_once<Number> < K; ++pass) {
        const int64_t k0 = pass * summed_at_once<Number>, count_k = std::min(summed_at_once<Number>, K - k0);
        for (int64_t k = k0; k < k0 + count_k; k += Number::step) {
            for (int64_t j = k + rows_before; j < std::min(k + rows_before + Number::step, K); ++j)
                for (int64_t m = first; m < last; m += line<Float32>) __builtin_prefetch(rows[j] + m, 0, 3);
            for (int64_t p = range.first; p < range.last; ++p)
                pack_columns<Number>(panels, p, std::min<int64_t>(Number::step, k0 + count_k - k), [&](int64_t i) { return rows[k + i]; },
                                     to + pass * stride + p * panel_elements<Number, Plain>(count_k) + (k - k0) * Plain::NV * L);
        }
    }
}

// --- denormal numbers count as zero inside the kernels: on many processors each costs a hundred ordinary operations

class NoDenormals {
public:
#if defined(__SSE2__)
    NoDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
    ~NoDenormals() { _mm_setcsr(before_); }

private:
    const unsigned before_;
#elif defined(__aarch64__)
    NoDenormals() {
        asm volatile("mrs %0, fpcr" : "=r"(before_));
        asm volatile("msr fpcr, %0" ::"r"(before_ | (uint64_t{1} << 24)));
    }
    ~NoDenormals() { asm volatile("msr fpcr, %0" ::"r"(before_)); }

private:
    uint64_t before_;
#else
    NoDenormals() {}
#endif
};

}  // namespace
}  // namespace unrolled::UNROLLED_ISA
