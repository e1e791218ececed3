/* Runs that are given one by one, each from the owner that is best then: see [Note: Turns] in vmm_dwdp/layout/turns.py.

   How a run goes is seen in memory: its stream writes a word when most of it is done, and one when all is. So to look
   costs no call of the driver, and no lock of it. A run that was given and has not ended is a flight. There is one at a
   time, since the next is to be chosen late; but the next is given when most of the one before is done, so that the link
   does not rest in between, and nobody has to predict when a run ends. Who pulls alone has two. */

#pragma once

#include "_lanes.h"
#include "_turns.h"

#pragma GCC visibility push(hidden)

#define MAX_FLIGHTS 2

typedef struct {
    const uint32_t *words; /* of the stream */
    uint32_t value;        /* that it writes after the run */
    int owner;
    uint64_t nbytes;
    int64_t given_ns, begun_ns; /* since then no other run was before it */
} Flight;

typedef struct { /* the lanes of a job, from its beginning until all its runs are given */
    Lane *lanes; /* each of an owner of its own */
    size_t num_lanes;
    uint64_t left[MAX_RANKS]; /* by owner: bytes that are not given */
    uint64_t all;             /* of `left` */
    int is_read;              /* the slot: all that its lanes wait for is complete */
    int64_t asked_ns;         /* whether it is */
    const char *call; /* that failed: nothing is left then */
    int result;
} Giving;

#define MAX_OPEN 2 /* jobs: where every owner of the first is pulled from by others, one of the second may not be */

typedef struct { /* of one thread, which alone calls what is here; whoever makes it states the first six */
    Page page;
    WaitEvent wait_event;
    CopyBatch copy_batch;
    RecordEvent record_event;
    WriteValue write_value;
    QueryEvent query_event;
    Giving open[MAX_OPEN]; /* the earliest first */
    int num_open;
    Flight flights[MAX_FLIGHTS];
    int num_flights;
    double ns_per_byte; /* of a run that has the link to itself; 0: none has ended; atomic */
    int64_t given_ns; /* the latest run; or when it was asked whether runs still end */
    int pulled[MAX_RANKS];
} Pulls;

/* One more job, whose lanes wait for one and the same event. `call` has failed already, if it is not NULL. */
void open_runs(Pulls *pulls, Lane *lanes, size_t num_lanes, const char *call, int result);

/* See what has ended, and give one run if there is room for it; else rest for a moment. Returns whether all of the first
   job that is open is given. */
int give_runs(Pulls *pulls);

/* The first job that is open is over: its streams record, each its event. Returns NULL, or the call that failed. */
const char *close_runs(Pulls *pulls, int *result);

/* See which runs have ended; how many have not. */
int look_at_runs(Pulls *pulls);

/* Forget what is under way, and say in this rank's line that it pulls no more. */
void leave_page(Pulls *pulls);

#pragma GCC visibility pop
