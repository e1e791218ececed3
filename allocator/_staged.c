/* See _staged.h. */

#include "_staged.h"

static int is_set(const PyObject *object) {
    return object && object != Py_None;
}

static void assign(PyObject **place, PyObject *object) {
    PyObject *before = *place;
    *place = object ? Py_NewRef(object) : NULL;
    Py_XDECREF(before);
}

/* -- the driver ---------------------------------------------------------------------------------------------------- */

static int fail(const PipelineObject *pipeline, const char *call, int result) {
    raise_failure(pipeline->failure, call, result);
    return -1;
}

static int call_driver(const PipelineObject *pipeline, const char *method, const void *first, const void *second) {
    PyObject *result = PyObject_CallMethod(pipeline->driver, method, "KK", (unsigned long long)(uintptr_t)first,
                                           (unsigned long long)(uintptr_t)second);
    Py_XDECREF(result);
    return result ? 0 : -1;
}

static int wait_for(const PipelineObject *pipeline, void *stream, void *event) {
    if (!pipeline->wait)
        return call_driver(pipeline, "wait", stream, event);
    const int result = pipeline->wait(stream, event, 0);
    return result ? fail(pipeline, "cuStreamWaitEvent", result) : 0;
}

static int record(const PipelineObject *pipeline, void *event, void *stream) {
    if (!pipeline->record)
        return call_driver(pipeline, "record", event, stream);
    const int result = pipeline->record(event, stream, 0);
    return result ? fail(pipeline, "cuEventRecordWithFlags", result) : 0;
}

/* -- what was handed over ------------------------------------------------------------------------------------------ */

/* 1 if the driver was given all of `ticket`, which is a Job or a Ticket of Python's; 0 if not; -1 with an exception. */
static int has_been_given(PyObject *ticket) {
    if (is_job(ticket))
        return is_given(ticket);
    PyObject *done = PyObject_GetAttrString(ticket, "done");
    const int is_done = done ? PyObject_IsTrue(done) : -1;
    Py_XDECREF(done);
    return is_done;
}

/* Wait for the slot's ticket; 0 if it was refused, of which the state machine tells; -1 with another exception. */
static int await_ticket(SlotObject *slot) {
    PyObject *ticket = Py_NewRef(slot->ticket);
    int given = 1;
    if (is_job(ticket)) {
        await_given(ticket);
        given = is_given(ticket);
    } else {
        PyObject *result = PyObject_CallMethod(ticket, "result", NULL);
        if (!result) {
            given = PyErr_ExceptionMatches(PyExc_Exception) ? 0 : -1;
            if (!given)
                PyErr_Clear();
        }
        Py_XDECREF(result);
    }
    if (given > 0 && slot->ticket == ticket)
        assign(&slot->ticket, NULL);
    Py_DECREF(ticket);
    return given;
}

static int hand_over_anyhow(LayerObject *layer) {
    if (is_job(layer->job)) {
        hand_over(layer->job);
        assign(&layer->slot->ticket, layer->job);
        return 0;
    }
    PyObject *ticket = PyObject_CallMethod(layer->pipeline->issuer, "submit", "O", layer->job);
    if (!ticket)
        return -1;
    assign(&layer->slot->ticket, ticket);
    Py_DECREF(ticket);
    return 0;
}

/* -- timing -------------------------------------------------------------------------------------------------------- */

static int resume(const LayerObject *layer, void *stream) {
    if (record(layer->pipeline, layer->resumed, stream))
        return -1;
    PyObject *place = PyLong_FromLong(layer->place);
    const int failed = place ? PyList_Append(layer->pipeline->order, place) : -1;
    Py_XDECREF(place);
    return failed;
}

/* -- the path ------------------------------------------------------------------------------------------------------ */

static int is_ready_to_enter(const LayerObject *layer) {
    const SlotObject *slot = layer->slot;
    const PipelineObject *pipeline = layer->pipeline;
    return !is_set(slot->reader) && slot->holds == (PyObject *)layer && layer->place > pipeline->latest &&
           !is_set(pipeline->tracer) && !pipeline->watched;
}

int enter(LayerObject *layer, void *stream) {
    SlotObject *slot = layer->slot;
    PipelineObject *pipeline = layer->pipeline;
    if (!is_ready_to_enter(layer))
        return 0;
    if (pipeline->timed && record(pipeline, layer->arrived, stream))
        return -1;
    if (is_set(slot->ticket)) {
        int given = has_been_given(slot->ticket);
        if (given == 0)
            given = await_ticket(slot);
        if (given <= 0)
            return given;
        if (!is_ready_to_enter(layer)) /* any more: others ran meanwhile */
            return 0;
    }
    for (size_t i = 0; i < layer->num_ready; i++)
        if (wait_for(pipeline, stream, layer->ready[i]))
            return -1;
    if (pipeline->timed && resume(layer, stream))
        return -1;
    pipeline->latest = layer->place;
    assign(&slot->reader, (PyObject *)layer);
    slot->read = 1;
    layer->hits++;
    return 1;
}

static int leave_for(LayerObject *layer, LayerObject *following, void *stream) {
    SlotObject *slot = layer->slot;
    const PipelineObject *pipeline = layer->pipeline;
    if (slot->reader != (PyObject *)layer || is_set(pipeline->tracer) || pipeline->watched)
        return 0;
    const int fetches = slot->holds != (PyObject *)following;
    if (fetches && (!is_set(slot->holds) || !slot->read || !is_set(following->job)))
        return 0;
    if (fetches && is_job(following->job) && !can_be_handed_over(following->job))
        return 0;
    if (pipeline->prompt && following->is_first)
        return 0;
    if (record(pipeline, layer->consumed, stream))
        return -1;
    assign(&slot->reader, NULL);
    if (!fetches)
        return 1;
    assign(&slot->holds, NULL); /* until it was handed over: see [Note: A slot that holds nothing] */
    if (hand_over_anyhow(following))
        return -1;
    slot->read = 0;
    assign(&slot->holds, (PyObject *)following);
    following->fetched_bytes += following->nbytes;
    return 1;
}

int leave(LayerObject *layer, void *stream) {
    if (!layer->following || !is_layer(layer->following))
        return 0;
    PyObject *following = Py_NewRef(layer->following);
    const int left = leave_for(layer, (LayerObject *)following, stream);
    Py_DECREF(following);
    return left;
}
