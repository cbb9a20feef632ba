// The output side: a linear layer, and softmax cross-entropy over one without its scores ever being whole.
#pragma once

#include <cmath>
#include <vector>

#include "kernels.h"
#include "product.h"

namespace unrolled::UNROLLED_ISA {
namespace {

template <class Number>
size_t packed_linear_size_of(int64_t N, int64_t K) {
    return packed_bytes<Number>(Plain{N}, K);
}

template <class Number>
void pack_linear_weights(int64_t N, int64_t K, const float* weight, std::byte* into, int threads) {
    const Plain panels{N};
    auto* to = reinterpret_cast<ElementOf<Number>*>(into);
    parallel(threads, [&](int index, int count) {
        const Range range = share(panels.panels(), index, count);
        for (int64_t p = range.first; p < range.last; ++p)
            pack_rows<Number>(panels, p, weight, K, 0, K, to + p * panel_elements<Number, Plain>(K));
    });
}

// Rows first to last, which lie at row(m), as operands: themselves, or rounded copies in `copies`.
template <class Number, class Row>
void operand_rows(Row row, int64_t first, int64_t last, int64_t K, ElementOf<Number>* copies,
                  Vector<const ElementOf<Number>*>& rows) {
    rows.clear();
    for (int64_t m = first; m < last; ++m) {
        if constexpr (!rounds<Number>) {
            rows.push_back(row(m));
        } else {
            ElementOf<Number>* to = copies + (m - first) * padded<Number>(K);
            Number::store_row(to, row(m), K);
            for (int64_t k = K; k < padded<Number>(K); ++k) to[k] = ElementOf<Number>{};
            rows.push_back(to);
        }
    }
}

constexpr double linear_flop_for_threads = 100e3;
constexpr int64_t rows_at_once = 96;  // rows whose operands are at hand at the same time

template <class Number>
void linear_layer(const Linear& given, int threads) {
    Linear l = given;
    if (2.0 * static_cast<double>(l.M) * static_cast<double>(l.N * l.K) < linear_flop_for_threads) threads = 1;
    Scratch pack;
    if (l.packed == nullptr && l.M > rows_packed_on_the_way) {
        pack = Scratch(packed_linear_size_of<Number>(l.N, l.K));
        pack_linear_weights<Number>(l.N, l.K, l.weight, pack.data(), threads);
        l.packed = pack.data();
    }
    const Plain panels{l.N};
    const Operand<Number> operand{reinterpret_cast<const ElementOf<Number>*>(l.packed), l.weight, l.K, l.K};
    parallel(threads, [&](int index, int count) {
        NoDenormals mode;
        // Few rows: every thread takes some of the columns of all of them.
        const bool by_columns = l.M < 6 * count;
        const Range rows = by_columns ? Range{0, l.M} : share(l.M, index, count);
        const Range range = by_columns ? share(panels.panels(), index, count) : Range{0, panels.panels()};
        Vector<const ElementOf<Number>*> from;
        Vector<float*> to;
        Scratch copies;
        if constexpr (rounds<Number>)
            copies = Scratch(static_cast<size_t>(rows_at_once * padded<Number>(l.K)) * sizeof(ElementOf<Number>));
        for (int64_t m = rows.first; m < rows.last; m += rows_at_once) {
            const int64_t end = std::min(m + rows_at_once, rows.last);
            operand_rows<Number>([&](int64_t i) { return l.x + i * l.x_row; }, m, end, l.K, copies.as<ElementOf<Number>>(), from);
            to.clear();
            for (int64_t i = m; i < end; ++i) to.push_back(l.y + i * l.N);
            product<Number>(panels, range, operand, l.bias, from.data(), to.data(), end - m);
        }
    });
}

// -log softmax(scores)[target], and scores -> softmax(scores) - one_hot(target) if `gradient`.
inline double cross_entropy_row(float* scores, int64_t n, int64_t target, bool gradient) {
    float most = scores[0];
    bool nan = false;
    for (int64_t j = 0; j < n; ++j) {
        most = scores[j] > most ? scores[j] : most;
        nan = nan || scores[j] != scores[j];
    }
    if (nan || !(most < INFINITY)) {  // as log_softmax: NaN all over
        if (gradient)
            for (int64_t j = 0; j < n; ++j) scores[j] = NAN;
        return NAN;
    }
    const double wanted = static_cast<double>(scores[target]) - static_cast<double>(most);
    vf sums = splat(0);
    float rest = 0;
    int64_t j = 0;
    for (; j + L <= n; j += L) {
        const vf e = exp(load(scores + j) - splat(most));
        if (gradient) store(scores + j, e);
        sums += e;
    }
    for (; j < n; ++j) {
        const vf e = exp(splat(scores[j]) - splat(most));
        if (gradient) scores[j] = e[0];
        rest += e[0];
    }
    for (int i = 0; i < L; ++i) rest += sums[i];
    if (gradient) {
        const vf scale = splat(1.0f / rest);
        for (j = 0; j + L <= n; j += L) store(scores + j, load(scores + j) * scale);
        for (; j < n; ++j) scores[j] *= scale[0];
        scores[target] -= 1.0f;
    }
    return std::log(static_cast<double>(rest)) - wanted;
}

constexpr int64_t symbols_at_once = 1024;  // that d(x) sums over before it adds up: a panel of so many stays near

// Rows in blocks: scores of a block, its losses and their gradient in place, then the three products from it. A row that
// is not counted takes no part in any of them: whatever it holds, NaN too, reaches nothing.
template <class Number>
void cross_entropy_layer(const CrossEntropy& c, int threads) {
    using Element = ElementOf<Number>;
    const bool gradient = c.d_x != nullptr;
    const Plain columns{c.N}, inputs{c.K};
    Vector<int64_t> counted;
    for (int64_t m = 0; m < c.M; ++m)
        if (c.targets[m] >= 0) counted.push_back(m);
    const int64_t M = static_cast<int64_t>(counted.size());
    const auto x = [&](int64_t i) { return c.x + counted[i] * c.x_row; };
    // Large enough for efficient sums over its rows, and at most some 16 MB of scores.
    const int64_t block = std::clamp<int64_t>((int64_t{4} << 20) / std::max<int64_t>(c.N, 1), 32, summed_at_once<Number>);
    const int64_t scores_row = (c.N + 1 + 15) / 16 * 16;
    const int64_t K = padded<Number>(c.K);
    Scratch forward_pack(packed_linear_size_of<Number>(c.N, c.K));
    pack_linear_weights<Number>(c.N, c.K, c.weight, forward_pack.data(), threads);
    Scratch backward_pack;
    const int64_t pass = inputs.panels() * panel_elements<Number, Plain>(std::min(block, M));
    Scratch scores_block(static_cast<size_t>(block * scores_row) * 4), operands, right, d_operands;
    if (gradient) {
        // [N / symbols_at_once][panels]; the last piece is smaller.
        backward_pack = Scratch(packed_bytes<Number>(inputs, c.N));
        right = Scratch(static_cast<size_t>(std::max<int64_t>(pass, 1)) * sizeof(Element));
        if (rounds<Number>) d_operands = Scratch(static_cast<size_t>(block * scores_row) * sizeof(Element));
    }
    if (rounds<Number>) operands = Scratch(static_cast<size_t>(block * K) * sizeof(Element));
    const auto for_pieces = [&](auto&& work) {
        for (int64_t j = 0; j < c.N; j += symbols_at_once)
            work(j, std::min(symbols_at_once, c.N - j),
                 backward_pack.as<Element>() + j / symbols_at_once * inputs.panels() * panel_elements<Number, Plain>(symbols_at_once));
    };
    Vector<double> losses(static_cast<size_t>(block));
    double total = 0;
    Barrier barrier;
    parallel(threads, [&](int index, int count) {
        NoDenormals mode;
        Vector<const Element*> rows, d_rows;
        Vector<float*> to;
        Scratch buffer(static_cast<size_t>(summed_at_once<Number> * left_columns) * sizeof(Element));
        const Range my_columns = share(c.N, index, count);
        if (gradient) {
            const Range range = share(inputs.panels(), index, count);
            for_pieces([&](int64_t j, int64_t symbols, Element* packed) {
                for (int64_t p = range.first; p < range.last; ++p)
                    pack_columns<Number>(inputs, p, symbols, [&](int64_t k) { return c.weight + (j + k) * c.K; },
                                         packed + p * panel_elements<Number, Plain>(symbols));
            });
            std::memset(c.d_weight + my_columns.first * c.K, 0,
                        static_cast<size_t>((my_columns.last - my_columns.first) * c.K) * 4);
            if (c.d_bias)
                std::memset(c.d_bias + my_columns.first, 0, static_cast<size_t>(my_columns.last - my_columns.first) * 4);
            const Range my_rows = share(c.M, index, count);
            for (int64_t m = my_rows.first; m < my_rows.last; ++m)
                if (c.targets[m] < 0) std::memset(c.d_x + m * c.K, 0, static_cast<size_t>(c.K) * 4);
        }
        barrier.wait(count);
        for (int64_t m = 0; m < M; m += block) {
            const int64_t n = std::min(block, M - m);
            if (gradient)
                pack_right<Number>(c.K, n, [&](int64_t k) { return x(m + k); }, right.as<Element>(), pass, index, count);
            const Range mine = share(n, index, count);
            operand_rows<Number>(x, m + mine.first, m + mine.last, c.K,
                                 rounds<Number> ? operands.as<Element>() + mine.first * K : nullptr, rows);
            to.clear();
            for (int64_t i = mine.first; i < mine.last; ++i) to.push_back(scores_block.as<float>() + i * scores_row);
            const int64_t own = mine.last - mine.first;
            product<Number>(columns, {0, columns.panels()},
                            Operand<Number>{forward_pack.as<Element>(), nullptr, 0, c.K}, c.bias, rows.data(), to.data(), own);
            d_rows.clear();
            for (int64_t i = mine.first; i < mine.last; ++i) {
                float* scores = scores_block.as<float>() + i * scores_row;
                losses[static_cast<size_t>(i)] = cross_entropy_row(scores, c.N, c.targets[counted[m + i]], gradient);
                if (!gradient) continue;
                if constexpr (rounds<Number>) {
                    Element* to_row = d_operands.as<Element>() + i * scores_row;
                    Number::store_row(to_row, scores, c.N);
                    std::fill(to_row + c.N, to_row + scores_row, Element{});
                    d_rows.push_back(to_row);
                } else {
                    d_rows.push_back(scores);
                }
            }
            if (gradient) {
                to.clear();
                for (int64_t i = mine.first; i < mine.last; ++i) to.push_back(c.d_x + counted[m + i] * c.K);
                for_pieces([&](int64_t j, int64_t symbols, Element* packed) {
                    product<Number>(inputs, {0, inputs.panels()}, Operand<Number>{packed, nullptr, 0, symbols}, nullptr,
                                    d_rows.data(), to.data(), own, j > 0);
                    for (const Element*& row : d_rows) row += symbols;
                });
            }
            barrier.wait(count);
            if (index == 0)
                for (int64_t i = 0; i < n; ++i) total += losses[static_cast<size_t>(i)];
            if (gradient) {
                d_rows.clear();
                for (int64_t i = 0; i < n; ++i) {
                    if constexpr (rounds<Number>) d_rows.push_back(d_operands.as<Element>() + i * scores_row);
                    else d_rows.push_back(scores_block.as<float>() + i * scores_row);
                }
                product_over_steps<Number>(d_rows.data(), n, my_columns.first, my_columns.last, right.as<Element>(), pass,
                                           c.K, c.d_weight, 0, buffer.as<Element>());
                for (int64_t j = my_columns.first; c.d_bias && j < my_columns.last; j += L) {
                    const int lanes = static_cast<int>(std::min<int64_t>(L, my_columns.last - j));
                    vf sum = splat(0);
                    for (int64_t i = 0; i < n; ++i) sum += load(scores_block.as<float>() + i * scores_row + j, lanes);
                    store(c.d_bias + j, load(c.d_bias + j, lanes) + sum, lanes);
                }
            }
            barrier.wait(count);
        }
    });
    *c.loss = total;
}

}  // namespace
}  // namespace unrolled::UNROLLED_ISA
