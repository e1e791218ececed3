/* See _turns.h, and [Note: Turns] in vmm_dwdp/layout/turns.py. */

#include "_turns.h"

/* In one order with what ranks claim: of two that claim at once, one sees the other. */
static uint32_t word(const uint32_t *at) {
    return __atomic_load_n(at, __ATOMIC_SEQ_CST);
}

/* The line of another rank, if it counts. */
static const Line *living(const Page *page, int rank, int64_t now_ns) {
    if (!page->lines || rank == page->rank)
        return NULL;
    const Line *line = line_of(page, rank);
    const int64_t age = now_ns - __atomic_load_n(&line->beat_ns, __ATOMIC_RELAXED);
    return word(&line->version) == LINE_VERSION && age < LINE_STALE_NS && age > -LINE_STALE_NS ? line : NULL;
}

void count_pullers(const Page *page, int64_t now_ns, int *pulled) {
    for (int owner = 0; owner < page->num_ranks; owner++)
        pulled[owner] = 0;
    for (int other = 0; other < page->num_ranks; other++) {
        const Line *line = living(page, other, now_ns);
        for (int owner = 0; line && owner < page->num_ranks; owner++)
            pulled[owner] += word(&line->under_way[owner]) != 0;
    }
}

int choose_owner(const Page *page, const uint64_t *left, const int *pulled) {
    int best = NOBODY;
    for (int step = 1; step < page->num_ranks; step++) {
        const int owner = (page->rank + step) % page->num_ranks;
        if (!left[owner])
            continue;
        if (best == NOBODY || pulled[owner] < pulled[best] || (pulled[owner] == pulled[best] && left[owner] > left[best]))
            best = owner;
    }
    return best;
}

int choose_of_two(const Page *page, const uint64_t *first, const uint64_t *second, const int *pulled, int *owner) {
    *owner = choose_owner(page, first, pulled);
    if (!second || !pulled[*owner])
        return 0;
    const int other = choose_owner(page, second, pulled);
    if (other == NOBODY || pulled[other] >= pulled[*owner])
        return 0;
    *owner = other;
    return 1;
}

/* Whether a rank between this one and `owner`, in cyclic order, pulls from it. */
static int has_nearer(const Page *page, int owner, int64_t now_ns) {
    const int distance = (owner - page->rank + page->num_ranks) % page->num_ranks;
    for (int step = 1; step < distance; step++) {
        const Line *line = living(page, (page->rank + step) % page->num_ranks, now_ns);
        if (line && word(&line->under_way[owner]))
            return 1;
    }
    return 0;
}

int settle_owner(const Page *page, int owner, const uint64_t *left, int before, int64_t now_ns, int *pulled) {
    count_pullers(page, now_ns, pulled);
    if (pulled[owner] <= before || !has_nearer(page, owner, now_ns))
        return owner;
    const int other = choose_owner(page, left, pulled);
    return other != NOBODY && pulled[other] < pulled[owner] ? other : owner;
}

int pulls_alone(const Page *page, int64_t now_ns) {
    for (int other = 0; other < page->num_ranks; other++) {
        const Line *line = living(page, other, now_ns);
        if (line && word(&line->pulls))
            return 0;
    }
    return 1;
}
