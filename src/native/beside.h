// Two products at once: of one row of states with the recurrent weights, which waits for memory, and of the inputs of later
// steps with theirs, which waits for arithmetic. Together they take less time than one after the other.
#pragma once

#include "product.h"

namespace unrolled::UNROLLED_ISA {
namespace {

constexpr int64_t rows_beside = 16;  // at most

// Elements of k, of I inputs, that are multiplied at once beside a recurrence of H units: few enough that a piece of the
// inputs' operand stays in the first cache while the recurrent operand streams through it. 0: no piece divides the inputs.
template <class Number>
int64_t beside_piece(int64_t I, int64_t H) {
    for (const int64_t piece : {32 * Number::step, 16 * Number::step})
        if (I % piece == 0 && (H % (2 * piece) == 0 || (piece == 16 * Number::step && H > 2 * piece))) return piece;
    return 0;
}

// rows x operand + bias for the panels of `range`, a piece at a time: two rows' part of a panel, whose vectors are loaded
// once for both, beside twice as many k's of the recurrence. That is as many loads as multiply-adds; one row beside as many
// k's would be five to four. Each sum has its k's in order, as in `product`, and so the same bits.
template <class Number, class Panels>
class ProductBeside {
    using Element = ElementOf<Number>;
    static constexpr int NV = Panels::NV;
    const Panels panels_;
    const Range range_;
    const Operand<Number> operand_;
    const float* const bias_;
    const int64_t piece_;
    const Element* const* rows_ = nullptr;
    float* const* to_ = nullptr;
    int64_t count_ = 0, panel_ = 0, k_ = 0, row_ = 0;
    alignas(64) float partial_[rows_beside][NV * L];  // sums of the panel in hand, for the k's before k_

public:
    // piece: `beside_piece`; 0: it is not used. The operand is packed.
    ProductBeside(const Panels& panels, Range range, const Operand<Number>& operand, const float* bias, int64_t piece)
        : panels_(panels), range_(range), operand_(operand), bias_(bias), piece_(piece), panel_(range.last) {}

    // The next `count` rows, `rows_beside` at most, and where their products go; those before must be done.
    void begin(const Element* const* rows, float* const* to, int64_t count) {
        rows_ = rows, to_ = to, count_ = count;
        panel_ = count > 0 ? range_.first : range_.last;
        k_ = row_ = 0;
    }

    // How many rows fit beside `steps` steps of a recurrence of K elements.
    int64_t fit(int64_t steps, int64_t K) const { return 2 * (steps * (K / (2 * piece_)) / (operand_.K / piece_)); }

    // Whether something is left to do.
    bool left() const { return panel_ < range_.last; }

    // sums += row x panel over K elements, and pieces of this product while some are left.
    void multiply(Sums<1, NV>& sums, const Element* row, const Element* panel, int64_t K) {
        Sums<1, NV> s = sums;
        int64_t k = 0;
        for (; k + 2 * piece_ <= K && left(); k += 2 * piece_) multiply_piece<true>(s, row + k, panel + k * NV * L);
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
        const int64_t at[2] = {row_, std::min(row_ + 1, count_ - 1)};  // the last of an odd number: twice the same
        const Element* const x[2] = {rows_[at[0]] + k_, rows_[at[1]] + k_};
        const Element* const mine = operand_.packed + panel_ * panel_elements<Number, Panels>(operand_.K) + k_ * NV * L;
        vf s[NV], t[2][NV];
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) {
            const int valid = panels_.valid(panel_, v);
            if constexpr (Both) s[v] = sums.of[0][v];
#pragma GCC unroll 2
            for (int r = 0; r < 2; ++r)
                t[r][v] = k_ > 0 ? load(partial_[at[r]] + v * L)
                          : bias_ == nullptr || valid == 0 ? splat(0)
                                                           : load(bias_ + panels_.column(panel_, v), valid);
        }
        for (int64_t k = 0; k < piece_; k += Number::step) {
            vf b[NV];
#pragma GCC unroll 8
            for (int v = 0; v < NV; ++v) std::memcpy(&b[v], mine + k * NV * L + v * L * Number::step, sizeof(vf));
            if constexpr (Both)
#pragma GCC unroll 2
                for (int64_t q = 2 * k; q < 2 * k + 2 * Number::step; q += Number::step)
#pragma GCC unroll 8
                    for (int v = 0; v < NV; ++v) {
                        vf a;
                        std::memcpy(&a, panel + q * NV * L + v * L * Number::step, sizeof(vf));
                        s[v] = Number::multiply_add(row + q, a, s[v]);
                    }
#pragma GCC unroll 2
            for (int r = 0; r < 2; ++r)
#pragma GCC unroll 8
                for (int v = 0; v < NV; ++v) t[r][v] = Number::multiply_add(x[r] + k, b[v], t[r][v]);
        }
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) {
            const int valid = panels_.valid(panel_, v);
            if constexpr (Both) sums.of[0][v] = s[v];
#pragma GCC unroll 2
            for (int r = 0; r < 2; ++r)
                if (k_ + piece_ < operand_.K) store(partial_[at[r]] + v * L, t[r][v]);
                else if (valid > 0) store(to_[at[r]] + panels_.column(panel_, v), t[r][v], valid);
        }
        if ((row_ += 2) < count_) return;
        row_ = 0;
        if ((k_ += piece_) < operand_.K) return;
        k_ = 0;
        ++panel_;
    }
};

}  // namespace
}  // namespace unrolled::UNROLLED_ISA
