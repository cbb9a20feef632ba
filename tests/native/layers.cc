// Layers against the oracle, and for the same bits with any number of threads and however weights are packed.
#include "oracle.h"
#include "samples.h"

namespace driver {
namespace {

// Few sizes for an emulated processor: empty ones, weights packed on the way, shared by rows and by units, and sums
// over more rows than one pass takes.
constexpr Size quick_sizes[] = {
    {0, 3, 2, 5, 4, ragged | both | lookup},
    {3, 0, 5, 7, 2, ragged | resets},
    {1, 1, 1, 1, 1, 0},
    {2, 2, 17, 5, 1, ragged | both | strided},
    {7, 5, 5, 15, 3, ragged | resets | both | some_null},
    {5, 7, 3, 17, big_block, ragged | lookup | both | resets},
    {3, 8, 31, 33, 2, both | resets | reversed},
    {12, 29, 1, 3, 11, resets | strided},
    {49, 1, 64, 131, 20, ragged | reversed},
};

// The thread sanitizer is slow as well: sizes large enough for several threads, by rows and by units.
constexpr Size threaded_sizes[] = {
    {3, 0, 5, 7, 2, ragged | resets},
    {7, 5, 5, 15, 3, ragged | resets | both | some_null},
    {9, 20, 17, 33, 5, ragged | resets | both | reversed},
    {5, 11, 33, 70, 2, both | resets},
    {5, 11, 33, 70, 3, ragged | lookup},
    {3, 1, 128, 250, 2, both | resets},
    {12, 29, 7, 19, 11, resets | strided},
    {67, 1, 64, 130, big_block, resets | both},
};

constexpr Size sizes[] = {
    // nothing to compute
    {0, 4, 5, 7, 4, 0},
    {0, 3, 2, 5, 4, ragged | both | lookup},
    {3, 0, 5, 7, 2, ragged | resets},
    {3, 0, 4, 3, 2, lookup | both},
    // T*B <= 4: forward packs weights on the way
    {1, 1, 1, 1, 1, 0},
    {1, 1, 3, 5, 1, both | resets},
    {2, 2, 1, 3, 1, ragged | both},
    {4, 1, 16, 16, 3, reversed},
    {2, 2, 70, 33, big_block, both | some_null | strided},
    {1, 3, 65, 48, 1, resets},
    {1, 4, 17, 5, 1, lookup | some_null},
    {3, 1, 128, 250, 2, both | resets},  // and shared by units
    // one step, one row, one unit
    {1, 40, 5, 31, 1, strided},
    {1, 6, 33, 17, 3, resets | both | lookup},
    {5, 1, 31, 17, 2, reversed},
    {40, 1, 33, 65, 7, both | resets},
    {9, 4, 1, 1, 3, ragged | resets | both},
    // some of everything
    {9, 2, 15, 15, 3, ragged | reversed | strided},
    {7, 5, 17, 15, 3, ragged | resets | both},
    {6, 8, 16, 16, 6, strided},
    {6, 7, 48, 32, big_block, ragged | lookup | both | resets},
    {11, 3, 33, 31, 4, ragged | resets | reversed | lookup | some_null},
    {10, 13, 3, 17, 3, ragged | resets | both | strided | some_null},
    {13, 37, 17, 33, 5, ragged | resets | both | reversed},
    {8, 40, 65, 48, big_block, no_bias},
    {9, 6, 70, 65, 2, ragged | reversed | some_null | strided},
    {6, 17, 5, 65, 1, ragged | resets | reversed | no_bias},
    // few rows, large steps: shared by units
    {5, 11, 33, 70, 2, both | resets},
    {5, 11, 33, 70, 3, ragged | both | lookup | some_null},
    {7, 4, 65, 70, 4, ragged | resets | strided},
    // more rows than one pass of the weights' gradients takes; more steps than are projected at once
    {22, 29, 7, 19, 11, ragged | resets | both | strided},
    {19, 29, 7, 19, big_block, resets | no_bias},
    {70, 9, 3, 5, big_block, ragged | some_null},
    {200, 2, 4, 6, 32, ragged | resets | reversed},
    {300, 1, 4, 6, 64, reversed | lookup},
    // one row and many steps: the products with the inputs beside the recurrence, of as many inputs, fewer, and more, of
    // numbers of units that no piece divides
    {50, 1, 64, 64, 32, resets | both},
    {67, 1, 64, 128, big_block, reversed | no_bias | strided},
    {49, 1, 192, 131, 20, ragged | reversed},
};

constexpr double half_ulp = 0x1p-24;  // of 1 in float32: what one rounding may change, relative to its result

// A step's sums have some I + H terms, whose roundings, being as often up as down, come to sqrt(I + H) of one, and each
// gate another few. The state of the step before is the kernel's own.
double step_bound(const Sample& sample, const oracle::States& want) {
    return 2 * half_ulp * std::sqrt(static_cast<double>(sample.size.I + sample.size.H + 2)) * want.size;
}

// A gradient is a sum of `summands` terms, each from a sum of G*H terms; both sums' roundings count, in proportion to
// what was summed. What later steps rounded comes on top; it shrinks on the way.
//
// With bf16 the gradients before the gates are rounded to 8 bits where they become operands. There the oracle and a
// kernel round alike only until the small error that float32 has anyway puts a number on the other side of a border:
// that moves all that comes before it in time, and soon the two round independently, each off by 2^-9 of every operand.
// The differences add up as the root of the terms' squares. With one step there are none in what is no product, nor, a
// relu's gradient being exact, in what is one of a relu.
double gradient_bound(const Sample& sample, const oracle::Gradient& want, int64_t summands, bool product) {
    const double sums = static_cast<double>(summands + sample.G() * sample.size.H);
    const double float32 = 4 * half_ulp * std::sqrt(sums) * want.largest_size();
    const bool alike = sample.size.T == 1 && (!product || sample.cell == Cell::rnn_relu);
    return float32 + (sample.bf16 && !alike ? 0x1p-9 * want.largest_root() : 0);
}

bool zero(const float* from, int64_t n) {
    for (int64_t i = 0; i < n; ++i)
        if (from[i] != 0) return false;
    return true;
}

void compare_forward(Group& to, const std::string& where, const Sample& sample, const ForwardMemory& got,
                     const oracle::States& want, double bound) {
    const auto [T, B, I, H, block, with] = sample.size;
    const int64_t stride = sample.directions * H, width = tape_gates(sample.cell) * H;
    check_close(to, where, "outputs", got.outputs.data(), want.outputs.data(), T * B * stride, bound);
    bool padding = true;
    for (int64_t at = 0; at < T * B; ++at)
        if (!sample.own(at / B, at % B)) padding = padding && zero(&got.outputs[at * stride], stride);
    to.check(padding, where, "outputs are not zero at padding");
    for (int d = 0; d < sample.directions; ++d) {
        check_close(to, where, "h_n", got.h_n[d].data(), want.h_n[d].data(), B * H, bound);
        if (sample.cell == Cell::lstm)
            check_close(to, where, "c_n", got.c_n[d].data(), want.c_n[d].data(), B * H, bound);
        if (!got.training) continue;
        for (int64_t at = 0; at < T * B; ++at) {
            if (!sample.own(at / B, at % B)) continue;
            if (width > 0)
                check_close(to, where, "tape", &got.tape[d][at * width], &want.tape[d][at * width],
                            width, bound);
            if (sample.cell == Cell::lstm)
                check_close(to, where, "c", &got.c[d][at * H], &want.c[d][at * H], H, bound);
        }
    }
}

void compare_backward(Group& to, const std::string& where, const Sample& sample, const BackwardMemory& got,
                      const oracle::Gradients& want) {
    const auto [T, B, I, H, block, with] = sample.size;
    const auto close = [&](const char* what, const Floats& have, const oracle::Gradient& should, int64_t summands,
                           bool product = true) {
        if (have.data() == nullptr) return;
        check_close(to, where, what, have.data(), should.value.data(), have.size(),
                    gradient_bound(sample, should, summands, product));
    };
    close("d_x", got.d_x, want.d_x, sample.directions * sample.G() * H);
    bool padding = true;
    for (int64_t at = 0; got.d_x.data() != nullptr && at < T * B; ++at)
        if (!sample.own(at / B, at % B)) padding = padding && zero(&got.d_x[at * I], I);
    to.check(padding, where, "d_x is not zero at padding");
    for (int d = 0; d < sample.directions; ++d) {
        close("d_table", got.d_table[d], want.d_table[d], T * B, false);
        close("d_h0", got.d_h0[d], want.d_h0[d], sample.G() * H);
        close("d_c0", got.d_c0[d], want.d_c0[d], sample.G() * H);
        close("d_ih", got.d_ih[d], want.d_ih[d], T * B);
        close("d_hh", got.d_hh[d], want.d_hh[d], T * B);
        close("d_bias_ih", got.d_bias_ih[d], want.d_bias_ih[d], T * B, false);
        close("d_bias_hh", got.d_bias_hh[d], want.d_bias_hh[d], T * B, false);
    }
}

struct Way {
    int threads;
    bool packed;
};

std::vector<Way> other_ways(const Sample& sample) {
    if (options.quick) return {{2, true}, {3, false}};
    std::vector<Way> ways = {{1, true}, {2, false}, {3, true}};
    // Two threads for each direction.
    if (sample.directions == 2) ways.push_back({4, false});
    return ways;
}

void check_forward(const std::string& set, const Sample& sample, const oracle::States* exact) {
    Group& right = group("forward " + set);
    Group& bits = group("forward bits " + set);
    const auto run = [&](bool training, Way way) {
        Forward f = sample.forward();
        ForwardMemory memory(f, training);
        memory.attach(f);
        if (!way.packed) {
            kernels().forward(f, way.threads);
        } else {
            const Packs packs(sample, false, way.threads);
            packs.attach(f.packed);
            kernels().forward(f, way.threads);
        }
        return memory;
    };
    const std::string where = described(sample, set, 1, false);
    const ForwardMemory first = run(true, {1, false});
    if (exact != nullptr) {
        Forward f = sample.forward();
        first.attach(f);
        const oracle::States followed = oracle::forward(f, true);
        compare_forward(right, where, sample, first, followed, step_bound(sample, followed));
        // In float32 also as a whole: weights shrink states to some 0.6, so that errors of all earlier steps come to
        // two or three of one step, not all at their largest.
        if (!sample.bf16)
            compare_forward(right, where + ", whole", sample, first, *exact, 2 * step_bound(sample, *exact));
    }
    check_same_forward(bits, where + ", inference", sample, run(false, {1, false}), first);
    for (const Way way : other_ways(sample)) {
        const std::string other = described(sample, set, way.threads, way.packed);
        check_same_forward(bits, other, sample, run(true, way), first);
        check_same_forward(bits, other + ", inference", sample, run(false, way), first);
    }
}

void check_backward(const std::string& set, const Sample& sample, const ForwardMemory& made,
                    const oracle::Gradients* want) {
    Group& right = group("backward " + set);
    Group& bits = group("backward bits " + set);
    const auto run = [&](Way way) {
        Backward b = sample.backward(made);
        BackwardMemory memory(b);
        memory.attach(b);
        if (!way.packed) {
            kernels().backward(b, way.threads);
        } else {
            const Packs packs(sample, true, way.threads);
            packs.attach(b.packed);
            kernels().backward(b, way.threads);
        }
        return memory;
    };
    const std::string where = described(sample, set, 1, false);
    const BackwardMemory first = run({1, false});
    if (want != nullptr) compare_backward(right, where, sample, first, *want);
    for (const Way way : other_ways(sample))
        check_same_backward(bits, described(sample, set, way.threads, way.packed), run(way), first);

    // Some gradients are not wanted: the others must not change.
    Random random(static_cast<uint64_t>(sample.size.T * 1000 + sample.size.H) + static_cast<uint64_t>(sample.cell));
    for (int i = 0; i < (options.quick ? 1 : 2); ++i) {
        Backward b = sample.backward(made);
        BackwardMemory memory(b);
        const auto drop = [&](Floats& gradient) {
            if (random.chance(0.5)) gradient = Floats();
        };
        drop(memory.d_x);
        for (int d = 0; d < sample.directions; ++d) {
            drop(memory.d_table[d]);
            drop(memory.d_ih[d]);
            drop(memory.d_hh[d]);
            drop(memory.d_bias_ih[d]);
            drop(memory.d_bias_hh[d]);
        }
        memory.attach(b);
        kernels().backward(b, 1 + i);
        check_same_backward(bits, where + ", some not wanted", memory, first);
    }
}

}  // namespace

void check_layers() {
    const std::vector<std::string> sets = runnable_sets();
    // Groups in the order of the sets.
    for (const std::string& set : sets)
        for (const char* name : {"forward ", "forward bits ", "backward ", "backward bits "}) group(name + set);
    std::vector<Size> chosen(std::begin(sizes), std::end(sizes));
    if (thread_sanitizer) chosen.assign(std::begin(threaded_sizes), std::end(threaded_sizes));
    if (options.quick) chosen.assign(std::begin(quick_sizes), std::end(quick_sizes));
    for (size_t i = 0; i < chosen.size(); ++i)
        for (const Cell cell : cells)
            for (const bool bf16 : {false, true}) {
                const Sample sample(chosen[i], cell, bf16, i + 1);
                Forward f = sample.forward();
                if (thread_sanitizer) {  // under which the oracle takes minutes, and says nothing new
                    const ForwardMemory made(f, true);
                    made.attach(f);
                    kernels().forward(f, 1);
                    for (const std::string& set : sets) {
                        use_instruction_set(set.c_str());
                        check_forward(set, sample, nullptr);
                        check_backward(set, sample, made, nullptr);
                    }
                    continue;
                }
                // The backward is given what an exact forward makes: it is judged on its own, and one oracle serves all
                // instruction sets.
                const oracle::States exact = oracle::forward(f);
                const ForwardMemory made(f, exact);
                Backward b = sample.backward(made);
                const BackwardMemory before(b);
                before.attach(b);
                const oracle::Gradients want = oracle::backward(b);
                for (const std::string& set : sets) {
                    use_instruction_set(set.c_str());
                    check_forward(set, sample, &exact);
                    check_backward(set, sample, made, &want);
                }
            }
}

// ------------------------------------------------------------------------------- the oracle by finite differences

void check_oracle() {
    Group& to = group("oracle: finite differences");
    constexpr Size tiny[] = {
        {3, 2, 2, 2, 2, ragged | resets | both},
        {4, 3, 1, 3, 2, ragged | reversed},
        {3, 2, 3, 2, 2, resets | lookup | both},
        {2, 2, 2, 3, 1, strided | some_null},
    };
    for (size_t i = 0; i < std::size(tiny); ++i)
        for (const Cell cell : cells) {
            const Sample sample(tiny[i], cell, false, 100 + i);
            const auto [T, B, I, H, block, with] = sample.size;
            // The loss whose gradient the backward computes.
            const auto loss = [&] {
                const oracle::States s = oracle::forward(sample.forward());
                double sum = 0;
                for (int d = 0; d < sample.directions; ++d) {
                    for (int64_t j = 0; j < B * H; ++j) {
                        if (sample.d_h_n[d].data()) sum += s.h_n[d][j] * sample.d_h_n[d][j];
                        if (sample.d_c_n[d].data()) sum += s.c_n[d][j] * sample.d_c_n[d][j];
                    }
                    for (int64_t at = 0; at < T * B; ++at) {
                        if (!sample.own(at / B, at % B)) continue;
                        for (int64_t u = 0; u < H; ++u) {
                            const int64_t in_d = at / B * sample.d_step + at % B * sample.d_row + d * H + u;
                            const auto out = at * sample.directions * H + d * H + u;
                            if (sample.d_outputs.data()) sum += s.outputs[out] * sample.d_outputs[in_d];
                            if (sample.d_c[d].data()) sum += s.c[d][at * H + u] * sample.d_c[d][at * H + u];
                        }
                    }
                }
                return sum;
            };
            const ForwardMemory made(sample.forward(), oracle::forward(sample.forward()));
            const oracle::Gradients got = oracle::backward(sample.backward(made));
            // Central differences over two widths; their errors of second order cancel (Richardson). What remains is
            // the rounding of the tape and of the moved inputs to float32.
            const auto slope = [&](float& number) {
                const float old = number;
                const auto difference = [&](float width) {
                    number = old + width;
                    const double above = loss(), high = number;
                    number = old - width;
                    const double below = loss(), low = number;
                    number = old;
                    return (above - below) / (high - low);
                };
                return (4 * difference(0x1p-8f) - difference(0x1p-7f)) / 3;
            };
            const auto compare = [&](const char* what, const Floats& inputs, const oracle::Gradient& gradient) {
                for (int64_t j = 0; j < inputs.size(); ++j) {
                    const double want = slope(inputs[j]), have = gradient.value[j];
                    to.check(std::abs(want - have) <= 1e-5 * (1 + std::abs(want)), sample.where,
                             std::string(what) + "[" + std::to_string(j) + "]: " + std::to_string(have) +
                                 ", by differences " + std::to_string(want));
                }
            };
            if (!(with & lookup))
                for (int64_t at = 0; at < T * B; ++at) {
                    if (!sample.own(at / B, at % B)) continue;
                    for (int64_t k = 0; k < I; ++k) {
                        const double want = slope(sample.x[at / B * sample.x_step + at % B * sample.x_row + k]);
                        const double have = got.d_x.value[at * I + k];
                        to.check(std::abs(want - have) <= 1e-5 * (1 + std::abs(want)), sample.where,
                                 "d_x: " + std::to_string(have) + ", by differences " + std::to_string(want));
                    }
                }
            for (int d = 0; d < sample.directions; ++d) {
                compare("d_table", sample.table[d], got.d_table[d]);
                compare("d_h0", sample.h0[d], got.d_h0[d]);
                compare("d_c0", sample.c0[d], got.d_c0[d]);
                compare("d_ih", sample.ih[d], got.d_ih[d]);
                compare("d_hh", sample.hh[d], got.d_hh[d]);
                // The table has it when inputs are looked up.
                if (!(with & lookup)) compare("d_bias_ih", sample.bias_ih[d], got.d_bias_ih[d]);
                compare("d_bias_hh", sample.bias_hh[d], got.d_bias_hh[d]);
            }
        }
    // Rounding to bfloat16: exact numbers stay, ties go to even, and what is above the largest becomes infinite.
    Group& rounding = group("oracle: bfloat16");
    const double pairs[][2] = {
        {1, 1},           {1 + 0x1p-7, 1 + 0x1p-7},           {1 + 0x1p-8, 1},          {1 + 3 * 0x1p-8, 1 + 0x1p-6},
        {-0.0, -0.0},     {1 + 0x1p-8 + 0x1p-20, 1 + 0x1p-7}, {-3.14159, -3.140625},    {0x1.fep127, 0x1.fep127},
        {3.4e38, infinity}, {-infinity, -infinity},
    };
    for (const auto& [from, wanted] : pairs)
        rounding.check(oracle::operand(true, from) == wanted, std::to_string(from), "rounded wrongly");
    rounding.check(std::isnan(oracle::operand(true, nan)), "nan", "rounded wrongly");
}

}  // namespace driver
