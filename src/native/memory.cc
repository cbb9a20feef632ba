#include "memory.h"

#include <pthread.h>

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
    void* fresh = std::aligned_alloc(4096, bytes ? bytes : 4096);
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
        std::free(data_);
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
    for (const Block& block : blocks) std::free(block.data);
}

size_t scratch_held() {
    std::lock_guard<std::mutex> lock(store->mutex);
    return store->kept + store->in_use;
}

}  // namespace unrolled
