/* The time, and a while of doing nothing. */

#pragma once

#include <stdint.h>
#include <time.h>

static inline int64_t now_ns(void) {
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return at.tv_sec * INT64_C(1000000000) + at.tv_nsec;
}

static inline void nap(int64_t ns) {
    const struct timespec length = {ns / 1000000000, ns % 1000000000};
    nanosleep(&length, NULL);
}
