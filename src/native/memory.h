// Scratch memory for the kernels: aligned blocks that are kept when returned, since having the kernel map and zero
// megabytes anew at every call costs more than a small layer's arithmetic.
#pragma once

#include <cstddef>
#include <cstdint>

namespace unrolled {

// A block of at least `bytes`, aligned to 64 bytes, not cleared; given back when the object ends.
class Scratch {
public:
    Scratch() = default;
    explicit Scratch(size_t bytes);
    ~Scratch();
    Scratch(Scratch&& other) noexcept;
    Scratch& operator=(Scratch&& other) noexcept;
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

    std::byte* data() const { return data_; }
    template <class T>
    T* as(size_t offset = 0) const {
        return reinterpret_cast<T*>(data_ + offset);
    }

private:
    std::byte* data_ = nullptr;
    size_t size_ = 0;
};

// Bytes of scratch that are in use or kept.
size_t scratch_held();

// Gives what is kept back to the system.
void release_scratch();

// Asks for large pages where the caller's memory [begin, end) is not backed by any yet: torch's tensors of tens of
// megabytes are fresh memory at every call, of which a fault for each small page is a sizable part of a layer's time.
// Nothing happens below some megabytes, and where the system has no such pages.
void prefer_large_pages(const void* begin, const void* end);

}  // namespace unrolled
