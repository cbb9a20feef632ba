// Scratch memory for tests, linked in the place of src/native/memory.cc: a block ends where what was asked for ends, so
// that the address sanitizer sees a step beyond; and it is full of NaN, so that what is read before it was written shows.
// Without the sanitizer a guard behind the block is looked at when it is given back.
#include <atomic>
#include <new>
#include <utility>

#include "checking.h"
#include "memory.h"

namespace unrolled {
namespace {

constexpr size_t guard = driver::address_sanitizer ? 0 : 256;
std::atomic<size_t> in_use{0};

}  // namespace

Scratch::Scratch(size_t bytes) : size_(bytes) {
    void* fresh = nullptr;
    if (posix_memalign(&fresh, 64, bytes + guard + (bytes + guard == 0)) != 0) throw std::bad_alloc();
    data_ = static_cast<std::byte*>(fresh);
    std::memset(data_, 0xff, bytes + guard);
    in_use += bytes;
}

Scratch::~Scratch() {
    if (data_ == nullptr) return;
    bool intact = true;
    for (size_t i = 0; i < guard; ++i) intact = intact && data_[size_ + i] == std::byte{0xff};
    driver::count_guard(intact);
    in_use -= size_;
    std::free(data_);
}

Scratch::Scratch(Scratch&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

Scratch& Scratch::operator=(Scratch&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
}

size_t scratch_held() { return in_use; }

}  // namespace unrolled
