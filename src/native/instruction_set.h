// Included once by each isa_*.cc, which defines
//   UNROLLED_ISA    the namespace,      UNROLLED_TABLE  the name of its table,
//   UNROLLED_LANES  floats in a vector, UNROLLED_BF16   whether there are bfloat16 dot products.
#include <chrono>

#include "output.h"
#include "recurrence.h"
#include "writing.h"

namespace unrolled {
namespace UNROLLED_ISA {
namespace {

template <class Number, class Work>
auto for_cell(Cell cell, Work work) {
    switch (cell) {
        case Cell::rnn: return work(std::integral_constant<Cell, Cell::rnn>{});
        case Cell::rnn_relu: return work(std::integral_constant<Cell, Cell::rnn_relu>{});
        case Cell::lstm: return work(std::integral_constant<Cell, Cell::lstm>{});
        default: return work(std::integral_constant<Cell, Cell::gru>{});
    }
}
// work(Number{}, std::integral_constant<Cell, C>{})
template <class Work>
auto dispatch(Cell cell, bool bf16, Work work) {
    if (bf16) return for_cell<BFloat16>(cell, [&](auto c) { return work(BFloat16{}, c); });
    return for_cell<Float32>(cell, [&](auto c) { return work(Float32{}, c); });
}

size_t packed_size_entry(Cell cell, bool bf16, bool backward, int64_t I, int64_t H) {
    return dispatch(cell, bf16, [&](auto number, auto c) {
        return packed_size_of<decltype(number), decltype(c)::value>(backward, I, H);
    });
}
void pack_entry(Cell cell, bool bf16, bool backward, int64_t I, int64_t H, const Weights& w, std::byte* into, int threads) {
    dispatch(cell, bf16, [&](auto number, auto c) {
        pack_weights<decltype(number), decltype(c)::value>(backward, I, H, w, into, threads);
    });
}
size_t packed_linear_size_entry(bool bf16, int64_t N, int64_t K) {
    return bf16 ? packed_linear_size_of<BFloat16>(N, K) : packed_linear_size_of<Float32>(N, K);
}
void pack_linear_entry(bool bf16, int64_t N, int64_t K, const float* weight, std::byte* into, int threads) {
    bf16 ? pack_linear_weights<BFloat16>(N, K, weight, into, threads) : pack_linear_weights<Float32>(N, K, weight, into, threads);
}
void forward_entry(const Forward& f, int threads) {
    dispatch(f.cell, f.bf16, [&](auto number, auto c) { forward_layer<decltype(number), decltype(c)::value>(f, threads); });
}
void backward_entry(const Backward& b, int threads) {
    dispatch(b.cell, b.bf16, [&](auto number, auto c) { backward_layer<decltype(number), decltype(c)::value>(b, threads); });
}
void linear_entry(const Linear& l, int threads) {
    l.bf16 ? linear_layer<BFloat16>(l, threads) : linear_layer<Float32>(l, threads);
}
void cross_entropy_entry(const CrossEntropy& c, int threads) {
    c.bf16 ? cross_entropy_layer<BFloat16>(c, threads) : cross_entropy_layer<Float32>(c, threads);
}
void write_entry(const Writing& w, int threads) {
    dispatch(w.cell, w.bf16, [&](auto number, auto c) { write_text<decltype(number), decltype(c)::value>(w, threads); });
}

// A tile whose operands never leave the first cache: nothing but multiply-adds can hold it up.
template <class Number>
double peak_of(int threads, double seconds) {
    constexpr int NV = 4, R = max_rows(NV);
    constexpr int64_t K = 64;
    double flop = 0;
    Barrier barrier;
    std::chrono::duration<double> taken{};
    parallel(threads, [&](int index, int count) {
        NoDenormals mode;
        alignas(64) ElementOf<Number> panel[K * NV * L], rows[R][K];
        for (auto& x : panel) x = Number::put(0.5f);
        for (auto& row : rows)
            for (auto& x : row) x = Number::put(0.001f);
        const ElementOf<Number>* pointers[R];
        for (int r = 0; r < R; ++r) pointers[r] = rows[r];
        Sums<R, NV> sums{};
        barrier.wait(count);
        const auto began = std::chrono::steady_clock::now();
        double done = 0;
        while (std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count() < seconds)
            for (int i = 0; i < 1000; ++i) {
                multiply<Number, R, NV>(sums, pointers, 0, panel, K);
                asm volatile("" : "+m"(sums), "+m"(panel), "+m"(rows));
                done += 2.0 * R * NV * L * K;
            }
        const auto mine = std::chrono::steady_clock::now() - began;
        for (int i = 0; i < count; ++i) {
            if (i == index) {
                flop += done;
                taken = std::max<std::chrono::duration<double>>(taken, mine);
            }
            barrier.wait(count);
        }
    });
    return flop / taken.count();
}
double peak_entry(bool bf16, int threads, double seconds) {
    return bf16 ? peak_of<BFloat16>(threads, seconds) : peak_of<Float32>(threads, seconds);
}

}  // namespace
}  // namespace UNROLLED_ISA

#define UNROLLED_QUOTE_(x) #x
#define UNROLLED_QUOTE(x) UNROLLED_QUOTE_(x)

extern const Kernels UNROLLED_TABLE;
const Kernels UNROLLED_TABLE = {
    UNROLLED_QUOTE(UNROLLED_ISA),
    UNROLLED_ISA::L,
    UNROLLED_ISA::packed_size_entry,
    UNROLLED_ISA::pack_entry,
    UNROLLED_ISA::packed_linear_size_entry,
    UNROLLED_ISA::pack_linear_entry,
    UNROLLED_ISA::forward_entry,
    UNROLLED_ISA::backward_entry,
    UNROLLED_ISA::linear_entry,
    UNROLLED_ISA::cross_entropy_entry,
    UNROLLED_ISA::write_entry,
    UNROLLED_ISA::peak_entry,
};

}  // namespace unrolled
