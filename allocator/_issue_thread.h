/* A thread that gives copies to the CUDA driver; it knows no Python.

   Giving the driver a layer of slices takes milliseconds. A thread of Python's that does so takes the interpreter's lock
   after every call, and each time a thread that launches kernels has to wait until it gets it back. This one never has
   it: what it does is laid out in C structures before, and whoever submits it only puts it on a list, without a lock
   while the thread is awake.

   A child that fork made has none of this process's threads, and locks as they were at that moment, held for good
   perhaps. So there nothing here locks or waits: of an issuer that its parent started a child may only ask `is_here`. */

#pragma once

#include <pthread.h>
#include <stddef.h>
#include <stdint.h>

#include "_pulls.h"

#pragma GCC visibility push(hidden) /* or a function of the same name elsewhere in the process could take its place */

enum { READY, SUBMITTED, DONE, FAILED }; /* a job's states */

typedef struct Job { /* its memory, and the lanes', is the caller's, and stays while the job is SUBMITTED */
    Lane *lanes;       /* first those that are given whole, then `num_chosen` whose runs are chosen one by one */
    size_t num_lanes, num_chosen;
    int is_whole;     /* for now nothing is chosen */
    int chooses;      /* since it was submitted: whether runs are chosen */
    struct Job *next; /* in a list of what was submitted */
    int state;        /* atomic */
    const char *call; /* the one that failed */
    int result;
} Job;

typedef struct { /* its memory is the caller's, who states the first seven, and zero for the rest */
    SetCurrent set_current;
    WaitEvent wait_event;
    CopyBatch copy_batch;
    RecordEvent record_event;
    void *context;
    Pulls pulls;
    ExchangeMode exchange_mode; /* NULL where nothing is chosen */
    int gives_whole; /* what is submitted; of who submits */
    unsigned forks; /* as they were when this was started */
    pthread_t thread;
    Job *pushed;        /* what was submitted and not seen by the thread yet, the latest first; atomic */
    uint64_t submitted; /* jobs, so far; atomic */
    int asleep;         /* until `work` is signalled; atomic */
    Job *first;         /* what the thread, whose own this is, has seen, the earliest first */
    pthread_mutex_t lock; /* of all below */
    pthread_cond_t work, hurry, progress;
    uint64_t ended; /* jobs; they end in the order of submission */
    int started, waiting, closing;
    long id; /* the thread's, in the kernel; from its start on */
    const char *start_call; /* that failed */
    int start_result;
} Issuer;

/* Once in a process, before it starts an issuer, and again at will. Returns 0, or what errno would be. */
int count_forks(void);

/* Whether this process is the one that started the issuer. */
int is_here(const Issuer *issuer);

/* Make the locks and the thread; wait until it has the context, of which `start_result` tells. Returns 0, or what errno
   would be: then there is no thread to end. The locks are to be destroyed in either case. */
int start_issuer(Issuer *issuer);

/* Append a job that is not SUBMITTED to what is to be done, and do not wait. */
void submit_job(Issuer *issuer, Job *job);

/* Wait until `job` is over, or, without one, all that was submitted so far. */
void await_job(Issuer *issuer, const Job *job);

/* Once: finish what was submitted, and end the thread. */
void end_issuer(Issuer *issuer);

/* After the thread's end. */
void destroy_locks(Issuer *issuer);

static inline int job_state(const Job *job) {
    return __atomic_load_n(&job->state, __ATOMIC_ACQUIRE);
}

#pragma GCC visibility pop
