#include "oracle.h"

namespace driver::oracle {
namespace {

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

// The steps of one row in the order in which they are computed.
struct Walk {
    int64_t length;
    bool reverse;
    Walk(const Extent& e, bool backwards, int64_t row) : length(e.lengths ? e.lengths[row] : e.T), reverse(backwards) {}
    int64_t time(int64_t s) const { return reverse ? length - 1 - s : s; }
};

bool is_reset(const Extent& e, int d, int64_t t, int64_t row) {
    return e.reset[d] != nullptr && e.reset[d][t * e.B + row] != 0;
}

}  // namespace

double operand(bool bf16, double x) {
    if (!bf16) return x;
    const float single = static_cast<float>(x);
    if (std::isnan(single) || std::isinf(single)) return single;
    // Eight significant bits, the last ones of a number in [0.5, 1) worth 2^-8; nearbyint rounds ties to even.
    int exponent;
    const double fraction = std::frexp(static_cast<double>(single), &exponent);
    const double rounded = std::ldexp(std::nearbyint(std::ldexp(fraction, 8)), exponent - 8);
    return static_cast<double>(static_cast<float>(rounded));  // beyond float32's range: infinite
}

Numbers operands(bool bf16, const float* x, int64_t n) {
    Numbers to(x, x + n);
    for (double& number : to) number = operand(bf16, number);
    return to;
}

// ------------------------------------------------------------------------------------------------- forward

Direction::Direction(Cell cell, bool bf16, int64_t I, int64_t H, const Weights& w)
    : cell_(cell), bf16_(bf16), I_(I), H_(H) {
    const int64_t GH = gates(cell) * H;
    if (w.ih != nullptr) ih_ = operands(bf16, w.ih, GH * I);
    hh_ = operands(bf16, w.hh, GH * H);
    for (int64_t i = 0; i < GH; ++i) {
        bias_ih_.push_back(w.bias_ih ? w.bias_ih[i] : 0);
        bias_hh_.push_back(w.bias_hh ? w.bias_hh[i] : 0);
    }
}

double Direction::dot(const Numbers& matrix, int64_t row, const double* x, int64_t n, double start) {
    double sum = start, size = std::abs(start);
    for (int64_t k = 0; k < n; ++k) {
        const double term = matrix[row * n + k] * x[k];
        sum += term;
        size += std::abs(term);
    }
    if (std::isfinite(size)) largest_ = std::max(largest_, size);
    return sum;
}

void Direction::project(const double* x, Numbers& projected) {
    rounded_.assign(x, x + I_);
    for (double& number : rounded_) number = operand(bf16_, number);
    const int64_t GH = gates(cell_) * H_;
    projected.resize(GH);
    for (int64_t j = 0; j < GH; ++j)
        projected[j] = dot(ih_, j, rounded_.data(), I_, bias_ih_[j]);
}

void Direction::project(const float* x, Numbers& projected) {
    const Numbers wide(x, x + I_);
    project(wide.data(), projected);
}

void Direction::step(const double* x, double* h, double* c, double* tape) {
    const int64_t H = H_, GH = gates(cell_) * H;
    rounded_.assign(h, h + H);
    for (double& number : rounded_) number = operand(bf16_, number);
    sums_.resize(GH);
    for (int64_t j = 0; j < GH; ++j)
        sums_[j] = dot(hh_, j, rounded_.data(), H, bias_hh_[j]);
    for (int64_t u = 0; u < H; ++u) {
        const auto a = [&](int gate) { return x[gate * H + u] + sums_[gate * H + u]; };
        switch (cell_) {
            case Cell::rnn: h[u] = std::tanh(a(0)); break;
            case Cell::rnn_relu: h[u] = a(0) < 0 ? 0 : a(0); break;  // NaN stays NaN
            case Cell::lstm: {
                const double i = sigmoid(a(0)), f = sigmoid(a(1)), g = std::tanh(a(2)), o = sigmoid(a(3));
                c[u] = f * c[u] + i * g;
                h[u] = o * std::tanh(c[u]);
                tape[u] = i, tape[H + u] = f, tape[2 * H + u] = g, tape[3 * H + u] = o;
                break;
            }
            case Cell::gru: {
                const double r = sigmoid(a(0)), z = sigmoid(a(1)), hn = sums_[2 * H + u];
                const double n = std::tanh(x[2 * H + u] + r * hn);
                h[u] = n + z * (h[u] - n);
                tape[u] = r, tape[H + u] = z, tape[2 * H + u] = n, tape[3 * H + u] = hn;
                break;
            }
        }
    }
}

States forward(const Forward& f, bool follow) {
    const Extent& e = f.extent;
    const int64_t T = e.T, B = e.B, H = e.H, GH = gates(f.cell) * H;
    const int64_t stride = f.directions * H, TH = tape_gates(f.cell) * H;
    States to;
    to.outputs.assign(T * B * stride, 0);
    for (int d = 0; d < f.directions; ++d) {
        to.tape[d].assign(T * B * TH, 0);
        to.c[d].assign(T * B * H, 0);
        to.h_n[d].assign(B * H, 0);
        to.c_n[d].assign(B * H, 0);
        Direction direction(f.cell, f.bf16, e.I, H, f.weights[d]);
        Numbers projected, h(H), c(H), tape(4 * H);
        for (int64_t row = 0; row < B; ++row) {
            const Walk walk(e, f.reverse[d], row);
            for (int64_t u = 0; u < H; ++u) {
                h[u] = f.h0[d][row * H + u];
                c[u] = f.c0[d] ? f.c0[d][row * H + u] : 0;
            }
            for (int64_t s = 0; s < walk.length; ++s) {
                const int64_t t = walk.time(s), at = t * B + row;
                if (follow && s > 0) {
                    const int64_t before = walk.time(s - 1) * B + row;
                    for (int64_t u = 0; u < H; ++u) {
                        h[u] = f.outputs[before * stride + d * H + u];
                        if (f.c[d]) c[u] = f.c[d][before * H + u];
                    }
                }
                if (is_reset(e, d, t, row)) {
                    h.assign(h.size(), 0);
                    c.assign(c.size(), 0);
                }
                if (f.inputs.ids != nullptr) {
                    const float* looked_up = f.table[d] + f.inputs.ids[at] * GH;
                    projected.assign(looked_up, looked_up + GH);
                } else {
                    direction.project(f.inputs.x + t * f.inputs.step + row * f.inputs.row, projected);
                }
                for (const double p : projected)
                    if (std::isfinite(p)) to.size = std::max(to.size, std::abs(p));
                direction.step(projected.data(), h.data(), c.data(), tape.data());
                for (int64_t u = 0; u < H; ++u) {
                    to.outputs[at * stride + d * H + u] = h[u];
                    to.c[d][at * H + u] = c[u];
                    for (const double state : {h[u], c[u]})
                        if (std::isfinite(state)) to.size = std::max(to.size, std::abs(state));
                }
                for (int64_t u = 0; u < TH; ++u)
                    to.tape[d][at * TH + u] = tape[u];
            }
            for (int64_t u = 0; u < H; ++u) {
                to.h_n[d][row * H + u] = h[u];
                to.c_n[d][row * H + u] = c[u];
            }
        }
        to.size = std::max(to.size, direction.largest_sum());
    }
    return to;
}

// ------------------------------------------------------------------------------------------------ backward

void Gradient::start(int64_t n, const float* before) {
    value.assign(n, 0);
    for (int64_t i = 0; before != nullptr && i < n; ++i) value[i] = before[i];
    size.assign(n, 0);
    square.assign(n, 0);
    for (int64_t i = 0; i < n; ++i) size[i] = std::abs(value[i]);
}

void Gradient::add(int64_t i, Measured a, double b) {
    value[i] += a.value * b;
    size[i] += a.size * std::abs(b);
    square[i] += a.size * a.size * b * b;
}

namespace {

double largest(const Numbers& of) {
    double most = 0;
    for (const double x : of)
        if (std::isfinite(x)) most = std::max(most, x);
    return most;
}

// x times a derivative; what is lost in making the derivative (1 - h^2 where h is nearly 1) counts in the size.
Measured times(Measured x, double by, double by_size) { return {x.value * by, x.size * by_size}; }

}  // namespace

double Gradient::largest_size() const { return largest(size); }
double Gradient::largest_root() const { return std::sqrt(largest(square)); }

Gradients backward(const Backward& b) {
    const Extent& e = b.extent;
    const int64_t T = e.T, B = e.B, I = e.I, H = e.H, G = gates(b.cell), GH = G * H;
    const int64_t stride = b.directions * H, TH = tape_gates(b.cell) * H;
    const bool lookup = b.inputs.ids != nullptr;
    Gradients to;
    to.d_x.start(lookup ? 0 : T * B * I, nullptr);
    for (int d = 0; d < b.directions; ++d) {
        const Weights& w = b.weights[d];
        const auto start = [](Gradient& g, int64_t n, const float* before) { g.start(n, before); };
        start(to.d_table[d], lookup ? b.inputs.symbols * GH : 0, b.d_table[d]);
        start(to.d_h0[d], B * H, nullptr);
        start(to.d_c0[d], B * H, nullptr);
        start(to.d_ih[d], lookup ? 0 : GH * I, b.d_ih[d]);
        start(to.d_hh[d], GH * H, b.d_hh[d]);
        start(to.d_bias_ih[d], lookup ? 0 : GH, b.d_bias_ih[d]);
        start(to.d_bias_hh[d], GH, b.d_bias_hh[d]);

        const Numbers hh = operands(b.bf16, w.hh, GH * H), ih = operands(b.bf16, w.ih, lookup ? 0 : GH * I);
        for (int64_t row = 0; row < B; ++row) {
            const Walk walk(e, b.reverse[d], row);
            // What reaches the state after the step in hand from the steps after it.
            std::vector<Measured> dh(H), dc(H);
            const auto add = [](Measured& x, double y) {
                x.value += y;
                x.size += std::abs(y);
            };
            for (int64_t u = 0; u < H; ++u) {
                if (b.d_h_n[d]) add(dh[u], b.d_h_n[d][row * H + u]);
                if (b.d_c_n[d]) add(dc[u], b.d_c_n[d][row * H + u]);
            }
            for (int64_t s = walk.length - 1; s >= 0; --s) {
                const int64_t t = walk.time(s), at = t * B + row;
                const bool reset = is_reset(e, d, t, row);
                Numbers h_before(H), c_before(H);
                for (int64_t u = 0; u < H && !reset; ++u) {
                    const int64_t before = s > 0 ? walk.time(s - 1) * B + row : 0;
                    h_before[u] = s > 0 ? b.outputs[before * stride + d * H + u] : b.h0[d][row * H + u];
                    if (b.cell == Cell::lstm) c_before[u] = s > 0 ? b.c[d][before * H + u] : b.c0[d][row * H + u];
                }
                // Gradients of the sums before the gates: of W_ih's product and of W_hh's, which differ in a gru's n.
                std::vector<Measured> of_x(GH), of_h(GH);
                std::vector<Measured> dh_before(H), dc_before(H);
                for (int64_t u = 0; u < H; ++u) {
                    if (b.d_outputs) add(dh[u], b.d_outputs[t * b.d_step + row * b.d_row + d * H + u]);
                    if (b.d_c[d]) add(dc[u], b.d_c[d][at * H + u]);
                    const double h = b.outputs[at * stride + d * H + u];
                    const float* tape = b.tape[d] + at * TH;
                    const auto kept = [&](int gate) { return static_cast<double>(tape[gate * H + u]); };
                    const auto set = [&](int gate, Measured x) { of_x[gate * H + u] = x; };
                    switch (b.cell) {
                        case Cell::rnn: set(0, times(dh[u], 1 - h * h, 1)); break;
                        case Cell::rnn_relu: set(0, h <= 0 ? Measured{} : dh[u]); break;  // as torch: through NaN
                        case Cell::lstm: {
                            const double in = kept(0), f = kept(1), g = kept(2), o = kept(3);
                            const double tanh_c = std::tanh(static_cast<double>(b.c[d][at * H + u]));
                            const Measured through = times(dh[u], o * (1 - tanh_c * tanh_c), o);
                            dc[u].value += through.value;
                            dc[u].size += through.size;
                            set(0, times(dc[u], g * in * (1 - in), std::abs(g) * in));
                            set(1, times(dc[u], c_before[u] * f * (1 - f), std::abs(c_before[u]) * f));
                            set(2, times(dc[u], in * (1 - g * g), in));
                            set(3, times(dh[u], tanh_c * o * (1 - o), std::abs(tanh_c) * o));
                            dc_before[u] = times(dc[u], f, f);
                            break;
                        }
                        case Cell::gru: {
                            const double r = kept(0), z = kept(1), n = kept(2), hn = kept(3);
                            const Measured dn = times(dh[u], (1 - z) * (1 - n * n), 1);
                            set(0, times(dn, hn * r * (1 - r), std::abs(hn) * r));
                            set(1, times(dh[u], (h_before[u] - n) * z * (1 - z),
                                         (std::abs(h_before[u]) + std::abs(n)) * z));
                            set(2, dn);
                            dh_before[u] = times(dh[u], z, z);
                            break;
                        }
                    }
                    for (int64_t gate = 0; gate < G; ++gate) {
                        const auto j = gate * H + u;
                        const double r = b.cell == Cell::gru && gate == 2 ? kept(0) : 1;
                        of_h[j] = times(of_x[j], r, r);
                    }
                }
                for (double& h : h_before) h = operand(b.bf16, h);
                const Numbers inputs =
                    operands(b.bf16, b.inputs.x + t * b.inputs.step + row * b.inputs.row, lookup ? 0 : I);
                for (int64_t j = 0; j < GH; ++j) {
                    // Biases and the rows of a table are sums of what is no operand yet.
                    to.d_bias_hh[d].add(j, of_h[j], 1);
                    if (lookup) to.d_table[d].add(b.inputs.ids[at] * GH + j, of_x[j], 1);
                    else to.d_bias_ih[d].add(j, of_x[j], 1);
                    const Measured x{operand(b.bf16, of_x[j].value), of_x[j].size};
                    const Measured h{operand(b.bf16, of_h[j].value), of_h[j].size};
                    for (int64_t k = 0; k < H; ++k) {
                        to.d_hh[d].add(j * H + k, h, h_before[k]);
                        dh_before[k].value += h.value * hh[j * H + k];
                        // Not h.size: what was lost in later steps shrinks on its way here, as gradients do.
                        dh_before[k].size += std::abs(h.value * hh[j * H + k]);
                    }
                    for (int64_t k = 0; k < I && !lookup; ++k) {
                        to.d_ih[d].add(j * I + k, x, inputs[k]);
                        to.d_x.add(at * I + k, x, ih[j * I + k]);
                    }
                }
                dh = dh_before;
                dc = dc_before;
                if (reset) {
                    dh.assign(dh.size(), Measured{});
                    dc.assign(dc.size(), Measured{});
                }
            }
            for (int64_t u = 0; u < H; ++u) {
                to.d_h0[d].add(row * H + u, dh[u], 1);
                to.d_c0[d].add(row * H + u, dc[u], 1);
            }
        }
    }
    return to;
}

}  // namespace driver::oracle
