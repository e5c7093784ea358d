// Work in the threads that torch's operators run in. The kernel links no OpenMP: a second runtime's threads would compete
// with torch's, which spin for a while after every operator.

#include <atomic>
#include <type_traits>
#if defined(__linux__)
#include <sched.h>
#endif

namespace {

// GOMP_parallel, which libgomp, LLVM's and Intel's OpenMP have: a function and its argument, in so many threads
typedef void (*Parallel)(void (*)(void*), void*, unsigned, unsigned);
Parallel parallel = nullptr;

// Calls `work()` in each of some threads; in this one alone where there is no OpenMP.
template <class Work>
void in_threads(int64_t threads, Work work) {
    if (threads < 2 || !parallel) return work();
    parallel([](void* w) { (*static_cast<Work*>(w))(); }, &work, threads, 0);
}

// Tasks that threads take one by one, so that one which the machine interrupts holds up only its own.
struct Tasks {
    int64_t count;
    std::atomic<int64_t> next{0}, done{0};
    explicit Tasks(int64_t count = 0) : count(count) {}

    template <class Do>
    void take(Do task) {
        for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) {
            task(i);
            done.fetch_add(1, std::memory_order_release);
        }
    }

    // until the others' tasks are done too, and what they wrote can be read
    void wait() {
        for (int tries = 0; done.load(std::memory_order_acquire) < count; tries++) {
#if defined(__SSE__)
            if (tries < 200) { _mm_pause(); continue; }
#endif
#if defined(__linux__)
            sched_yield();
#endif
        }
    }
};

template <class Do>
void for_each(int64_t threads, int64_t count, Do task) {
    Tasks tasks(count);
    in_threads(threads < count ? threads : count, [&] {
        const FlushDenormals flush;
        tasks.take(task);
    });
}

}  // namespace
