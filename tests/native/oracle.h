// What the kernels should compute, in float64, number by number, in the slow and obvious way: from the equations in
// src/unrolled/cells.py (forward) and src/unrolled/tape.py (backward). It takes the kernels' own descriptions.
#pragma once

#include <vector>

#include "checking.h"

namespace driver::oracle {

using Numbers = std::vector<double>;

// x as the operand of a product: with bf16 rounded to bfloat16, from float32, to nearest, ties to even.
double operand(bool bf16, double x);
Numbers operands(bool bf16, const float* x, int64_t n);

// A number, and the size of what was summed up and multiplied to make it: what its rounding error is in proportion to.
struct Measured {
    double value = 0, size = 0;
};

// One direction's weights in double, rounded if they are operands.
class Direction {
public:
    Direction(Cell cell, bool bf16, int64_t I, int64_t H, const Weights& weights);

    // W_ih x + b_ih; [G*H].
    void project(const float* x, Numbers& projected);
    void project(const double* x, Numbers& projected);
    // One step. h and c [H] are replaced; tape [tape_gates*H] is written: lstm i f g o, gru r z n W_hn h + b_hn.
    void step(const double* projected, double* h, double* c, double* tape);

    double largest_sum() const { return largest_; }  // of absolute values, of all sums made so far

private:
    double dot(const Numbers& matrix, int64_t row, const double* x, int64_t n, double start);

    Cell cell_;
    bool bf16_;
    int64_t I_, H_;
    Numbers ih_, hh_, bias_ih_, bias_hh_, rounded_, sums_;
    double largest_ = 0;
};

struct States {
    Numbers outputs;                      // [T B directions*H], zero at padding
    Numbers h_n[2], c_n[2];               // [B H]
    Numbers tape[2], c[2];                // [T B tape_gates*H], [T B H], zero at padding
    double size = 1;                      // of the largest sum or state, at least 1
};

// The forward run. With `follow`, the state before each step is the one that f.outputs and f.c hold (float32, written
// by a kernel), so that every step is judged on its own: rounding errors do not add up, and with bf16 the rounded
// operands are the kernel's own.
States forward(const Forward& f, bool follow = false);

// A gradient, element by element: its value, the sizes of its terms summed up, and the root of their squares' sum.
struct Gradient {
    Numbers value, size, square;

    void start(int64_t n, const float* before);  // before: what it is added to, or null
    void add(int64_t i, Measured a, double b);
    double largest_size() const;
    double largest_root() const;
};

struct Gradients {
    Gradient d_x;                                                  // [T B I]
    Gradient d_table[2], d_h0[2], d_c0[2];                         // [V G*H] [B H] [B H]
    Gradient d_ih[2], d_hh[2], d_bias_ih[2], d_bias_hh[2];
};

// The backward run from b.outputs, b.tape and b.c. Those of b's gradients that are added to and not null are what the
// sums start from.
Gradients backward(const Backward& b);

}  // namespace driver::oracle
