#include "threads.h"

#include <dlfcn.h>
#include <pthread.h>

#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace unrolled {
namespace {

// --- threads of our own: asleep on a condition variable between calls

class Pool {
public:
    // Runs on the caller and count - 1 workers; false if another call has the workers.
    bool run(int count, void (*work)(void*, int, int), void* context) {
        std::unique_lock<std::mutex> busy(busy_, std::try_to_lock);
        if (!busy.owns_lock()) return false;
        {
            std::lock_guard<std::mutex> lock(mutex_);
            try {
                while (static_cast<int>(workers_.size()) < count - 1) {
                    const int index = static_cast<int>(workers_.size()) + 1;
                    workers_.emplace_back([this, index, seen = round_] { serve(index, seen); });
                }
            } catch (const std::exception&) {  // no more threads can be had: those that there are do the work
                count = static_cast<int>(workers_.size()) + 1;
            }
            work_ = work;
            context_ = context;
            count_ = count;
            left_ = count - 1;
            ++round_;
        }
        wake_.notify_all();
        work(context, 0, count);
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, [this] { return left_ == 0; });
        return true;
    }

    ~Pool() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            stop_ = true;
        }
        wake_.notify_all();
        for (std::thread& worker : workers_) worker.join();
    }

private:
    void serve(int index, uint64_t seen) {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            wake_.wait(lock, [&] { return stop_ || (round_ != seen && index < count_); });
            if (stop_) return;
            seen = round_;
            auto work = work_;
            void* context = context_;
            const int count = count_;
            lock.unlock();
            work(context, index, count);
            lock.lock();
            if (--left_ == 0) done_.notify_one();
        }
    }

    std::mutex busy_, mutex_;
    std::condition_variable wake_, done_;
    std::vector<std::thread> workers_;
    void (*work_)(void*, int, int) = nullptr;
    void* context_ = nullptr;
    int count_ = 0, left_ = 0;
    uint64_t round_ = 0;
    bool stop_ = false;
};

// --- OpenMP, found in the process; its entry points are the same in GNU's, LLVM's and Intel's runtime

struct OpenMp {
    void (*parallel)(void (*)(void*), void*, unsigned, unsigned);
    int (*index)();
    int (*count)();
    int (*nested)();
};

std::mutex guard;         // of what follows
Pool* pool = nullptr;     // made when first needed
OpenMp openmp{};
std::string openmp_path;  // empty: not shared
bool forked = false;

// A child process has none of its parent's threads, and an OpenMP runtime that had started some waits for them
// forever. The child leaves both alone and begins with a pool of its own; the parent's is only forgotten, since its
// threads and locks are in no state to be taken down.
void after_fork_in_child() {
    new (&guard) std::mutex;
    pool = nullptr;
    forked = true;
}

const bool watching_forks = pthread_atfork(nullptr, nullptr, after_fork_in_child) == 0;

struct Region {
    void (*work)(void*, int, int);
    void* context;
};

thread_local bool inside = false;

void run_in_openmp(void* data) {
    const Region& region = *static_cast<Region*>(data);
    region.work(region.context, openmp.index(), openmp.count());
}

}  // namespace

void run_threads(int asked, void (*work)(void*, int, int), void* context) {
    if (asked <= 1 || inside) return work(context, 0, 1);
    bool share;
    Pool* own;
    {
        std::lock_guard<std::mutex> lock(guard);
        share = openmp.parallel != nullptr && !forked;
        if (!share && pool == nullptr) pool = new Pool;
        own = pool;
    }
    if (share) {
        if (openmp.nested() > 0) return work(context, 0, 1);
        Region region{work, context};
        openmp.parallel(run_in_openmp, &region, static_cast<unsigned>(asked), 0);
        return;
    }
    inside = true;
    const bool ran = own->run(asked, work, context);
    if (!ran) work(context, 0, 1);
    inside = false;
}

bool share_openmp(const char* path) {
    void* library = dlopen(path, RTLD_NOW | RTLD_NOLOAD);
    if (library == nullptr) return false;
    OpenMp found{};
    found.parallel = reinterpret_cast<decltype(found.parallel)>(dlsym(library, "GOMP_parallel"));
    found.index = reinterpret_cast<decltype(found.index)>(dlsym(library, "omp_get_thread_num"));
    found.count = reinterpret_cast<decltype(found.count)>(dlsym(library, "omp_get_num_threads"));
    found.nested = reinterpret_cast<decltype(found.nested)>(dlsym(library, "omp_get_active_level"));
    if (!found.parallel || !found.index || !found.count || !found.nested) return false;
    std::lock_guard<std::mutex> lock(guard);
    openmp = found;
    openmp_path = path;
    return true;
}

std::string describe_threads() {
    std::lock_guard<std::mutex> lock(guard);
    if (openmp.parallel != nullptr && !forked) return "shared with torch (" + openmp_path.substr(openmp_path.rfind('/') + 1) + ")";
    return forked ? "own (this process was forked)" : "own";
}

namespace {

template <class Met>
void spin_until(Met met) {
    for (int spin = 0; !met(); ++spin) {
        if (spin < 4000) {
#if defined(__x86_64__)
            _mm_pause();
#endif
        } else {
            std::this_thread::yield();
        }
    }
}

}  // namespace

void Barrier::wait(int count) {
    if (count == 1) return;
    const uint32_t round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == count) {
        arrived_.store(0, std::memory_order_relaxed);
        round_.store(round + 1, std::memory_order_release);
        return;
    }
    spin_until([&] { return round_.load(std::memory_order_acquire) != round; });
}

uint32_t Barrier::arrive(int index) {
    const uint32_t round = marks_[index].round.load(std::memory_order_relaxed) + 1;
    marks_[index].round.store(round, std::memory_order_release);
    return round;
}

bool Barrier::met(int other, uint32_t round) const {
    // It may be at the next meeting already, and no further.
    return static_cast<int32_t>(marks_[other].round.load(std::memory_order_acquire) - round) >= 0;
}

void Barrier::wait_for(int other, uint32_t round) const { spin_until([&] { return met(other, round); }); }

void Barrier::wait(int index, int count) {
    wait(index, count, [] { return false; });
}

}  // namespace unrolled
