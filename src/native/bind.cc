// The Python module `unrolled._native`: every argument is checked here, then the kernels are called without the GIL.
// No arithmetic.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <vector>

#include "kernels.h"
#include "memory.h"
#include "tensor_view.h"
#include "threads.h"

namespace unrolled {
namespace {

using Views = std::vector<const TensorView*>;

[[noreturn]] void refuse(const std::string& message) { throw nb::value_error(message.c_str()); }

Cell cell_of(int number) {
    if (number < 0 || number > 3) refuse("cell: expected 0 (rnn), 1 (rnn_relu), 2 (lstm) or 3 (gru), got " + std::to_string(number));
    return static_cast<Cell>(number);
}

void expect_threads(int threads) {
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

    Direction(nb::handle ih_, nb::handle hh_, nb::handle bias_ih_, nb::handle bias_hh_, TensorView h0_, TensorView c0_)
        : ih(ih_, "weight_ih"), hh(hh_, "weight_hh"), bias_ih(bias_ih_, "bias_ih"), bias_hh(bias_hh_, "bias_hh"),
          table(nb::none(), "table"), h0(std::move(h0_)), c0(std::move(c0_)), reset(nb::none(), "reset") {}
};

using Packs = std::vector<std::optional<const Pack*>>;

std::vector<Direction> read_directions(const std::vector<nb::tuple>& tuples) {
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
        read = {&x, &ids, &lengths};
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

// Views of the entries of a tuple, all there from the start so that pointers to them stay good.
template <size_t N>
std::array<TensorView, N> views(const nb::tuple& t, const std::array<const char*, N>& names) {
    if (nb::len(t) != N) refuse("results: expected tuples of " + std::to_string(N) + ", got " + std::to_string(nb::len(t)));
    return [&]<size_t... I>(std::index_sequence<I...>) {
        return std::array<TensorView, N>{TensorView(t[I], names[I])...};
    }(std::make_index_sequence<N>{});
}

float* optional_out(const TensorView& view, std::initializer_list<int64_t> shape) {
    if (!view.given()) return nullptr;
    return view.expect(Kind::float32, shape).expect_contiguous().as<float>();
}

void forward(int cell, bool bf16, const std::vector<bool>& reverse, nb::handle x, nb::handle ids, nb::handle lengths,
             const std::vector<nb::tuple>& directions, const Packs& packs,
             nb::handle outputs_, const std::vector<nb::tuple>& results, int threads) {
    expect_threads(threads);
    const Given given(cell, bf16, reverse, {x, "x"}, {ids, "ids"}, {lengths, "lengths"}, read_directions(directions), packs,
                      false, 1);
    const auto [T, B, I, H, lengths_, reset_, block_] = given.extent;
    Forward f{};
    f.cell = given.cell, f.bf16 = bf16, f.directions = given.directions, f.extent = given.extent, f.inputs = given.inputs;
    const TensorView outputs(outputs_, "outputs");
    outputs.expect(Kind::float32, {T, B, f.directions * H}).expect_contiguous();
    f.outputs = outputs.as<float>();
    Views written{&outputs};
    if (results.size() != directions.size()) refuse("results: expected one tuple for each direction");
    std::vector<std::array<TensorView, 4>> kept;
    kept.reserve(2);
    for (int d = 0; d < f.directions; ++d) {
        f.reverse[d] = given.reverse[d];
        f.weights[d] = given.weights[d], f.packed[d] = given.packed[d];
        f.table[d] = given.table(d), f.h0[d] = given.h0(d), f.c0[d] = given.c0(d);
        kept.push_back(views<4>(results[d], {"h_n", "c_n", "tape", "c"}));
        const auto& [h_n, c_n, tape, c] = kept.back();
        const bool lstm = f.cell == Cell::lstm;
        f.h_n[d] = h_n.expect(Kind::float32, {B, H}).expect_contiguous().as<float>();
        if (lstm) f.c_n[d] = c_n.expect(Kind::float32, {B, H}).expect_contiguous().as<float>();
        if (tape_gates(f.cell) > 0) f.tape[d] = optional_out(tape, {T, B, tape_gates(f.cell) * H});
        if (lstm) f.c[d] = optional_out(c, {T, B, H});
        if (f.tape[d] != nullptr && lstm && f.c[d] == nullptr) refuse("c: expected a tensor beside the tape, got None");
        for (const TensorView& view : kept.back()) written.push_back(&view);
    }
    expect_apart(written, given.read);
    nb::gil_scoped_release unlocked;
    kernels().forward(f, threads);
}

// A stack of layers on a dense batch, for inference: what `forward` would do layer by layer, in one call, since for a single
// step the ways between Python and here take longer than the arithmetic.
// weights: two or four (`bias`) for each direction; h0, c0, h, c [layers*D B H].
void stack(int cell, bool bf16, bool both, bool bias, nb::handle x_, const nb::sequence& weights, nb::handle h0_,
           nb::handle c0_, nb::handle outputs_, nb::handle h_, nb::handle c_, const Packs& packs, int threads) {
    expect_threads(threads);
    const int64_t directions = both ? 2 : 1, each = bias ? 4 : 2;
    TensorView x(x_, "x");
    const TensorView h0(h0_, "h_0"), c0(c0_, "c_0"), outputs(outputs_, "outputs"), h(h_, "h_n"), c(c_, "c_n");
    x.expect(Kind::float32, {-1, -1, -1}).expect_last_contiguous();
    const int64_t T = x.size(0), B = x.size(1);
    h0.expect(Kind::float32, {-1, B, -1}).expect_contiguous();
    const int64_t count = h0.size(0), H = h0.size(2);
    const bool lstm = cell_of(cell) == Cell::lstm;
    h.expect(Kind::float32, {count, B, H}).expect_contiguous();
    if (lstm) {
        c0.expect(Kind::float32, {count, B, H}).expect_contiguous();
        c.expect(Kind::float32, {count, B, H}).expect_contiguous();
    }
    outputs.expect(Kind::float32, {T, B, directions * H}).expect_contiguous();
    const nb::list list(weights);
    if (count < 1 || count % directions != 0 || static_cast<int64_t>(nb::len(list)) != count * each)
        refuse("weights: expected " + std::to_string(count * each) + " tensors, got " + std::to_string(nb::len(list)));
    if (!packs.empty() && static_cast<int64_t>(packs.size()) != count) refuse("packs: expected one for each direction");
    expect_apart({&outputs, &h, &c}, {&x, &h0, &c0});
    const std::vector<bool> reverse = both ? std::vector<bool>{false, true} : std::vector<bool>{false};
    Scratch between[2];  // outputs of the layers below the last one, in turn
    for (int64_t k = 0; k < count; k += directions) {
        std::vector<Direction> ways;
        Packs own;
        for (int64_t d = k; d < k + directions; ++d) {
            const auto weight = [&](int64_t i) { return i < each ? nb::handle(list[static_cast<size_t>(d * each + i)]) : nb::none(); };
            // Only an LSTM has a c_0; what another cell is given has not been looked at.
            TensorView first = lstm ? c0.part(d) : TensorView(nb::none(), "c_0");
            ways.emplace_back(weight(0), weight(1), weight(2), weight(3), h0.part(d), std::move(first));
            if (!packs.empty()) own.push_back(packs[static_cast<size_t>(d)]);
        }
        const Given given(cell, bf16, reverse, x, {nb::none(), "ids"}, {nb::none(), "lengths"}, std::move(ways), own, false, 1);
        Forward f{};
        f.cell = given.cell, f.bf16 = bf16, f.directions = given.directions, f.extent = given.extent, f.inputs = given.inputs;
        if (f.extent.H != H) refuse("weight_hh: expected " + std::to_string(H) + " hidden units, as h_0 has");
        const bool last = k + directions == count;
        Scratch& mine = between[(k / directions) & 1];
        if (!last) mine = Scratch(static_cast<size_t>(T * B * directions * H) * 4);
        f.outputs = last ? outputs.as<float>() : mine.as<float>();
        for (int d = 0; d < f.directions; ++d) {
            f.reverse[d] = given.reverse[d];
            f.weights[d] = given.weights[d], f.packed[d] = given.packed[d];
            f.h0[d] = given.h0(d), f.c0[d] = given.c0(d);
            f.h_n[d] = h.as<float>() + (k + d) * B * H;
            f.c_n[d] = lstm ? c.as<float>() + (k + d) * B * H : nullptr;
        }
        expect_apart({&outputs, &h, &c}, given.read);
        {
            nb::gil_scoped_release unlocked;
            kernels().forward(f, threads);
        }
        if (!last) x = TensorView(f.outputs, T, B, directions * H, "x");
    }
}

void backward(int cell, bool bf16, const std::vector<bool>& reverse, nb::handle x, nb::handle ids, nb::handle lengths,
              const std::vector<nb::tuple>& directions, const Packs& packs,
              nb::handle outputs_, const std::vector<nb::tuple>& tapes, nb::handle d_outputs_,
              const std::vector<nb::tuple>& d_states, nb::handle d_x_, const std::vector<nb::tuple>& results, int64_t block,
              int threads) {
    expect_threads(threads);
    const Given given(cell, bf16, reverse, {x, "x"}, {ids, "ids"}, {lengths, "lengths"}, read_directions(directions), packs,
                      true, block);
    const auto [T, B, I, H, lengths_, reset_, block_] = given.extent;
    const int64_t G = given.G(), V = given.inputs.symbols;
    Backward b{};
    b.cell = given.cell, b.bf16 = bf16, b.directions = given.directions, b.extent = given.extent, b.inputs = given.inputs;
    const TensorView outputs(outputs_, "outputs"), d_outputs(d_outputs_, "d_outputs"), d_x(d_x_, "d_x");
    b.outputs = outputs.expect(Kind::float32, {T, B, b.directions * H}).expect_contiguous().as<float>();
    if (d_outputs.given()) {
        b.d_outputs = d_outputs.expect(Kind::float32, {T, B, b.directions * H}).expect_last_contiguous().as<float>();
        b.d_step = d_outputs.stride(0), b.d_row = d_outputs.stride(1);
    }
    if (given.x.given()) b.d_x = optional_out(d_x, {T, B, I});
    Views written{&d_x}, read = given.read;
    read.push_back(&outputs);
    read.push_back(&d_outputs);
    for (const auto* list : {&tapes, &d_states, &results})
        if (list->size() != directions.size()) refuse("tapes, d_states, results: expected one tuple for each direction");
    std::vector<std::array<TensorView, 2>> kept;
    std::vector<std::array<TensorView, 3>> d_kept;
    std::vector<std::array<TensorView, 7>> wanted;
    kept.reserve(2), d_kept.reserve(2), wanted.reserve(2);
    const bool lstm = b.cell == Cell::lstm;
    for (int d = 0; d < b.directions; ++d) {
        b.reverse[d] = given.reverse[d];
        b.weights[d] = given.weights[d], b.packed[d] = given.packed[d];
        b.h0[d] = given.h0(d), b.c0[d] = given.c0(d);
        kept.push_back(views<2>(tapes[d], {"tape", "c"}));
        if (tape_gates(b.cell) > 0)
            b.tape[d] = kept.back()[0].expect(Kind::float32, {T, B, tape_gates(b.cell) * H}).expect_contiguous().as<float>();
        if (lstm) b.c[d] = kept.back()[1].expect(Kind::float32, {T, B, H}).expect_contiguous().as<float>();
        d_kept.push_back(views<3>(d_states[d], {"d_h_n", "d_c_n", "d_c"}));
        b.d_h_n[d] = optional_out(d_kept.back()[0], {B, H});
        if (lstm) {
            b.d_c_n[d] = optional_out(d_kept.back()[1], {B, H});
            b.d_c[d] = optional_out(d_kept.back()[2], {T, B, H});
        }
        wanted.push_back(views<7>(results[d], {"d_h0", "d_c0", "d_weight_ih", "d_weight_hh", "d_bias_ih", "d_bias_hh", "d_table"}));
        const auto& [d_h0, d_c0, d_ih, d_hh, d_bias_ih, d_bias_hh, d_table] = wanted.back();
        b.d_h0[d] = d_h0.expect(Kind::float32, {B, H}).expect_contiguous().as<float>();
        if (lstm) b.d_c0[d] = d_c0.expect(Kind::float32, {B, H}).expect_contiguous().as<float>();
        if (given.x.given()) b.d_ih[d] = optional_out(d_ih, {G * H, I});
        b.d_hh[d] = optional_out(d_hh, {G * H, H});
        if (given.x.given()) b.d_bias_ih[d] = optional_out(d_bias_ih, {G * H});
        b.d_bias_hh[d] = optional_out(d_bias_hh, {G * H});
        if (given.ids.given()) b.d_table[d] = optional_out(d_table, {V, G * H});
        for (const auto& view : kept.back()) read.push_back(&view);
        for (const auto& view : d_kept.back()) read.push_back(&view);
        for (const auto& view : wanted.back()) written.push_back(&view);
    }
    expect_apart(written, read);
    nb::gil_scoped_release unlocked;
    kernels().backward(b, threads);
}

Pack* pack(int cell, bool bf16, bool backward, nb::handle ih_, nb::handle hh_, int threads) {
    expect_threads(threads);
    const Cell c = cell_of(cell);
    const TensorView ih(ih_, "weight_ih"), hh(hh_, "weight_hh");
    hh.expect(Kind::float32, {-1, -1});
    const int64_t H = hh.size(1), G = gates(c);
    if (H < 1) refuse("weight_hh: expected at least one hidden unit");
    hh.expect(Kind::float32, {G * H, H}).expect_contiguous();
    int64_t I = 0;
    if (ih.given()) {
        ih.expect(Kind::float32, {G * H, -1}).expect_contiguous();
        I = ih.size(1);
    }
    const Kernels& k = kernels();
    auto made = new Pack{Scratch(k.packed_size(c, bf16, backward, I, H)), &k, false, bf16, backward, c, I, H};
    const Weights w{ih.given() ? ih.as<float>() : nullptr, hh.as<float>(), nullptr, nullptr};
    nb::gil_scoped_release unlocked;
    k.pack(c, bf16, backward, I, H, w, made->memory.data(), threads);
    return made;
}

Pack* pack_linear(bool bf16, nb::handle weight_, int threads) {
    expect_threads(threads);
    const TensorView weight(weight_, "weight");
    weight.expect(Kind::float32, {-1, -1}).expect_contiguous();
    const int64_t N = weight.size(0), K = weight.size(1);
    const Kernels& k = kernels();
    auto made = new Pack{Scratch(k.packed_linear_size(bf16, N, K)), &k, true, bf16, false, Cell::rnn, K, N};
    nb::gil_scoped_release unlocked;
    k.pack_linear(bf16, N, K, weight.as<float>(), made->memory.data(), threads);
    return made;
}

Packed linear_pack(const std::optional<const Pack*>& given, bool bf16, int64_t N, int64_t K) {
    if (!given) return nullptr;
    const Pack& p = **given;
    if (!p.linear || p.kernels != &kernels() || p.bf16 != bf16 || p.I != K || p.H != N)
        refuse("pack: expected a pack of this linear layer, got one of another size, precision or instruction set");
    return p.memory.data();
}

void linear(bool bf16, nb::handle x_, nb::handle weight_, nb::handle bias_, std::optional<const Pack*> given, nb::handle y_,
            int threads) {
    expect_threads(threads);
    const TensorView x(x_, "x"), weight(weight_, "weight"), bias(bias_, "bias"), y(y_, "y");
    x.expect(Kind::float32, {-1, -1}).expect_last_contiguous();
    const int64_t M = x.size(0), K = x.size(1);
    weight.expect(Kind::float32, {-1, K}).expect_contiguous();
    const int64_t N = weight.size(0);
    if (bias.given()) bias.expect(Kind::float32, {N}).expect_contiguous();
    y.expect(Kind::float32, {M, N}).expect_contiguous();
    expect_apart({&y}, {&x, &weight, &bias});
    const Linear l{bf16, M, N, K, x.as<float>(), x.stride(0), weight.as<float>(), bias.given() ? bias.as<float>() : nullptr,
                   linear_pack(given, bf16, N, K), y.as<float>()};
    if (M == 0 || N == 0) return;
    nb::gil_scoped_release unlocked;
    kernels().linear(l, threads);
}

double cross_entropy(bool bf16, nb::handle x_, nb::handle weight_, nb::handle bias_, nb::handle targets_, nb::handle d_x_,
                     nb::handle d_weight_, nb::handle d_bias_, int threads) {
    expect_threads(threads);
    const TensorView x(x_, "x"), weight(weight_, "weight"), bias(bias_, "bias"), targets(targets_, "targets");
    const TensorView d_x(d_x_, "d_x"), d_weight(d_weight_, "d_weight"), d_bias(d_bias_, "d_bias");
    x.expect(Kind::float32, {-1, -1}).expect_last_contiguous();
    const int64_t M = x.size(0), K = x.size(1);
    weight.expect(Kind::float32, {-1, K}).expect_contiguous();
    const int64_t N = weight.size(0);
    if (N < 1) refuse("weight: expected at least one symbol");
    if (bias.given()) bias.expect(Kind::float32, {N}).expect_contiguous();
    targets.expect(Kind::int64, {M}).expect_contiguous();
    for (int64_t m = 0; m < M; ++m)
        if (targets.as<int64_t>()[m] >= N)
            refuse("targets: expected less than " + std::to_string(N) + ", got " + std::to_string(targets.as<int64_t>()[m]));
    CrossEntropy c{};
    c.bf16 = bf16, c.M = M, c.N = N, c.K = K, c.x = x.as<float>(), c.x_row = x.stride(0), c.weight = weight.as<float>();
    c.bias = bias.given() ? bias.as<float>() : nullptr;
    c.targets = targets.as<int64_t>();
    if (d_x.given() != d_weight.given()) refuse("d_x and d_weight: expected both or neither");
    if (d_bias.given() && !d_x.given()) refuse("d_bias: expected d_x and d_weight beside it");
    c.d_x = optional_out(d_x, {M, K}), c.d_weight = optional_out(d_weight, {N, K}), c.d_bias = optional_out(d_bias, {N});
    expect_apart({&d_x, &d_weight, &d_bias}, {&x, &weight, &bias, &targets});
    double loss = 0;
    c.loss = &loss;
    nb::gil_scoped_release unlocked;
    kernels().cross_entropy(c, threads);
    return loss;
}

// A language model held still for writing: its weights packed once, its state kept between calls of `write`.
class Writer {
public:
    // layers: tuples (weight_ih, weight_hh, bias_ih, bias_hh); the first one's weight_ih is in `table` already.
    Writer(int cell, bool bf16, nb::handle table_, const std::vector<nb::tuple>& layers, nb::handle output_weight,
           nb::handle output_bias, int threads)
        : cell_(cell_of(cell)), bf16_(bf16), threads_(threads), kernels_(&kernels()) {
        expect_threads(threads);
        if (layers.empty()) refuse("layers: expected at least one");
        const TensorView table(table_, "table");
        const int64_t G = gates(cell_);
        table.expect(Kind::float32, {-1, -1}).expect_contiguous();
        V_ = table.size(0);
        if (V_ < 1 || table.size(1) % G != 0 || table.size(1) == 0) refuse("table: expected [V, G*H]");
        H_ = table.size(1) / G;
        copy(table_copy_, table);
        weights_.resize(layers.size());
        biases_.resize(2 * layers.size());
        for (size_t k = 0; k < layers.size(); ++k) {
            if (nb::len(layers[k]) != 4) refuse("layers: expected tuples of 4");
            const TensorView ih(layers[k][0], "weight_ih"), hh(layers[k][1], "weight_hh");
            hh.expect(Kind::float32, {G * H_, H_}).expect_contiguous();
            if (k > 0) ih.expect(Kind::float32, {G * H_, H_}).expect_contiguous();
            for (size_t j = 0; j < 2; ++j) {
                const TensorView bias(layers[k][2 + j], j == 0 ? "bias_ih" : "bias_hh");
                if (!bias.given()) continue;
                bias.expect(Kind::float32, {G * H_}).expect_contiguous();
                copy(biases_[2 * k + j], bias);
            }
            const auto bias_pointer = [&](size_t i) { return biases_[i].empty() ? nullptr : biases_[i].data(); };
            weights_[k] = {nullptr, nullptr, k > 0 ? bias_pointer(2 * k) : nullptr, bias_pointer(2 * k + 1)};
            const int64_t I = k > 0 ? H_ : 0;
            packs_.emplace_back(kernels_->packed_size(cell_, bf16, false, I, H_));
            const Weights w{k > 0 ? ih.as<float>() : nullptr, hh.as<float>(), nullptr, nullptr};
            kernels_->pack(cell_, bf16, false, I, H_, w, packs_.back().data(), threads);
        }
        const TensorView out(output_weight, "output_weight"), bias(output_bias, "output_bias");
        out.expect(Kind::float32, {V_, H_}).expect_contiguous();
        if (bias.given()) copy(output_bias_, bias.expect(Kind::float32, {V_}).expect_contiguous());
        output_pack_ = Scratch(kernels_->packed_linear_size(bf16, V_, H_));
        kernels_->pack_linear(bf16, V_, H_, out.as<float>(), output_pack_.data(), threads);
    }

    // Writes uniform.size symbols after reading `last`; h, c [layers H] and recent are taken on.
    void write(int64_t last, nb::handle h_, nb::handle c_, nb::handle barred_, nb::handle barred_first_, nb::handle uniform_,
               nb::handle recent_, nb::handle recent_count_, nb::handle written_, double repetition_penalty,
               double temperature, int64_t top_k, double top_p) {
        const int64_t layers = static_cast<int64_t>(packs_.size());
        const TensorView h(h_, "h"), c(c_, "c"), barred(barred_, "barred"), barred_first(barred_first_, "barred_first"),
            uniform(uniform_, "uniform"), recent(recent_, "recent"), recent_count(recent_count_, "recent_count"),
            written(written_, "written");
        if (last < 0 || last >= V_) refuse("last: expected 0.." + std::to_string(V_ - 1) + ", got " + std::to_string(last));
        h.expect(Kind::float32, {layers, H_}).expect_contiguous();
        if (cell_ == Cell::lstm) c.expect(Kind::float32, {layers, H_}).expect_contiguous();
        for (const TensorView* view : {&barred, &barred_first})
            if (view->given()) view->expect(Kind::boolean, {V_}).expect_contiguous();
        uniform.expect(Kind::float64, {-1}).expect_contiguous();
        recent.expect(Kind::int64, {-1}).expect_contiguous();
        recent_count.expect(Kind::int64, {1}).expect_contiguous();
        written.expect(Kind::int64, {uniform.size(0)}).expect_contiguous();
        const int64_t window = recent.size(0), count = recent_count.as<int64_t>()[0];
        if (window < 1) refuse("recent: expected room for at least one symbol");
        if (count < 0 || count > window) refuse("recent_count: expected 0.." + std::to_string(window) + ", got " + std::to_string(count));
        for (int64_t i = 0; i < count; ++i)
            if (const int64_t j = recent.as<int64_t>()[i]; j < 0 || j >= V_) refuse("recent: expected symbols of the vocabulary");
        if (!(repetition_penalty > 0) || !(temperature >= 0) || top_k < 0 || !(top_p > 0)) refuse("sampling: a value is out of range");
        expect_apart({&h, &c, &recent, &recent_count, &written}, {&barred, &barred_first, &uniform});
        std::vector<Packed> packs;
        for (const Scratch& pack : packs_) packs.push_back(pack.data());
        Writing w{};
        w.cell = cell_, w.bf16 = bf16_, w.layers = static_cast<int>(layers), w.H = H_, w.V = V_;
        w.table = table_copy_.data(), w.weights = weights_.data(), w.packed = packs.data();
        w.output_weight = nullptr, w.output_bias = output_bias_.empty() ? nullptr : output_bias_.data();
        w.output_packed = output_pack_.data();
        w.h = h.as<float>(), w.c = cell_ == Cell::lstm ? c.as<float>() : nullptr;
        w.barred = barred.given() ? barred.as<uint8_t>() : nullptr;
        w.barred_first = barred_first.given() ? barred_first.as<uint8_t>() : nullptr;
        w.repetition_penalty = repetition_penalty, w.repetition_window = window, w.temperature = temperature;
        w.top_k = top_k, w.top_p = top_p, w.uniform = uniform.as<double>(), w.count = uniform.size(0);
        w.recent = recent.as<int64_t>(), w.recent_count = recent_count.as<int64_t>(), w.last = last;
        w.written = written.as<int64_t>();
        nb::gil_scoped_release unlocked;
        kernels_->write(w, threads_);
    }

private:
    static void copy(std::vector<float>& to, const TensorView& from) {
        to.assign(from.as<const float>(), from.as<const float>() + (from.end() - from.begin()) / 4);
    }

    Cell cell_;
    bool bf16_;
    int threads_;
    const Kernels* kernels_;
    int64_t V_ = 0, H_ = 0;
    std::vector<float> table_copy_, output_bias_;
    std::vector<std::vector<float>> biases_;
    std::vector<Weights> weights_;
    std::vector<Scratch> packs_;
    Scratch output_pack_;
};

std::vector<std::pair<std::string, std::string>> list_instruction_sets() {
    InstructionSet sets[instruction_set_count];
    instruction_sets(sets);
    std::vector<std::pair<std::string, std::string>> named;
    for (const InstructionSet& set : sets) {
        const char* presence[] = {"in use", "available", "not on this processor", "not built"};
        named.emplace_back(set.name, presence[static_cast<int>(set.presence)]);
    }
    return named;
}

}  // namespace
}  // namespace unrolled

NB_MODULE(_native, m) {
    using namespace unrolled;
    namespace nb = nanobind;
    using nb::arg;
    nb::class_<Pack>(m, "Pack");
    m.def("forward", &forward, arg("cell"), arg("bf16"), arg("reverse"), arg("x").none(), arg("ids").none(),
          arg("lengths").none(), arg("directions"), arg("packs"), arg("outputs"), arg("results"), arg("threads"));
    m.def("stack", &stack, arg("cell"), arg("bf16"), arg("both"), arg("bias"), arg("x"), arg("weights"), arg("h_0"),
          arg("c_0").none(), arg("outputs"), arg("h_n"), arg("c_n").none(), arg("packs"), arg("threads"));
    m.def("backward", &backward, arg("cell"), arg("bf16"), arg("reverse"), arg("x").none(), arg("ids").none(),
          arg("lengths").none(), arg("directions"), arg("packs"), arg("outputs"), arg("tapes"), arg("d_outputs").none(),
          arg("d_states"), arg("d_x").none(), arg("results"), arg("block"), arg("threads"));
    m.def("pack", &pack, arg("cell"), arg("bf16"), arg("backward"), arg("weight_ih").none(), arg("weight_hh"), arg("threads"),
          nb::rv_policy::take_ownership);
    m.def("pack_linear", &pack_linear, arg("bf16"), arg("weight"), arg("threads"), nb::rv_policy::take_ownership);
    m.def("linear", &linear, arg("bf16"), arg("x"), arg("weight"), arg("bias").none(), arg("pack").none(), arg("y"),
          arg("threads"));
    m.def("cross_entropy", &cross_entropy, arg("bf16"), arg("x"), arg("weight"), arg("bias").none(), arg("targets"),
          arg("d_x").none(), arg("d_weight").none(), arg("d_bias").none(), arg("threads"));
    nb::class_<Writer>(m, "Writer")
        .def(nb::init<int, bool, nb::handle, const std::vector<nb::tuple>&, nb::handle, nb::handle, int>(), arg("cell"),
             arg("bf16"), arg("table"), arg("layers"), arg("output_weight"), arg("output_bias").none(), arg("threads"))
        .def("write", &Writer::write, arg("last"), arg("h"), arg("c").none(), arg("barred").none(),
             arg("barred_first").none(), arg("uniform"), arg("recent"), arg("recent_count"), arg("written"),
             arg("repetition_penalty"), arg("temperature"), arg("top_k"), arg("top_p"));
    m.def("instruction_sets", &list_instruction_sets);
    m.def("use_instruction_set", [](const std::string& name) { use_instruction_set(name.c_str()); }, arg("name"));
    m.def("share_openmp", [](const std::string& path) { return share_openmp(path.c_str()); }, arg("path"));
    m.def("describe_threads", &describe_threads);
    m.def("scratch_held", &scratch_held);
    m.def("release_scratch", &release_scratch);
    m.def("peak", [](bool bf16, int threads, double seconds) {
        expect_threads(threads);
        nb::gil_scoped_release unlocked;
        return kernels().peak(bf16, threads, seconds);
    }, arg("bf16"), arg("threads"), arg("seconds"));
}
