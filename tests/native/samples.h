// Samples of layers: everything that a layer reads, by size and kind, and guarded memory for what it writes.
#pragma once

#include "checking.h"
#include "oracle.h"

namespace driver {

enum : unsigned {
    ragged = 1,       // lengths from 0 to T in any order
    resets = 2,       // states that count as zero before some steps
    reversed = 4,     // from the last step to the first; with `both`: the first direction is the reverse one
    both = 8,         // two directions, the second one reverse
    lookup = 16,      // ids and a table
    strided = 32,     // x and the outputs' gradient lie in larger arrays
    no_bias = 64,     // neither bias
    some_null = 128,  // some of the gradients that the backward reads are null, and a bias
};

constexpr int64_t big_block = 1000;  // longer than any sequence here

struct Size {
    int64_t T, B, I, H, block;
    unsigned with;
};

struct ForwardMemory;

// A layer's inputs. Padding of x, ids and gradients, and the gaps between strides, hold NaN and huge numbers.
class Sample {
public:
    Sample(const Size& size, Cell cell, bool bf16, uint64_t seed);

    // The descriptions, without the memory for what is written.
    Forward forward() const;
    Backward backward(const ForwardMemory& made) const;

    int64_t G() const { return gates(cell); }
    int64_t length(int64_t row) const { return lengths.data() ? lengths[row] : size.T; }
    // Whether (t, row) is one of the row's own steps.
    bool own(int64_t t, int64_t row) const { return t < length(row); }

    Size size;
    Cell cell;
    bool bf16;
    int directions;
    int64_t symbols = 0, x_step = 0, x_row = 0, d_step = 0, d_row = 0;
    Guarded<int64_t> lengths, ids;
    Guarded<uint8_t> reset[2];
    Floats x, table[2], ih[2], hh[2], bias_ih[2], bias_hh[2], h0[2], c0[2];
    Floats d_outputs, d_h_n[2], d_c_n[2], d_c[2];
    std::string where;  // for messages
};

// What a forward run writes, NaN before.
struct ForwardMemory {
    ForwardMemory(const Forward& f, bool training);
    // As if an exact layer had written it.
    ForwardMemory(const Forward& f, const oracle::States& states);
    void attach(Forward& f) const;

    bool training;
    Floats outputs, h_n[2], c_n[2], tape[2], c[2];
};

// What a backward run writes: NaN before, or, where it is added to, random numbers (the same ones for the same sizes).
struct BackwardMemory {
    BackwardMemory() = default;
    explicit BackwardMemory(const Backward& b);
    void attach(Backward& b) const;

    Floats d_x, d_table[2], d_h0[2], d_c0[2], d_ih[2], d_hh[2], d_bias_ih[2], d_bias_hh[2];
};

// Packed weights of both directions, by the kernels in use.
struct Packs {
    Packs(const Sample& sample, bool backward, int threads);
    void attach(Packed (&to)[2]) const;

    PackedMemory memory[2];
};

// Checks that both hold the same bits: of tape and c only at rows' own steps, elsewhere they are undefined.
void check_same_forward(Group& to, const std::string& where, const Sample& sample, const ForwardMemory& a,
                        const ForwardMemory& b);
void check_same_backward(Group& to, const std::string& where, const BackwardMemory& a, const BackwardMemory& b);

// For messages: the sample and how it is run.
std::string described(const Sample& sample, const std::string& set, int threads, bool packed);

}  // namespace driver
