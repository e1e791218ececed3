/* The rule of vmm_dwdp/layout/turns.py in C: from which owner a rank takes its next run, by what every rank says of itself.

   The page is memory that the processes of a group share; each writes its own line. Whatever the others' lines say is
   advice: an answer is always an owner that has bytes left. */

#pragma once

#include <stddef.h>
#include <stdint.h>

#pragma GCC visibility push(hidden)

#define NOBODY (-1)
#define MAX_RANKS 128            /* that choose */
#define LINE_VERSION 1          /* a line that says another is not read */
#ifndef LINE_STALE_NS
#define LINE_STALE_NS 20000000 /* a rank that pulls and has not looked at its runs for so long is taken for dead */
#endif

typedef struct { /* see `Line`; every word is read and written at once */
    uint32_t version;
    uint32_t pulls;
    int64_t beat_ns; /* of CLOCK_MONOTONIC, which the processes of a machine share */
    uint32_t under_way[]; /* by owner */
} Line;

typedef struct { /* a page, as one rank sees it */
    char *lines;        /* NULL: this rank sees nobody */
    size_t line_nbytes; /* from one to the next */
    int num_ranks, rank;
} Page;

static inline Line *line_of(const Page *page, int rank) {
    return (Line *)(page->lines + (size_t)rank * page->line_nbytes);
}

/* See `pullers`: by owner, in `pulled`. */
void count_pullers(const Page *page, int64_t now_ns, int *pulled);

/* See `choose`. */
int choose_owner(const Page *page, const uint64_t *left, const int *pulled);

/* See `choose_of_two`: the layer, and in `owner` from whom. `second` may be NULL. */
int choose_of_two(const Page *page, const uint64_t *first, const uint64_t *second, const int *pulled, int *owner);

/* See `settle`. `pulled` is written. */
int settle_owner(const Page *page, int owner, const uint64_t *left, int before, int64_t now_ns, int *pulled);

/* See `is_alone`. */
int pulls_alone(const Page *page, int64_t now_ns);

#pragma GCC visibility pop
