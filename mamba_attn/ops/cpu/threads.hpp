// Work in the threads that torch's operators run in. The kernel links no OpenMP: a second runtime's threads would compete
// with torch's, which spin for a while after every operator.

#include <atomic>
#include <chrono>
#if defined(__unix__) || defined(__APPLE__)
#include <sched.h>
#endif

namespace {

// GOMP_parallel, which libgomp, LLVM's and Intel's OpenMP have: a function and its argument, in so many threads
typedef void (*Parallel)(void (*)(void*), void*, unsigned, unsigned);
Parallel parallel = nullptr;

inline double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

thread_local double waited = 0;  // seconds that this thread has waited for tasks of others

// On a machine whose cores are busy, a call may wait longer for its other threads than they save: then so many calls run
// alone that what was lost is a tenth of their time.
struct Patience {
    std::atomic<int> alone{0};

    bool runs_alone() {
        if (alone.load(std::memory_order_relaxed) <= 0) return false;
        alone.fetch_sub(1, std::memory_order_relaxed);
        return true;
    }
    void learn(double busy, double lost) {
        const double calls = 10 * lost / (busy + 1e-9);
        alone.store(lost < 0.75 * busy ? 0 : calls < 1000 ? int(calls) : 1000, std::memory_order_relaxed);
    }
} patience;

// Calls `work()` in each of some threads; in this one alone where there is no OpenMP.
template <class Work>
void in_threads(int64_t threads, Work work) {
    if (threads < 2 || !parallel || patience.runs_alone()) return work();
    struct Call { Work* work; const double* caller; double finished; } call{&work, &waited, 0};
    waited = 0;
    const double started = now();
    parallel([](void* its) {
        Call& call = *static_cast<Call*>(its);
        (*call.work)();
        if (call.caller == &waited) call.finished = now();
    }, &call, threads, 0);
    patience.learn(call.finished - started - waited, now() - call.finished + waited);
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
        if (done.load(std::memory_order_acquire) == count) return;
        const double started = now();
        for (int tries = 0; done.load(std::memory_order_acquire) < count; tries++) {
#if defined(__SSE__)
            if (tries < 200) { _mm_pause(); continue; }
#endif
#if defined(__unix__) || defined(__APPLE__)
            sched_yield();
#endif
        }
        waited += now() - started;
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
