/* See _issue_thread.h for what it is for. Two things here cost a thread that launches kernels more than the lock:

   * To wake another thread takes a system call. So while layers follow one another this thread looks for work by itself,
     every NAP_NS, and sleeps until it is woken only when nothing came for LINGER_NS.
   * While the driver takes a batch of copies, it launches no kernel. So between two it is left alone for PAUSE times as
     long as the one before took, unless somebody waits, or begins to. Slices are then given faster than links take them
     still: 64 of 2 MiB in 0.2 ms. */

#define _GNU_SOURCE 1 /* whatever standard the compiler keeps to; Python.h defines it for the other file */

#include "_issue_thread.h"

#include <sys/prctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "_clock.h"

#define NAP_NS 50000
#define SHORT_NAP_NS 10000
#ifndef LINGER_NS
#define LINGER_NS 300000000 /* longer than a layer takes over a slow link: 8 GB over PCIe */
#endif
#ifndef PAUSE
#define PAUSE 3
#endif

static unsigned forks; /* that lie between the process that loaded this and the one that it runs in */

static void count_fork(void) {
    forks++;
}

int count_forks(void) {
    static int counting;
    const int failed = counting ? 0 : pthread_atfork(NULL, NULL, count_fork);
    counting = !failed;
    return failed;
}

int is_here(const Issuer *issuer) {
    return issuer->forks == forks;
}

/* Leave the driver alone for a while, unless somebody waits or begins to. */
static void leave_alone(Issuer *issuer, int64_t ns) {
    const int64_t until = now_ns() + ns;
    const struct timespec at = {until / 1000000000, until % 1000000000};
    pthread_mutex_lock(&issuer->lock);
    while (!issuer->waiting && !issuer->closing && pthread_cond_timedwait(&issuer->hurry, &issuer->lock, &at) == 0)
        ;
    pthread_mutex_unlock(&issuer->lock);
}

static const char *give_lane(Issuer *issuer, const Lane *lane, int *result) {
    if ((*result = issuer->wait_event(lane->stream, lane->after, 0)))
        return "cuStreamWaitEvent";
    for (size_t i = 0; i < lane->num_batches; i++) {
        const Batch *b = &lane->batches[i];
        const int64_t start = now_ns();
        if ((*result = issuer->copy_batch(b->dsts, b->srcs, b->sizes, b->count, b->attributes, b->firsts,
                                          b->num_attributes, lane->stream)))
            return "cuMemcpyBatchAsync";
        if (i + 1 < lane->num_batches)
            leave_alone(issuer, PAUSE * (now_ns() - start));
    }
    return (*result = issuer->record_event(lane->then, lane->stream, 0)) ? "cuEventRecordWithFlags" : NULL;
}

/* Give the lanes of which nothing is to be chosen. */
static const char *give_whole(Issuer *issuer, const Job *job, int *result) {
    const char *call = NULL;
    for (size_t i = 0; i < job->num_lanes - (job->chooses ? job->num_chosen : 0) && !call; i++)
        call = give_lane(issuer, &job->lanes[i], result);
    return call;
}

/* See what was submitted, and tell whether there is anything to do. */
static int has_work(Issuer *issuer) {
    if (!issuer->first) {
        Job *latest = __atomic_exchange_n(&issuer->pushed, NULL, __ATOMIC_SEQ_CST);
        while (latest) { /* to the front, one before the other */
            Job *earlier = latest->next;
            latest->next = issuer->first;
            issuer->first = latest;
            latest = earlier;
        }
    }
    return issuer->first != NULL;
}

/* Wait for a job, with the lock held; until close, too. */
static void await_work(Issuer *issuer) {
    int64_t until = now_ns() + LINGER_NS;
    while (!has_work(issuer) && !issuer->closing) {
        if (now_ns() < until) {
            pthread_mutex_unlock(&issuer->lock);
            nap(look_at_runs(&issuer->pulls) ? SHORT_NAP_NS : NAP_NS); /* others wait to hear that a run has ended */
            pthread_mutex_lock(&issuer->lock);
        } else {
            leave_page(&issuer->pulls);
            /* Either this sees what was pushed, or who pushed it sees that this is asleep, and signals. */
            __atomic_store_n(&issuer->asleep, 1, __ATOMIC_SEQ_CST);
            if (!has_work(issuer))
                pthread_cond_wait(&issuer->work, &issuer->lock);
            __atomic_store_n(&issuer->asleep, 0, __ATOMIC_SEQ_CST);
        }
    }
}

/* The next job, or NULL: after close, or where some job is under way and the next has to wait for its end. */
static Job *next_job(Issuer *issuer) {
    if (!issuer->pulls.num_open) {
        pthread_mutex_lock(&issuer->lock);
        await_work(issuer);
        pthread_mutex_unlock(&issuer->lock);
    } else if (issuer->pulls.num_open == MAX_OPEN || !has_work(issuer) || !issuer->first->chooses) {
        return NULL;
    }
    Job *job = issuer->first;
    if (job)
        issuer->first = job->next;
    return job;
}

/* The driver was given all of it, or has refused `call`. */
static void end_job(Issuer *issuer, Job *job, const char *call, int result) {
    pthread_mutex_lock(&issuer->lock);
    job->call = call;
    job->result = result;
    __atomic_store_n(&job->state, call ? FAILED : DONE, __ATOMIC_RELEASE);
    issuer->ended++;
    pthread_cond_broadcast(&issuer->progress);
    pthread_mutex_unlock(&issuer->lock);
}

/* All jobs, until close. */
static void work(Issuer *issuer) {
    Pulls *pulls = &issuer->pulls;
    Job *open[MAX_OPEN] = {NULL}; /* as those of `pulls` */
    for (;;) {
        Job *job = next_job(issuer);
        if (job) {
            int result = 0;
            const char *call = give_whole(issuer, job, &result);
            if (job->chooses) {
                open[pulls->num_open] = job;
                open_runs(pulls, job->lanes + job->num_lanes - job->num_chosen, job->num_chosen, call, result);
            } else {
                end_job(issuer, job, call, result);
            }
        } else if (!pulls->num_open) {
            return;
        } else if (give_runs(pulls)) {
            job = open[0];
            open[0] = open[1];
            int result;
            const char *call = close_runs(pulls, &result);
            end_job(issuer, job, call, result);
        }
    }
}

static void *serve(void *argument) {
    Issuer *issuer = argument;
    prctl(PR_SET_NAME, "vmm-dwdp-issue");
    prctl(PR_SET_TIMERSLACK, 1000); /* or a nap would take twice as long */
    pthread_mutex_lock(&issuer->lock);
    int mode = RELAXED;
    issuer->id = syscall(SYS_gettid);
    issuer->start_call = "cuCtxSetCurrent";
    issuer->start_result = issuer->set_current(issuer->context);
    if (!issuer->start_result && issuer->exchange_mode) {
        issuer->start_call = "cuThreadExchangeStreamCaptureMode";
        issuer->start_result = issuer->exchange_mode(&mode);
    }
    issuer->started = 1;
    pthread_cond_broadcast(&issuer->progress);
    pthread_mutex_unlock(&issuer->lock);
    work(issuer);
    leave_page(&issuer->pulls);
    return NULL;
}

int start_issuer(Issuer *issuer) {
    issuer->forks = forks;
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&issuer->hurry, &monotonic);
    pthread_condattr_destroy(&monotonic);
    pthread_mutex_init(&issuer->lock, NULL);
    pthread_cond_init(&issuer->work, NULL);
    pthread_cond_init(&issuer->progress, NULL);
    const int failed = pthread_create(&issuer->thread, NULL, serve, issuer);
    if (failed)
        return failed;
    pthread_mutex_lock(&issuer->lock);
    while (!issuer->started)
        pthread_cond_wait(&issuer->progress, &issuer->lock);
    pthread_mutex_unlock(&issuer->lock);
    return 0;
}

void submit_job(Issuer *issuer, Job *job) {
    job->chooses = job->num_chosen && !job->is_whole && !issuer->gives_whole;
    __atomic_store_n(&job->state, SUBMITTED, __ATOMIC_RELAXED);
    __atomic_fetch_add(&issuer->submitted, 1, __ATOMIC_SEQ_CST);
    job->next = __atomic_load_n(&issuer->pushed, __ATOMIC_RELAXED);
    while (!__atomic_compare_exchange_n(&issuer->pushed, &job->next, job, 0, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED))
        ;
    if (!__atomic_load_n(&issuer->asleep, __ATOMIC_SEQ_CST))
        return;
    pthread_mutex_lock(&issuer->lock); /* which the thread has until it waits */
    pthread_cond_signal(&issuer->work);
    pthread_mutex_unlock(&issuer->lock);
}

void await_job(Issuer *issuer, const Job *job) {
    pthread_mutex_lock(&issuer->lock);
    const uint64_t submitted = __atomic_load_n(&issuer->submitted, __ATOMIC_SEQ_CST);
    issuer->waiting++;
    pthread_cond_signal(&issuer->hurry);
    while (job ? job_state(job) == SUBMITTED : issuer->ended < submitted)
        pthread_cond_wait(&issuer->progress, &issuer->lock);
    issuer->waiting--;
    pthread_mutex_unlock(&issuer->lock);
}

void end_issuer(Issuer *issuer) {
    pthread_mutex_lock(&issuer->lock);
    issuer->closing = 1;
    pthread_cond_signal(&issuer->work);
    pthread_cond_signal(&issuer->hurry);
    pthread_mutex_unlock(&issuer->lock);
    pthread_join(issuer->thread, NULL);
}

void destroy_locks(Issuer *issuer) {
    pthread_mutex_destroy(&issuer->lock);
    pthread_cond_destroy(&issuer->work);
    pthread_cond_destroy(&issuer->hurry);
    pthread_cond_destroy(&issuer->progress);
}
