"""In what is C."""

from __future__ import annotations

from typing import Final

from mutants.seeded import Bug

_NATIVE = ("tests/unit/allocator/test_native_issue.py", "tests/unit/allocator/test_native_sanitized.py")
_NEAR = ("tests/unit/allocator/test_numa.py",)
_HIT_PATH = ("tests/unit/schedule/test_hit_path.py", "tests/unit/schedule/test_hit_path_by_address.py")

BUGS: Final = (
    Bug(
        "C tells the number of the process instead of that of its thread",
        "allocator/_issue_thread.c",
        "issuer->id = syscall(SYS_gettid);",
        "issuer->id = getpid();",
        _NEAR,
    ),
    Bug(
        "a thread is moved to cores that its process may not use",
        "allocator/numa.py",
        "os.sched_getaffinity(thread) & set(cores)",
        "set(cores)",
        _NEAR,
    ),
    Bug(
        "a thread of Python's runs far from its device",
        "vmm_dwdp/schedule/issue.py",
        "            keep_near(self._thread.native_id, driver.numa_node)\n",
        "",
        _NEAR,
    ),
    Bug(
        "the native thread goes on after a batch that the driver refused",
        "allocator/_issue_thread.c",
        """            return "cuMemcpyBatchAsync";
""",
        """            continue;
""",
        _NATIVE,
    ),
    Bug(
        "a job that the native thread is at can be freed",
        "allocator/_issue.c",
        """    await(self->owner, &self->job);
    for""",
        "    for",
        _NATIVE,
    ),
    Bug(
        "a native thread that sleeps is not woken",
        "allocator/_issue_thread.c",
        "if (!__atomic_load_n(&issuer->asleep, __ATOMIC_SEQ_CST))",
        "if (1)",
        ("tests/unit/allocator/test_native_issue.py::test_submit_does_not_wait",),
    ),
    Bug(
        "what a job's addresses point into is not kept",
        "allocator/_issue.c",
        "made->kept = Py_NewRef(kept);",
        "made->kept = Py_NewRef(Py_None);",
        _NATIVE,
    ),
    Bug(
        "a refused job of the native thread counts as done",
        "allocator/_issue_thread.c",
        "call ? FAILED : DONE",
        "DONE",
        _NATIVE,
    ),
    Bug(
        "of two jobs that are submitted at once the later is done first",
        "allocator/_issue_thread.c",
        """            Job *earlier = latest->next;
            latest->next = issuer->first;
            issuer->first = latest;
            latest = earlier;
""",
        """            issuer->first = latest;
            latest = NULL;
""",
        _NATIVE,
    ),
    Bug(
        "a job that comes while the native thread falls asleep waits for the next",
        "allocator/_issue_thread.c",
        "            if (!has_work(issuer))\n                pthread_cond_wait",
        "                pthread_cond_wait",
        _NATIVE,
    ),
    Bug(
        "flush does not wait for the native thread",
        "allocator/_issue.c",
        "    await((IssuerObject *)object, NULL);\n",
        "    (void)object;\n",
        ("tests/unit/allocator/test_native_issue.py::test_flush_waits_for_all_that_was_submitted_and_raises_nothing",),
    ),
    Bug(
        "a pause of the native thread is not cut short",
        "allocator/_issue_thread.c",
        "    issuer->waiting++;\n    pthread_cond_signal(&issuer->hurry);\n",
        "    issuer->waiting++;\n",
        ("tests/unit/allocator/test_native_issue.py::test_a_pause_ends_when_somebody_begins_to_wait",),
    ),
    Bug(
        "a layer whose slot is being read is hit",
        "allocator/_staged.c",
        "return !is_set(slot->reader) && slot->holds",
        "return slot->holds",
        _HIT_PATH,
    ),
    Bug(
        "a layer that its slot does not hold is hit",
        "allocator/_staged.c",
        "slot->holds == (PyObject *)layer && layer->place > pipeline->latest &&",
        "layer->place > pipeline->latest &&",
        _HIT_PATH,
    ),
    Bug(
        "a layer that is hit does not count as read",
        "allocator/_staged.c",
        "    slot->read = 1;\n    layer->hits++;",
        "    layer->hits++;",
        _HIT_PATH,
    ),
    Bug(
        "a hit does not wait for the copies to be given",
        "allocator/_staged.c",
        "    if (is_set(slot->ticket)) {",
        "    if (0) {",
        _HIT_PATH,
    ),
    Bug(
        "a hit waits for the copies of one stream alone",
        "allocator/_staged.c",
        "for (size_t i = 0; i < layer->num_ready; i++)\n        if (wait_for(",
        "for (size_t i = 0; i < 1; i++)\n        if (wait_for(",
        _HIT_PATH,
    ),
    Bug(
        "C names the layer before it hands the job over",
        "allocator/_staged.c",
        "    assign(&slot->holds, NULL); /* until it was handed over: see [Note: A slot that holds nothing] */\n",
        "    assign(&slot->holds, (PyObject *)following);\n",
        _HIT_PATH,
    ),
    Bug(
        "C releases without a record",
        "allocator/_staged.c",
        "    if (record(pipeline, layer->consumed, stream))\n        return -1;\n",
        "",
        _HIT_PATH,
    ),
    Bug(
        "C goes on with the pass of another thread",
        "allocator/_hit_path.c",
        "if (!path->turn->in_pass || path->turn->runner != this_thread())",
        "if (!path->turn->in_pass)",
        _HIT_PATH,
    ),
    Bug(
        "C hits a layer between passes",
        "allocator/_hit_path.c",
        "if (!path->turn->in_pass || path->turn->runner != this_thread())",
        "if (path->turn->runner != this_thread())",
        _HIT_PATH,
    ),
    Bug(
        "C does not ask whether the stream is captured",
        "allocator/_hit_path.c",
        "path->is_capturing(stream, &status) == 0 && status == 0",
        "path->is_capturing(stream, &status) == 0",
        _HIT_PATH,
    ),
    Bug(
        "C does not ask which context is current",
        "allocator/_hit_path.c",
        "path->get_current(&context) == 0 && context == path->context",
        "path->get_current(&context) == 0",
        _HIT_PATH,
    ),
    Bug(
        "a pass that ends in C does not end",
        "allocator/_hit_path.c",
        "        if (released > 0 && layer->is_last)\n            path->turn->in_pass = 0;\n",
        "",
        _HIT_PATH,
    ),
    Bug(
        "C leaves the first layers of the next pass to be given later",
        "allocator/_staged.c",
        "    if (pipeline->prompt && following->is_first)\n        return 0;\n",
        "",
        _HIT_PATH,
    ),
    Bug(
        "C hits a layer that is traced",
        "allocator/_staged.c",
        "layer->place > pipeline->latest &&\n           !is_set(pipeline->tracer) &&",
        "layer->place > pipeline->latest &&",
        _HIT_PATH,
    ),
    Bug(
        "C keeps the interpreter while it waits for copies",
        "allocator/_issue.c",
        "    Py_BEGIN_ALLOW_THREADS\n    await_job(&owner->issuer, job);\n    Py_END_ALLOW_THREADS",
        "    await_job(&owner->issuer, job);",
        _HIT_PATH,
    ),
    Bug(
        "C hides the copies that it had fetched from the counts",
        "allocator/_staged.c",
        "    following->fetched_bytes += following->nbytes;\n",
        "",
        _HIT_PATH,
    ),
)
