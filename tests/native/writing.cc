// Text written by the kernels against a scalar model: the same symbols, where no rounding can decide.
#include <numeric>

#include "oracle.h"

namespace driver {
namespace {

using oracle::Numbers;

struct Choosing {
    double temperature = 1, repetition_penalty = 1, top_p = 1;
    int64_t repetition_window = 8, top_k = 0;
    bool barred = false, barred_first = false;
};

// A language model with sharp scores, and how it writes.
class Writer {
public:
    Writer(Cell cell, bool bf16, int layers, int64_t H, int64_t V, const Choosing& choosing, uint64_t seed)
        : cell_(cell), bf16_(bf16), layers_(layers), H_(H), V_(V), choosing_(choosing), random_(seed) {
        const int64_t GH = gates(cell) * H;
        const double a = 1 / std::sqrt(static_cast<double>(H));
        table_ = random_floats(random_, V * GH, -2, 2);
        for (int layer = 0; layer < layers; ++layer) {
            if (layer > 0) ih_.push_back(random_floats(random_, GH * H, -2 * a, 2 * a));
            else ih_.emplace_back();
            hh_.push_back(random_floats(random_, GH * H, -a, a));
            const bool with_bias = random_.chance(0.7);
            bias_ih_.push_back(with_bias && layer > 0 ? random_floats(random_, GH, -0.5, 0.5) : Floats());
            bias_hh_.push_back(with_bias ? random_floats(random_, GH, -0.5, 0.5) : Floats());
        }
        const double sharp = a * (tape_gates(cell) > 0 ? 15 : 6);  // gates make states smaller
        output_weight_ = random_floats(random_, V * H, -sharp, sharp);
        if (random_.chance(0.7)) output_bias_ = random_floats(random_, V, -1, 1);
        h_ = random_floats(random_, layers * H, -1, 1);
        if (cell == Cell::lstm) c_ = random_floats(random_, layers * H, -1, 1);
        last_ = random_.below(V);
        recent_count_ = random_.below(choosing.repetition_window + 1);
        recent_ = Guarded<int64_t>(choosing.repetition_window, -1);  // beyond the count there is nothing to read
        for (int64_t i = 0; i < recent_count_; ++i) recent_[i] = random_.below(V);
        if (choosing.barred) {
            barred_ = Guarded<uint8_t>(V);
            for (uint8_t& b : barred_) b = random_.chance(0.3);
            barred_[random_.below(V)] = 0;
        }
        if (choosing.barred_first) {  // and what is barred later is barred at first too
            barred_first_ = Guarded<uint8_t>(V);
            const int64_t allowed = random_.below(V);
            for (int64_t j = 0; j < V; ++j) barred_first_[j] = (choosing.barred && barred_[j]) || random_.chance(0.5);
            if (!choosing.barred || !barred_[allowed]) barred_first_[allowed] = 0;
            else for (int64_t j = 0; j < V; ++j) barred_first_[j] = barred_[j];
        }
    }

    // Writes up to `most` symbols with the scalar model, and draws numbers that are not near a border. Stops before a
    // symbol whose choice hangs on less than `margin` (of a score or a probability).
    void imagine(int64_t most, double margin) {
        std::vector<oracle::Direction> layers;
        for (int layer = 0; layer < layers_; ++layer) layers.emplace_back(cell_, bf16_, H_, H_, weights(layer));
        want_h_.assign(h_.begin(), h_.end());
        want_c_.assign(layers_ * H_, 0);
        if (cell_ == Cell::lstm) want_c_.assign(c_.begin(), c_.end());
        want_recent_.assign(recent_.begin(), recent_.begin() + recent_count_);
        const int64_t GH = gates(cell_) * H_;
        int64_t last = last_;
        Numbers projected, tape(4 * H_), scores(V_);
        while (static_cast<int64_t>(want_.size()) < most) {
            const Numbers h_before = want_h_, c_before = want_c_;
            for (int layer = 0; layer < layers_; ++layer) {
                double* h = want_h_.data() + layer * H_;
                if (layer == 0) projected.assign(table_.data() + last * GH, table_.data() + (last + 1) * GH);
                else layers[layer].project(h - H_, projected);
                layers[layer].step(projected.data(), h, want_c_.data() + layer * H_, tape.data());
            }
            const double* top = want_h_.data() + (layers_ - 1) * H_;
            for (int64_t j = 0; j < V_; ++j) {
                double sum = output_bias_.data() ? output_bias_[j] : 0;
                for (int64_t k = 0; k < H_; ++k)
                    sum += oracle::operand(bf16_, output_weight_[j * H_ + k]) * oracle::operand(bf16_, top[k]);
                scores[j] = sum;
            }
            double uniform = 0;
            const int64_t symbol = choose(scores, margin, uniform);
            if (symbol < 0) {
                want_h_ = h_before;
                want_c_ = c_before;
                return;
            }
            want_.push_back(symbol);
            uniforms_.push_back(uniform);
            want_recent_.push_back(symbol);
            const auto held = static_cast<int64_t>(want_recent_.size());
            if (held > choosing_.repetition_window) want_recent_.erase(want_recent_.begin());
            last = symbol;
        }
    }

    int64_t imagined() const { return static_cast<int64_t>(want_.size()); }

    // Lets the kernels write the same text, in one call or two, and compares.
    void check(Group& to, const std::string& where, double bound) {
        std::vector<PackedMemory> memory;
        std::vector<Packed> packed;
        std::vector<Weights> all;
        for (int layer = 0; layer < layers_; ++layer) {
            all.push_back(weights(layer));
            memory.emplace_back(kernels().packed_size(cell_, bf16_, false, layer == 0 ? 0 : H_, H_));
            kernels().pack(cell_, bf16_, false, layer == 0 ? 0 : H_, H_, all.back(), memory.back().data(), 1);
            packed.push_back(memory.back().data());
        }
        PackedMemory output(kernels().packed_linear_size(bf16_, V_, H_));
        kernels().pack_linear(bf16_, V_, H_, output_weight_.data(), output.data(), 1);
        const int64_t count = imagined();
        Guarded<double> uniforms(count);
        std::copy(uniforms_.begin(), uniforms_.end(), uniforms.begin());

        struct Written {
            Floats h, c;
            Guarded<int64_t> recent, recent_count, symbols;
        };
        const auto write = [&](int threads, int64_t first_part) {
            Written w{h_.copy(), c_.copy(), recent_.copy(), Guarded<int64_t>(1, recent_count_),
                      Guarded<int64_t>(count, -1)};
            for (int64_t done = 0; done < count || (done == 0 && count == 0);) {
                const int64_t part = done == 0 ? first_part : count - done;
                Writing asked{};
                asked.cell = cell_;
                asked.bf16 = bf16_;
                asked.layers = layers_;
                asked.H = H_;
                asked.V = V_;
                asked.table = table_.data();
                asked.weights = all.data();
                asked.packed = packed.data();
                asked.output_weight = output_weight_.data();
                asked.output_bias = output_bias_.data();
                asked.output_packed = output.data();
                asked.h = w.h.data();
                asked.c = w.c.data();
                asked.barred = barred_.data();
                asked.barred_first = done == 0 ? barred_first_.data() : nullptr;
                asked.repetition_penalty = choosing_.repetition_penalty;
                asked.repetition_window = choosing_.repetition_window;
                asked.temperature = choosing_.temperature;
                asked.top_k = choosing_.top_k;
                asked.top_p = choosing_.top_p;
                asked.uniform = uniforms.data() + done;
                asked.count = part;
                asked.recent = w.recent.data();
                asked.recent_count = w.recent_count.data();
                asked.last = done == 0 ? last_ : w.symbols[done - 1];
                asked.written = w.symbols.data() + done;
                kernels().write(asked, threads);
                done += part;
                if (count == 0) break;
            }
            return w;
        };
        const Written first = write(1, count);
        bool same = true;
        int64_t differs = -1;
        for (int64_t i = 0; i < count && same; ++i)
            if (first.symbols[i] != want_[i]) {
                same = false;
                differs = i;
            }
        to.check(same, where, differs < 0 ? std::string() : "symbol " + std::to_string(differs) + " is " +
                                  std::to_string(first.symbols[differs]) + " and should be " +
                                  std::to_string(want_[differs]));
        if (same) {
            check_close(to, where, "h", first.h.data(), want_h_.data(), first.h.size(), bound);
            if (cell_ == Cell::lstm) check_close(to, where, "c", first.c.data(), want_c_.data(), first.c.size(), bound);
            bool recent = first.recent_count[0] == static_cast<int64_t>(want_recent_.size());
            for (size_t i = 0; recent && i < want_recent_.size(); ++i)
                recent = first.recent[static_cast<int64_t>(i)] == want_recent_[i];
            to.check(recent, where, "recent symbols are not the last ones");
        }
        const auto compare = [&](const Written& other, const std::string& how) {
            check_same(to, where + how, "symbols", other.symbols.data(), first.symbols.data(), count);
            check_same(to, where + how, "h", other.h.data(), first.h.data(), first.h.size());
            check_same(to, where + how, "c", other.c.data(), first.c.data(), first.c.size());
            check_same(to, where + how, "recent", other.recent.data(), first.recent.data(), first.recent.size());
        };
        for (const int threads : {2, 3}) compare(write(threads, count), ", " + std::to_string(threads) + " threads");
        if (count > 2) compare(write(1, count / 3), ", in two parts");
        check_poisoned(to, where, first.symbols, write);
        check_all_barred(to, where, write);
    }

private:
    // Where every symbol is barred, at once or after the first one, there is none to write.
    template <class Write>
    void check_all_barred(Group& to, const std::string& where, Write write) {
        const int64_t count = imagined();
        Guarded<uint8_t> all(V_, 1), first = barred_first_.data() ? barred_first_.copy() : Guarded<uint8_t>(V_);
        for (const bool at_first : {true, false}) {
            std::swap(at_first ? barred_first_ : barred_, all);
            if (!at_first) std::swap(barred_first_, first);
            const auto written = write(1, count).symbols;
            bool good = true;
            for (int64_t i = 0; i < count; ++i) good = good && (!at_first && i == 0 ? written[i] >= 0 : written[i] == -1);
            to.check(good, where + ", all symbols barred", "not -1 where none may be written");
            if (!at_first) std::swap(barred_first_, first);
            std::swap(at_first ? barred_first_ : barred_, all);
        }
    }

    // A symbol whose vector is NaN: what is written after it has been read is -1, and what before it, as ever.
    template <class Write>
    void check_poisoned(Group& to, const std::string& where, const Guarded<int64_t>& clean, Write write) {
        const int64_t count = clean.size();
        if (count == 0) return;
        const int64_t symbol = clean[count / 2];
        int64_t first = 0;
        for (; symbol != last_ && clean[first] != symbol; ++first) {}
        if (symbol != last_) ++first;
        const float old = std::exchange(table_[symbol * gates(cell_) * H_], nan);
        for (const int threads : {1, 3}) {
            const auto written = write(threads, count).symbols;
            bool good = true;
            for (int64_t i = 0; i < count; ++i) good = good && written[i] == (i < first ? clean[i] : -1);
            to.check(good, where + ", NaN in a symbol's vector", "not -1 from where it is read, or other before");
        }
        table_[symbol * gates(cell_) * H_] = old;
    }

    Weights weights(int layer) const {
        return {ih_[layer].data(), hh_[layer].data(), bias_ih_[layer].data(), bias_hh_[layer].data()};
    }

    // Draws a number for the next symbol, from the middle half of the symbol's share, and returns the symbol; -1 where
    // it hangs on less than `margin` of a score. An error of as much moves a sum of probabilities by a quarter of it.
    int64_t choose(Numbers scores, double margin, double& uniform) {
        const Guarded<uint8_t>& barred = want_.empty() && barred_first_.data() ? barred_first_ : barred_;
        for (int64_t j = 0; barred.data() != nullptr && j < V_; ++j)
            if (barred[j]) scores[j] = -infinity;
        std::vector<bool> seen(V_);
        for (const int64_t j : want_recent_) seen[j] = true;
        for (size_t j = 0; j < scores.size(); ++j)
            if (seen[j]) scores[j] *= scores[j] > 0 ? 1 / choosing_.repetition_penalty : choosing_.repetition_penalty;
        std::vector<size_t> order(scores.size());
        std::iota(order.begin(), order.end(), size_t{0});
        std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return scores[a] > scores[b]; });
        if (choosing_.temperature == 0) {
            if (order.size() > 1 && scores[order[0]] - scores[order[1]] < margin) return -1;
            return static_cast<int64_t>(order[0]);
        }
        Numbers p(scores.size());
        double total = 0;
        for (size_t j = 0; j < p.size(); ++j)
            total += p[j] = std::exp((scores[j] - scores[order[0]]) / choosing_.temperature);
        for (double& each : p) each /= total;
        if (choosing_.top_k > 0 && choosing_.top_k < V_) {
            const auto k = choosing_.top_k;
            // Which of two nearly equal ones is kept must not be asked; where both are impossible, it does not matter.
            if (p[order[k]] > 0 && scores[order[k - 1]] - scores[order[k]] < margin) return -1;
            for (size_t i = k; i < order.size(); ++i) p[order[i]] = 0;
        }
        if (choosing_.top_p < 1) {
            double all = 0, before = 0;
            for (const double each : p) all += each;
            for (size_t i = 0; i < order.size(); ++i) {
                const double each = p[order[i]];
                if (each > 0 && std::abs(before - choosing_.top_p * all) < margin / 2) return -1;
                if (before >= choosing_.top_p * all) p[order[i]] = 0;
                before += each;
            }
        }
        total = 0;
        for (const double each : p) total += each;
        for (int draw = 0; draw < 50; ++draw) {
            const double wanted = random_.uniform();
            double sum = 0;
            for (size_t j = 0; j < p.size(); ++j) {
                const double share = p[j] / total;
                if (sum + share > wanted) {
                    uniform = sum + share * (0.25 + 0.5 * (wanted - sum) / share);
                    if (share >= 2 * margin) return static_cast<int64_t>(j);
                    break;  // too near its borders: another one
                }
                sum += share;
            }
        }
        return -1;
    }

    Cell cell_;
    bool bf16_;
    int layers_;
    int64_t H_, V_;
    Choosing choosing_;
    Random random_;
    Floats table_, output_weight_, output_bias_, h_, c_;
    std::vector<Floats> ih_, hh_, bias_ih_, bias_hh_;
    int64_t last_ = 0, recent_count_ = 0;
    Guarded<int64_t> recent_;
    Guarded<uint8_t> barred_, barred_first_;
    Numbers uniforms_, want_h_, want_c_;
    std::vector<int64_t> want_, want_recent_;
};

}  // namespace

void check_writing() {
    Choosing plain, greedy, cold, by_k, by_p, penalty, barred, everything;
    greedy.temperature = 0;
    cold.temperature = 0.6;
    cold.repetition_window = 1;
    by_k.top_k = 3;
    by_p.top_p = 0.6;
    penalty.repetition_penalty = 1.7;
    penalty.repetition_window = 5;
    penalty.temperature = 0;
    barred.barred = barred.barred_first = true;
    everything = {0.9, 1.3, 0.9, 1, 4, true, true};
    const std::pair<const char*, Choosing> ways[] = {
        {"plain", plain}, {"greedy", greedy}, {"cold", cold},     {"top_k", by_k},
        {"top_p", by_p},  {"penalty", penalty}, {"barred", barred}, {"everything", everything},
    };
    struct Model {
        int layers;
        int64_t H, V;
    };
    std::vector<Model> models = {{1, 5, 7}, {2, 33, 30}, {3, 16, 65}, {2, 70, 21}, {1, 17, 1}};
    if (options.quick) models = {{1, 5, 7}, {2, 17, 19}};
    if (thread_sanitizer) models = {{2, 70, 21}};  // the one large enough for several threads
    const int64_t most = options.quick ? 12 : 30;
    const std::vector<std::string> sets = runnable_sets();
    for (const std::string& set : sets) group("write " + set);
    // In float32 a score is off by some hundred roundings. With bf16 the states, which are rounded to 8 bits, may be
    // rounded apart (see layers.cc): scores differ by 2^-9 of some sqrt(H) terms of the size of the weights.
    uint64_t seed = 1000;
    for (const Cell cell : cells)
        for (const bool bf16 : {false, true})
            for (const Model& model : models)
                for (const auto& [name, choosing] : ways) {
                    const double margin = bf16 ? 0.02 : 1e-4, bound = bf16 ? 0.02 : 1e-5;
                    const std::string where =
                        name_of(cell) + std::string(bf16 ? " bf16 " : " fp32 ") + name +
                        ", layers=" + std::to_string(model.layers) + " H=" + std::to_string(model.H) +
                        " V=" + std::to_string(model.V);
                    // Other models until enough was written.
                    int64_t written = 0;
                    for (int tries = 0; written < most && tries < 60; ++tries) {
                        Writer writer(cell, bf16, model.layers, model.H, model.V, choosing, ++seed);
                        writer.imagine(most, margin);
                        if (writer.imagined() == 0 && tries > 0) continue;
                        written += writer.imagined();
                        for (const std::string& set : sets) {
                            use_instruction_set(set.c_str());
                            writer.check(group("write " + set), set + " " + where, bound);
                        }
                    }
                    group("write " + sets[0]).check(written >= most / 2, where, "too little could be judged");
                }
}

}  // namespace driver
