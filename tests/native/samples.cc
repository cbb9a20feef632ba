#include "samples.h"

namespace driver {

Sample::Sample(const Size& given, Cell c, bool half, uint64_t seed)
    : size(given), cell(c), bf16(half), directions(given.with & both ? 2 : 1) {
    Random random(seed * 64 + static_cast<uint64_t>(cell) * 2 + bf16);
    const auto [T, B, I, H, block, with] = size;
    const int64_t GH = G() * H;
    where = name_of(cell) + std::string(bf16 ? " bf16" : " fp32");
    const std::pair<const char*, int64_t> numbers[] = {
        {" T=", T}, {" B=", B}, {" I=", I}, {" H=", H}, {" block=", block}};
    for (const auto& [letter, number] : numbers) where += letter + std::to_string(number);
    const std::pair<unsigned, const char*> words[] = {
        {ragged, "ragged"}, {resets, "resets"}, {reversed, "reversed"}, {both, "both"},
        {lookup, "lookup"}, {strided, "strided"}, {no_bias, "no_bias"}, {some_null, "some_null"},
    };
    for (const auto& [flag, word] : words)
        if (with & flag) where += std::string(" ") + word;

    if (with & ragged) {
        lengths = Guarded<int64_t>(B);
        for (int64_t& length : lengths) length = random.below(T + 1);
        if (B >= 3) {  // the extremes, not at the ends of the order
            lengths[random.below(B)] = 0;
            lengths[random.below(B)] = T;
        }
    }
    for (int d = 0; d < directions; ++d)
        if (with & resets) {
            reset[d] = Guarded<uint8_t>(T * B);
            for (uint8_t& r : reset[d]) r = random.chance(0.25);
        }
    // NaN, infinity, a huge number: what would show if it were read.
    const auto junk = [&] { return random.chance(0.5) ? nan : random.chance(0.5) ? -infinity : 3e38f; };

    if (with & lookup) {
        symbols = random.chance(0.3) ? 1 : 2 + random.below(12);
        ids = Guarded<int64_t>(T * B);
        for (int64_t at = 0; at < T * B; ++at) {
            const bool mine = own(at / B, at % B);
            ids[at] = mine ? random.below(symbols) : random.chance(0.5) ? std::numeric_limits<int64_t>::max() : -1 - at;
        }
        for (int d = 0; d < directions; ++d) table[d] = random_floats(random, symbols * GH, -1.5, 1.5);
    } else {
        x_row = I + (with & strided ? 3 : 0);
        x_step = B * x_row + (with & strided ? 5 : 0);
        const int64_t n = T > 0 && B > 0 ? (T - 1) * x_step + (B - 1) * x_row + I : 0;
        x = Floats(n);
        for (float& number : x) number = junk();
        for (int64_t t = 0; t < T; ++t)
            for (int64_t row = 0; row < B; ++row)
                for (int64_t k = 0; k < I && own(t, row); ++k)
                    x[t * x_step + row * x_row + k] = random.between(-1.5, 1.5);
    }
    // As torch starts them: W_hh then shrinks states, so that what one step rounds is forgotten by later ones.
    const double a = 1 / std::sqrt(static_cast<double>(H));
    for (int d = 0; d < directions; ++d) {
        if (!(with & lookup)) ih[d] = random_floats(random, GH * I, -a, a);
        hh[d] = random_floats(random, GH * H, -a, a);
        const bool without_ih = with & no_bias || (with & some_null && random.chance(0.5));
        const bool without_hh = with & no_bias || (with & some_null && random.chance(0.5));
        if (!without_ih) bias_ih[d] = random_floats(random, GH, -0.5, 0.5);
        if (!without_hh) bias_hh[d] = random_floats(random, GH, -0.5, 0.5);
        h0[d] = random_floats(random, B * H, -1, 1);
        if (cell == Cell::lstm) c0[d] = random_floats(random, B * H, -1.5, 1.5);
    }

    const auto given_too = [&] { return !(with & some_null) || random.chance(0.5); };
    d_row = directions * H + (with & strided ? 2 : 0);
    d_step = B * d_row + (with & strided ? 1 : 0);
    if (given_too()) {
        d_outputs = Floats(T > 0 && B > 0 ? (T - 1) * d_step + (B - 1) * d_row + directions * H : 0);
        for (float& number : d_outputs) number = junk();
        for (int64_t t = 0; t < T; ++t)
            for (int64_t row = 0; row < B; ++row)
                for (int64_t u = 0; u < directions * H && own(t, row); ++u)
                    d_outputs[t * d_step + row * d_row + u] = random.between(-1, 1);
    }
    for (int d = 0; d < directions; ++d) {
        if (given_too()) d_h_n[d] = random_floats(random, B * H, -1, 1);
        if (cell != Cell::lstm) continue;
        if (given_too()) d_c_n[d] = random_floats(random, B * H, -1, 1);
        if (given_too()) {
            d_c[d] = Floats(T * B * H);
            for (int64_t i = 0; i < T * B * H; ++i)
                d_c[d][i] = own(i / (B * H), i / H % B) ? random.between(-1, 1) : junk();
        }
    }
}

Forward Sample::forward() const {
    Forward f{};
    f.cell = cell;
    f.bf16 = bf16;
    f.directions = directions;
    const bool first = size.with & reversed;
    f.reverse[0] = first;
    f.reverse[1] = !first;
    f.extent = {size.T, size.B, size.I, size.H, lengths.data(), {reset[0].data(), reset[1].data()}, size.block};
    f.inputs = {x.data(), x_step, x_row, ids.data(), symbols};
    for (int d = 0; d < directions; ++d) {
        f.table[d] = table[d].data();
        f.weights[d] = {ih[d].data(), hh[d].data(), bias_ih[d].data(), bias_hh[d].data()};
        f.h0[d] = h0[d].data();
        f.c0[d] = c0[d].data();
    }
    return f;
}

Backward Sample::backward(const ForwardMemory& made) const {
    const Forward f = forward();
    Backward b{};
    b.cell = cell;
    b.bf16 = bf16;
    b.directions = directions;
    b.extent = f.extent;
    b.inputs = f.inputs;
    b.outputs = made.outputs.data();
    b.d_outputs = d_outputs.data();
    b.d_step = d_step;
    b.d_row = d_row;
    for (int d = 0; d < directions; ++d) {
        b.reverse[d] = f.reverse[d];
        b.weights[d] = f.weights[d];
        b.h0[d] = f.h0[d];
        b.c0[d] = f.c0[d];
        b.tape[d] = made.tape[d].data();
        b.c[d] = made.c[d].data();
        b.d_h_n[d] = d_h_n[d].data();
        b.d_c_n[d] = d_c_n[d].data();
        b.d_c[d] = d_c[d].data();
    }
    return b;
}

ForwardMemory::ForwardMemory(const Forward& f, bool keep) : training(keep) {
    const auto& e = f.extent;
    outputs = Floats(e.T * e.B * f.directions * e.H, nan);
    for (int d = 0; d < f.directions; ++d) {
        h_n[d] = Floats(e.B * e.H, nan);
        if (f.cell == Cell::lstm) c_n[d] = Floats(e.B * e.H, nan);
        if (!training) continue;
        tape[d] = Floats(e.T * e.B * tape_gates(f.cell) * e.H, nan);
        if (f.cell == Cell::lstm) c[d] = Floats(e.T * e.B * e.H, nan);
    }
}

ForwardMemory::ForwardMemory(const Forward& f, const oracle::States& states) : ForwardMemory(f, true) {
    const auto& e = f.extent;
    const auto put = [](const Floats& to, const oracle::Numbers& from) {
        for (int64_t i = 0; i < to.size(); ++i) to[i] = static_cast<float>(from[i]);
    };
    put(outputs, states.outputs);
    for (int d = 0; d < f.directions; ++d) {
        put(h_n[d], states.h_n[d]);
        put(c_n[d], states.c_n[d]);
        // Undefined at padding.
        const int64_t width = tape_gates(f.cell) * e.H;
        for (int64_t at = 0; at < e.T * e.B; ++at) {
            if (e.lengths != nullptr && at / e.B >= e.lengths[at % e.B]) continue;
            for (int64_t i = at * width; i < (at + 1) * width; ++i)
                tape[d][i] = static_cast<float>(states.tape[d][i]);
            for (int64_t i = at * e.H; f.cell == Cell::lstm && i < (at + 1) * e.H; ++i)
                c[d][i] = static_cast<float>(states.c[d][i]);
        }
    }
}

void ForwardMemory::attach(Forward& f) const {
    f.outputs = outputs.data();
    for (int d = 0; d < f.directions; ++d) {
        f.h_n[d] = h_n[d].data();
        f.c_n[d] = c_n[d].data();
        f.tape[d] = tape[d].data();
        f.c[d] = c[d].data();
    }
}

BackwardMemory::BackwardMemory(const Backward& b) {
    const auto& e = b.extent;
    const int64_t GH = gates(b.cell) * e.H;
    const bool looked_up = b.inputs.ids != nullptr;
    Random random(7);
    if (!looked_up) d_x = Floats(e.T * e.B * e.I, nan);
    for (int d = 0; d < b.directions; ++d) {
        d_h0[d] = Floats(e.B * e.H, nan);
        if (b.cell == Cell::lstm) d_c0[d] = Floats(e.B * e.H, nan);
        d_hh[d] = random_floats(random, GH * e.H, -1, 1);
        d_bias_hh[d] = random_floats(random, GH, -1, 1);
        if (looked_up) {
            d_table[d] = random_floats(random, b.inputs.symbols * GH, -1, 1);
        } else {
            d_ih[d] = random_floats(random, GH * e.I, -1, 1);
            d_bias_ih[d] = random_floats(random, GH, -1, 1);
        }
    }
}

void BackwardMemory::attach(Backward& b) const {
    b.d_x = d_x.data();
    for (int d = 0; d < b.directions; ++d) {
        b.d_table[d] = d_table[d].data();
        b.d_h0[d] = d_h0[d].data();
        b.d_c0[d] = d_c0[d].data();
        b.d_ih[d] = d_ih[d].data();
        b.d_hh[d] = d_hh[d].data();
        b.d_bias_ih[d] = d_bias_ih[d].data();
        b.d_bias_hh[d] = d_bias_hh[d].data();
    }
}

Packs::Packs(const Sample& sample, bool backward, int threads) {
    const Forward f = sample.forward();
    const int64_t I = sample.size.with & lookup ? 0 : sample.size.I;
    for (int d = 0; d < sample.directions; ++d) {
        memory[d] = PackedMemory(kernels().packed_size(sample.cell, sample.bf16, backward, I, sample.size.H));
        kernels().pack(sample.cell, sample.bf16, backward, I, sample.size.H, f.weights[d], memory[d].data(), threads);
    }
}

void Packs::attach(Packed (&to)[2]) const {
    for (int d = 0; d < 2; ++d) to[d] = memory[d].data();
}

void check_same_forward(Group& to, const std::string& where, const Sample& sample, const ForwardMemory& a,
                        const ForwardMemory& b) {
    const auto [T, B, I, H, block, with] = sample.size;
    check_same(to, where, "outputs", a.outputs.data(), b.outputs.data(), a.outputs.size());
    for (int d = 0; d < sample.directions; ++d) {
        check_same(to, where, "h_n", a.h_n[d].data(), b.h_n[d].data(), a.h_n[d].size());
        check_same(to, where, "c_n", a.c_n[d].data(), b.c_n[d].data(), a.c_n[d].size());
        if (!a.training || !b.training) continue;
        const int64_t width = tape_gates(sample.cell) * H;
        bool same = true;
        for (int64_t at = 0; at < T * B; ++at) {
            if (!sample.own(at / B, at % B)) continue;
            if (width > 0)
                same = same && !std::memcmp(&a.tape[d][at * width], &b.tape[d][at * width], width * 4);
            if (sample.cell == Cell::lstm)
                same = same && !std::memcmp(&a.c[d][at * H], &b.c[d][at * H], H * 4);
        }
        to.check(same, where, "tape or c: different bits");
    }
}

void check_same_backward(Group& to, const std::string& where, const BackwardMemory& a, const BackwardMemory& b) {
    const auto same = [&](const char* what, const Floats& one, const Floats& other) {
        // Memory that was not asked for is not there.
        if (one.data() != nullptr && other.data() != nullptr)
            check_same(to, where, what, one.data(), other.data(), one.size());
    };
    same("d_x", a.d_x, b.d_x);
    for (int d = 0; d < 2; ++d) {
        same("d_table", a.d_table[d], b.d_table[d]);
        same("d_h0", a.d_h0[d], b.d_h0[d]);
        same("d_c0", a.d_c0[d], b.d_c0[d]);
        same("d_ih", a.d_ih[d], b.d_ih[d]);
        same("d_hh", a.d_hh[d], b.d_hh[d]);
        same("d_bias_ih", a.d_bias_ih[d], b.d_bias_ih[d]);
        same("d_bias_hh", a.d_bias_hh[d], b.d_bias_hh[d]);
    }
}

std::string described(const Sample& sample, const std::string& set, int threads, bool packed) {
    return set + " " + sample.where + (packed ? ", packed" : "") + ", " + std::to_string(threads) + " threads";
}

}  // namespace driver
