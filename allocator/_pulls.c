/* See _pulls.h. */

#define _GNU_SOURCE 1 /* whatever standard the compiler keeps to */

#include "_pulls.h"

#include "_clock.h"

#define LOOK_NS 2000     /* between two looks at a run, of which a nap takes some microseconds more, */
#define SPIN_NS 20000    /* but for so long before it can end: then there are no naps */
#define LEAD_NS 20000    /* before it can end, the next one is given */
#define OVERLAP_NS 100000 /* of two runs, after which the later one tells nothing of how fast one can be */
#define REST_NS 20000    /* between two looks where nothing is urgent: at a slot that is still read */
#define QUERY_NS 5000000 /* between two questions whether the stream still runs: after a fault it writes nothing */

static Line *own_line(const Pulls *pulls) {
    return line_of(&pulls->page, pulls->page.rank);
}

/* Its flights, and `claimed`, which are about to be. A rank that sees nobody is seen by nobody. */
static void say_under_way(const Pulls *pulls, int owner, uint32_t claimed) {
    for (int i = 0; i < pulls->num_flights; i++)
        claimed += pulls->flights[i].owner == owner;
    if (pulls->page.lines)
        __atomic_store_n(&own_line(pulls)->under_way[owner], claimed, __ATOMIC_SEQ_CST);
}

static void say_pulls(const Pulls *pulls, int is_pulling, int64_t now) {
    if (!pulls->page.lines)
        return;
    __atomic_store_n(&own_line(pulls)->beat_ns, now, __ATOMIC_RELAXED);
    __atomic_store_n(&own_line(pulls)->pulls, is_pulling, __ATOMIC_RELAXED);
}

void leave_page(Pulls *pulls) {
    while (pulls->num_flights) {
        const int owner = pulls->flights[--pulls->num_flights].owner;
        say_under_way(pulls, owner, 0);
    }
    say_pulls(pulls, 0, now_ns());
}

static int has_written(const uint32_t *words, uint32_t value) {
    return (int32_t)(__atomic_load_n(&words[WRITTEN], __ATOMIC_ACQUIRE) - value) >= 0;
}

/* How fast a run can be: as the fastest of those that had the link to themselves; somewhat slower again with each. */
static void learn(Pulls *pulls, const Flight *ended, int64_t now) {
    if (ended->begun_ns - ended->given_ns > OVERLAP_NS)
        return;
    double found = (double)(now - ended->begun_ns) / (double)ended->nbytes;
    if (pulls->ns_per_byte && found > pulls->ns_per_byte)
        found = pulls->ns_per_byte * 1.0002;
    __atomic_store(&pulls->ns_per_byte, &found, __ATOMIC_RELAXED); /* others may read it */
}

int look_at_runs(Pulls *pulls) {
    const int64_t now = now_ns();
    for (int i = 0; i < pulls->num_flights;) {
        const Flight ended = pulls->flights[i];
        if (!has_written(ended.words, ended.value)) {
            i++;
            continue;
        }
        pulls->flights[i] = pulls->flights[--pulls->num_flights];
        for (int j = 0; j < pulls->num_flights; j++)
            pulls->flights[j].begun_ns = now;
        learn(pulls, &ended, now);
        say_under_way(pulls, ended.owner, 0);
    }
    say_pulls(pulls, pulls->num_flights || (pulls->num_open && pulls->open[0].is_read), now);
    return pulls->num_flights;
}

/* When the run under way can have ended, if it has the owner's link to itself. */
static int64_t can_end(const Pulls *pulls) {
    return pulls->flights[0].begun_ns + (int64_t)(pulls->ns_per_byte * (double)pulls->flights[0].nbytes);
}

static int has_room(const Pulls *pulls, int64_t now) {
    if (pulls->num_flights == 0 || pulls->num_flights == MAX_FLIGHTS)
        return pulls->num_flights == 0;
    return now >= can_end(pulls) - LEAD_NS || pulls_alone(&pulls->page, now);
}

/* -- a run --------------------------------------------------------------------------------------------------------- */

/* Choose, say so, and look again: two ranks that choose at the same time see each other now. */
static Giving *claim_run(Pulls *pulls, int64_t now, int *owner) {
    count_pullers(&pulls->page, now, pulls->pulled);
    const Giving *second = &pulls->open[1];
    const int is_open = pulls->num_open == 2 && second->is_read && second->all;
    const uint64_t *ahead = is_open ? second->left : NULL;
    Giving *giving = &pulls->open[choose_of_two(&pulls->page, pulls->open[0].left, ahead, pulls->pulled, owner)];
    const int chosen = *owner, before = pulls->pulled[chosen];
    say_under_way(pulls, chosen, 1);
    *owner = settle_owner(&pulls->page, chosen, giving->left, before, now, pulls->pulled);
    if (*owner != chosen) {
        say_under_way(pulls, *owner, 1);
        say_under_way(pulls, chosen, 0);
    }
    return giving;
}

static void fail(Giving *giving, const char *call, int result) {
    giving->call = call;
    giving->result = result;
    giving->all = 0;
}

static void give_run(Pulls *pulls, Giving *giving, int owner, int64_t now) {
    Lane *lane = giving->lanes;
    while (lane->owner != owner)
        lane++;
    const Batch *b = &lane->batches[lane->next++];
    giving->left[owner] -= b->nbytes;
    giving->all -= b->nbytes;
    const char *call = "cuMemcpyBatchAsync";
    int result = pulls->copy_batch(b->dsts, b->srcs, b->sizes, b->count, b->attributes, b->firsts, b->num_attributes,
                                   lane->stream);
    if (!result) {
        call = "cuStreamWriteValue32";
        result = pulls->write_value(lane->stream, (uint64_t)lane->words, ++lane->words[TOLD], 0);
    }
    if (result) {
        say_under_way(pulls, owner, 0);
        return fail(giving, call, result);
    }
    pulls->flights[pulls->num_flights++] = (Flight){lane->words, lane->words[TOLD], owner, b->nbytes, now, now};
}

/* -- jobs ---------------------------------------------------------------------------------------------------------- */

void open_runs(Pulls *pulls, Lane *lanes, size_t num_lanes, const char *call, int result) {
    Giving *giving = &pulls->open[pulls->num_open++];
    *giving = (Giving){.lanes = lanes, .num_lanes = num_lanes};
    for (size_t i = 0; i < num_lanes; i++) {
        lanes[i].next = 0;
        for (size_t j = 0; j < lanes[i].num_batches; j++)
            giving->left[lanes[i].owner] += lanes[i].batches[j].nbytes;
        giving->all += giving->left[lanes[i].owner];
    }
    if (call)
        fail(giving, call, result);
}

const char *close_runs(Pulls *pulls, int *result) {
    const Giving giving = pulls->open[0];
    pulls->open[0] = pulls->open[1];
    pulls->num_open--;
    *result = giving.result;
    for (size_t i = 0; i < giving.num_lanes && !giving.call; i++)
        if ((*result = pulls->record_event(giving.lanes[i].then, giving.lanes[i].stream, 0)))
            return "cuEventRecordWithFlags";
    return giving.call;
}

/* Ask, now and then, whether the slot was read. Until then its streams are not told to wait: what is left of the job
   before would have to wait with them. */
static void ask_for_slot(Pulls *pulls, Giving *giving, int64_t now) {
    if (giving->is_read || !giving->all || now - giving->asked_ns < REST_NS)
        return;
    giving->asked_ns = now;
    int result = pulls->query_event(giving->lanes->after);
    if (result == NOT_READY)
        return;
    if (result)
        return fail(giving, "cuEventQuery", result);
    for (size_t i = 0; i < giving->num_lanes && !result; i++)
        result = pulls->wait_event(giving->lanes[i].stream, giving->lanes[i].after, 0);
    if (result)
        return fail(giving, "cuStreamWaitEvent", result);
    giving->is_read = 1;
}

/* After a fault on the device no run ends; then every call says so. Asked seldom: it takes the driver's lock. */
static void ask_whether_runs_end(Pulls *pulls, Giving *giving, int64_t now) {
    if (!pulls->num_flights || now - pulls->given_ns < QUERY_NS)
        return;
    pulls->given_ns = now;
    const int result = pulls->query_event(giving->lanes->after);
    if (result && result != NOT_READY)
        fail(giving, "cuEventQuery", result);
}

int give_runs(Pulls *pulls) {
    Giving *first = &pulls->open[0];
    look_at_runs(pulls);
    const int64_t now = now_ns();
    for (int i = 0; i < pulls->num_open; i++)
        ask_for_slot(pulls, &pulls->open[i], now);
    if (first->all && first->is_read && has_room(pulls, now)) {
        int owner;
        Giving *giving = claim_run(pulls, now, &owner);
        give_run(pulls, giving, owner, now);
        pulls->given_ns = now;
    } else if (first->all) {
        ask_whether_runs_end(pulls, first, now);
        if (!first->is_read)
            nap(REST_NS);
        else if (pulls->num_flights == MAX_FLIGHTS || can_end(pulls) - LEAD_NS - now > SPIN_NS)
            nap(LOOK_NS);
    }
    return !first->all;
}
