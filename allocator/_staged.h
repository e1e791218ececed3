/* A staged layer at the moment when nothing is unusual: the C half of vmm_dwdp/schedule/layer.py.

   There is one state machine, in Python. What it keeps lies in the structures here, which Python reads and writes as
   attributes. `enter` and `leave` do what it would do where a layer lies ready in its slot, or is on its way there, in
   the middle of a pass that nobody traces or captures. In every other case they change nothing, and say so.

   All of it runs under the interpreter's lock, but for the wait for copies that the driver has not been given yet. So no
   signal's handler runs, and no other thread, between two steps here: only inside a driver that is Python's, whose calls
   are Python's, and there the order of the steps is the state machine's. */

#pragma once

#include "_issue.h"
#include "_issue_thread.h"

#pragma GCC visibility push(hidden)

typedef struct { /* a slot: see `Slot` */
    PyObject_HEAD
    PyObject *holds, *reader, *ticket; /* NULL is None */
    char read;
} SlotObject;

typedef struct { /* what the layers of a rank share: see `Pipeline` */
    PyObject_HEAD
    PyObject *driver, *issuer, *tracer;
    PyObject *order; /* a list: the places of layers whose acquires were timed and not read yet */
    WaitEvent wait; /* NULL: ask the driver in Python */
    RecordEvent record;
    PyObject *failure; /* makes an exception of the name of a call and its result */
    int latest;
    char prompt, timed, watched;
} PipelineObject;

typedef struct { /* see `StagedLayer` */
    PyObject_HEAD
    PipelineObject *pipeline;
    SlotObject *slot;
    PyObject *following, *weights, *job;
    void **ready, *consumed, *arrived, *resumed; /* events; the last two time the wait for the copies */
    size_t num_ready;
    long long nbytes, hits, misses, fetched_bytes;
    int place;
    char is_first, is_last;
} LayerObject;

extern PyTypeObject *slot_type, *pipeline_type, *layer_type;

/* Whether it is a layer, which was initialised. */
int is_layer(PyObject *object);

/* Acquire the layer for `stream`. Returns 1; or 0, and nothing has changed, where the state machine has to; or -1 with an
   exception, as it would raise it. */
int enter(LayerObject *layer, void *stream);

/* Release it, and have the next one of its slot fetched. As `enter`. */
int leave(LayerObject *layer, void *stream);

int add_staged_types(PyObject *module);

#pragma GCC visibility pop
