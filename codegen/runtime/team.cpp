// A team of threads that walks a list of kernel launches, with a barrier between dependent launches.
//
// The caller is thread 0. The others spin for half a millisecond after a run, in the hope of the next one, and then sleep:
// an idle process uses no CPU. Between two steps of decoding Python takes 0.2 to 0.5 ms. Barriers spin, and give their core away once they have waited for long (more threads than cores).

#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdlib.h>
#include <time.h>

extern "C" {

typedef void (*tw_kernel)(void* const* buffers, const int64_t* sizes, int64_t thread, int64_t threads, char* scratch,
                          int32_t* error);

// One launch: argument i of the kernel is values[slots[i]]. A solo launch is run by thread 0 alone.
struct tw_launch {
    tw_kernel kernel;
    const int32_t* slots;
    const int64_t* sizes;
    int32_t arguments, solo, error, unused;
};

// Pieces of a batch (codegen/batches.py): a thread takes the next piece and walks all launches alone, with its own
// table of values. Slot s lies of_piece[s] bytes further in the next piece, of_thread[s] further for the next thread.
struct tw_pieces {
    tw_launch* last;  // the launches of the last piece, which may be smaller
    void** tables;    // [threads, slots]
    const int64_t *of_piece, *of_thread;
    int64_t slots, count, next;
};

struct tw_job {
    tw_launch* launches;
    int64_t count;
    void* const* values;
    char* scratch;
    int64_t scratch_stride;
    tw_pieces* pieces;
};

struct tw_team {
    int64_t threads;
    alignas(64) int64_t generation;  // of the job; a change starts it
    alignas(64) int64_t arrived;     // at the barrier
    alignas(64) int64_t phase;       // of the barrier
    alignas(64) int64_t sleepers;
    tw_job job;
    pthread_mutex_t mutex;
    pthread_cond_t wake;
    int caller_cpu;       // that the members keep away from
    pthread_t* members;   // all but the caller
};

struct tw_member { tw_team* team; int64_t thread; };

static const int64_t barrier_spin_ns = 50000, idle_spin_ns = 500000;
static const int most_arguments = 512;

static inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

static int64_t now_ns() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ll + t.tv_nsec;
}

// Spin until *place differs from `old`; false after that time.
static bool spin_while(const int64_t* place, int64_t old, int64_t spin_ns) {
    for (int i = 0; i < 64; ++i) {
        if (__atomic_load_n(place, __ATOMIC_ACQUIRE) != old) return true;
        relax();
    }
    const int64_t end = now_ns() + spin_ns;
    do {
        for (int i = 0; i < 64; ++i) {
            if (__atomic_load_n(place, __ATOMIC_ACQUIRE) != old) return true;
            relax();
        }
    } while (now_ns() < end);
    return false;
}

static void barrier(tw_team* team) {
    const int64_t phase = __atomic_load_n(&team->phase, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(&team->arrived, 1, __ATOMIC_ACQ_REL) == team->threads) {
        __atomic_store_n(&team->arrived, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&team->phase, phase + 1, __ATOMIC_RELEASE);
        return;
    }
    if (spin_while(&team->phase, phase, barrier_spin_ns)) return;
    while (__atomic_load_n(&team->phase, __ATOMIC_ACQUIRE) == phase) sched_yield();
}

static void call(const tw_job& job, tw_launch& launch, int64_t thread, int64_t threads) {
    void* buffers[most_arguments];
    for (int32_t i = 0; i < launch.arguments; ++i) buffers[i] = job.values[launch.slots[i]];
    launch.kernel(buffers, launch.sizes, thread, threads, job.scratch + thread * job.scratch_stride, &launch.error);
}

static void walk_pieces(tw_job job, int64_t thread) {
    tw_pieces& pieces = *job.pieces;
    void** const table = pieces.tables + thread * pieces.slots;
    void* const* const values = job.values;
    job.values = table;
    for (;;) {
        const int64_t piece = __atomic_fetch_add(&pieces.next, 1, __ATOMIC_RELAXED);
        if (piece >= pieces.count) return;
        for (int64_t s = 0; s < pieces.slots; ++s)
            table[s] = (char*)values[s] + piece * pieces.of_piece[s] + thread * pieces.of_thread[s];
        // A kernel takes its scratch memory by its thread number, which is 0 for one that is alone.
        tw_job own = job;
        own.scratch += thread * job.scratch_stride;
        tw_launch* const launches = piece + 1 < pieces.count ? job.launches : pieces.last;
        for (int64_t i = 0; i < job.count; ++i) call(own, launches[i], 0, 1);
    }
}

static void walk(tw_team* team, const tw_job& job, int64_t thread) {
    if (job.pieces) {
        walk_pieces(job, thread);
        barrier(team);
        return;
    }
    for (int64_t i = 0; i < job.count; ++i) {
        const bool solo = job.launches[i].solo;
        if (i && !(solo && job.launches[i - 1].solo)) barrier(team);
        if (!solo || thread == 0) call(job, job.launches[i], thread, solo ? 1 : team->threads);
    }
    barrier(team);
}

static void* member_main(void* argument) {
    tw_member* const member = (tw_member*)argument;
    tw_team* const team = member->team;
    int64_t seen = 0;
    for (;;) {
        if (!spin_while(&team->generation, seen, idle_spin_ns)) {
            pthread_mutex_lock(&team->mutex);
            __atomic_add_fetch(&team->sleepers, 1, __ATOMIC_SEQ_CST);
            while (__atomic_load_n(&team->generation, __ATOMIC_SEQ_CST) == seen) {
                pthread_cond_wait(&team->wake, &team->mutex);
            }
            __atomic_sub_fetch(&team->sleepers, 1, __ATOMIC_SEQ_CST);
            pthread_mutex_unlock(&team->mutex);
        }
        seen += 1;
        walk(team, team->job, member->thread);
    }
}

static void start(tw_team* team) {
    __atomic_add_fetch(&team->generation, 1, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&team->sleepers, __ATOMIC_SEQ_CST) == 0) return;
    pthread_mutex_lock(&team->mutex);
    pthread_cond_broadcast(&team->wake);
    pthread_mutex_unlock(&team->mutex);
}

// A team of `threads` threads with the caller; null if not a single further thread could be started.
void* tw_team_new(int64_t threads) {
    void* room = nullptr;
    if (posix_memalign(&room, 64, sizeof(tw_team))) return nullptr;
    tw_team* const team = (tw_team*)room;
    __builtin_memset(room, 0, sizeof(tw_team));
    team->threads = 1;
    team->caller_cpu = -1;
    team->members = (pthread_t*)malloc(threads * sizeof(pthread_t));
    pthread_mutex_init(&team->mutex, nullptr);
    pthread_cond_init(&team->wake, nullptr);
    for (int64_t thread = 1; team->members && thread < threads; ++thread) {
        tw_member* const member = (tw_member*)malloc(sizeof(tw_member));  // lives as long as its thread
        if (!member) break;
        member->team = team;
        member->thread = thread;
        if (pthread_create(&team->members[thread - 1], nullptr, member_main, member)) break;
        pthread_detach(team->members[thread - 1]);
        team->threads += 1;
    }
    if (team->threads > 1) return team;
    free(team->members);
    free(room);
    return nullptr;
}

int64_t tw_team_threads(const void* team) { return team ? ((const tw_team*)team)->threads : 1; }

// Give every member a CPU of its own, other than the caller's, so that no two ever wait for each other on one. The caller
// itself stays free, since the threads that it starts later would inherit its place. Nothing is changed where there are
// too few CPUs.
static void spread(tw_team* team) {
#if defined(__linux__)
    const int here = sched_getcpu();
    if (here < 0 || here == team->caller_cpu) return;
    team->caller_cpu = here;
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof(allowed), &allowed) || CPU_COUNT(&allowed) < team->threads) return;
    int64_t member = 0;
    for (int cpu = 0; cpu < CPU_SETSIZE && member < team->threads - 1; ++cpu) {
        if (cpu == here || !CPU_ISSET(cpu, &allowed)) continue;
        cpu_set_t place;
        CPU_ZERO(&place);
        CPU_SET(cpu, &place);
        pthread_setaffinity_np(team->members[member++], sizeof(place), &place);
    }
#else
    (void)team;
#endif
}

// Run all launches; the number of the first one that met an illegal index, or -1. A null team is the caller alone.
int64_t tw_run(void* handle, tw_launch* launches, int64_t count, void* const* values, char* scratch,
               int64_t scratch_stride) {
    tw_team* const team = (tw_team*)handle;
    const tw_job job = {launches, count, values, scratch, scratch_stride, nullptr};
    bool together = false;
    for (int64_t i = 0; i < count; ++i) {
        launches[i].error = 0;
        together |= !launches[i].solo;
    }
    if (team && together) {
        spread(team);
        team->job = job;
        start(team);
        walk(team, job, 0);
    } else {
        for (int64_t i = 0; i < count; ++i) call(job, launches[i], 0, 1);
    }
    for (int64_t i = 0; i < count; ++i)
        if (launches[i].error) return i;
    return -1;
}

// As tw_run, of a batch in pieces.
int64_t tw_run_pieces(void* handle, tw_launch* launches, int64_t count, void* const* values, char* scratch,
                      int64_t scratch_stride, tw_pieces* pieces) {
    tw_team* const team = (tw_team*)handle;
    const tw_job job = {launches, count, values, scratch, scratch_stride, pieces};
    for (int64_t i = 0; i < count; ++i) launches[i].error = pieces->last[i].error = 0;
    pieces->next = 0;
    if (team) {
        spread(team);
        team->job = job;
        start(team);
        walk(team, job, 0);
    } else {
        walk_pieces(job, 0);
    }
    for (int64_t i = 0; i < count; ++i)
        if (launches[i].error || pieces->last[i].error) return i;
    return -1;
}

}
