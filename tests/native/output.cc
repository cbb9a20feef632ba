// The linear layer and the cross-entropy against an oracle, and for the same bits on different ways.
#include "oracle.h"

namespace driver {
namespace {

constexpr double half_ulp = 0x1p-24;  // of 1 in float32

using oracle::Numbers;
using oracle::operand;
using oracle::operands;

// x W^T + b, and the largest sum of absolute terms.
struct Scores {
    Numbers value;
    double size = 0;

    Scores(bool bf16, int64_t M, int64_t N, int64_t K, const float* x, int64_t x_row, const float* weight,
           const float* bias) {
        const Numbers w = operands(bf16, weight, N * K);
        for (int64_t m = 0; m < M; ++m) {
            const Numbers row = operands(bf16, x + m * x_row, K);
            for (int64_t n = 0; n < N; ++n) {
                double sum = bias ? bias[n] : 0, absolute = std::abs(sum);
                for (int64_t k = 0; k < K; ++k) {
                    const double term = row[k] * w[n * K + k];
                    sum += term;
                    absolute += std::abs(term);
                }
                value.push_back(sum);
                if (std::isfinite(absolute)) size = std::max(size, absolute);
            }
        }
    }
};

std::string shape(const std::string& set, bool bf16, int64_t M, int64_t N, int64_t K) {
    return set + (bf16 ? " bf16" : " fp32") + " M=" + std::to_string(M) + " N=" + std::to_string(N) +
           " K=" + std::to_string(K);
}

// --- linear

void check_linear(bool bf16, int64_t M, int64_t N, int64_t K, bool with_bias) {
    Random random(static_cast<uint64_t>(M * 1000003 + N * 1009 + K));
    const int64_t x_row = K + (N % 2) * 3;
    Floats x(M > 0 ? (M - 1) * x_row + K : 0, nan);  // NaN in the gaps
    for (int64_t m = 0; m < M; ++m)
        for (int64_t k = 0; k < K; ++k) x[m * x_row + k] = random.between(-2, 2);
    const Floats weight = random_floats(random, N * K, -1, 1);
    const Floats bias = with_bias ? random_floats(random, N, -1, 1) : Floats();
    // One row is poisoned: its results must be, and no others.
    const int64_t poisoned = M > 3 ? M / 2 : -1;
    if (poisoned >= 0) x[poisoned * x_row + K / 2] = N % 3 == 0 ? nan : infinity;
    const Scores want(bf16, M, N, K, x.data(), x_row, weight.data(), bias.data());
    // As many roundings as terms, as often up as down.
    const double bound = 2 * half_ulp * std::sqrt(static_cast<double>(K + 1)) * want.size;

    for (const std::string& set : runnable_sets()) {
        use_instruction_set(set.c_str());
        Group& to = group("linear " + set);
        const std::string where = shape(set, bf16, M, N, K);
        PackedMemory packed(kernels().packed_linear_size(bf16, N, K));
        kernels().pack_linear(bf16, N, K, weight.data(), packed.data(), 2);
        const auto run = [&](int64_t first, int64_t rows, int threads, bool use_packed) {
            Floats y(rows * N, nan);
            kernels().linear({bf16, rows, N, K, x.data() + first * x_row, x_row, weight.data(), bias.data(),
                              use_packed ? packed.data() : nullptr, y.data()},
                             threads);
            return y;
        };
        const Floats all = run(0, M, 1, false);
        check_close(to, where, "y", all.data(), want.value.data(), M * N, bound);
        for (const int threads : {1, 2, 3})
            for (const bool use_packed : {false, true}) {
                if (threads == 1 && !use_packed) continue;
                const std::string how = where + ", " + std::to_string(threads) + " threads";
                check_same(to, how, "y", run(0, M, threads, use_packed).data(), all.data(), M * N);
            }
        // Some rows alone: packed on the way, shared by columns, in other tiles.
        for (const int64_t rows : {1, 2, 5, 17})
            for (const int threads : {1, 3}) {
                if (rows >= M) continue;
                const int64_t first = random.below(M - rows + 1);
                const std::string how = where + ", " + std::to_string(rows) + " rows alone, " + std::to_string(threads);
                check_same(to, how + " threads", "y", run(first, rows, threads, rows % 2 == 0).data(),
                           all.data() + first * N, rows * N);
            }
    }
}

// --- cross-entropy

// The gradients' terms: sizes summed up, and the largest one.
struct Sum {
    Numbers value, size, most;
    explicit Sum(int64_t n) : value(n), size(value), most(value) {}
    void add(int64_t i, double score, double score_size, double by) {
        value[i] += score * by;
        if (!std::isfinite(by)) return;
        size[i] += score_size * std::abs(by);
        most[i] = std::max(most[i], score_size * std::abs(by));
    }
    static double largest(const Numbers& of) {
        double most = 0;
        for (const double x : of) most = std::max(most, x);
        return most;
    }
};

enum class Kind { plain, none_counted, sharp, minus_infinity, poisoned };

void check_cross_entropy(bool bf16, int64_t M, int64_t N, int64_t K, bool with_bias, Kind kind) {
    Random random(static_cast<uint64_t>(M * 1000003 + N * 1009 + K) + static_cast<uint64_t>(kind));
    const int64_t x_row = K + (N % 2) * 5;
    const double scale = kind == Kind::sharp ? 30 : 1;  // scores farther apart than float32's exp reaches
    Floats x(M > 0 ? (M - 1) * x_row + K : 0, nan);
    for (int64_t m = 0; m < M; ++m)
        for (int64_t k = 0; k < K; ++k) x[m * x_row + k] = random.between(-2, 2) * static_cast<float>(scale);
    const Floats weight = random_floats(random, N * K, -1, 1);
    const Floats bias = with_bias ? random_floats(random, N, -1, 1) : Floats();
    if (kind == Kind::minus_infinity && with_bias) bias[N / 2] = -infinity;
    Guarded<int64_t> targets(M);
    for (int64_t& target : targets) {
        target = random.below(N);
        if (kind == Kind::minus_infinity && target == N / 2) target = 0;
        if (kind == Kind::none_counted || random.chance(0.2)) target = random.chance(0.5) ? -1 : -100;
    }
    for (int64_t m = 0; m < M; ++m)  // what is not counted may hold anything
        for (int64_t k = 0; k < K && targets[m] < 0; ++k) x[m * x_row + k] = k % 2 == 0 ? nan : infinity;
    if (kind == Kind::poisoned && M > 0) {
        for (int64_t k = 0; k < K; ++k) x[M / 2 * x_row + k] = k == K / 2 ? nan : 1;
        targets[M / 2] = 0;
    }

    const Scores scores(bf16, M, N, K, x.data(), x_row, weight.data(), bias.data());
    double loss = 0;
    Sum d_x(M * K), d_weight(N * K), d_bias(N);
    const Numbers w = operands(bf16, weight.data(), N * K);
    for (int64_t m = 0; m < M; ++m) {
        if (targets[m] < 0) continue;
        const Numbers row = operands(bf16, x.data() + m * x_row, K);
        const double* s = &scores.value[m * N];
        double most = -infinity, total = 0;
        for (int64_t n = 0; n < N; ++n) most = std::isnan(s[n]) ? s[n] : std::max(most, s[n]);
        for (int64_t n = 0; n < N; ++n) total += std::exp(s[n] - most);
        loss += std::log(total) - (s[targets[m]] - most);
        for (int64_t n = 0; n < N; ++n) {
            const double p = std::exp(s[n] - most) / total, hot = n == targets[m];
            const double d = operand(bf16, p - hot), size = std::isnan(p) ? 0 : p + hot;
            d_bias.add(n, p - hot, size, 1);
            for (int64_t k = 0; k < K; ++k) {
                d_x.add(m * K + k, d, size, w[n * K + k]);
                d_weight.add(n * K + k, d, size, row[k]);
            }
        }
    }
    // The scores' own error moves a probability by as much of itself; the sum of N exponentials, each of a few
    // roundings, by some sqrt(N); and sums over the rows are roundings again. With bf16 one probability or another may
    // be rounded to the other side, by 2^-8 of itself.
    const double score_error = 2 * half_ulp * (std::sqrt(static_cast<double>(K + 1)) * scores.size +
                                               std::sqrt(static_cast<double>(N)) + 4);
    const auto bound = [&](const Sum& sum, int64_t summands, bool of_operands) {
        return (2 * score_error + 4 * half_ulp * std::sqrt(static_cast<double>(summands))) * Sum::largest(sum.size) +
               (bf16 && of_operands ? 0x1p-8 * Sum::largest(sum.most) : 0);
    };

    struct Run {
        Guarded<double> loss;
        Floats d_x, d_weight, d_bias;
    };
    const auto run = [&](bool gradients, bool bias_too, int threads) {
        Run r{Guarded<double>(1, nan), {}, {}, {}};
        if (gradients) {
            r.d_x = Floats(M * K, nan);
            r.d_weight = Floats(N * K, nan);
            if (bias_too) r.d_bias = Floats(N, nan);
        }
        kernels().cross_entropy({bf16, M, N, K, x.data(), x_row, weight.data(), bias.data(), targets.data(),
                                 r.loss.data(), r.d_x.data(), r.d_weight.data(), r.d_bias.data()},
                                threads);
        return r;
    };
    for (const std::string& set : runnable_sets()) {
        use_instruction_set(set.c_str());
        Group& to = group("cross_entropy " + set);
        const std::string where = shape(set, bf16, M, N, K);
        const Run first = run(true, true, 1);
        const double got = first.loss[0];
        const bool near = std::abs(got - loss) <= score_error * static_cast<double>(M);
        to.check(std::isnan(loss) ? std::isnan(got) : near, where,
                 "loss is " + std::to_string(got) + " and should be " + std::to_string(loss));
        check_close(to, where, "d_x", first.d_x.data(), d_x.value.data(), M * K, bound(d_x, N, true));
        check_close(to, where, "d_bias", first.d_bias.data(), d_bias.value.data(), N, bound(d_bias, M, false));
        // A poisoned row's targets are counted, and so all of d_weight is NaN.
        check_close(to, where, "d_weight", first.d_weight.data(), d_weight.value.data(), N * K,
                    bound(d_weight, M, true));
        for (const int threads : {1, 2, 3})
            for (const int wanted : {0, 1, 2}) {
                if (threads == 1 && wanted == 2) continue;
                const Run other = run(wanted > 0, wanted > 1, threads);
                const std::string how = where + ", " + std::to_string(threads) + " threads";
                check_same(to, how, "loss", other.loss.data(), first.loss.data(), 1);
                if (wanted == 0) continue;
                check_same(to, how, "d_x", other.d_x.data(), first.d_x.data(), M * K);
                check_same(to, how, "d_weight", other.d_weight.data(), first.d_weight.data(), N * K);
                if (wanted > 1) check_same(to, how, "d_bias", other.d_bias.data(), first.d_bias.data(), N);
            }
    }
}

}  // namespace

void check_output() {
    std::vector<int64_t> Ms = {0, 1, 2, 3, 4, 5, 7, 31, 97, 300}, Ns = {1, 2, 3, 15, 16, 17, 63, 64, 65, 129, 300};
    std::vector<int64_t> Ks = {1, 3, 16, 33, 70, 131};
    if (options.quick) {
        Ms = {0, 1, 4, 7, 210};
        Ns = {1, 17, 33};
        Ks = {1, 5, 21};
    } else if (thread_sanitizer) {  // what threads share, and no more: the oracle takes long
        Ms = {1, 5, 210};
        Ns = {65, 300};
        Ks = {131};
    }
    // Groups in this order.
    for (const char* name : {"linear ", "cross_entropy "})
        for (const std::string& set : runnable_sets()) group(name + set);
    for (const bool bf16 : {false, true}) {
        int64_t turn = 0;
        for (const int64_t M : Ms)
            for (const int64_t N : Ns)
                // All M with all N; the K in turn.
                for (int i = 0; i < 2; ++i, ++turn)
                    check_linear(bf16, M, N, Ks[turn % Ks.size()], turn % 3 != 0);
        const auto both_biases = [&](int64_t M, int64_t N, int64_t K, Kind kind = Kind::plain) {
            check_cross_entropy(bf16, M, N, K, true, kind);
            check_cross_entropy(bf16, M, N, K, false, kind);
        };
        if (options.quick) {
            for (const int64_t M : {0, 1, 7}) both_biases(M, 19, 5);
            both_biases(33, 7, 3, Kind::sharp);
            both_biases(9, 40, 17, Kind::poisoned);
            continue;
        }
        if (thread_sanitizer) {
            both_biases(5, 65, 33);
            both_biases(300, 65, 33);
            continue;
        }
        for (const int64_t M : {0, 1, 7, 300})
            for (const int64_t N : {1, 2, 16, 65, 300}) {
                check_cross_entropy(bf16, M, N, Ks[turn % Ks.size()], turn % 2 == 0, Kind::plain);
                ++turn;
            }
        both_biases(600, 33, 17);  // three blocks of rows
        for (const Kind kind : {Kind::none_counted, Kind::sharp, Kind::minus_infinity, Kind::poisoned}) {
            both_biases(7, 65, 33, kind);
            both_biases(70, 19, 5, kind);
        }
        // So many columns that blocks have fewer rows.
        check_cross_entropy(bf16, 110, 40000, 2, true, Kind::plain);
    }
}

}  // namespace driver
