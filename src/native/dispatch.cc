// Which instruction sets there are, and which one is used.
#include <atomic>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace unrolled {

extern const Kernels kernels_generic;
#if UNROLLED_HAVE_AVX2
extern const Kernels kernels_avx2;
#endif
#if UNROLLED_HAVE_AVX512
extern const Kernels kernels_avx512;
#endif
#if UNROLLED_HAVE_AVX512BF16
extern const Kernels kernels_avx512bf16;
#endif

namespace {

struct Entry {
    const char* name;
    const Kernels* built;  // null: not built
    bool (*present)();
};

#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#if UNROLLED_HAVE_AVX512BF16
bool has_avx512bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif
#else
bool has_avx2() { return false; }
bool has_avx512() { return false; }
#endif
bool always() { return true; }
#if !UNROLLED_HAVE_AVX512BF16
bool has_avx512bf16() { return false; }
#endif

const Entry entries[instruction_set_count] = {
    {"generic", &kernels_generic, always},
#if UNROLLED_HAVE_AVX2
    {"avx2", &kernels_avx2, has_avx2},
#else
    {"avx2", nullptr, has_avx2},
#endif
#if UNROLLED_HAVE_AVX512
    {"avx512", &kernels_avx512, has_avx512},
#else
    {"avx512", nullptr, has_avx512},
#endif
#if UNROLLED_HAVE_AVX512BF16
    {"avx512bf16", &kernels_avx512bf16, has_avx512bf16},
#else
    {"avx512bf16", nullptr, has_avx512bf16},
#endif
};

std::atomic<const Kernels*> chosen{nullptr};

const Kernels* best() {
    const Kernels* found = nullptr;
    for (const Entry& entry : entries)
        if (entry.built != nullptr && entry.present()) found = entry.built;
    return found;
}

}  // namespace

void instruction_sets(InstructionSet (&into)[instruction_set_count]) {
    const Kernels* used = &kernels();
    for (int i = 0; i < instruction_set_count; ++i) {
        const Entry& entry = entries[i];
        into[i] = {entry.name, entry.built == nullptr   ? Presence::not_built
                               : entry.built == used    ? Presence::in_use
                               : entry.present()        ? Presence::available
                                                        : Presence::not_on_this_processor};
    }
}

void use_instruction_set(const char* name) {
    const std::string wanted = name;
    for (const Entry& entry : entries) {
        if (wanted != entry.name) continue;
        if (entry.built == nullptr) throw std::invalid_argument(wanted + " was not built into this installation");
        if (!entry.present()) throw std::invalid_argument("this processor has no " + wanted);
        chosen.store(entry.built, std::memory_order_release);
        return;
    }
    throw std::invalid_argument("unknown instruction set '" + wanted + "': known are generic, avx2, avx512, avx512bf16");
}

const Kernels& kernels() {
    const Kernels* used = chosen.load(std::memory_order_acquire);
    if (used == nullptr) {
        used = best();
        chosen.store(used, std::memory_order_release);
    }
    return *used;
}

}  // namespace unrolled
