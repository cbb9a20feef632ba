// The same bits on different ways: a row alone and among others; a sequence whole and piece by piece.
#include <algorithm>

#include "samples.h"

namespace driver {
namespace {

// --- rows

// The inputs of some rows of a sample, in memory of their own.
struct Rows {
    Rows(const Sample& sample, const std::vector<int64_t>& rows) {
        const auto [T, B, I, H, block, with] = sample.size;
        const auto n = static_cast<int64_t>(rows.size());
        f = sample.forward();
        f.extent.B = n;
        const auto pick = [&](auto& to, const auto& from, int64_t outer, int64_t width) {  // [outer B width]
            using Memory = std::remove_reference_t<decltype(to)>;
            if (from.data() == nullptr) return;
            to = Memory(outer * n * width);
            for (int64_t o = 0; o < outer; ++o)
                for (int64_t i = 0; i < n; ++i)
                    for (int64_t k = 0; k < width; ++k)
                        to[(o * n + i) * width + k] = from[(o * B + rows[i]) * width + k];
        };
        pick(lengths, sample.lengths, 1, 1);
        pick(ids, sample.ids, T, 1);
        f.extent.lengths = lengths.data();
        f.inputs.ids = ids.data();
        if (sample.x.data() != nullptr) {
            x = Floats(T * n * I);
            for (int64_t t = 0; t < T; ++t)
                for (int64_t i = 0; i < n; ++i)
                    for (int64_t k = 0; k < I; ++k)
                        x[(t * n + i) * I + k] = sample.x[t * sample.x_step + rows[i] * sample.x_row + k];
            f.inputs.x = x.data();
            f.inputs.step = n * I;
            f.inputs.row = I;
        }
        for (int d = 0; d < sample.directions; ++d) {
            pick(reset[d], sample.reset[d], T, 1);
            pick(h0[d], sample.h0[d], 1, H);
            pick(c0[d], sample.c0[d], 1, H);
            f.extent.reset[d] = reset[d].data();
            f.h0[d] = h0[d].data();
            f.c0[d] = c0[d].data();
        }
    }

    Forward f;
    Guarded<int64_t> lengths, ids;
    Guarded<uint8_t> reset[2];
    Floats x, h0[2], c0[2];
};

void check_rows(const std::string& set, const Sample& sample) {
    Group& to = group("rows alone " + set);
    const auto [T, B, I, H, block, with] = sample.size;
    const int64_t stride = sample.directions * H;
    const Packs packs(sample, false, 1);
    Forward f = sample.forward();
    const ForwardMemory all(f, false);
    all.attach(f);
    packs.attach(f.packed);
    kernels().forward(f, 2);

    const auto check = [&](const std::vector<int64_t>& rows, int threads, bool packed) {
        Rows some(sample, rows);
        const ForwardMemory memory(some.f, false);
        memory.attach(some.f);
        if (packed) packs.attach(some.f.packed);
        kernels().forward(some.f, threads);
        const auto n = static_cast<int64_t>(rows.size());
        bool same = true;
        for (int64_t i = 0; i < n; ++i) {
            const int64_t row = rows[i];
            const auto equal = [&](const Floats& a, int64_t at_a, const Floats& b, int64_t at_b, int64_t width) {
                same = same && std::memcmp(&a[at_a], &b[at_b], width * 4) == 0;
            };
            for (int64_t t = 0; t < T; ++t)
                equal(memory.outputs, (t * n + i) * stride, all.outputs, (t * B + row) * stride, stride);
            for (int d = 0; d < sample.directions; ++d) {
                equal(memory.h_n[d], i * H, all.h_n[d], row * H, H);
                if (sample.cell == Cell::lstm) equal(memory.c_n[d], i * H, all.c_n[d], row * H, H);
            }
        }
        to.check(same, described(sample, set, threads, packed),
                 std::to_string(n) + " rows from " + std::to_string(rows[0]) + " have other bits than among all");
    };
    for (int64_t row = 0; row < B; row += options.quick ? 5 : thread_sanitizer ? 12 : 3)
        for (const int threads : {1, 2, 3})
            for (const bool packed : {false, true}) check({row}, threads, packed);
    // A handful, in another order: other tiles, and, where there is much to do, shared by units.
    for (const int threads : {1, 2, 3}) {
        check({B - 1, 0}, threads, false);
        check({3, 2, 7, 5, 1}, threads, threads == 2);
        check({10, 8, 9, 4, 2, 0, 1, 11}, threads, threads == 3);
    }
}

// --- pieces

void check_pieces(const std::string& set, const Sample& sample) {
    Group& to = group("piece by piece " + set);
    const auto [T, B, I, H, block, with] = sample.size;
    const bool lstm = sample.cell == Cell::lstm;
    const Packs forward_packs(sample, false, 1), backward_packs(sample, true, 1);

    const Forward f = sample.forward();
    Forward whole = f;
    const ForwardMemory all(f, true);
    all.attach(whole);
    forward_packs.attach(whole.packed);
    kernels().forward(whole, 2);
    Backward b = sample.backward(all);
    const BackwardMemory want(b);
    want.attach(b);
    backward_packs.attach(b.packed);
    kernels().backward(b, 2);

    for (const int threads : {1, 3}) {
        const std::string where = described(sample, set, threads, true);
        struct Piece {
            int64_t first, steps;  // in the order of time
            Guarded<int64_t> lengths;
            Floats h0, c0;
            ForwardMemory made;
            Forward f;
        };
        std::vector<Piece> pieces;
        Floats h = sample.h0[0].copy(), c = lstm ? sample.c0[0].copy() : Floats();
        bool same = true;
        for (int64_t s = 0; s < T; s += block) {
            const int64_t steps = std::min(block, T - s), first = f.reverse[0] ? T - s - steps : s;
            Forward part = f;
            part.extent.T = steps;
            Guarded<int64_t> lengths;
            if (sample.lengths.data() != nullptr) {
                lengths = Guarded<int64_t>(B);
                for (int64_t row = 0; row < B; ++row)
                    lengths[row] = std::clamp<int64_t>(sample.lengths[row] - first, 0, steps);
            }
            part.extent.lengths = lengths.data();
            if (f.extent.reset[0]) part.extent.reset[0] = f.extent.reset[0] + first * B;
            if (f.inputs.ids) part.inputs.ids = f.inputs.ids + first * B;
            if (f.inputs.x) part.inputs.x = f.inputs.x + first * f.inputs.step;
            part.h0[0] = h.data();
            part.c0[0] = c.data();
            ForwardMemory made(part, true);
            made.attach(part);
            if (threads == 1) forward_packs.attach(part.packed);
            kernels().forward(part, threads);
            same = same && std::memcmp(made.outputs.data(), &all.outputs[first * B * H],
                                       (steps * B * H) * 4) == 0;
            Floats h_after = made.h_n[0].copy(), c_after = made.c_n[0].copy();
            pieces.push_back({first, steps, std::move(lengths), std::move(h), std::move(c), std::move(made), part});
            h = std::move(h_after);
            c = lstm ? std::move(c_after) : Floats();
        }
        to.check(same, where, "outputs: other bits than the whole's");
        check_same(to, where, "h_n", h.data(), all.h_n[0].data(), h.size());
        if (lstm) check_same(to, where, "c_n", c.data(), all.c_n[0].data(), c.size());

        const BackwardMemory got(b);
        Floats d_h, d_c;
        for (auto piece = pieces.rbegin(); piece != pieces.rend(); ++piece) {
            Backward part = b;
            part.extent = piece->f.extent;
            part.inputs = piece->f.inputs;
            part.h0[0] = piece->h0.data();
            part.c0[0] = piece->c0.data();
            part.outputs = piece->made.outputs.data();
            part.tape[0] = piece->made.tape[0].data();
            part.c[0] = piece->made.c[0].data();
            if (b.d_outputs) part.d_outputs = b.d_outputs + piece->first * b.d_step;
            if (b.d_c[0]) part.d_c[0] = b.d_c[0] + piece->first * B * H;
            if (piece != pieces.rbegin()) {
                part.d_h_n[0] = d_h.data();
                part.d_c_n[0] = d_c.data();
            }
            if (threads != 1) part.packed[0] = nullptr;
            got.attach(part);
            if (part.d_x) part.d_x += piece->first * B * I;
            Floats next_h(B * H, nan), next_c = lstm ? Floats(B * H, nan) : Floats();
            part.d_h0[0] = next_h.data();
            part.d_c0[0] = next_c.data();
            kernels().backward(part, threads);
            d_h = std::move(next_h);
            d_c = std::move(next_c);
        }
        std::memcpy(got.d_h0[0].data(), d_h.data(), (B * H) * 4);
        if (lstm) std::memcpy(got.d_c0[0].data(), d_c.data(), (B * H) * 4);
        check_same_backward(to, where, got, want);
    }
}

}  // namespace

void check_bits() {
    std::vector<Size> batches = {
        {3, 37, 33, 65, big_block, ragged | both},              // alone: packed on the way
        {4, 37, 17, 16, big_block, resets | reversed},          // alone: packed on the way, four steps
        {9, 37, 5, 33, big_block, ragged | resets | both | strided},
        {5, 37, 3, 31, big_block, ragged | resets | lookup},
        {3, 37, 128, 208, big_block, both | resets},            // alone: shared by units and packed on the way
        {6, 12, 65, 70, big_block, ragged | lookup | reversed},
        {50, 12, 64, 128, big_block, ragged | resets | both},   // alone: inputs multiplied beside the recurrence
        {66, 12, 192, 134, big_block, ragged | reversed | strided},
    };
    std::vector<Size> sequences = {
        {11, 7, 17, 33, 4, ragged | resets},
        {13, 5, 9, 16, 5, ragged | resets | reversed | strided},
        {10, 6, 5, 31, 3, ragged | resets | reversed | lookup | some_null},
        {12, 40, 33, 48, 4, ragged | strided},
        {8, 3, 3, 5, 1, resets | lookup},
        {9, 4, 65, 70, 4, ragged | resets | reversed},          // shared by units
        {24, 29, 7, 19, 11, ragged | resets | some_null},       // more rows than one pass takes
        {7, 4, 1, 1, 2, ragged | reversed | no_bias},
    };
    if (options.quick) {
        batches = {{3, 12, 5, 17, big_block, ragged | both | resets}};
        sequences = {{7, 5, 5, 17, 3, ragged | resets | reversed}, {5, 12, 3, 9, 2, ragged | lookup}};
    } else if (thread_sanitizer) {  // slow: what is shared by rows, and what by units
        batches.erase(batches.begin(), batches.begin() + 4);
        sequences = {sequences[3], sequences[5]};
    }
    for (const std::string& set : runnable_sets()) {
        use_instruction_set(set.c_str());
        for (const Cell cell : cells)
            for (const bool bf16 : {false, true}) {
                for (size_t i = 0; i < batches.size(); ++i)
                    check_rows(set, Sample(batches[i], cell, bf16, 200 + i));
                for (size_t i = 0; i < sequences.size(); ++i)
                    check_pieces(set, Sample(sequences[i], cell, bf16, 300 + i));
            }
    }
}

}  // namespace driver
