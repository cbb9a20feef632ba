// A language model that writes: embedding or one-hot, layers, output, choice of the next symbol, over and over.
#pragma once

#include <cmath>
#include <numeric>
#include <vector>

#include "output.h"
#include "recurrence.h"

namespace unrolled::UNROLLED_ISA {
namespace {

// The next symbol for the random number `uniform`, from its scores [V], which are overwritten: the steps of
// `unrolled.decoding.next_distribution`, then the first symbol at which the summed probabilities exceed `uniform`.
// -1 if there is nothing to choose by: see `Writing::written`.
inline int64_t choose(const Writing& w, Vector<double>& scores, const uint8_t* barred, double uniform,
                      Vector<int64_t>& order, Vector<uint8_t>& seen) {
    const int64_t V = w.V;
    for (int64_t j = 0; barred != nullptr && j < V; ++j)
        if (barred[j]) scores[j] = -INFINITY;
    double highest = -INFINITY;
    for (double s : scores) {
        if (!(s < INFINITY)) return -1;
        highest = std::max(highest, s);
    }
    if (highest == -INFINITY) return -1;
    if (w.repetition_penalty != 1 && *w.recent_count > 0) {
        std::fill(seen.begin(), seen.end(), uint8_t{0});
        for (int64_t i = 0; i < *w.recent_count; ++i) {
            const int64_t j = w.recent[i];
            if (seen[j]) continue;
            seen[j] = 1;
            scores[j] = scores[j] > 0 ? scores[j] / w.repetition_penalty : scores[j] * w.repetition_penalty;
        }
    }
    if (w.temperature == 0) return std::max_element(scores.begin(), scores.end()) - scores.begin();
    double most = -INFINITY, total = 0;
    for (double& s : scores) most = std::max(most, s /= w.temperature);
    for (double& s : scores) total += s = std::exp(s - most);
    if (!(total > 0)) return -1;  // so low a temperature that the scores became infinite
    for (double& s : scores) s /= total;
    const bool by_k = w.top_k > 0 && w.top_k < V, by_p = w.top_p < 1;
    if (by_k || by_p) {
        order.resize(static_cast<size_t>(V));
        std::iota(order.begin(), order.end(), 0);
        // Of equal ones the first symbols first.
        std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
            return scores[a] != scores[b] ? scores[a] > scores[b] : a < b;
        });
        if (by_k)
            for (int64_t i = w.top_k; i < V; ++i) scores[order[i]] = 0;
        if (by_p) {
            double all = 0, before = 0;
            for (int64_t j : order) all += scores[j];
            for (int64_t j : order) {
                const double p = scores[j];
                if (before >= w.top_p * all) scores[j] = 0;
                before += p;
            }
        }
    }
    total = 0;
    for (double s : scores) total += s;
    const double wanted = uniform * total;
    double sum = 0;
    int64_t last = 0;
    for (int64_t j = 0; j < V; ++j) {
        if (scores[j] == 0) continue;
        sum += scores[j];
        last = j;
        if (sum > wanted) break;
    }
    return last;
}

template <class Number, Cell C>
void write_text(const Writing& w, int threads) {
    using Element = ElementOf<Number>;
    using Panels = typename PanelsOf<C>::type;
    constexpr int G = gates(C);
    constexpr bool copies = !std::is_same_v<Number, Float32>;
    const int64_t H = w.H, V = w.V, K = padded<Number>(H);
    const Panels panels{H};
    const Plain symbols{V};
    // h of every layer before and after the step, as floats and as operands.
    Vector<float> h(static_cast<size_t>(2 * w.layers * H)), scores_(static_cast<size_t>(V));
    Vector<Element> operands(static_cast<size_t>(2 * w.layers * K));
    for (int layer = 0; layer < w.layers; ++layer)
        for (int parity = 0; parity < 2; ++parity) {
            std::memcpy(&h[static_cast<size_t>((parity * w.layers + layer) * H)], w.h + layer * H, static_cast<size_t>(H) * 4);
            Number::store_row(&operands[static_cast<size_t>((parity * w.layers + layer) * K)], w.h + layer * H, H);
        }
    const auto h_of = [&](int64_t parity, int layer) { return h.data() + (parity * w.layers + layer) * H; };
    const auto operand_of = [&](int64_t parity, int layer) -> const Element* {
        if constexpr (copies) return operands.data() + (parity * w.layers + layer) * K;
        else return h_of(parity, layer);
    };
    const double flop = 2.0 * static_cast<double>(w.layers) * 2 * G * static_cast<double>(H * H);
    if (flop < 100e3) threads = 1;
    int64_t last = w.last;
    Barrier barrier;
    Vector<double> wide(static_cast<size_t>(V));
    Vector<int64_t> order;
    Vector<uint8_t> seen(static_cast<size_t>(V));
    parallel(threads, [&](int index, int count) {
        NoDenormals mode;
        const Range range = share(panels.panels(), index, count);
        const Range outputs = share(symbols.panels(), index, count);
        StepRows<Number> step(1);
        for (int64_t i = 0; i < w.count; ++i) {
            const int64_t now = i & 1, before = now ^ 1;
            for (int layer = 0; layer < w.layers; ++layer) {
                const std::byte* packed = w.packed[layer];
                const Operand<Number> input{reinterpret_cast<const Element*>(packed), nullptr, 0, H};
                const Element* const x = layer > 0 ? operand_of(now, layer - 1) : nullptr;
                if (layer > 0) packed += packed_input_size<Number, C>(H, H);
                else step.projected[0] = w.table + last * G * H;
                step.operand[0] = operand_of(before, layer);
                step.h_before[0] = h_of(before, layer);
                step.h[0] = h_of(now, layer);
                step.c[0] = C == Cell::lstm ? w.c + layer * H : nullptr;
                step.c_before[0] = step.c[0];
                step.operand_after[0] = copies ? const_cast<Element*>(operand_of(now, layer)) : nullptr;
                step_panels<Number, C>({input, w.weights[layer].bias_ih, layer > 0 ? &x : nullptr},
                                       Operand<Number>{reinterpret_cast<const Element*>(packed), nullptr, 0, H},
                                       w.weights[layer].bias_hh, H, range, now != 0, step, 1);
                barrier.wait(count);
            }
            const Element* x = operand_of(now, w.layers - 1);
            float* to = scores_.data();
            product<Number>(symbols, outputs, Operand<Number>{reinterpret_cast<const Element*>(w.output_packed), nullptr, 0, H},
                            w.output_bias, &x, &to, 1);
            barrier.wait(count);
            if (index == 0) {
                for (int64_t j = 0; j < V; ++j) wide[j] = scores_[j];
                last = choose(w, wide, i == 0 && w.barred_first ? w.barred_first : w.barred, w.uniform[i], order, seen);
                w.written[i] = last;
                if (last < 0) std::fill(w.written + i, w.written + w.count, int64_t{-1});
                else if (*w.recent_count == w.repetition_window) {
                    std::memmove(w.recent, w.recent + 1, static_cast<size_t>(w.repetition_window - 1) * sizeof(int64_t));
                    w.recent[w.repetition_window - 1] = last;
                } else {
                    w.recent[(*w.recent_count)++] = last;
                }
            }
            barrier.wait(count);
            if (last < 0) break;
        }
    });
    if (w.count > 0)
        for (int layer = 0; layer < w.layers; ++layer)
            std::memcpy(w.h + layer * H, h_of((w.count - 1) & 1, layer), static_cast<size_t>(H) * 4);
}

}  // namespace
}  // namespace unrolled::UNROLLED_ISA
