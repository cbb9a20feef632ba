// Scratch memory for the address sanitizer, in the place of src/native/memory.cc: a block is given back to the system
// at once and ends where what was asked for ends, so that a step beyond it is seen; and it is full of NaN, so that what
// is read before it was written shows. In other builds this file is empty and the kernels' own scratch memory is used.
//
// The kernels are a static library: its memory.cc is left out because everything that it has is here already.
#include "checking.h"

#if DRIVER_ADDRESS_SANITIZER

#include <atomic>
#include <new>

#include "memory.h"

namespace unrolled {
namespace {

std::atomic<size_t> in_use{0};

}  // namespace

Scratch::Scratch(size_t bytes) : size_(bytes) {
    void* fresh = nullptr;
    if (posix_memalign(&fresh, 64, bytes > 0 ? bytes : 1) != 0) throw std::bad_alloc();
    data_ = static_cast<std::byte*>(fresh);
    std::memset(data_, 0xff, bytes);
    in_use += bytes;
}

Scratch::~Scratch() {
    if (data_ != nullptr) in_use -= size_;
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

void release_scratch() {}

}  // namespace unrolled

#endif
