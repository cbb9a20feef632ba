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

#include "given.h"
#include "kernels.h"
#include "memory.h"
#include "tensor_view.h"
#include "threads.h"

namespace unrolled {
namespace {

// Views of the entries of a tuple, all there from the start so that pointers to them stay good.
template <size_t N>
std::array<TensorView, N> views(const nb::tuple& t, const std::array<const char*, N>& names) {
    if (nb::len(t) != N) refuse("results: expected tuples of " + std::to_string(N) + ", got " + std::to_string(nb::len(t)));
    return [&]<size_t... I>(std::index_sequence<I...>) {
        return std::array<TensorView, N>{TensorView(t[I], names[I])...};
    }(std::make_index_sequence<N>{});
}

// Large tensors that are about to be written for the first time.
void prefer_large_pages_for(const Views& written) {
    for (const TensorView* view : written)
        if (view->given()) prefer_large_pages(view->begin(), view->end());
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
    prefer_large_pages_for(written);
    nb::gil_scoped_release unlocked;
    kernels().forward(f, threads);
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
    prefer_large_pages_for({&d_x});  // the others hold something already, or are small
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
    bind_stack(m);
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
    m.def("prefer_large_pages", [](nb::handle memory_) {
        const TensorView memory(memory_, "memory");
        memory.expect(Kind::float32, {-1, -1, -1}).expect_contiguous();
        prefer_large_pages_for({&memory});
    }, arg("memory"));
    m.def("scratch_held", &scratch_held);
    m.def("release_scratch", &release_scratch);
    m.def("peak", [](bool bf16, int threads, double seconds) {
        expect_threads(threads);
        nb::gil_scoped_release unlocked;
        return kernels().peak(bf16, threads, seconds);
    }, arg("bf16"), arg("threads"), arg("seconds"));
}
