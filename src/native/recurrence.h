// A layer over a whole sequence, forward and backward.
//
// Work is shared between threads in one of two ways, with the same bits:
//   by rows    each thread takes its own rows through all steps and never waits (many rows);
//   by units   each thread computes its own units of every row, and all meet after each step (few rows).
#pragma once

#include <algorithm>
#include <array>
#include <numeric>
#include <vector>

#include "beside.h"
#include "kernels.h"
#include "product.h"

namespace unrolled::UNROLLED_ISA {
namespace {

// --- what both directions of travel need to know about rows and steps

struct Plan {
    Extent extent;
    int threads;
    bool by_units;
    Vector<int64_t> order;  // rows, longest first

    int64_t length(int64_t row) const { return extent.lengths ? extent.lengths[row] : extent.T; }

    // The rows of one thread, longest first: those of step t are then the first `active(rows, t)`.
    Vector<int64_t> rows_of(int index, int count) const {
        Vector<int64_t> rows;
        if (by_units) return order;
        if (extent.lengths == nullptr) {
            const Range range = share(extent.B, index, count);
            for (int64_t i = range.first; i < range.last; ++i) rows.push_back(i);
            return rows;
        }
        // Dealt in turn, there and back, so that long rows are spread evenly.
        for (int64_t i = 0; i < extent.B; ++i) {
            const int64_t turn = i % (2 * count);
            if ((turn < count ? turn : 2 * count - 1 - turn) == index) rows.push_back(order[i]);
        }
        return rows;
    }
    int64_t active(const Vector<int64_t>& rows, int64_t t) const {
        if (extent.lengths == nullptr) return static_cast<int64_t>(rows.size());
        return std::partition_point(rows.begin(), rows.end(), [&](int64_t row) { return length(row) > t; }) - rows.begin();
    }
};

constexpr int64_t rows_for_units = 6;           // fewer rows than this for each thread: share by units
constexpr double flop_for_threads = 100e3;      // a step or call below it is not worth waking a thread for

Plan make_plan(const Extent& extent, Cell cell, int directions, int threads) {
    Plan plan{extent, threads, false, {}};
    const double flop = 2.0 * directions * gates(cell) * static_cast<double>(extent.T * extent.B) *
                        static_cast<double>(extent.H * (extent.H + extent.I));
    if (flop < flop_for_threads) plan.threads = 1;
    plan.by_units = plan.threads > 1 && extent.B < rows_for_units * plan.threads;
    if (plan.by_units && flop < flop_for_threads / 4 * static_cast<double>(extent.T)) {
        // Too little for the threads to meet after every step.
        plan.by_units = false;
        plan.threads = static_cast<int>(std::clamp<int64_t>(extent.B, 1, threads));
    }
    plan.order.resize(static_cast<size_t>(extent.B));
    std::iota(plan.order.begin(), plan.order.end(), 0);
    if (extent.lengths != nullptr)
        std::sort(plan.order.begin(), plan.order.end(), [&](int64_t a, int64_t b) {
            return std::pair(-extent.lengths[a], a) < std::pair(-extent.lengths[b], b);
        });
    return plan;
}

template <Cell C>
struct PanelsOf {
    using type = Gated<gates(C)>;
};
template <>
struct PanelsOf<Cell::rnn> {
    using type = Plain;
};
template <>
struct PanelsOf<Cell::rnn_relu> {
    using type = Plain;
};

// --- packed weights of a direction: W_ih, then W_hh, each as its product wants it

template <class Number, Cell C>
size_t packed_input_size(int64_t I, int64_t H) {
    return I > 0 ? packed_bytes<Number>(typename PanelsOf<C>::type{H}, I) : 0;
}
template <class Number, Cell C>
size_t packed_size_of(bool backward, int64_t I, int64_t H) {
    if (backward)
        return (I > 0 ? packed_bytes<Number>(Plain{I}, gates(C) * H) : 0) + packed_bytes<Number>(Plain{H}, gates(C) * H);
    return packed_input_size<Number, C>(I, H) + packed_bytes<Number>(typename PanelsOf<C>::type{H}, H);
}

// In D, the gradients of a step's sums, a gru's candidate comes first: n r z, then the recurrent candidate n r, so that
// what belongs to W_ih (n r z) and what belongs to W_hh (r z n r) are both in one piece.
template <Cell C>
int64_t row_of_input_weight(int64_t k, int64_t H) {
    if constexpr (C == Cell::gru) return k < H ? 2 * H + k : k - H;
    return k;
}

template <class Number, Cell C>
void pack_weights(bool backward, int64_t I, int64_t H, const Weights& w, std::byte* into, int threads) {
    using Element = ElementOf<Number>;
    using Panels = typename PanelsOf<C>::type;
    Element* input = reinterpret_cast<Element*>(into);
    if (!backward) {
        const Panels panels{H};
        Element* recurrent = reinterpret_cast<Element*>(into + packed_input_size<Number, C>(I, H));
        parallel(threads, [&](int index, int count) {
            const Range range = share(panels.panels(), index, count);
            for (int64_t p = range.first; p < range.last; ++p) {
                if (I > 0) pack_rows<Number>(panels, p, w.ih, I, 0, I, input + p * panel_elements<Number, Panels>(I));
                pack_rows<Number>(panels, p, w.hh, H, 0, H, recurrent + p * panel_elements<Number, Panels>(H));
            }
        });
        return;
    }
    const int64_t K = gates(C) * H;
    Element* recurrent =
        reinterpret_cast<Element*>(into + (I > 0 ? packed_bytes<Number>(Plain{I}, K) : 0));
    parallel(threads, [&](int index, int count) {
        if (I > 0) {
            const Plain panels{I};
            const Range range = share(panels.panels(), index, count);
            for (int64_t p = range.first; p < range.last; ++p)
                pack_columns<Number>(panels, p, K, [&](int64_t k) { return w.ih + row_of_input_weight<C>(k, H) * I; },
                                     input + p * panel_elements<Number, Plain>(K));
        }
        const Plain panels{H};
        const Range range = share(panels.panels(), index, count);
        for (int64_t p = range.first; p < range.last; ++p)
            pack_columns<Number>(panels, p, K, [&](int64_t k) { return w.hh + k * H; },
                                 recurrent + p * panel_elements<Number, Plain>(K));
    });
}

// --- forward

UNROLLED_INLINE vf load_or_zero(const float* p, int64_t u, int n) { return p == nullptr ? splat(0) : load(p + u, n); }

// What a tile's last act reads and writes: the rows of one step. Entry i of each array is of the i-th active row.
template <class Number>
class StepRows {
    static constexpr size_t lists = 8;
    Vector<std::byte> memory_;  // of all of them: one allocation, where a step is a few microseconds

    template <class T>
    T* list(size_t number) {
        static_assert(sizeof(T) == sizeof(void*));
        return reinterpret_cast<T*>(memory_.data()) + number * (memory_.size() / lists / sizeof(T));
    }

public:
    explicit StepRows(size_t n) : memory_(n * lists * sizeof(void*)) {}
    StepRows(const StepRows&) = delete;
    StepRows& operator=(const StepRows&) = delete;

    const ElementOf<Number>** const operand = list<const ElementOf<Number>*>(0);  // h before, as an operand
    const float** const projected = list<const float*>(1);                        // [G*H] what the input contributes
    const float** const h_before = list<const float*>(2);                         // [H]
    const float** const c_before = list<const float*>(3);                         // [H]
    float** const h = list<float*>(4);                                            // [H]
    float** const c = list<float*>(5);                                            // [H]
    float** const tape = list<float*>(6);                                         // [4H] or null
    // [H] h as an operand for the next step; null: h itself is
    ElementOf<Number>** const operand_after = list<ElementOf<Number>*>(7);
};

// sums: of both products and b_ih; a gru's candidate has what the input contributes to it in `input` instead, since only
// the other part is reset. bias: b_hh, or null.
template <class Number, Cell C, int R, int NV>
UNROLLED_INLINE void finish_tile(const Sums<R, NV>& sums, const vf (&input)[R], const float* bias,
                                 const typename PanelsOf<C>::type& panels, int64_t panel, int64_t H,
                                 StepRows<Number>& rows, int64_t first) {
    vf b[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
        const int valid = panels.valid(panel, v);
        b[v] = bias == nullptr || valid == 0 ? splat(0) : load(bias + panels.column(panel, v), valid);
    }
    for (int r = 0; r < R; ++r) {
        const int64_t i = first + r;
        float* tape = rows.tape[i];
        if constexpr (C == Cell::rnn || C == Cell::rnn_relu) {
            for (int v = 0; v < NV; ++v) {
                const int n = panels.valid(panel, v);
                if (n == 0) break;
                const int64_t u = panels.column(panel, v);
                vf a = sums.of[r][v] + b[v];
                vf h = C == Cell::rnn ? tanh(a) : at_least(a, 0.0f);
                store(rows.h[i] + u, h, n);
                if (rows.operand_after[i]) Number::store_lanes(rows.operand_after[i] + u, h, n);
            }
        } else {
            const int n = panels.valid(panel, 0);
            const int64_t u = panel * L;
            vf h;
            if constexpr (C == Cell::lstm) {
                const vf in = sigmoid(sums.of[r][0] + b[0]);
                const vf forget = sigmoid(sums.of[r][1] + b[1]);
                const vf candidate = tanh(sums.of[r][2] + b[2]);
                const vf out = sigmoid(sums.of[r][3] + b[3]);
                const vf c = forget * load(rows.c_before[i] + u, n) + in * candidate;
                h = out * tanh(c);
                store(rows.c[i] + u, c, n);
                if (tape) {
                    store(tape + u, in, n);
                    store(tape + H + u, forget, n);
                    store(tape + 2 * H + u, candidate, n);
                    store(tape + 3 * H + u, out, n);
                }
            } else {
                const vf reset = sigmoid(sums.of[r][0] + b[0]);
                const vf update = sigmoid(sums.of[r][1] + b[1]);
                const vf recurrent = sums.of[r][2] + b[2];
                const vf candidate = tanh(input[r] + reset * recurrent);
                h = candidate + update * (load(rows.h_before[i] + u, n) - candidate);
                if (tape) {
                    store(tape + u, reset, n);
                    store(tape + H + u, update, n);
                    store(tape + 2 * H + u, candidate, n);
                    store(tape + 3 * H + u, recurrent, n);
                }
            }
            store(rows.h[i] + u, h, n);
            if (rows.operand_after[i]) Number::store_lanes(rows.operand_after[i] + u, h, n);
        }
    }
}

// Asks for what `finish_tile` writes of row i, which has not been near since the call before.
template <class Number, Cell C>
UNROLLED_INLINE void prefetch_row(const typename PanelsOf<C>::type& panels, int64_t panel, int64_t H,
                                  const StepRows<Number>& rows, int64_t i) {
    if constexpr (C == Cell::rnn || C == Cell::rnn_relu) {
        for (int v = 0; v < Plain::NV && panels.valid(panel, v) > 0; ++v)
            __builtin_prefetch(rows.h[i] + panels.column(panel, v), 1, 2);
    } else {
        const int64_t u = panels.column(panel, 0);
        __builtin_prefetch(rows.h[i] + u, 1, 2);
        if (C == Cell::lstm) __builtin_prefetch(rows.c[i] + u, 1, 2);
        if (rows.tape[i] != nullptr)
            for (int64_t gate = 0; gate < 4; ++gate) __builtin_prefetch(rows.tape[i] + gate * H + u, 1, 2);
    }
}

// A step's inputs that are multiplied on the way, row by row as the step's; `rows` null: that was done before, and
// `StepRows::projected` is what came of it. The sums go on where they would have been kept, so that no bit differs.
template <class Number>
struct StepInputs {
    Operand<Number> operand;
    const float* bias;
    const ElementOf<Number>* const* rows;
};

// One step of the first n rows, for the panels of `range`. Every other step goes through them backwards: the panels that
// were used last are still near. With one row, pieces of the product `beside` are done too, if it is not null; the weights
// are packed then.
template <class Number, Cell C>
void step_panels(const StepInputs<Number>& inputs, const Operand<Number>& recurrent, const float* bias, int64_t H,
                 Range range, bool backwards, StepRows<Number>& rows, int64_t n,
                 ProductBeside<Number, typename PanelsOf<C>::type>* beside = nullptr) {
    using Panels = typename PanelsOf<C>::type;
    constexpr int NV = Panels::NV;
    const Panels panels{H};
    for (int64_t q = range.first; q < range.last; ++q) {
        const int64_t p = backwards ? range.first + range.last - 1 - q : q;
        each_tile<max_rows(NV)>(n, [&](auto tile_rows, int64_t first) UNROLLED_LAMBDA_INLINE {
            constexpr int R = decltype(tile_rows)::value;
            Sums<R, NV> sums;
            if (inputs.rows != nullptr) {
                start<R>(sums, panels, p, inputs.bias);
                multiply_panel<Number, R>(sums, panels, p, inputs.operand, inputs.rows + first, [&](int r) UNROLLED_LAMBDA_INLINE {
                    prefetch_row<Number, C>(panels, p, H, rows, first + r);
                });
            } else {
                // What the next sums begin with lies in the second cache at best.
                const int64_t next = std::clamp(backwards ? p - 1 : p + 1, range.first, range.last - 1);
#pragma GCC unroll 8
                for (int v = 0; v < NV; ++v) {
                    const int valid = panels.valid(p, v);
#pragma GCC unroll 8
                    for (int r = 0; r < R; ++r) {
                        const float* const from = rows.projected[first + r];
                        sums.of[r][v] = valid == 0 ? splat(0) : load(from + panels.column(p, v), valid);
                        __builtin_prefetch(from + panels.column(next, v), 0, 3);
                    }
                }
            }
            vf apart[R];
            if constexpr (C == Cell::gru)
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r) apart[r] = std::exchange(sums.of[r][2], splat(0));
            if (R == 1 && beside != nullptr) {
                if constexpr (R == 1)
                    beside->multiply(sums, rows.operand[first], recurrent.packed + p * panel_elements<Number, Panels>(H),
                                     padded<Number>(H));
            } else {
                multiply_panel<Number, R>(sums, panels, p, recurrent, rows.operand + first);
            }
            finish_tile<Number, C, R, NV>(sums, apart, bias, panels, p, H, rows, first);
        });
    }
}

constexpr int64_t rows_at_hand = 128;   // rows of inputs that are multiplied at once, before the steps that they belong to
constexpr int64_t rows_on_the_way = 6;  // so many rows of a step make that needless: they share each panel of W_ih

int64_t steps_at_hand(int64_t T, int64_t rows) {
    return std::clamp<int64_t>(rows_at_hand / std::max<int64_t>(rows, 1), 1, std::max<int64_t>(T, 1));
}

// Whether the recurrence of a single row, which waits for memory, is long enough for the products with the inputs of later
// steps to be done beside it: all of W_ih is packed for that, and the inputs of the first steps have nothing beside them.
template <class Number>
bool pays_beside(const Extent& e) {
    return e.T >= 3 * rows_beside && e.I > 0 && beside_piece<Number>(e.I, e.H) > 0;
}

// What the threads of one call have in common, per direction.
struct Shared {
    // Weights packed for this call alone. input null: packed panel by panel on the way, each used at once.
    std::byte *input = nullptr, *recurrent = nullptr;
    bool unpacked = false;  // each thread is to pack the panels of its units, which no other one reads
    // If they share by units: h as operands, c, and what the inputs contribute. Threads that each ask for memory of their
    // own wait for one another, which for a single step takes longer than the arithmetic.
    Scratch operands, cells, projected;
};

template <class Number, Cell C>
void forward_direction(const Forward& f, int d, const Plan& plan, int index, int count, Barrier& barrier,
                       const Shared& shared) {
    using Element = ElementOf<Number>;
    using Panels = typename PanelsOf<C>::type;
    constexpr int G = gates(C);
    const auto [T, B, I, H, lengths, resets, block_] = f.extent;
    const int64_t stride = f.directions * H;
    float* const outputs = f.outputs + d * H;
    const bool reverse = f.reverse[d];
    const uint8_t* reset = resets[d];
    const Weights& w = f.weights[d];
    const Panels panels{H};
    const Range range = plan.by_units ? share(panels.panels(), index, count) : Range{0, panels.panels()};
    const Vector<int64_t> rows = plan.rows_of(index, count);
    const int64_t n = static_cast<int64_t>(rows.size());
    const bool lookup = f.inputs.ids != nullptr;

    Operand<Number> input{nullptr, w.ih, I, I}, recurrent{nullptr, w.hh, H, H};
    if (f.packed[d] != nullptr) {
        if (!lookup) input.packed = reinterpret_cast<const Element*>(f.packed[d]);
        recurrent.packed = reinterpret_cast<const Element*>(
            f.packed[d] + (lookup ? 0 : packed_input_size<Number, C>(I, H)));
    } else {
        input.packed = reinterpret_cast<const Element*>(shared.input);
        recurrent.packed = reinterpret_cast<const Element*>(shared.recurrent);
    }
    const bool passing = !lookup && input.packed == nullptr && recurrent.packed != nullptr;
    bool unpacked = shared.unpacked;
    Scratch passing_block;
    if (passing)
        passing_block = Scratch(static_cast<size_t>(panel_elements<Number, Panels>(I)) * sizeof(Element));

    // Operands [2][n][K]: h of the step before and of this one, in turn; a row of zeros for resets.
    const int64_t K = padded<Number>(H);
    Scratch zero_block;
    if (reset != nullptr) {
        zero_block = Scratch(static_cast<size_t>(K) * 4);
        std::memset(zero_block.data(), 0, static_cast<size_t>(K) * 4);
    }
    const float* const zero = zero_block.as<float>();
    const Element* const zero_operand = zero_block.as<Element>();
    Scratch operand_block;
    Element* operands = shared.operands.template as<Element>();
    if constexpr (rounds<Number>) {
        if (!plan.by_units) {
            operand_block = Scratch(static_cast<size_t>(2 * std::max<int64_t>(n, 1) * K) * sizeof(Element));
            operands = operand_block.as<Element>();
        }
        if (!plan.by_units || index == 0)
            for (int64_t i = 0; i < n; ++i)
                for (int parity = 0; parity < 2; ++parity) {
                    Element* to = operands + (parity * n + i) * K;
                    Number::store_row(to, f.h0[d] + rows[i] * H, H);
                    for (int64_t k = H; k < K; ++k) to[k] = Element{};
                }
    }
    // Inference keeps one c for each row.
    Scratch c_block;
    float* cells = shared.cells.template as<float>();
    const bool keep_c = C == Cell::lstm && f.c[d] == nullptr;
    if (keep_c) {
        if (!plan.by_units) {
            c_block = Scratch(static_cast<size_t>(std::max<int64_t>(n, 1) * H) * 4);
            cells = c_block.as<float>();
        }
    }

    // The products with the inputs, for as many steps at once as make them large while what they write stays near; of all
    // threads together, for the budget of `fused.costs` holds whatever their number.
    const bool beside = n == 1 && !lookup && input.packed != nullptr && recurrent.packed != nullptr && pays_beside<Number>(f.extent);
    const int64_t ahead = lookup ? T : beside ? rows_beside : steps_at_hand(T, B);
    const int64_t slots = beside ? 2 * ahead : ahead;  // steps that there is room for
    const bool in_place = f.tape[d] != nullptr || C == Cell::rnn || C == Cell::rnn_relu;
    Scratch projected_block, x_block;
    float* projected = shared.projected.template as<float>();
    if (!lookup && !in_place && !plan.by_units) {
        projected_block = Scratch(static_cast<size_t>(slots * n * G * H) * 4);
        projected = projected_block.as<float>();
    }
    const int64_t KI = padded<Number>(I);
    if (!lookup && rounds<Number>) x_block = Scratch(static_cast<size_t>(slots * n * KI) * sizeof(Element));
    const auto projected_row = [&](int64_t t, int64_t i, int64_t s) -> float* {
        const int64_t at = t * B + rows[i];
        if constexpr (C == Cell::rnn || C == Cell::rnn_relu) return outputs + at * stride;
        if (in_place) return f.tape[d] + at * tape_gates(C) * H;
        return projected + ((s % slots) * n + i) * G * H;
    };
    Vector<const Element*> x_rows;
    Vector<float*> x_to;

    const auto list_inputs = [&](int64_t s0) {
        x_rows.clear();
        x_to.clear();
        for (int64_t s = s0; s < std::min(s0 + ahead, T); ++s) {
            const int64_t t = reverse ? T - 1 - s : s;
            for (int64_t i = 0, m = plan.active(rows, t); i < m; ++i) {
                const float* x = f.inputs.x + t * f.inputs.step + rows[i] * f.inputs.row;
                if constexpr (rounds<Number>) {
                    Element* to = x_block.as<Element>() + ((s % slots) * n + i) * KI;
                    Number::store_row(to, x, I);
                    for (int64_t k = I; k < KI; ++k) to[k] = Element{};
                    x_rows.push_back(to);
                } else {
                    x_rows.push_back(x);
                }
                x_to.push_back(projected_row(t, i, s));
            }
        }
        return static_cast<int64_t>(x_rows.size());
    };
    const auto multiply_inputs = [&](int64_t from, int64_t count) {
        const Element* const* x = x_rows.data() + from;
        float* const* to = x_to.data() + from;
        const int64_t here = range.first * panel_elements<Number, Panels>(I);
        if (passing) product_packing<Number>(panels, range, input, w.bias_ih, x, to, count, passing_block.as<Element>(), false);
        else if (unpacked)
            product_packing<Number>(panels, range, input, w.bias_ih, x, to, count,
                                    reinterpret_cast<Element*>(shared.input) + here, true);
        else product<Number>(panels, range, input, w.bias_ih, x, to, count);
    };
    ProductBeside<Number, Panels> later(panels, range, input, w.bias_ih, beside_piece<Number>(I, H));
    StepInputs<Number> inputs{input, w.bias_ih, nullptr};

    StepRows<Number> step(static_cast<size_t>(n));
    if (rounds<Number> && plan.by_units) barrier.wait(index, count);  // for the operands
    for (int64_t s0 = 0, listed = 0; s0 < T; s0 += ahead) {
        const int64_t s1 = std::min(s0 + ahead, T);
        const bool on_the_way = !lookup && !beside && !passing && !unpacked &&
                                (T == 1 || plan.active(rows, reverse ? T - 1 - s0 : s1 - 1) >= rows_on_the_way);
        if (!lookup && (!beside || s0 == 0)) {
            listed = list_inputs(s0);
            if (!on_the_way) multiply_inputs(0, listed);
        }
        inputs.rows = on_the_way ? x_rows.data() : nullptr;
        if (unpacked) {
            for (int64_t p = range.first; p < range.last; ++p)
                pack_rows<Number>(panels, p, w.hh, H, 0, H,
                                  reinterpret_cast<Element*>(shared.recurrent) + p * panel_elements<Number, Panels>(H));
            unpacked = false;
        }
        if (beside) {
            const int64_t now = listed;
            listed = list_inputs(s1);
            const int64_t fit = std::min(listed, later.fit(now, H));  // beside these steps; the others are multiplied before
            multiply_inputs(fit, listed - fit);
            later.begin(x_rows.data(), x_to.data(), fit);
        }
        for (int64_t s = s0; s < s1; ++s) {
            const int64_t t = reverse ? T - 1 - s : s;
            const int64_t before = reverse ? t + 1 : t - 1;
            const int64_t m = plan.active(rows, t);
            for (int64_t i = 0; i < m; ++i) {
                const int64_t row = rows[i], at = t * B + row;
                const bool fresh = reset != nullptr && reset[at];
                const bool start = before < 0 || before >= plan.length(row);
                const float* h_before = fresh ? zero : start ? f.h0[d] + row * H : outputs + (before * B + row) * stride;
                step.h_before[i] = h_before;
                if constexpr (rounds<Number>) {
                    step.operand[i] = fresh ? zero_operand : operands + (((s + 1) & 1) * n + i) * K;
                    step.operand_after[i] = operands + ((s & 1) * n + i) * K;
                } else {
                    step.operand[i] = h_before;
                    step.operand_after[i] = nullptr;
                }
                step.projected[i] =
                    lookup ? f.table[d] + f.inputs.ids[at] * G * H : projected_row(t, i, s);
                step.h[i] = outputs + at * stride;
                step.tape[i] = f.tape[d] != nullptr ? f.tape[d] + at * tape_gates(C) * H : nullptr;
                if constexpr (C == Cell::lstm) {
                    if (keep_c) {
                        step.c[i] = cells + i * H;
                        step.c_before[i] = fresh ? zero : start ? f.c0[d] + row * H : step.c[i];
                    } else {
                        step.c[i] = f.c[d] + at * H;
                        step.c_before[i] = fresh ? zero : start ? f.c0[d] + row * H : f.c[d] + (before * B + row) * H;
                    }
                }
            }
            step_panels<Number, C>(inputs, recurrent, w.bias_hh, H, range, (s & 1) == 0, step, m, beside ? &later : nullptr);
            if (on_the_way) inputs.rows += m;
            if (plan.by_units && s + 1 < T)
                barrier.wait(index, count, [&] {
                    if (!later.left()) return false;
                    later.advance();
                    return true;
                });
        }
    }

    // The final states, and zeros at padding: of this thread's units.
    const int64_t first = panels.column(range.first, 0), last_unit = std::min(panels.column(range.last, 0), H);
    if (first >= last_unit) return;
    const size_t bytes = static_cast<size_t>(last_unit - first) * 4;
    for (int64_t i = 0; i < n; ++i) {
        const int64_t row = rows[i], length = plan.length(row);
        const int64_t last = reverse ? 0 : length - 1, at = row * H + first;
        std::memcpy(f.h_n[d] + at, length > 0 ? outputs + (last * B + row) * stride + first : f.h0[d] + at, bytes);
        if constexpr (C == Cell::lstm) {
            const float* c = length == 0 ? f.c0[d] + row * H : keep_c ? cells + i * H : f.c[d] + (last * B + row) * H;
            std::memcpy(f.c_n[d] + at, c + first, bytes);
        }
        for (int64_t t = length; t < T; ++t) std::memset(outputs + (t * B + row) * stride + first, 0, bytes);
    }
}

// Packs the weights for one call where that pays: with few rows in all, each weight is used so seldom that it is packed
// on the way. So is W_ih where each of its panels is used once, for the rows of all steps and not beside them.
template <class Number, Cell C>
void forward_layer(const Forward& given, int threads) {
    Forward f = given;
    const Extent& e = f.extent;
    const Plan plan = make_plan(e, C, f.directions, threads);
    const bool lookup = f.inputs.ids != nullptr;
    const bool own = plan.by_units || plan.threads == 1;  // no two threads use the same panel
    const bool once = own && e.T * e.B <= rows_at_hand && !(e.B == 1 && pays_beside<Number>(e));
    Scratch packs[2];
    Shared shared[2];
    Barrier barriers[2];
    const int64_t K = padded<Number>(e.H);
    for (int d = 0; d < f.directions; ++d) {
        if (f.packed[d] == nullptr && e.T * e.B > rows_packed_on_the_way) {
            const int64_t I = lookup || once ? 0 : e.I;
            packs[d] = Scratch(packed_size_of<Number, C>(false, I, e.H));
            shared[d].unpacked = own;
            if (!own) pack_weights<Number, C>(false, I, e.H, f.weights[d], packs[d].data(), plan.threads);
            if (I > 0) shared[d].input = packs[d].data();
            shared[d].recurrent = packs[d].data() + packed_input_size<Number, C>(I, e.H);
        }
        if (!plan.by_units) continue;
        if (rounds<Number>) shared[d].operands = Scratch(static_cast<size_t>(2 * e.B * K) * sizeof(ElementOf<Number>));
        if (C == Cell::lstm && f.c[d] == nullptr) shared[d].cells = Scratch(static_cast<size_t>(e.B * e.H) * 4);
        const bool in_place = f.tape[d] != nullptr || C == Cell::rnn || C == Cell::rnn_relu;
        if (!lookup && !in_place)
            shared[d].projected = Scratch(static_cast<size_t>(steps_at_hand(e.T, e.B) * e.B * gates(C) * e.H) * 4);
    }
    parallel(plan.threads, [&](int index, int count) {
        NoDenormals mode;
        int first = 0, last = f.directions;
        if (plan.by_units && f.directions == 2 && count % 2 == 0) {
            // Half of the threads for each direction: they meet less often.
            count /= 2;
            first = index / count;
            last = first + 1;
            index %= count;
        }
        for (int d = first; d < last; ++d)
            forward_direction<Number, C>(f, d, plan, index, count, barriers[d], shared[d]);
    });
}

// --- backward

// The rows of one step on the way back. Entry i of each array is of the i-th active row; null pointers are zeros.
template <class Number>
struct BackRows {
    const ElementOf<Number>* nothing;                   // the operand of a row that no later step gives anything
    Vector<const ElementOf<Number>*> operand;           // D of the step after, what W_hh was multiplied with
    Vector<const float*> carry_in;                      // [H] what reaches h without a product
    Vector<const float*> d_output, d_c_output;          // [H]
    Vector<const float*> h, h_before, c, c_before;      // [H]
    Vector<const float*> tape;                          // [4H]
    Vector<const float*> d_c_in;                        // [H] lstm
    Vector<float*> d_c_out, carry_out;                  // [H] lstm; gru
    Vector<ElementOf<Number>*> d;                       // [columns of D] out
    Vector<float*> d_exact;                             // [columns of D] out: D before it is rounded; null: not wanted
    Vector<float*> d_sums;                              // [columns of D] in/out: this row's over steps; null: not wanted

    BackRows(size_t n, const ElementOf<Number>* nothing_)
        : nothing(nothing_), operand(n), carry_in(n), d_output(n), d_c_output(n), h(n), h_before(n), c(n), c_before(n),
          tape(n), d_c_in(n), d_c_out(n), carry_out(n), d(n), d_exact(n), d_sums(n) {}
};

// The gradients of a step's sums: rnn [H], lstm [4H] i f g o, gru [4H] n r z and the recurrent candidate's.
template <Cell C>
constexpr int d_gates() {
    return C == Cell::lstm || C == Cell::gru ? 4 : 1;
}

// Asks for what `finish_back_tile` reads of row i: it comes from a tape that went through memory long ago, a few lines here
// and a few there, which a processor cannot foresee.
template <class Number, Cell C>
UNROLLED_INLINE void prefetch_back_row(const Plain& panels, int64_t panel, int64_t H, const BackRows<Number>& rows, int64_t i) {
    for (int v = 0; v < Plain::NV && panels.valid(panel, v) > 0; ++v) {
        const int64_t u = panels.column(panel, v);
        const auto ask = [u](const float* from, int64_t offset = 0) UNROLLED_LAMBDA_INLINE {
            if (from != nullptr) __builtin_prefetch(from + offset + u, 0, 2);
        };
        ask(rows.d_output[i]);
        if constexpr (C == Cell::rnn || C == Cell::rnn_relu) {
            ask(rows.h[i]);
        } else {
            for (int64_t gate = 0; gate < 4; ++gate) ask(rows.tape[i], gate * H);
            if constexpr (C == Cell::lstm) {
                ask(rows.c[i]);
                ask(rows.c_before[i]);
            } else {
                ask(rows.h_before[i]);
            }
        }
    }
}

template <class Number, Cell C, int R>
UNROLLED_INLINE void finish_back_tile(const Sums<R, Plain::NV>& sums, const Plain& panels, int64_t panel, int64_t H,
                                      BackRows<Number>& rows, int64_t first) {
    const vf one = splat(1.0f);
    for (int r = 0; r < R; ++r) {
        const int64_t i = first + r;
        // Not left to a product with zeros, which is NaN where a weight is not finite.
        const bool alone = rows.operand[i] == rows.nothing;
        for (int v = 0; v < Plain::NV; ++v) {
            const int n = panels.valid(panel, v);
            if (n == 0) break;
            const int64_t u = panels.column(panel, v);
            const auto put = [&](int64_t column, vf x) UNROLLED_LAMBDA_INLINE {
                Number::store_lanes(rows.d[i] + column, x, n);
                if constexpr (rounds<Number>)
                    if (rows.d_exact[i] != nullptr) store(rows.d_exact[i] + column, x, n);
                if (float* sums_here = rows.d_sums[i]; sums_here != nullptr)
                    store(sums_here + column, load(sums_here + column, n) + x, n);
            };
            const vf dh = (alone ? splat(0) : sums.of[r][v]) + load_or_zero(rows.carry_in[i], u, n) +
                          load_or_zero(rows.d_output[i], u, n);
            if constexpr (C == Cell::rnn) {
                const vf h = load(rows.h[i] + u, n);
                put(u, dh * (one - h * h));
            } else if constexpr (C == Cell::rnn_relu) {
                const vf h = load(rows.h[i] + u, n);
                put(u, select(h <= splat(0), splat(0), dh));  // as torch: through NaN
            } else if constexpr (C == Cell::lstm) {
                const float* tape = rows.tape[i];
                const vf in = load(tape + u, n), forget = load(tape + H + u, n);
                const vf candidate = load(tape + 2 * H + u, n), out = load(tape + 3 * H + u, n);
                const vf t = tanh(load(rows.c[i] + u, n));
                const vf dc = load_or_zero(rows.d_c_in[i], u, n) + load_or_zero(rows.d_c_output[i], u, n) +
                              dh * out * (one - t * t);
                put(u, dc * candidate * (in * (one - in)));
                put(H + u, dc * load_or_zero(rows.c_before[i], u, n) * (forget * (one - forget)));
                put(2 * H + u, dc * in * (one - candidate * candidate));
                put(3 * H + u, dh * t * (out * (one - out)));
                store(rows.d_c_out[i] + u, dc * forget, n);
            } else {
                const float* tape = rows.tape[i];
                const vf reset = load(tape + u, n), update = load(tape + H + u, n);
                const vf candidate = load(tape + 2 * H + u, n), recurrent = load(tape + 3 * H + u, n);
                const vf through = dh * update;
                const vf dn = (dh - through) * (one - candidate * candidate);
                const vf h_before = load_or_zero(rows.h_before[i], u, n);
                put(u, dn);
                put(H + u, dn * recurrent * (reset * (one - reset)));
                put(2 * H + u, dh * (h_before - candidate) * (update * (one - update)));
                put(3 * H + u, dn * reset);
                store(rows.carry_out[i] + u, through, n);
            }
        }
    }
}

// What the threads of one direction share on the way back: offsets in bytes.
struct BackwardLayout {
    int64_t d_row;                                   // elements of a row of D
    size_t d_bytes, h_bytes, x_bytes;                // D of a piece; its right operands h before and x, packed
    size_t second_d, right_h, right_x;               // D of every other piece: the first one's where there is no other
    int64_t h_pass, x_pass;                          // elements of one pass of a right operand
    size_t first_d, carry, d_cell, zero, zero_bytes;
    size_t sums;                                     // D summed over the steps of a piece, row by row
    size_t exact, total;                             // D of a piece before it was rounded, if that is wanted
};

template <class Number, Cell C>
BackwardLayout backward_layout(const Extent& e, bool lookup, bool exact) {
    const auto round = [](size_t bytes) { return (bytes + 63) / 64 * 64; };
    const size_t element = sizeof(ElementOf<Number>);
    const int64_t steps = std::min(e.block, e.T), K = steps * e.B;
    BackwardLayout l{};
    // One spare element: an odd number of columns is read in pairs.
    l.d_row = (d_gates<C>() * e.H + 1 + 15) / 16 * 16;
    l.d_bytes = round(static_cast<size_t>(std::max<int64_t>(K, 1) * l.d_row) * element);
    l.h_pass = Plain{e.H}.panels() * panel_elements<Number, Plain>(std::min(K, summed_at_once<Number>));
    l.x_pass = lookup ? 0 : Plain{e.I}.panels() * panel_elements<Number, Plain>(std::min(K, summed_at_once<Number>));
    // The last pass takes no more than its own rows.
    l.h_bytes = round(static_cast<size_t>(Plain{e.H}.panels() * panel_elements<Number, Plain>(K)) * element);
    l.x_bytes = lookup ? 0 : round(static_cast<size_t>(Plain{e.I}.panels() * panel_elements<Number, Plain>(K)) * element);
    l.second_d = e.T > e.block ? l.d_bytes : 0;
    l.right_h = l.second_d + l.d_bytes;
    l.right_x = l.right_h + l.h_bytes;
    l.first_d = l.right_x + l.x_bytes;
    l.carry = l.first_d + round(static_cast<size_t>(e.B * l.d_row) * element);
    l.d_cell = l.carry + round(C == Cell::gru ? static_cast<size_t>(e.B * e.H) * 4 : 0);
    l.zero = l.d_cell + round(C == Cell::lstm ? static_cast<size_t>(e.B * e.H) * 4 : 0);
    l.zero_bytes = round(static_cast<size_t>(std::max(l.d_row, std::max(e.I, e.H) + 16)) * 4);
    l.sums = l.zero + l.zero_bytes;
    l.exact = l.sums + round(static_cast<size_t>(std::max<int64_t>(e.B, 1) * l.d_row) * 4);
    l.total = l.exact + (exact ? round(static_cast<size_t>(K * l.d_row) * 4) : 0);
    return l;
}

// Whether D is wanted as it was before it was rounded to be an operand: for the rows of a table, which are sums and no
// products.
template <class Number>
bool wants_exact(const Backward& b, int d) {
    return rounds<Number> && b.d_table[d] != nullptr;
}

// Steps are gone through in pieces of `extent.block`. In each: D of the piece, by rows or by units; then, all threads
// having met, every thread sums its share of the weights' rows over the piece.
template <class Number, Cell C>
void backward_direction(const Backward& b, int d, const Plan& plan, int index, int count, Barrier& barrier,
                        std::byte* shared) {
    using Element = ElementOf<Number>;
    constexpr int G = gates(C), DG = d_gates<C>();
    const auto [T, B, I, H, lengths, resets, block] = b.extent;
    const int64_t stride = b.directions * H;
    const float* const outputs = b.outputs + d * H;
    const bool reverse = b.reverse[d];
    const uint8_t* reset = resets[d];
    const bool lookup = b.inputs.ids != nullptr;
    const Vector<int64_t> rows = plan.rows_of(index, count);
    const int64_t n = static_cast<int64_t>(rows.size());
    const Plain hidden_panels{H}, input_panels{I};
    const auto my_panels = [&](const Plain& panels) {
        return plan.by_units ? share(panels.panels(), index, count) : Range{0, panels.panels()};
    };
    const Range hidden_range = my_panels(hidden_panels), input_range = my_panels(input_panels);

    // Steps count from the first one computed: step s is at time(s).
    const auto time = [&](int64_t s) { return reverse ? T - 1 - s : s; };

    const int64_t KD = G * H;                   // what W_hh or W_ih is multiplied with
    const int64_t hh_offset = C == Cell::gru ? H : 0;  // where W_hh's part of D begins
    Operand<Number> input{nullptr, nullptr, 0, KD}, recurrent{nullptr, nullptr, 0, KD};
    input.packed = lookup ? nullptr : reinterpret_cast<const Element*>(b.packed[d]);
    recurrent.packed = reinterpret_cast<const Element*>(b.packed[d] + (lookup ? 0 : packed_bytes<Number>(input_panels, KD)));

    const bool exact = wants_exact<Number>(b, d);
    const BackwardLayout layout = backward_layout<Number, C>(b.extent, lookup, exact);
    const int64_t D_row = layout.d_row;
    Element* const D[2] = {reinterpret_cast<Element*>(shared), reinterpret_cast<Element*>(shared + layout.second_d)};
    Element* const right_h = reinterpret_cast<Element*>(shared + layout.right_h);
    Element* const right_x = reinterpret_cast<Element*>(shared + layout.right_x);
    Element* const first_d = reinterpret_cast<Element*>(shared + layout.first_d);
    float* const carry = reinterpret_cast<float*>(shared + layout.carry);
    float* const d_cell = reinterpret_cast<float*>(shared + layout.d_cell);
    const Element* const zero = reinterpret_cast<const Element*>(shared + layout.zero);
    const bool biased = b.d_bias_ih[d] != nullptr || b.d_bias_hh[d] != nullptr;
    float* const D_sums = reinterpret_cast<float*>(shared + layout.sums);  // [B][D_row], zero before every piece
    float* const D_exact = exact ? reinterpret_cast<float*>(shared + layout.exact) : nullptr;

    // Where row `row` of step t stands in its piece: the piece's steps in the order of time, rows by number.
    const auto piece_of = [&](int64_t t) { return (reverse ? T - 1 - t : t) / block; };
    struct Place {
        int64_t t, row;
    };
    Vector<Place> places;                      // of the piece in hand
    Vector<int64_t> slots[2];                  // [steps][B] -> place, for two pieces in turn
    const auto list_places = [&](int64_t piece) {
        const int64_t s0 = piece * block, s1 = std::min(s0 + block, T);
        const int64_t t0 = std::min(time(s0), time(s1 - 1));
        Vector<int64_t>& slot = slots[piece & 1];
        slot.assign(static_cast<size_t>((s1 - s0) * B), -1);
        places.clear();
        for (int64_t t = t0; t < t0 + (s1 - s0); ++t)
            for (int64_t row = 0; row < B; ++row)
                if (t < plan.length(row)) {
                    slot[static_cast<size_t>((t - t0) * B + row)] = static_cast<int64_t>(places.size());
                    places.push_back({t, row});
                }
        return t0;
    };
    int64_t piece_start[2] = {0, 0};
    const auto slot_of = [&](int64_t t, int64_t row) {
        const int64_t parity = piece_of(t) & 1;
        return slots[parity][static_cast<size_t>((t - piece_start[parity]) * B + row)];
    };
    const auto d_of = [&](int64_t t, int64_t row) { return D[piece_of(t) & 1] + slot_of(t, row) * D_row; };
    const auto active_at = [&](int64_t t, int64_t row) { return t >= 0 && t < plan.length(row); };
    const auto is_reset = [&](int64_t t, int64_t row) { return reset != nullptr && reset[t * B + row] != 0; };
    const auto h_before_of = [&](int64_t t, int64_t row) -> const float* {
        const int64_t before = reverse ? t + 1 : t - 1;
        if (is_reset(t, row)) return nullptr;
        return active_at(before, row) ? outputs + (before * B + row) * stride : b.h0[d] + row * H;
    };

    // The share of the weights' rows: rows of W are columns of D, cut where D's order differs from W's.
    const Range columns = share(DG * H, index, count);
    Vector<const Element*> left;  // rows of D, and where their products go
    Vector<float*> to_rows;
    Scratch buffer(static_cast<size_t>(summed_at_once<Number> * left_columns) * sizeof(Element));

    BackRows<Number> step(static_cast<size_t>(n), zero);
    const int64_t pieces = (T + block - 1) / block;
    for (int64_t piece = pieces - 1; piece >= 0; --piece) {
        const int64_t s0 = piece * block, s1 = std::min(s0 + block, T);
        piece_start[piece & 1] = list_places(piece);
        const int64_t K = static_cast<int64_t>(places.size());

        // Packed now, since it needs nothing of this piece's D.
        const Element* const zero_row = zero;
        if (b.d_hh[d] != nullptr)
            pack_right<Number>(H, K, [&](int64_t k) {
                const float* h = h_before_of(places[k].t, places[k].row);
                return h != nullptr ? h : reinterpret_cast<const float*>(zero_row);
            }, right_h, layout.h_pass, index, count);
        if (b.d_ih[d] != nullptr && !lookup)
            pack_right<Number>(I, K, [&](int64_t k) {
                return b.inputs.x + places[k].t * b.inputs.step + places[k].row * b.inputs.row;
            }, right_x, layout.x_pass, index, count);

        for (int64_t s = s1 - 1; s >= s0; --s) {
            const int64_t t = time(s), after = reverse ? t - 1 : t + 1;
            const int64_t m = plan.active(rows, t);
            for (int64_t i = 0; i < m; ++i) {
                const int64_t row = rows[i], at = t * B + row;
                const bool last = !active_at(after, row);
                const bool cut = !last && is_reset(after, row);
                step.operand[i] = last || cut ? zero : d_of(after, row) + hh_offset;
                step.carry_in[i] = last ? (b.d_h_n[d] ? b.d_h_n[d] + row * H : nullptr)
                                   : C == Cell::gru && !cut ? carry + row * H
                                                            : nullptr;
                step.d_output[i] = b.d_outputs ? b.d_outputs + t * b.d_step + row * b.d_row + d * H : nullptr;
                step.h[i] = outputs + at * stride;
                step.h_before[i] = h_before_of(t, row);
                step.d[i] = d_of(t, row);
                step.d_sums[i] = biased ? D_sums + row * D_row : nullptr;
                step.d_exact[i] = exact ? D_exact + slot_of(t, row) * D_row : nullptr;
                if constexpr (C == Cell::gru) step.carry_out[i] = carry + row * H;
                if constexpr (C == Cell::lstm || C == Cell::gru) step.tape[i] = b.tape[d] + at * tape_gates(C) * H;
                if constexpr (C == Cell::lstm) {
                    const int64_t before = reverse ? t + 1 : t - 1;
                    step.c[i] = b.c[d] + at * H;
                    step.c_before[i] = is_reset(t, row)         ? nullptr
                                       : active_at(before, row) ? b.c[d] + (before * B + row) * H
                                                                : b.c0[d] + row * H;
                    step.d_c_output[i] = b.d_c[d] ? b.d_c[d] + at * H : nullptr;
                    step.d_c_in[i] = last  ? (b.d_c_n[d] ? b.d_c_n[d] + row * H : nullptr)
                                     : cut ? nullptr
                                           : d_cell + row * H;
                    step.d_c_out[i] = d_cell + row * H;
                }
            }
            for (int64_t q = hidden_range.first; q < hidden_range.last; ++q) {
                const int64_t p = (s & 1) ? hidden_range.first + hidden_range.last - 1 - q : q;
                each_tile<max_rows(Plain::NV)>(m, [&](auto tile_rows, int64_t first) UNROLLED_LAMBDA_INLINE {
                    constexpr int R = decltype(tile_rows)::value;
                    Sums<R, Plain::NV> sums;
                    start<R>(sums, hidden_panels, p, nullptr);
                    multiply_panel<Number, R>(sums, hidden_panels, p, recurrent, step.operand.data() + first,
                                              [&](int r) UNROLLED_LAMBDA_INLINE {
                                                  prefetch_back_row<Number, C>(hidden_panels, p, H, step, first + r);
                                              });
                    finish_back_tile<Number, C, R>(sums, hidden_panels, p, H, step, first);
                });
            }
            if (plan.by_units) barrier.wait(count);
            // The first computed step's D outlives its piece: d(h0) comes from it.
            if (!plan.by_units || index == 0)
                for (int64_t i = 0; i < m; ++i) {
                    const int64_t before = reverse ? t + 1 : t - 1;
                    if (!active_at(before, rows[i]))
                        std::memcpy(first_d + rows[i] * D_row, step.d[i], static_cast<size_t>(D_row) * sizeof(Element));
                }
        }
        barrier.wait(count);

        if (b.d_x != nullptr) {
            left.clear();
            to_rows.clear();
            for (int64_t s = s0; s < s1; ++s) {
                const int64_t t = time(s);
                for (int64_t i = 0, m = plan.active(rows, t); i < m; ++i) {
                    left.push_back(d_of(t, rows[i]));
                    to_rows.push_back(b.d_x + (t * B + rows[i]) * I);
                }
            }
            product<Number>(input_panels, input_range, input, nullptr, left.data(), to_rows.data(),
                            static_cast<int64_t>(left.size()), d > 0);
        }

        left.resize(static_cast<size_t>(K));
        for (int64_t k = 0; k < K; ++k) left[k] = D[piece & 1] + k * D_row;
        const auto sum_weight = [&](int64_t from, int64_t to, int64_t shift, const Element* right, int64_t pass,
                                    int64_t N, float* into) {
            from = std::max(from, columns.first);
            to = std::min(to, columns.last);
            if (from < to) product_over_steps<Number>(left.data(), K, from, to, right, pass, N, into, shift, buffer.as<Element>());
        };
        // Gradients of the biases: D summed over the steps, which was done row by row on the way, and over the rows, here.
        // Not from D itself: it is far away by now, and rounded.
        if (biased)
            for (int64_t row = 1; row < B; ++row)
                for (int64_t m = columns.first; m < columns.last; m += L) {
                    const int lanes = static_cast<int>(std::min<int64_t>(L, columns.last - m));
                    float* const part = D_sums + row * D_row + m;
                    store(D_sums + m, load(D_sums + m, lanes) + load(part, lanes), lanes);
                    store(part, splat(0), lanes);
                }
        const auto add_bias = [&](int64_t from, int64_t to, int64_t shift, float* into) {
            from = std::max(from, columns.first);
            to = std::min(to, columns.last);
            for (int64_t m = from; m < to; ++m) into[m + shift] += D_sums[m];
        };
        const auto sum_table = [&](int64_t from, int64_t to, int64_t shift) {
            from = std::max(from, columns.first);
            to = std::min(to, columns.last);
            for (int64_t k = 0; k < K && from < to; ++k) {
                float* into = b.d_table[d] + b.inputs.ids[places[k].t * B + places[k].row] * G * H + shift;
                for (int64_t m = from; m < to; m += L) {
                    const int lanes = static_cast<int>(std::min<int64_t>(L, to - m));
                    vf summand;
                    if constexpr (rounds<Number>) summand = load(D_exact + k * D_row + m, lanes);
                    else summand = load(left[k] + m, lanes);
                    store(into + m, load(into + m, lanes) + summand, lanes);
                }
            }
        };
        constexpr bool gru = C == Cell::gru;
        // Of D's columns: W_ih's rows [0, G*H) or, for the gru, n then r z; W_hh's are those from hh_offset on.
        if (b.d_hh[d]) sum_weight(hh_offset, hh_offset + KD, -hh_offset, right_h, layout.h_pass, H, b.d_hh[d]);
        if (b.d_bias_hh[d]) add_bias(hh_offset, hh_offset + KD, -hh_offset, b.d_bias_hh[d]);
        for (int part = 0; part < (gru ? 2 : 1); ++part) {
            const int64_t from = part * H, to = gru ? (part == 0 ? H : 3 * H) : KD;
            const int64_t shift = gru ? (part == 0 ? 2 * H : -H) : 0;
            if (b.d_ih[d] && !lookup) sum_weight(from, to, shift, right_x, layout.x_pass, I, b.d_ih[d]);
            if (b.d_bias_ih[d] && !lookup) add_bias(from, to, shift, b.d_bias_ih[d]);
            if (b.d_table[d] && lookup) sum_table(from, to, shift);
        }
        if (biased) std::fill(D_sums + columns.first, D_sums + columns.last, 0.0f);
        barrier.wait(count);
    }

    // What reaches the initial states.
    left.clear();
    to_rows.clear();
    for (const int64_t row : rows) {
        const int64_t length = plan.length(row);
        const bool empty = length == 0, cut = !empty && is_reset(reverse ? length - 1 : 0, row);
        float* const d_h0 = b.d_h0[d] + row * H;
        const float* direct = empty ? (b.d_h_n[d] ? b.d_h_n[d] + row * H : nullptr)
                              : C == Cell::gru && !cut ? carry + row * H
                                                       : nullptr;
        const float* cell = empty ? (b.d_c_n[d] ? b.d_c_n[d] + row * H : nullptr) : cut ? nullptr : d_cell + row * H;
        for (int64_t p = hidden_range.first; p < hidden_range.last; ++p)
            for (int v = 0; v < Plain::NV; ++v) {
                const int lanes = hidden_panels.valid(p, v);
                if (lanes == 0) break;
                const int64_t u = hidden_panels.column(p, v);
                store(d_h0 + u, load_or_zero(direct, u, lanes), lanes);
                if constexpr (C == Cell::lstm) store(b.d_c0[d] + row * H + u, load_or_zero(cell, u, lanes), lanes);
            }
        if (empty || cut) continue;
        left.push_back(first_d + row * D_row + hh_offset);
        to_rows.push_back(d_h0);
    }
    product<Number>(hidden_panels, hidden_range, recurrent, nullptr, left.data(), to_rows.data(),
                    static_cast<int64_t>(left.size()), true);
}

template <class Number, Cell C>
void backward_layer(const Backward& given, int threads) {
    Backward b = given;
    const Extent& e = b.extent;
    const bool lookup = b.inputs.ids != nullptr;
    const Plan plan = make_plan(e, C, 3 * b.directions, threads);
    Scratch packs[2], shared[2];
    for (int d = 0; d < b.directions; ++d) {
        const BackwardLayout layout = backward_layout<Number, C>(e, lookup, wants_exact<Number>(b, d));
        const int64_t I = lookup ? 0 : e.I;
        if (b.packed[d] == nullptr) {
            packs[d] = Scratch(packed_size_of<Number, C>(true, I, e.H));
            pack_weights<Number, C>(true, I, e.H, b.weights[d], packs[d].data(), plan.threads);
            b.packed[d] = packs[d].data();
        }
        shared[d] = Scratch(layout.total);
        std::memset(shared[d].data() + layout.zero, 0, layout.exact - layout.zero);  // and the sums
        // The spare elements at the end of D's rows.
        const int64_t columns = d_gates<C>() * e.H;
        for (int64_t k = 0; k < std::min(e.block, e.T) * e.B; ++k)
            for (const size_t base : {size_t{0}, layout.second_d}) {
                auto* row = shared[d].template as<ElementOf<Number>>(base) + k * layout.d_row;
                std::fill(row + columns, row + layout.d_row, ElementOf<Number>{});
            }
    }
    Barrier barrier;
    parallel(plan.threads, [&](int index, int count) {
        NoDenormals mode;
        if (b.d_x != nullptr && e.lengths != nullptr) {
            const Range rows = share(e.B, index, count);
            for (int64_t row = rows.first; row < rows.last; ++row)
                for (int64_t t = plan.length(row); t < e.T; ++t)
                    std::memset(b.d_x + (t * e.B + row) * e.I, 0, static_cast<size_t>(e.I) * 4);
        }
        for (int d = 0; d < b.directions; ++d)
            backward_direction<Number, C>(b, d, plan, index, count, barrier, shared[d].data());
    });
}

}  // namespace
}  // namespace unrolled::UNROLLED_ISA
