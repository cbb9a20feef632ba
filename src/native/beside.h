// Two products at once: of one row of states with the recurrent weights, which waits for memory, and of the inputs of later
// steps with theirs, which waits for arithmetic. Together they take less time than one after the other.
#pragma once

#include "product.h"

namespace unrolled::UNROLLED_ISA {
namespace {

constexpr int64_t rows_beside = 16;  // at most

// Elements of k that are multiplied at once: few enough that a piece of the inputs' operand stays in the first cache while
// the recurrent operand streams through it.
template <class Number>
constexpr int64_t beside_piece = 32 * Number::step;

// rows x operand + bias for the panels of `range`, a piece at a time, one row's part of a panel. Each sum has its k's in
// order, as in `product`, and so the same bits.
template <class Number, class Panels>
class ProductBeside {
    using Element = ElementOf<Number>;
    static constexpr int NV = Panels::NV;
    static constexpr int64_t piece = beside_piece<Number>;
    const Panels panels_;
    const Range range_;
    const Operand<Number> operand_;
    const float* const bias_;
    const Element* const* rows_ = nullptr;
    float* const* to_ = nullptr;
    int64_t count_ = 0, panel_ = 0, k_ = 0, row_ = 0;
    alignas(64) float partial_[rows_beside][NV * L];  // sums of the panel in hand, for the k's before k_

public:
    // K of the operand is a multiple of `beside_piece`, and it is packed.
    ProductBeside(const Panels& panels, Range range, const Operand<Number>& operand, const float* bias)
        : panels_(panels), range_(range), operand_(operand), bias_(bias), panel_(range.last) {}

    // The next `count` rows, `rows_beside` at most, and where their products go; those before must be done.
    void begin(const Element* const* rows, float* const* to, int64_t count) {
        rows_ = rows, to_ = to, count_ = count;
        panel_ = count > 0 ? range_.first : range_.last;
        k_ = row_ = 0;
    }

    // Whether something is left to do.
    bool left() const { return panel_ < range_.last; }

    // sums += row x panel over K elements (a multiple of `beside_piece`), and pieces of this product while some are left.
    void multiply(Sums<1, NV>& sums, const Element* row, const Element* panel, int64_t K) {
        Sums<1, NV> s = sums;
        int64_t k = 0;
        for (; k < K && left(); k += piece) multiply_piece<true>(s, row + k, panel + k * NV * L);
        if (k < K) UNROLLED_ISA::multiply<Number, 1, NV>(s, &row, k, panel + k * NV * L, K - k);
        sums = s;
    }

    // One piece of this product alone.
    void advance() {
        Sums<1, NV> none;
        multiply_piece<false>(none, nullptr, nullptr);
    }

private:
    template <bool Both>
    UNROLLED_INLINE void multiply_piece(Sums<1, NV>& sums, const Element* row, const Element* panel) {
        const Element* const x = rows_[row_] + k_;
        const Element* const mine = operand_.packed + panel_ * panel_elements<Number, Panels>(operand_.K) + k_ * NV * L;
        float* const to = to_[row_];
        vf s[NV], t[NV];
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) {
            const int valid = panels_.valid(panel_, v);
            if constexpr (Both) s[v] = sums.of[0][v];
            t[v] = k_ > 0 ? load(partial_[row_] + v * L)
                   : bias_ == nullptr || valid == 0 ? splat(0)
                                                    : load(bias_ + panels_.column(panel_, v), valid);
        }
#pragma GCC unroll 2
        for (int64_t k = 0; k < piece; k += Number::step) {
            vf a[NV], b[NV];
#pragma GCC unroll 8
            for (int v = 0; v < NV; ++v) {
                if constexpr (Both) std::memcpy(&a[v], panel + k * NV * L + v * L * Number::step, sizeof(vf));
                std::memcpy(&b[v], mine + k * NV * L + v * L * Number::step, sizeof(vf));
            }
            if constexpr (Both)
#pragma GCC unroll 8
                for (int v = 0; v < NV; ++v) s[v] = Number::multiply_add(row + k, a[v], s[v]);
#pragma GCC unroll 8
            for (int v = 0; v < NV; ++v) t[v] = Number::multiply_add(x + k, b[v], t[v]);
        }
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) {
            const int valid = panels_.valid(panel_, v);
            if constexpr (Both) sums.of[0][v] = s[v];
            if (k_ + piece < operand_.K) store(partial_[row_] + v * L, t[v]);
            else if (valid > 0) store(to + panels_.column(panel_, v), t[v], valid);
        }
        if (++row_ < count_) return;
        row_ = 0;
        if ((k_ += piece) < operand_.K) return;
        k_ = 0;
        ++panel_;
    }
};

}  // namespace
}  // namespace unrolled::UNROLLED_ISA
