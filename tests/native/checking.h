// What the driver's files share: checks that are counted, memory with guards around it, reproducible numbers.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "kernels.h"

namespace driver {

using namespace unrolled;

// Which sanitizer the driver is built with: some checks are its business then, and some it cannot bear.
#if defined(__has_feature)
#define DRIVER_HAS_FEATURE(feature) __has_feature(feature)
#else
#define DRIVER_HAS_FEATURE(feature) 0
#endif
#if defined(__SANITIZE_ADDRESS__) || DRIVER_HAS_FEATURE(address_sanitizer)
#define DRIVER_ADDRESS_SANITIZER 1
#else
#define DRIVER_ADDRESS_SANITIZER 0
#endif
constexpr bool address_sanitizer = DRIVER_ADDRESS_SANITIZER;
#if defined(__SANITIZE_THREAD__) || DRIVER_HAS_FEATURE(thread_sanitizer)
constexpr bool thread_sanitizer = true;
#else
constexpr bool thread_sanitizer = false;
#endif

struct Options {
    bool quick = false;    // fewer and smaller samples: for an emulated processor
    bool verbose = false;  // each group also says how near its errors came to the bounds
    std::string only;      // run one of the parts alone
};
extern Options options;

// --- counted checks

// Checks that are reported together in one line.
class Group {
public:
    explicit Group(std::string name) : name_(std::move(name)) {}
    // Counts; `where` and `what` are only looked at in a failure.
    bool check(bool good, const std::string& where, const std::string& what);
    void near(double part_of_bound) { worst_ = std::max(worst_, part_of_bound); }
    void print() const;

    const std::string& name() const { return name_; }
    int64_t passed() const { return passed_; }
    int64_t failed() const { return failed_; }

private:
    std::string name_;
    int64_t passed_ = 0, failed_ = 0;
    double worst_ = 0;  // largest error as a part of its bound
};

// The group of this name, made when first asked for; lasts as long as the part that is running.
Group& group(const std::string& name);

// --- reproducible numbers: the same on every machine, which those of <random> are not

class Random {
public:
    explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 1) {}
    uint64_t bits() {  // splitmix64
        uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
        return z ^ (z >> 31);
    }
    double uniform() { return static_cast<double>(bits() >> 11) * 0x1p-53; }
    float between(double low, double high) { return static_cast<float>(low + (high - low) * uniform()); }
    int64_t below(int64_t n) { return static_cast<int64_t>(bits() % static_cast<uint64_t>(n)); }
    bool chance(double p) { return uniform() < p; }

private:
    uint64_t state_;
};

// --- guarded memory

constexpr float nan = std::numeric_limits<float>::quiet_NaN();
constexpr float infinity = std::numeric_limits<float>::infinity();

// n elements between two margins of a pattern that is a NaN as a float, a huge number as an int64 and true as a byte:
// what is read there by mistake shows in the results, and what is written there shows when the memory is freed, which
// counts as a check. Margins are an odd number of elements, so that floats are aligned to four bytes and no better.
// The address sanitizer needs the memory itself to end where the elements do.
void count_guard(bool intact);

template <class T>
class Guarded {
    static_assert(std::is_trivially_copyable_v<T>);
    static constexpr size_t margin = address_sanitizer ? 0 : 33;

public:
    Guarded() = default;
    explicit Guarded(int64_t n, T fill = T{}) : n_(n) {
        const size_t bytes = (static_cast<size_t>(n) + 2 * margin) * sizeof(T);
        memory_ = static_cast<unsigned char*>(std::malloc(bytes ? bytes : 1));
        if (memory_ == nullptr) std::abort();
        for (size_t i = 0; i < margin * sizeof(T); ++i) {
            memory_[i] = pattern(i);
            memory_[(margin + static_cast<size_t>(n)) * sizeof(T) + i] = pattern(i);
        }
        for (int64_t i = 0; i < n; ++i) data()[i] = fill;
    }
    Guarded(const Guarded&) = delete;
    Guarded(Guarded&& other) noexcept { *this = std::move(other); }
    Guarded& operator=(Guarded&& other) noexcept {
        std::swap(memory_, other.memory_);
        std::swap(n_, other.n_);
        return *this;
    }
    ~Guarded() {
        if (memory_ == nullptr) return;
        bool intact = true;
        for (size_t i = 0; i < margin * sizeof(T); ++i)
            intact = intact && memory_[i] == pattern(i) &&
                     memory_[(margin + static_cast<size_t>(n_)) * sizeof(T) + i] == pattern(i);
        count_guard(intact);
        std::free(memory_);
    }
    T* data() const { return memory_ ? reinterpret_cast<T*>(memory_ + margin * sizeof(T)) : nullptr; }
    int64_t size() const { return n_; }
    T& operator[](int64_t i) const { return data()[i]; }
    T* begin() const { return data(); }
    T* end() const { return data() + n_; }
    Guarded copy() const {
        Guarded other(n_);
        if (n_ > 0) std::memcpy(other.data(), data(), static_cast<size_t>(n_) * sizeof(T));
        return other;
    }

private:
    static unsigned char pattern(size_t i) {
        constexpr unsigned char bytes[4] = {0xc5, 0xa5, 0xc5, 0x7f};
        return bytes[i % 4];
    }

    unsigned char* memory_ = nullptr;
    int64_t n_ = 0;
};

using Floats = Guarded<float>;

inline Floats random_floats(Random& random, int64_t n, double low, double high) {
    Floats to(n);
    for (float& x : to) x = random.between(low, high);
    return to;
}

// Packed weights: aligned to 64 bytes as the contract asks, every byte of a NaN before they are written.
class PackedMemory {
public:
    PackedMemory() = default;
    explicit PackedMemory(size_t bytes) : bytes_(bytes) {
        // Two lines behind it are the guard; none where the address sanitizer stands guard itself.
        memory_ = static_cast<std::byte*>(std::aligned_alloc(64, std::max<size_t>(64, bytes + guard)));
        if (memory_ == nullptr) std::abort();
        std::memset(memory_, 0xff, bytes + guard);
    }
    PackedMemory(PackedMemory&& other) noexcept { *this = std::move(other); }
    PackedMemory& operator=(PackedMemory&& other) noexcept {
        std::swap(memory_, other.memory_);
        std::swap(bytes_, other.bytes_);
        return *this;
    }
    ~PackedMemory() {
        if (memory_ == nullptr) return;
        bool intact = true;
        for (size_t i = 0; i < guard; ++i) intact = intact && memory_[bytes_ + i] == std::byte{0xff};
        count_guard(intact);
        std::free(memory_);
    }
    std::byte* data() const { return memory_; }

private:
    static constexpr size_t guard = address_sanitizer ? 0 : 128;
    std::byte* memory_ = nullptr;
    size_t bytes_ = 0;
};

// --- comparisons

// Everywhere |got - want| <= bound; NaN where NaN is wanted and nowhere else, an infinity where it is wanted.
bool check_close(Group& to, const std::string& where, const char* what, const float* got, const double* want, int64_t n,
                 double bound);

// The same bits everywhere.
template <class T>
bool check_same(Group& to, const std::string& where, const char* what, const T* a, const T* b, int64_t n) {
    if (n == 0 || std::memcmp(a, b, static_cast<size_t>(n) * sizeof(T)) == 0) return to.check(true, where, what);
    int64_t different = 0, first = -1;
    for (int64_t i = 0; i < n; ++i)
        if (std::memcmp(a + i, b + i, sizeof(T)) != 0) {
            if (first < 0) first = i;
            ++different;
        }
    return to.check(false, where,
                    std::string(what) + ": " + std::to_string(different) + " of " + std::to_string(n) +
                        " differ in bits, first [" + std::to_string(first) + "] " + std::to_string(a[first]) + " and " +
                        std::to_string(b[first]));
}

// --- what there is to run

extern const Cell cells[4];
const char* name_of(Cell cell);

// The sets that are built and that this processor has, slowest first.
std::vector<std::string> runnable_sets();

// The parts, each in a file of its own name.
void check_oracle();
void check_layers();
void check_bits();
void check_numbers();
void check_output();
void check_writing();
void check_surroundings();

}  // namespace driver
