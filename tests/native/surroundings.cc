// What the kernels stand on: the choice of an instruction set, threads, scratch memory, and life after a fork.
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <stdexcept>
#include <thread>

#include "memory.h"
#include "samples.h"
#include "threads.h"

namespace driver {
namespace {

void check_sets() {
    Group& to = group("instruction sets");
    InstructionSet sets[instruction_set_count];
    const char* names[instruction_set_count] = {"generic", "avx2", "avx512", "avx512bf16"};
    const char* best = nullptr;
    for (const std::string& name : runnable_sets()) {
        use_instruction_set(name.c_str());
        to.check(kernels().name == name, name, std::string("in use is ") + kernels().name);
        to.check(kernels().lanes == (name == "generic" ? 4 : name == "avx2" ? 8 : 16), name, "lanes");
        instruction_sets(sets);
        for (int i = 0; i < instruction_set_count; ++i) {
            to.check(std::string(sets[i].name) == names[i], names[i], "another order");
            to.check((sets[i].presence == Presence::in_use) == (name == names[i]), name, "not the one in use");
            if (sets[i].presence == Presence::in_use || sets[i].presence == Presence::available) best = names[i];
        }
        for (const bool bf16 : {false, true}) {
            const double flops = kernels().peak(bf16, 2, 0.005);
            to.check(std::isfinite(flops) && flops > 1e5, name, "peak of " + std::to_string(flops) + " FLOP/s");
        }
    }
    to.check(best == runnable_sets().back(), "best", "the best set is not the last one");
    const auto refused = [&](const char* name) {
        const char* before = kernels().name;
        try {
            use_instruction_set(name);
        } catch (const std::invalid_argument& error) {
            return std::string(error.what()).size() > 10 && kernels().name == before;
        }
        return false;
    };
    to.check(refused("avx"), "avx", "not refused");
    to.check(refused(""), "no name", "not refused");
    instruction_sets(sets);
    for (const InstructionSet& set : sets)
        if (set.presence == Presence::not_built || set.presence == Presence::not_on_this_processor)
            to.check(refused(set.name), set.name, "not refused");
    use_instruction_set(best);
}

// A layer with work enough for several threads, forward and backward; whether it has the bits of a run on one.
class Work {
public:
    Work()
        : sample_({12, 20, 17, 33, 5, ragged | both}, Cell::lstm, false, 500),
          made_(forward(1)),
          gradients_(backward(1)) {}

    bool right(int threads) const {
        const ForwardMemory f = forward(threads);
        const BackwardMemory b = backward(threads);
        bool same = equal(f.outputs, made_.outputs) && equal(b.d_x, gradients_.d_x);
        for (int d = 0; d < 2; ++d)
            same = same && equal(f.h_n[d], made_.h_n[d]) && equal(b.d_hh[d], gradients_.d_hh[d]) &&
                   equal(b.d_ih[d], gradients_.d_ih[d]) && equal(b.d_h0[d], gradients_.d_h0[d]);
        return same;
    }

private:
    static bool equal(const Floats& a, const Floats& b) {
        return std::memcmp(a.data(), b.data(), a.size() * 4) == 0;
    }
    ForwardMemory forward(int threads) const {
        Forward f = sample_.forward();
        ForwardMemory memory(f, true);
        memory.attach(f);
        kernels().forward(f, threads);
        return memory;
    }
    BackwardMemory backward(int threads) const {
        Backward b = sample_.backward(made_);
        BackwardMemory memory(b);
        memory.attach(b);
        kernels().backward(b, threads);
        return memory;
    }

    Sample sample_;
    ForwardMemory made_;
    BackwardMemory gradients_;
};

void check_threads(const Work& work) {
    Group& to = group("threads");
    for (int asked = 1; asked <= 5; ++asked)
        for (int round = 0; round < 20; ++round) {
            std::atomic<int> calls{0}, sum{0}, counts{0}, inner{0};
            Barrier barrier;
            parallel(asked, [&](int index, int count) {
                ++calls;
                sum += index;
                if (count < 1 || count > asked) ++counts;
                for (int i = 0; i < 10; ++i) barrier.wait(count);
                // Inside a parallel region there is no second one.
                if (asked > 1 && count > 1)
                    parallel(3, [&](int i, int n) { inner += i != 0 || n != 1; });
            });
            const int n = calls;
            to.check(n >= 1 && n <= asked && sum == n * (n - 1) / 2 && counts == 0 && inner == 0, std::to_string(asked),
                     "work was not shared as promised");
        }
    for (const int64_t total : {0, 1, 5, 7, 1000})
        for (int count = 1; count <= 7; ++count) {
            int64_t next = 0;
            bool good = true;
            for (int i = 0; i < count; ++i) {
                const Range range = share(total, i, count);
                const int64_t items = range.last - range.first;
                good = good && range.first == next && items >= 0 && items <= total / count + 1;
                next = range.last;
            }
            to.check(good && next == total, std::to_string(total), "items are not shared evenly");
        }
    to.check(!share_openmp("/nowhere/libgomp.so.1"), "OpenMP", "a library that is not there was found");
    to.check(describe_threads() == "own", "OpenMP", "threads are " + describe_threads());

    // Several callers at once: one gets the workers, the others do their work alone.
    std::vector<std::thread> callers;
    std::atomic<int> wrong{0};
    for (int caller = 0; caller < 3; ++caller)
        callers.emplace_back([&, caller] {
            for (int i = 0; i < (options.quick ? 2 : 10); ++i) wrong += !work.right(2 + caller % 2);
        });
    for (std::thread& caller : callers) caller.join();
    to.check(wrong == 0, "three callers at once", std::to_string(wrong) + " results with other bits");
}

void check_memory() {
    Group& to = group("scratch memory");
    {
        Scratch a(100), b(100), moved(std::move(a));
        to.check(moved.data() != nullptr && moved.data() != b.data(), "two blocks", "are one");
        to.check(reinterpret_cast<uintptr_t>(moved.data()) % 64 == 0, "a block", "is not aligned");
        std::memset(moved.data(), 1, 100);
        to.check(a.data() == nullptr, "a block moved from", "is still there");  // NOLINT: that is what is checked
        const size_t held = scratch_held();
        const Scratch large(size_t{100} << 20);
        to.check(scratch_held() >= held + (size_t{100} << 20), "held", "does not count a block in use");
    }
    to.check(scratch_held() <= size_t{65} << 20, "held", "keeps more than it should");
    const Scratch used(size_t{1} << 20);
    release_scratch();
    to.check(scratch_held() >= size_t{1} << 20, "released", "gives back a block in use");
    to.check(scratch_held() < size_t{2} << 20, "released", "keeps what is not in use");
}

// The exit status of a child process that runs `work`; -1 if it was killed.
template <class Work>
int status_of_child(Work work) {
    const pid_t child = fork();
    if (child == 0) _exit(work());
    int status = -1;
    if (child < 0 || waitpid(child, &status, 0) != child || !WIFEXITED(status)) return -1;
    return WEXITSTATUS(status);
}

// With an address space that has room for a few stacks only. (Root may have as many threads as it likes otherwise.)
void check_too_many_threads() {
    // Sanitizers and the emulator need an address space of their own.
    if (address_sanitizer || thread_sanitizer || options.quick) return;
    const int status = status_of_child([] {
        long pages = 0;
        std::FILE* file = std::fopen("/proc/self/statm", "r");
        if (file == nullptr || std::fscanf(file, "%ld", &pages) != 1) return 2;
        std::fclose(file);
        const rlim_t room = static_cast<rlim_t>(pages * sysconf(_SC_PAGESIZE)) + (rlim_t{40} << 20);
        const rlimit limit{room, room};
        if (setrlimit(RLIMIT_AS, &limit) != 0) return 3;
        std::atomic<int> calls{0}, counts{0};
        parallel(200, [&](int, int count) {
            ++calls;
            counts = count;
        });
        return calls == counts && calls >= 1 && calls < 200 ? 0 : 4;
    });
    group("threads").check(status == 0, "no memory for 200", "status " + std::to_string(status));
}

// The child has none of its parent's threads and must make its own; the parent goes on.
void check_fork(const Work& work) {
    // Neither the thread sanitizer nor QEMU can follow a fork of a process with threads.
    if (thread_sanitizer || options.quick) return;
    Group& to = group("after a fork");
    to.check(work.right(3), "before", "other bits");  // the pool has workers
    const int status = status_of_child([&] {
        return work.right(3) && work.right(2) && describe_threads() == "own (this process was forked)" ? 0 : 1;
    });
    to.check(status == 0, "the child", "status " + std::to_string(status));
    to.check(work.right(3), "the parent afterwards", "other bits");
}

}  // namespace

void check_surroundings() {
    check_sets();
    const Work work;
    check_threads(work);
    check_too_many_threads();
    check_memory();
    check_fork(work);
}

}  // namespace driver
