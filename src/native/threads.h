// Threads for the kernels: the OpenMP runtime that torch has loaded if there is one, so that no second set of threads
// fights it for the cores, else threads of our own that sleep when idle.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>

namespace unrolled {

// Calls work(context, index, count) on `count` threads at once, index 0..count-1, and returns when all have; count is
// what was asked for or less (1 inside another parallel region and where threads cannot be had). The work must not
// throw.
void run_threads(int asked, void (*work)(void* context, int index, int count), void* context);

template <class Work>
void parallel(int asked, Work&& work) {
    run_threads(
        asked, [](void* context, int index, int count) { (*static_cast<Work*>(context))(index, count); }, &work);
}

// Share the threads of an OpenMP runtime that is in the process already (path of its library). False: it is not, or
// lacks a function; threads of our own serve.
bool share_openmp(const char* path);

// Which threads are used, in words.
std::string describe_threads();

// All `count` threads of a parallel region meet here. Spins shortly, then gives the core away.
class Barrier {
public:
    void wait(int count);
    // The same, for threads that say which one they are: two then only look at each other's mark, which takes half as long.
    // One barrier is used in one of the two ways.
    void wait(int index, int count);
    // The same, and `work()` over and over meanwhile, until it says that nothing is left to do.
    template <class Work>
    void wait(int index, int count, Work work) {
        if (count != 2) return wait(count);
        const uint32_t round = arrive(index);
        while (!met(1 - index, round))
            if (!work()) return wait_for(1 - index, round);
    }

private:
    // Of two threads. Not inline: see vector.h.
    uint32_t arrive(int index);
    bool met(int other, uint32_t round) const;
    void wait_for(int other, uint32_t round) const;

    struct alignas(128) Mark {  // no two on one line of a cache, nor on a pair of lines that come together
        std::atomic<uint32_t> round{0};
    };
    std::atomic<int> arrived_{0};
    std::atomic<uint32_t> round_{0};
    Mark marks_[2];
};

// Items [first, last) of `total` for share `index` of `count`, as even as whole items can be.
struct Range {
    int64_t first, last;
};
inline Range share(int64_t total, int index, int count) {
    return {total * index / count, total * (index + 1) / count};
}

}  // namespace unrolled
