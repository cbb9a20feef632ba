// Drives the native kernels without Python: against a plain float64 oracle, for the same bits on every way to the same
// result, and past guards around all memory. Plain C++20; made for sanitizers and for emulated processors.
//
//     driver [--quick] [--verbose] [--only PART]        PART: see `parts` below
//
// One line per group of checks; the last line is "N passed, N failed", the exit status 1 if any failed.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <memory>
#include <mutex>

#include "checking.h"
#include "threads.h"

namespace driver {

Options options;

const Cell cells[4] = {Cell::rnn, Cell::rnn_relu, Cell::lstm, Cell::gru};

const char* name_of(Cell cell) {
    switch (cell) {
        case Cell::rnn: return "rnn";
        case Cell::rnn_relu: return "rnn_relu";
        case Cell::lstm: return "lstm";
        default: return "gru";
    }
}

std::vector<std::string> runnable_sets() {
    std::vector<std::string> names;
    InstructionSet sets[instruction_set_count];
    instruction_sets(sets);
    for (const InstructionSet& set : sets)
        if (set.presence == Presence::in_use || set.presence == Presence::available) names.push_back(set.name);
    return names;
}

namespace {

std::vector<std::unique_ptr<Group>> groups;
Group guards("guards around memory");

constexpr int64_t shown_failures = 5;  // of each group

struct Part {
    const char* name;
    void (*run)();
};
constexpr Part parts[] = {
    {"oracle", check_oracle}, {"layers", check_layers},   {"bits", check_bits},
    {"numbers", check_numbers}, {"output", check_output}, {"writing", check_writing},
    {"surroundings", check_surroundings},
};

}  // namespace

bool Group::check(bool good, const std::string& where, const std::string& what) {
    if (good) {
        ++passed_;
    } else if (++failed_ <= shown_failures) {
        std::printf("  FAILED %s: %s: %s\n", name_.c_str(), where.c_str(), what.c_str());
        std::fflush(stdout);
    }
    return good;
}

void Group::print() const {
    std::printf("%-28s %7lld checks", name_.c_str(), static_cast<long long>(passed_ + failed_));
    if (options.verbose && worst_ > 0) std::printf(", errors up to %.3f of their bounds", worst_);
    if (failed_ > 0) std::printf(", %lld FAILED", static_cast<long long>(failed_));
    std::printf("\n");
    std::fflush(stdout);
}

Group& group(const std::string& name) {
    for (const auto& known : groups)
        if (known->name() == name) return *known;
    groups.push_back(std::make_unique<Group>(name));
    return *groups.back();
}

void count_guard(bool intact) {
    static std::mutex mutex;  // memory is freed by several threads
    const std::lock_guard<std::mutex> lock(mutex);
    guards.check(intact, "memory", "written beyond its end");
}

bool check_close(Group& to, const std::string& where, const char* what, const float* got, const double* want, int64_t n,
                 double bound) {
    int64_t bad = 0, first = -1;
    for (int64_t i = 0; i < n; ++i) {
        const double g = got[i], w = want[i];
        bool good;
        if (std::isnan(w) || std::isinf(w)) {
            good = std::isnan(w) ? std::isnan(g) : g == w;
        } else {
            const double error = std::abs(g - w);
            good = error <= bound;
            if (good && bound > 0) to.near(error / bound);
        }
        if (!good && bad++ == 0) first = i;
    }
    if (bad == 0) return to.check(true, where, what);
    char text[200];
    std::snprintf(text, sizeof text, ": %lld of %lld wrong, first [%lld] is %.9g and should be %.9g within %.3g",
                  static_cast<long long>(bad), static_cast<long long>(n), static_cast<long long>(first),
                  static_cast<double>(got[first]), want[first], bound);
    return to.check(false, where, what + std::string(text));
}

}  // namespace driver

int main(int count, char** arguments) {
    using namespace driver;
    for (int i = 1; i < count; ++i) {
        const std::string word = arguments[i];
        if (word == "--quick") options.quick = true;
        else if (word == "--verbose") options.verbose = true;
        else if (word == "--only" && i + 1 < count) options.only = arguments[++i];
        else {
            std::fprintf(stderr, "usage: driver [--quick] [--verbose] [--only PART], PART one of:");
            for (const Part& part : parts) std::fprintf(stderr, " %s", part.name);
            std::fprintf(stderr, "\n");
            return 2;
        }
    }
    std::printf("instruction sets here:");
    for (const std::string& name : runnable_sets()) std::printf(" %s", name.c_str());
    std::printf("; threads: %s\n", unrolled::describe_threads().c_str());
    int64_t passed = 0, failed = 0;
    for (const Part& part : parts) {
        if (!options.only.empty() && options.only != part.name) continue;
        // What threads have no part in.
        if (thread_sanitizer && (part.run == check_oracle || part.run == check_numbers)) continue;
        const auto began = std::chrono::steady_clock::now();
        part.run();
        for (const auto& done : groups) {
            done->print();
            passed += done->passed();
            failed += done->failed();
        }
        groups.clear();
        if (options.verbose)
            std::printf("  (%s: %.1f s)\n", part.name,
                        std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count());
    }
    guards.print();
    passed += guards.passed();
    failed += guards.failed();
    if (passed == 0) ++failed;  // a misspelt part must not look like success
    std::printf("%lld passed, %lld failed\n", static_cast<long long>(passed), static_cast<long long>(failed));
    return failed > 0 ? 1 : 0;
}
