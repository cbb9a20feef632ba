#include "memory.h"

#include <pthread.h>
#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

namespace unrolled {
namespace {

constexpr size_t kept_at_most = size_t{64} << 20;  // beyond it, blocks go back to the system

struct Block {
    std::byte* data;
    size_t size;
};

struct Store {
    std::mutex mutex;
    std::vector<Block> free;  // smallest first
    size_t kept = 0, in_use = 0;
};

// Blocks of a large page and more lie on large pages where the system has them. Weights of some megabytes are read at
// every step: on small pages a processor cannot keep that many addresses translated, and they collide in its caches.
constexpr size_t large_page = size_t{2} << 20;

#if defined(MADV_HUGEPAGE)
// Of such a block: whole pages, however large the system's small ones are.
size_t mapped_size(size_t bytes) { return (bytes + 0xffff) / 0x10000 * 0x10000; }
#endif

void* take(size_t bytes) {
#if defined(MADV_HUGEPAGE)
    if (bytes >= large_page) {
        // More than is wanted, of which what lies before and after whole large pages goes back.
        const size_t wanted = mapped_size(bytes);
        void* mapped = mmap(nullptr, wanted + large_page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (mapped == MAP_FAILED) return nullptr;
        auto* const begin = static_cast<std::byte*>(mapped);
        const size_t before = (large_page - reinterpret_cast<uintptr_t>(begin) % large_page) % large_page;
        if (before > 0) munmap(begin, before);
        if (before < large_page) munmap(begin + before + wanted, large_page - before);
        // Whole pages only: what is left over is not made larger than it is. A system that refuses has small pages.
        madvise(begin + before, bytes / large_page * large_page, MADV_HUGEPAGE);
        return begin + before;
    }
#endif
    return std::aligned_alloc(4096, bytes ? bytes : 4096);
}

void give_back(void* data, size_t bytes) {
#if defined(MADV_HUGEPAGE)
    if (bytes >= large_page) {
        munmap(data, mapped_size(bytes));
        return;
    }
#endif
    static_cast<void>(bytes);
    std::free(data);
}

Store* store = new Store;  // never destroyed: threads may end after the program's own objects

// A lock held by another thread at the moment of a fork would stay held in the child.
const bool watching_forks = pthread_atfork([] { store->mutex.lock(); }, [] { store->mutex.unlock(); },
                                           [] { store->mutex.unlock(); }) == 0;

}  // namespace

Scratch::Scratch(size_t bytes) {
    bytes = (bytes + 4095) / 4096 * 4096;
    {
        std::lock_guard<std::mutex> lock(store->mutex);
        for (auto it = store->free.begin(); it != store->free.end(); ++it) {
            // A much larger block would be wasted on this.
            if (it->size >= bytes && it->size <= 2 * bytes + (size_t{1} << 16)) {
                data_ = it->data;
                size_ = it->size;
                store->kept -= size_;
                store->in_use += size_;
                store->free.erase(it);
                return;
            }
        }
    }
    void* fresh = take(bytes);
    if (fresh == nullptr) throw std::bad_alloc();
    data_ = static_cast<std::byte*>(fresh);
    size_ = bytes;
    std::lock_guard<std::mutex> lock(store->mutex);
    store->in_use += size_;
}

Scratch::~Scratch() {
    if (data_ == nullptr) return;
    std::lock_guard<std::mutex> lock(store->mutex);
    store->in_use -= size_;
    if (store->kept + size_ > kept_at_most) {
        give_back(data_, size_);
        return;
    }
    store->kept += size_;
    auto it = store->free.begin();
    while (it != store->free.end() && it->size < size_) ++it;
    store->free.insert(it, Block{data_, size_});
}

Scratch::Scratch(Scratch&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

Scratch& Scratch::operator=(Scratch&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
}

void release_scratch() {
    std::vector<Block> blocks;
    {
        std::lock_guard<std::mutex> lock(store->mutex);
        blocks.swap(store->free);
        store->kept = 0;
    }
    for (const Block& block : blocks) give_back(block.data, block.size);
}

void prefer_large_pages(const void* begin, const void* end) {
#if defined(MADV_HUGEPAGE)
    constexpr uintptr_t page = 4096;  // where they are larger, the call is refused and nothing is lost
    const uintptr_t first = reinterpret_cast<uintptr_t>(begin), last = reinterpret_cast<uintptr_t>(end);
    if (last < first + 2 * large_page) return;
    // From the page it begins in: an allocator's note before it lies there too, and were that page left out, so would be
    // the whole large page that it belongs to.
    const uintptr_t from = first / page * page, to = last / page * page;
    madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
#else
    static_cast<void>(begin), static_cast<void>(end);
#endif
}

size_t scratch_held() {
    std::lock_guard<std::mutex> lock(store->mutex);
    return store->kept + store->in_use;
}

}  // namespace unrolled
