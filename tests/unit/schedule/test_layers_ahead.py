"""The thread that needs no interpreter looks one layer ahead: its own files of C, on a driver that is written here."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest
from support.native import compiled

from vmm_dwdp.layout import turns
from vmm_dwdp.memory import lines

ALLOCATOR = Path(__file__).parents[3] / "allocator"
# Rank 0 of three has two jobs of two lanes, and rank 1 says that it pulls from rank 2. A copy has ended when it is
# given. The slot of the first job is not read before the thread knows that the second one's is, if it ever is.
PROGRAM = """
#include <stdio.h>
#include <stdlib.h>
#include "_issue_thread.h"

static int given[16], num_given, asked;
static int is_submitted, is_second_read; /* atomic */
static int is_first_read;

static int wait_event(void *stream, void *event, unsigned flags) { return 0; }
static int record_event(void *event, void *stream, unsigned flags) { return 0; }
static int set_current(void *context) { return 0; }
static int exchange_mode(int *mode) { return 0; }

static int copy_batch(void *dsts, void *srcs, void *sizes, size_t count, void *attributes, void *firsts,
                      size_t num_attributes, void *stream) {
    given[num_given++] = (int)(intptr_t)dsts;
    return 0;
}

static int write_value(void *stream, uint64_t address, uint32_t value, unsigned flags) {
    __atomic_store_n((uint32_t *)address, value, __ATOMIC_RELEASE);
    return 0;
}

static int query_event(void *event) { /* the first job's is 1, the second's 2 */
    if (!__atomic_load_n(&is_submitted, __ATOMIC_ACQUIRE))
        return NOT_READY;
    if (event == (void *)1)
        return is_first_read || ++asked > 5000 ? 0 : NOT_READY; /* at last, also if the second is never asked for */
    is_first_read = 1;
    return __atomic_load_n(&is_second_read, __ATOMIC_ACQUIRE) ? 0 : NOT_READY;
}

/* Runs of both jobs, as 10 * job + owner, in the order in which they are given. */
__attribute__((visibility("default"))) int order(int second_is_read, int gives_whole, int *seen) {
    const size_t stride = 64;
    char *page = calloc(3, stride);
    Line *other = line_of(&(Page){page, stride, 3, 0}, 1);
    *other = (Line){.version = LINE_VERSION, .pulls = 1, .beat_ns = 0};
    other->under_way[2] = 1;
    is_submitted = is_first_read = num_given = asked = 0;
    is_second_read = second_is_read;
    uint32_t words[2][NUM_WORDS] = {{0}};
    Batch batches[2][2][2];
    Lane lanes[2][2];
    Job jobs[2];
    const size_t runs[2][2] = {{1, 2}, {2, 1}}; /* of the first job: one of rank 1 and two of rank 2 */
    for (intptr_t job = 0; job < 2; job++) {
        for (intptr_t lane = 0; lane < 2; lane++) {
            for (int run = 0; run < 2; run++)
                batches[job][lane][run] = (Batch){.dsts = (void *)(10 * (job + 1) + lane + 1), .nbytes = 1 << 20};
            lanes[job][lane] = (Lane){.after = (void *)(job + 1), .batches = batches[job][lane],
                                      .num_batches = runs[job][lane], .owner = lane + 1, .words = words[lane]};
        }
        jobs[job] = (Job){.lanes = lanes[job], .num_lanes = 2, .num_chosen = 2};
    }
    Issuer issuer = {.gives_whole = gives_whole,
                     .set_current = set_current, .wait_event = wait_event, .copy_batch = copy_batch,
                     .record_event = record_event, .exchange_mode = exchange_mode,
                     .pulls = {.page = {page, stride, 3, 0}, .wait_event = wait_event, .copy_batch = copy_batch,
                               .record_event = record_event, .write_value = write_value, .query_event = query_event}};
    if (start_issuer(&issuer))
        return -1;
    submit_job(&issuer, &jobs[0]);
    submit_job(&issuer, &jobs[1]);
    __atomic_store_n(&is_submitted, 1, __ATOMIC_RELEASE);
    await_job(&issuer, &jobs[0]);
    __atomic_store_n(&is_second_read, 1, __ATOMIC_RELEASE); /* the thread asks again */
    await_job(&issuer, &jobs[1]);
    end_issuer(&issuer);
    destroy_locks(&issuer);
    for (int i = 0; i < num_given; i++)
        seen[i] = given[i];
    free(page);
    return num_given;
}

__attribute__((visibility("default"))) int times_asked(void) {
    return asked + is_first_read;
}
"""


@pytest.fixture(scope="module")
def thread(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """No line is ever too old."""
    folder = tmp_path_factory.mktemp("thread")
    (folder / "program.c").write_text(PROGRAM)
    files = [folder / "program.c", *(ALLOCATOR / f"{name}.c" for name in ("_issue_thread", "_pulls", "_turns"))]
    return ctypes.CDLL(str(compiled(folder, f"-I{ALLOCATOR}", f"-DLINE_STALE_NS={2**62}", "-pthread", sources=files)))


@pytest.mark.parametrize(
    ("is_read", "expected"),
    [
        (True, [11, 21, 21, 12, 12, 22]),  # what rank 1 does not pull from, of both layers, before what it does
        (False, [11, 12, 12, 21, 21, 22]),
    ],
    ids=["its slot was read", "its slot is still read"],
)
def test_a_run_of_the_next_layer_where_every_owner_is_pulled_from(
    thread: ctypes.CDLL, is_read: bool, expected: list[int]
) -> None:
    seen = (ctypes.c_int * 16)()

    assert list(seen[: thread.order(int(is_read), 0, seen)]) == expected
    assert thread.times_asked() > 0


def test_what_is_given_whole_waits_for_no_slot(thread: ctypes.CDLL) -> None:
    """Lane after lane, and without a look at whether a slot was read: its streams wait for that."""
    seen = (ctypes.c_int * 16)()

    assert list(seen[: thread.order(0, 1, seen)]) == [11, 12, 12, 21, 21, 22]
    assert thread.times_asked() == 0


def test_c_and_python_have_the_same_numbers() -> None:
    text = "".join((ALLOCATOR / name).read_text() for name in ("_turns.h", "_pulls.h", "_pulls.c"))
    defined = {name: int(value) for name, value in re.findall(r"^#define (\w+) \(?(-?\d+)\)?", text, re.MULTILINE)}

    assert defined["MAX_RANKS"] == turns.MAX_RANKS
    assert defined["MAX_FLIGHTS"] == turns.MOST_UNDER_WAY
    assert defined["MAX_OPEN"] == 2, "the layers of choose_of_two"
    assert defined["LEAD_NS"] == turns.LEAD_NS
    assert defined["NOBODY"] == turns.NOBODY
    assert (defined["LINE_VERSION"], defined["LINE_STALE_NS"]) == (lines.VERSION, lines.STALE_NS)
