/* A team of threads that wait briefly with a core in their hands and then sleep.
 *
 * A step is some hundred loops of 5 to 200 us with little between them: a thread that slept after each would be woken
 * (30 us) for nothing. One that never sleeps takes a core from others. Items are handed out, not divided: where another
 * process holds a thread's core, the caller does that thread's share itself. Only a part that was begun is waited for:
 * where that took as long as the whole loop, cores are too few, and for a while loops run in the calling thread. */

#define _GNU_SOURCE
#include "threads.h"

#if defined(__unix__) || defined(__APPLE__)

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <time.h>

#define MOST_THREADS 256
#define SPIN_NANOSECONDS 60000 /* longer than what lies between two loops of a step */
#define LONG_WAIT 200000       /* nanoseconds */
#define ALONE 20               /* times as long as was waited */
#define TURNS 32               /* between two looks at the clock */

#if defined(__x86_64__)
#define PAUSE() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define PAUSE() __asm__ volatile("yield")
#else
#define PAUSE() ((void)0)
#endif

static pthread_mutex_t one_loop = PTHREAD_MUTEX_INITIALIZER; /* held by the thread whose loop it is */
static pthread_mutex_t sleep_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t called = PTHREAD_COND_INITIALIZER;
static int64_t members; /* threads that were made, besides those that call */
static atomic_llong loops, sleepers;
static int64_t alone_until; /* of the thread whose loop it is */

static struct {
    Part part;
    const void *job;
    int64_t count, threads;
    atomic_llong next;
    atomic_llong inside; /* members that may be reading this */
    atomic_bool open;
} loop;

static int64_t now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

/* Items until there are none: half of an even share of what is left at a time. */
static void work(void) {
    long long first = atomic_load(&loop.next);
    while (first < loop.count) {
        const int64_t some = (loop.count - first) / (2 * loop.threads), take = some > 1 ? some : 1;
        if (atomic_compare_exchange_weak(&loop.next, &first, first + take)) {
            loop.part(loop.job, first, first + take);
            first = atomic_load(&loop.next);
        }
    }
}

static void await(long long seen) {
    for (int64_t until = now() + SPIN_NANOSECONDS; now() < until;)
        for (int i = 0; i < TURNS; i++) {
            if (atomic_load_explicit(&loops, memory_order_acquire) != seen)
                return;
            PAUSE();
        }
    pthread_mutex_lock(&sleep_lock);
    atomic_fetch_add(&sleepers, 1);
    while (atomic_load(&loops) == seen)
        pthread_cond_wait(&called, &sleep_lock);
    atomic_fetch_sub(&sleepers, 1);
    pthread_mutex_unlock(&sleep_lock);
}

static void *member(void *number) {
    long long seen = 0;
    for (;;) {
        await(seen);
        seen = atomic_load(&loops);
        atomic_fetch_add(&loop.inside, 1);
        if (atomic_load(&loop.open) && (int64_t)(intptr_t)number < loop.threads - 1)
            work();
        atomic_fetch_sub(&loop.inside, 1);
    }
    return 0;
}

/* A child of fork has the calling thread alone. */
static void forget(void) {
    members = 0;
    atomic_store(&sleepers, 0);
    atomic_store(&loop.inside, 0);
    pthread_mutex_init(&one_loop, 0);
    pthread_mutex_init(&sleep_lock, 0);
    pthread_cond_init(&called, 0);
}

static void hire(int64_t wanted) {
    static int prepared;
    if (!prepared)
        prepared = !pthread_atfork(0, 0, forget);
    for (; members < wanted && members < MOST_THREADS; members++) {
        pthread_t thread;
        if (pthread_create(&thread, 0, member, (void *)(intptr_t)members))
            return;
        pthread_detach(thread);
    }
}

void share_out(Part part, const void *job, int64_t count, int64_t threads) {
    if (count < 2 || threads < 2 || pthread_mutex_trylock(&one_loop)) { /* or another thread's loop is under way */
        if (count > 0)
            part(job, 0, count);
        return;
    }
    const int64_t began = now();
    if (began < alone_until) {
        pthread_mutex_unlock(&one_loop);
        part(job, 0, count);
        return;
    }
    hire(threads - 1);
    loop.part = part;
    loop.job = job;
    loop.count = count;
    loop.threads = threads;
    atomic_store(&loop.next, 0);
    atomic_store(&loop.open, 1);
    atomic_fetch_add(&loops, 1);
    if (atomic_load(&sleepers)) {
        pthread_mutex_lock(&sleep_lock);
        pthread_cond_broadcast(&called);
        pthread_mutex_unlock(&sleep_lock);
    }
    work();
    atomic_store(&loop.open, 0);
    if (atomic_load(&loop.inside)) {
        const int64_t done = now();
        for (int turn = 0; atomic_load(&loop.inside); turn++) {
            PAUSE();
            if (turn > TURNS * TURNS)
                sched_yield();
        }
        const int64_t waited = now() - done;
        if (waited > LONG_WAIT && waited > done - began)
            alone_until = done + waited + ALONE * waited;
    }
    pthread_mutex_unlock(&one_loop);
}

#else

void share_out(Part part, const void *job, int64_t count, int64_t threads) {
    (void)threads;
    if (count > 0)
        part(job, 0, count);
}

#endif
