// What the module's functions on layers are given, read and checked.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "kernels.h"
#include "memory.h"
#include "tensor_view.h"

namespace unrolled {

using Views = std::vector<const TensorView*>;

[[noreturn]] inline void refuse(const std::string& message) { throw nb::value_error(message.c_str()); }

inline Cell cell_of(int number) {
    if (number < 0 || number > 3) refuse("cell: expected 0 (rnn), 1 (rnn_relu), 2 (lstm) or 3 (gru), got " + std::to_string(number));
    return static_cast<Cell>(number);
}

inline void expect_threads(int threads) {
    if (threads < 1 || threads > 1024) refuse("threads: expected 1..1024, got " + std::to_string(threads));
}

// Packed weights of one direction or of a linear layer: a copy, which the caller keeps only where it says so.
struct Pack {
    Scratch memory;
    const Kernels* kernels;
    bool linear, bf16, backward;
    Cell cell;
    int64_t I, H;  // linear: K, N
};

// --- arguments that come once for each direction

struct Direction {
    TensorView ih, hh, bias_ih, bias_hh, table, h0, c0, reset;

    // (ih, hh, bias_ih, bias_hh, table, h0, c0, reset)
    explicit Direction(nb::tuple t)
        : ih(t[0], "weight_ih"), hh(t[1], "weight_hh"), bias_ih(t[2], "bias_ih"), bias_hh(t[3], "bias_hh"),
          table(t[4], "table"), h0(t[5], "h_0"), c0(t[6], "c_0"), reset(t[7], "reset") {}

    Direction(TensorView ih_, TensorView hh_, TensorView bias_ih_, TensorView bias_hh_, TensorView h0_, TensorView c0_)
        : ih(std::move(ih_)), hh(std::move(hh_)), bias_ih(std::move(bias_ih_)), bias_hh(std::move(bias_hh_)),
          table(nb::none(), "table"), h0(std::move(h0_)), c0(std::move(c0_)), reset(nb::none(), "reset") {}
};

using Packs = std::vector<std::optional<const Pack*>>;

inline std::vector<Direction> read_directions(const std::vector<nb::tuple>& tuples) {
    std::vector<Direction> each;
    for (const nb::tuple& t : tuples) {
        if (nb::len(t) != 8) refuse("directions: expected tuples of 8, got " + std::to_string(nb::len(t)));
        each.emplace_back(t);
    }
    return each;
}

// What forward and backward are both given, checked.
struct Given {
    Cell cell;
    bool bf16;
    int directions;
    bool reverse[2] = {};
    TensorView x, ids, lengths;
    std::vector<Direction> each;
    Extent extent{};
    Inputs inputs{};
    Weights weights[2] = {};
    Packed packed[2] = {};
    Views read;

    Given(int cell_number, bool bf16_, const std::vector<bool>& reverses, TensorView x_, TensorView ids_, TensorView lengths_,
          std::vector<Direction> directions_, const Packs& packs, bool backward, int64_t block)
        : cell(cell_of(cell_number)), bf16(bf16_), directions(static_cast<int>(directions_.size())), x(std::move(x_)),
          ids(std::move(ids_)), lengths(std::move(lengths_)), each(std::move(directions_)) {
        if (directions < 1 || directions > 2) refuse("directions: expected 1 or 2, got " + std::to_string(directions));
        if (reverses.size() != each.size()) refuse("reverse: expected one value for each direction");
        if (x.given() == ids.given()) refuse("expected either x or ids");
        if (block < 1) refuse("block: expected at least 1 step, got " + std::to_string(block));
        const int64_t G = gates(cell);
        Direction& one = each[0];
        one.hh.expect(Kind::float32, {-1, -1});
        const int64_t H = one.hh.size(1);
        if (H < 1) refuse("weight_hh: expected at least one hidden unit");
        int64_t T, B, I = 0, V = 0;
        if (x.given()) {
            x.expect(Kind::float32, {-1, -1, -1}).expect_last_contiguous();
            T = x.size(0), B = x.size(1), I = x.size(2);
            if (I < 1) refuse("x: expected at least one input");
        } else {
            ids.expect(Kind::int64, {-1, -1}).expect_contiguous();
            T = ids.size(0), B = ids.size(1);
            one.table.expect(Kind::float32, {-1, G * H});
            V = one.table.size(0);
        }
        if (lengths.given()) {
            lengths.expect(Kind::int64, {B}).expect_contiguous();
            for (int64_t b = 0; b < B; ++b)
                if (const int64_t n = lengths.as<int64_t>()[b]; n < 0 || n > T)
                    refuse("lengths: expected 0.." + std::to_string(T) + " (the number of steps), got " + std::to_string(n));
        }
        if (ids.given()) {
            const int64_t* id = ids.as<int64_t>();
            for (int64_t t = 0; t < T; ++t)
                for (int64_t b = 0; b < B; ++b)
                    if (!lengths.given() || t < lengths.as<int64_t>()[b])
                        if (const int64_t i = id[t * B + b]; i < 0 || i >= V)
                            refuse("ids: expected 0.." + std::to_string(V - 1) + " (rows of the table), got " + std::to_string(i));
        }
        extent = {T, B, I, H, lengths.given() ? lengths.as<int64_t>() : nullptr, {nullptr, nullptr},
                  std::min(block, std::max<int64_t>(T, 1))};
        inputs = {x.given() ? x.as<float>() : nullptr, x.given() ? x.stride(0) : 0, x.given() ? x.stride(1) : 0,
                  ids.given() ? ids.as<int64_t>() : nullptr, V};
        read.reserve(3 + 8 * 2);
        for (const TensorView* view : {&x, &ids, &lengths}) read.push_back(view);
        for (int d = 0; d < directions; ++d) {
            Direction& g = each[d];
            reverse[d] = reverses[d];
            g.hh.expect(Kind::float32, {G * H, H}).expect_contiguous();
            if (x.given()) g.ih.expect(Kind::float32, {G * H, I}).expect_contiguous();
            else g.table.expect(Kind::float32, {V, G * H}).expect_contiguous();
            for (TensorView* bias : {&g.bias_ih, &g.bias_hh})
                if (bias->given()) bias->expect(Kind::float32, {G * H}).expect_contiguous();
            g.h0.expect(Kind::float32, {B, H}).expect_contiguous();
            if (cell == Cell::lstm) g.c0.expect(Kind::float32, {B, H}).expect_contiguous();
            if (g.reset.given()) {
                g.reset.expect(Kind::boolean, {T, B}).expect_contiguous();
                extent.reset[d] = g.reset.as<uint8_t>();
            }
            weights[d] = {x.given() ? g.ih.as<float>() : nullptr, g.hh.as<float>(),
                          g.bias_ih.given() ? g.bias_ih.as<float>() : nullptr,
                          g.bias_hh.given() ? g.bias_hh.as<float>() : nullptr};
            for (TensorView* view : {&g.ih, &g.hh, &g.bias_ih, &g.bias_hh, &g.table, &g.h0, &g.c0, &g.reset}) read.push_back(view);
            if (static_cast<size_t>(d) < packs.size() && packs[d]) {
                const Pack& p = **packs[d];
                if (p.linear || p.kernels != &kernels() || p.bf16 != bf16 || p.backward != backward || p.cell != cell ||
                    p.I != I || p.H != H)
                    refuse("packs: expected a pack of these weights, got one of another cell, size, precision or instruction set");
                packed[d] = p.memory.data();
            }
        }
    }

    const float* h0(int d) const { return each[d].h0.as<float>(); }
    const float* c0(int d) const { return cell == Cell::lstm ? each[d].c0.as<float>() : nullptr; }
    const float* table(int d) const { return ids.given() ? each[d].table.as<float>() : nullptr; }
    int64_t G() const { return gates(cell); }
};

// Defines `stack` and `call`, see stack.cc.
void bind_stack(nb::module_& m);

}  // namespace unrolled
