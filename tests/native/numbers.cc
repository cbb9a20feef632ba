// The gates' functions over their whole range, and NaN and infinity on their way through a layer.
#include "oracle.h"
#include "samples.h"

namespace driver {
namespace {

// --- sigmoid and tanh to the last places

// The tape of an lstm whose state is zero holds the functions of what was looked up.
void check_functions(const std::string& set) {
    Group& to = group("sigmoid and tanh " + set);
    constexpr int64_t H = 32;
    std::vector<float> inputs;
    for (int e = -40; e <= 7; ++e)  // all sizes
        for (int i = 0; i < (options.quick ? 4 : 16); ++i) {
            const float x = std::ldexp(1 + static_cast<float>(i) / 16, e);
            inputs.push_back(x);
            inputs.push_back(-x);
        }
    for (float x = -105; x <= 105; x += options.quick ? 0.37f : 0.0137f) inputs.push_back(x);
    for (const float x : {0.0f, -0.0f, infinity, -infinity, nan, 3.4e38f, -3.4e38f, 1e-44f}) inputs.push_back(x);
    while (inputs.size() % H != 0) inputs.push_back(0);
    const auto T = static_cast<int64_t>(inputs.size()) / H;

    Floats table(T * 4 * H), zero_weights(4 * H * H), zeros(H);
    Guarded<int64_t> ids(T);
    for (int64_t t = 0; t < T; ++t) {
        ids[t] = t;
        for (int64_t j = 0; j < 4 * H; ++j) table[t * 4 * H + j] = inputs[t * H + j % H];
    }
    Forward f{};
    f.cell = Cell::lstm;
    f.directions = 1;
    Guarded<uint8_t> reset(T, 1);  // an infinity must not go from step to step
    f.extent = {T, 1, 1, H, nullptr, {reset.data(), nullptr}, T};
    f.inputs.ids = ids.data();
    f.inputs.symbols = T;
    f.table[0] = table.data();
    f.weights[0].hh = zero_weights.data();
    f.h0[0] = f.c0[0] = zeros.data();
    const ForwardMemory memory(f, true);
    memory.attach(f);
    kernels().forward(f, 1);
    for (int64_t i = 0; i < T * H; ++i) {
        const double x = inputs[i];
        const float* tape = &memory.tape[0][i / H * 4 * H + i % H];
        for (int gate = 0; gate < 4; ++gate) {
            const double want = gate == 2 ? std::tanh(x) : 1 / (1 + std::exp(-x)), got = tape[gate * H];
            // Numbers below the smallest normal one count as zero, on the way in and out.
            const double bound = 3 * 0x1p-23 * std::abs(want) + 0x1p-126;
            const double error = std::abs(got - want);
            to.check(std::isnan(want) ? std::isnan(got) : error <= bound, set,
                     std::string(gate == 2 ? "tanh(" : "sigmoid(") + std::to_string(x) + ") is " + std::to_string(got));
            if (error <= bound && std::abs(want) > 0x1p-100) to.near(error / bound);
        }
    }
}

// --- poisoned layers

// A clean sample; then one number of it replaced by NaN or an infinity, forward and backward. The oracle says where it
// must come out; rows that it does not belong to must keep their bits.
class Poisoned {
public:
    Poisoned(const std::string& set, const Sample& sample)
        : to_(group("NaN and infinity " + set)), set_(set), sample_(sample), clean_(run()) {
        const auto [T, B, I, H, block, with] = sample.size;
        row_ = 0;
        for (int64_t row = 0; row < B; ++row)
            if (sample.length(row) > sample.length(row_)) row_ = row;
        const int64_t t = sample.length(row_) / 2, u = H / 2;
        for (const float poison : {nan, infinity, -infinity}) {
            if (with & lookup) {
                try_one("table", sample.table[0][sample.ids[t * B + row_] * sample.G() * H + u], poison, false);
            } else {
                try_one("x", sample.x[t * sample.x_step + row_ * sample.x_row + I / 2], poison, true);
            }
            try_one("h0", sample.h0[0][row_ * H + u], poison, true);
            if (sample.cell == Cell::lstm) try_one("c0", sample.c0[0][row_ * H + u], poison, true);
            try_one("bias_hh", sample.bias_hh[0][u], poison, false);
            try_one("W_hh", sample.hh[0][u * H + 1], poison, false);
        }
        try_one("d_outputs", sample.d_outputs[t * sample.d_step + row_ * sample.d_row + u], nan, true);
        try_one("d_h_n", sample.d_h_n[0][row_ * H + u], nan, true);
        if (sample.cell == Cell::lstm) {
            try_one("d_c_n", sample.d_c_n[0][row_ * H + u], nan, true);
            try_one("d_c", sample.d_c[0][(t * B + row_) * H + u], nan, true);
        }
    }

private:
    struct Run {
        ForwardMemory made;
        BackwardMemory gradients;
    };
    Run run() const {
        Forward f = sample_.forward();
        ForwardMemory made(f, true);
        made.attach(f);
        kernels().forward(f, 1);
        Backward b = sample_.backward(made);
        BackwardMemory gradients(b);
        gradients.attach(b);
        kernels().backward(b, 1);
        return {std::move(made), std::move(gradients)};
    }

    void try_one(const char* place, float& number, float poison, bool one_row) {
        const float old = std::exchange(number, poison);
        const std::string where = described(sample_, set_, 1, false) + ", " + place + "=" + std::to_string(poison);
        const auto [T, B, I, H, block, with] = sample_.size;
        const int64_t stride = sample_.directions * H, width = tape_gates(sample_.cell) * H;
        const Run got = run();
        Forward f = sample_.forward();
        got.made.attach(f);
        const oracle::States want = oracle::forward(f, true);
        // Sums without the poison are as in the other samples. What an infinity leaves finite is exact: gates that are
        // 0 or 1.
        const double bound = 2 * 0x1p-24 * std::sqrt(static_cast<double>(I + H + 2)) * want.size;
        check_close(to_, where, "outputs", got.made.outputs.data(), want.outputs.data(), T * B * stride, bound);
        for (int d = 0; d < sample_.directions; ++d) {
            check_close(to_, where, "h_n", got.made.h_n[d].data(), want.h_n[d].data(), B * H, bound);
            if (sample_.cell == Cell::lstm)
                check_close(to_, where, "c_n", got.made.c_n[d].data(), want.c_n[d].data(), B * H, bound);
            for (int64_t at = 0; at < T * B && width > 0; ++at)
                if (sample_.own(at / B, at % B))
                    check_close(to_, where, "tape", &got.made.tape[d][at * width],
                                &want.tape[d][at * width], width, bound);
        }
        if (one_row)
            for (int64_t at = 0; at < T * B; ++at)
                if (at % B != row_)
                    check_same(to_, where, "outputs of other rows", &got.made.outputs[at * stride],
                               &clean_.made.outputs[at * stride], stride);

        Backward b = sample_.backward(got.made);
        const BackwardMemory before(b);
        before.attach(b);
        const oracle::Gradients gradients = oracle::backward(b);
        const auto close = [&](const char* what, const Floats& have, const oracle::Gradient& should) {
            if (have.data() == nullptr) return;
            // The bounds of layers.cc, with room: here it matters where NaN are.
            const double loose = 32 * 0x1p-24 * std::sqrt(static_cast<double>(T * B + 4 * H)) * should.largest_size() +
                                 (sample_.bf16 ? 8 * 0x1p-9 * should.largest_root() : 0);
            check_close(to_, where, what, have.data(), should.value.data(), have.size(), loose);
        };
        close("d_x", got.gradients.d_x, gradients.d_x);
        for (int d = 0; d < sample_.directions; ++d) {
            close("d_table", got.gradients.d_table[d], gradients.d_table[d]);
            close("d_h0", got.gradients.d_h0[d], gradients.d_h0[d]);
            close("d_c0", got.gradients.d_c0[d], gradients.d_c0[d]);
            close("d_ih", got.gradients.d_ih[d], gradients.d_ih[d]);
            close("d_hh", got.gradients.d_hh[d], gradients.d_hh[d]);
            close("d_bias_ih", got.gradients.d_bias_ih[d], gradients.d_bias_ih[d]);
            close("d_bias_hh", got.gradients.d_bias_hh[d], gradients.d_bias_hh[d]);
            for (int64_t row = 0; row < B && one_row; ++row)
                if (row != row_)
                    check_same(to_, where, "d_h0 of other rows", &got.gradients.d_h0[d][row * H],
                               &clean_.gradients.d_h0[d][row * H], H);
        }
        number = old;
    }

    Group& to_;
    std::string set_;
    const Sample& sample_;
    int64_t row_ = 0;
    Run clean_;
};

}  // namespace

void check_numbers() {
    const Size samples[] = {
        {6, 7, 5, 19, 4, ragged | resets},
        {5, 4, 3, 17, 2, both | ragged},
        {5, 3, 3, 6, 2, lookup | reversed},
    };
    for (const std::string& set : runnable_sets()) {
        use_instruction_set(set.c_str());
        check_functions(set);
        for (const Cell cell : cells)
            for (const bool bf16 : {false, true})
                for (size_t i = 0; i < std::size(samples); ++i)
                    if (!options.quick || i == 0) Poisoned(set, Sample(samples[i], cell, bf16, 400 + i));
    }
}

}  // namespace driver
