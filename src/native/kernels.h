// The contract of the native kernels: plain C++, no Python, no torch.
//
// A layer is one or two directions of one built-in cell over a whole sequence. Everything is float32 in memory;
// with `bf16` the operands of every product are rounded to bfloat16 first and summed in float32, and nothing else is.
//
// Every pointer's tensor shape stands beside it, time-major and row-major, the last dimension contiguous unless
// strides (in elements) are given. "in" is read, "out" written whole, "in/out" added to. No output may overlap an
// input or another output. A pointer that may be null says so. Nothing is checked here: callers check (bind.cc).
//
// T steps, B rows, I inputs, H hidden units, V symbols, G gates (rnn 1, gru 3, lstm 4), torch's gate order:
//   lstm i f g o   gru r z n
// The equations are in the docstrings of src/unrolled/cells.py and tape.py.
#pragma once

#include <cstddef>
#include <cstdint>

namespace unrolled {

enum class Cell : int { rnn = 0, rnn_relu = 1, lstm = 2, gru = 3 };

constexpr int gates(Cell cell) { return cell == Cell::lstm ? 4 : cell == Cell::gru ? 3 : 1; }

// What training keeps of a step besides its states, in multiples of H: lstm i f g o; gru r z n and W_hn h + b_hn;
// an rnn's gate is its state.
constexpr int tape_gates(Cell cell) { return cell == Cell::lstm || cell == Cell::gru ? 4 : 0; }

// The weights of one direction, in torch's layout.
struct Weights {
    const float* ih;       // [G*H I]; null when the inputs are looked up
    const float* hh;       // [G*H H]
    const float* bias_ih;  // [G*H] or null; not used when the inputs are looked up (the table has it)
    const float* bias_hh;  // [G*H] or null
};

// Weights laid out for the kernels, see `Kernels::pack`. Null: packed by the call itself, for its own time.
using Packed = const std::byte*;

// The inputs of a layer: vectors, or rows of a table named by number.
struct Inputs {
    const float* x;      // [T B I] with the strides below, last dimension contiguous; null when looked up
    int64_t step, row;   // strides of x
    const int64_t* ids;  // [T B], 0..V-1; null for vectors. At padding it may hold anything
    int64_t symbols;     // V
};

// Which steps of which rows are computed. Directions share it; the reverse one starts at each row's last own step.
struct Extent {
    int64_t T, B, I, H;
    const int64_t* lengths;  // [B], 0..T, any order; null: all rows have T steps
    const uint8_t* reset[2]; // [T B] per direction or null: the state counts as zero before this step
    int64_t block;           // weights' gradients are summed in pieces of so many steps (see Kernels::backward)
};

struct Forward {
    Cell cell;
    bool bf16;
    int directions;      // 1 or 2
    bool reverse[2];     // of each direction
    Extent extent;
    Inputs inputs;
    const float* table[2];  // [V G*H] per direction when looked up: W_ih e + b_ih for every symbol's vector e
    Weights weights[2];
    Packed packed[2];       // forward packs or null
    const float* h0[2];     // [B H] in
    const float* c0[2];     // [B H] in, lstm
    float* outputs;         // [T B directions*H] out: h; zero at padding
    float* h_n[2];          // [B H] out: h after each row's last step; an empty row's is h0
    float* c_n[2];          // [B H] out, lstm
    float* tape[2];         // [T B tape_gates*H] out; null: inference, nothing is kept. Undefined at padding
    float* c[2];            // [T B H] out: c after every step, lstm; null: inference. Undefined at padding
};

// Gradients of a layer, from the tape of its forward run. `outputs`, `tape` and `c` are what it wrote.
struct Backward {
    Cell cell;
    bool bf16;
    int directions;
    bool reverse[2];
    Extent extent;
    Inputs inputs;
    Weights weights[2];
    Packed packed[2];          // backward packs or null
    const float* h0[2];        // [B H] in
    const float* c0[2];        // [B H] in, lstm
    const float* outputs;      // [T B directions*H] in
    const float* tape[2];      // [T B tape_gates*H] in
    const float* c[2];         // [T B H] in, lstm
    const float* d_outputs;    // [T B directions*H] in, or null: zeros. With the strides below, last contiguous
    int64_t d_step, d_row;
    const float* d_h_n[2];     // [B H] in, or null: zeros
    const float* d_c_n[2];     // [B H] in, or null
    const float* d_c[2];       // [T B H] in, or null: gradient of every c, lstm
    float* d_x;                // [T B I] out, zero at padding; null: not wanted
    float* d_table[2];         // [V G*H] in/out; null: not wanted
    float* d_h0[2];            // [B H] out
    float* d_c0[2];            // [B H] out, lstm
    float* d_ih[2];            // [G*H I] in/out; null: not wanted
    float* d_hh[2];            // [G*H H] in/out; null: not wanted
    float* d_bias_ih[2];       // [G*H] in/out; null: not wanted
    float* d_bias_hh[2];       // [G*H] in/out; null: not wanted
};

// y = x W^T + b. A row of y depends on that row of x only, bit for bit, whatever M and the number of threads are.
struct Linear {
    bool bf16;
    int64_t M, N, K;
    const float* x;       // [M K] in, row stride x_row
    int64_t x_row;
    const float* weight;  // [N K] in
    const float* bias;    // [N] in, or null
    Packed packed;        // or null
    float* y;             // [M N] out
};

// Summed softmax cross-entropy of y = x W^T + b, in blocks of rows: the M x N scores never exist at once.
struct CrossEntropy {
    bool bf16;
    int64_t M, N, K;
    const float* x;           // [M K] in, row stride x_row
    int64_t x_row;
    const float* weight;      // [N K] in
    const float* bias;        // [N] in, or null
    const int64_t* targets;   // [M] in, 0..N-1, or negative: the row is not counted, may hold anything, and its d_x is zero
    double* loss;             // [1] out: nats
    float* d_x;               // [M K] out; null: gradients are not wanted
    float* d_weight;          // [N K] out
    float* d_bias;            // [N] out, or null
};

// Text written by a language model, one row: embedding or one-hot -> layers -> output -> the next symbol, repeated.
// How the next symbol is chosen is `unrolled.decoding.Sampling`; the same arithmetic in float64, in symbol order.
struct Writing {
    Cell cell;
    bool bf16;
    int layers;
    int64_t H, V;
    const float* table;           // [V G*H]: what each symbol contributes to the first layer, b_ih included
    const Weights* weights;       // [layers]; weights[0].ih is not used
    const Packed* packed;         // [layers] forward packs
    const float* output_weight;   // [V H]
    const float* output_bias;     // [V] or null
    Packed output_packed;
    float* h;                     // [layers H] in and out: the state
    float* c;                     // [layers H] in and out, lstm
    const uint8_t* barred;        // [V] true: not written; or null: all symbols may be
    const uint8_t* barred_first;  // [V] in the place of `barred` for the first symbol of this call; or null: `barred` is
    double repetition_penalty;    // 1: none
    int64_t repetition_window;
    double temperature;           // 0: the highest score, the first of equal ones
    int64_t top_k;                // 0: no limit
    double top_p;                 // 1: no limit
    const double* uniform;        // [count] in [0, 1): the random numbers, one a symbol
    int64_t count;
    int64_t* recent;              // [repetition_window] in and out: the last symbols read or written, oldest first, at
    int64_t* recent_count;        // [1] its end; how many there are
    int64_t last;                 // the symbol read first
    int64_t* written;             // [count] out; -1 from where there was nothing to choose by: of the symbols that are not
                                  // barred one score was NaN or +infinity, or all were -infinity, or there are none
};

// What one instruction set offers. `threads`: at most so many; results do not depend on it (sums over rows are split
// by what they are summed for, never by row).
struct Kernels {
    const char* name;
    int lanes;  // floats in a vector

    // Sizes in bytes of, and the layout of, one direction's packed weights: for forward W_ih (where I > 0) and W_hh,
    // for backward both transposed. `into` must be 64-byte aligned.
    size_t (*packed_size)(Cell, bool bf16, bool backward, int64_t I, int64_t H);
    void (*pack)(Cell, bool bf16, bool backward, int64_t I, int64_t H, const Weights&, std::byte* into, int threads);
    size_t (*packed_linear_size)(bool bf16, int64_t N, int64_t K);
    void (*pack_linear)(bool bf16, int64_t N, int64_t K, const float* weight, std::byte* into, int threads);

    void (*forward)(const Forward&, int threads);

    // The products that give the weights' gradients are taken over pieces of `extent.block` steps, counted from the
    // first step computed, and added up from the last piece to the first: a sequence gone through piece by piece
    // (each with T = block, the later ones first) therefore has the same sums bit for bit.
    void (*backward)(const Backward&, int threads);

    void (*linear)(const Linear&, int threads);
    void (*cross_entropy)(const CrossEntropy&, int threads);
    void (*write)(const Writing&, int threads);

    // FLOP/s of a loop that only multiplies and adds in registers: the machine's limit.
    double (*peak)(bool bf16, int threads, double seconds);
};

// --- instruction sets, see dispatch.cc

enum class Presence : int { in_use, available, not_on_this_processor, not_built };

struct InstructionSet {
    const char* name;
    Presence presence;
};

constexpr int instruction_set_count = 4;  // generic, avx2, avx512, avx512bf16: slowest first

// All of them, as they stand here.
void instruction_sets(InstructionSet (&into)[instruction_set_count]);

// Uses this set from now on. Throws std::invalid_argument with the reason where it cannot.
void use_instruction_set(const char* name);

// The kernels in use; the best set that this processor has unless another one was asked for.
const Kernels& kernels();

}  // namespace unrolled
